"""Keep what a report needs of a suite's finished runs: python -m benchmark.keep, see benchmark/launch/keep.py"""

from benchmark.launch.keep import main

if __name__ == "__main__":
    raise SystemExit(main())
