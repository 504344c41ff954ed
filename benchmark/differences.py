"""Do two algorithms of a suite differ?: python -m benchmark.differences, see benchmark/report/differences.py"""

from benchmark.common import speak_utf8
from benchmark.report.differences import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
