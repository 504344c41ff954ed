"""Turn finished runs into committed tables: python -m benchmark.collect, see benchmark/report/collect.py"""

from benchmark.common import speak_utf8
from benchmark.report.collect import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
