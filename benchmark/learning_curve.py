"""Draw a run's learning curve: python -m benchmark.learning_curve, see benchmark/report/learning_curve.py"""

from benchmark.common import speak_utf8
from benchmark.report.learning_curve import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
