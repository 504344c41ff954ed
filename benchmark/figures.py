"""The documents' tables and pictures: python -m benchmark.figures, see benchmark/report/figures.py"""

from benchmark.common import speak_utf8
from benchmark.report.figures import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
