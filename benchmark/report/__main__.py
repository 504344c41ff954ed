"""A suite's report: python -m benchmark.report DIR, see benchmark/report/report.py"""

from benchmark.common import speak_utf8
from benchmark.report.report import main

if __name__ == "__main__":
    speak_utf8()
    main()
