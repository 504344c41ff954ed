"""Make every run of a suite: python -m benchmark.run, see benchmark/launch/launcher.py"""

from benchmark.launch.launcher import main

if __name__ == "__main__":
    raise SystemExit(main())
