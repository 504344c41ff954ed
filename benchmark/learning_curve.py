"""Draw a run's learning curve: python -m benchmark.learning_curve, see benchmark/report/learning_curve.py"""

from benchmark.report.learning_curve import main

if __name__ == "__main__":
    raise SystemExit(main())
