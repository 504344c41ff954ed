"""Keep what a report needs of a suite's finished runs: python -m benchmark.keep, see benchmark/launch/keep.py"""

from benchmark.common import speak_utf8
from benchmark.launch.keep import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
