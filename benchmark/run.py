"""Make every run of a suite: python -m benchmark.run, see benchmark/launch/launcher.py"""

from benchmark.common import speak_utf8
from benchmark.launch.launcher import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
