"""The documents' tables and pictures: python -m benchmark.figures, see benchmark/report/figures.py"""

from benchmark.report.figures import main

if __name__ == "__main__":
    raise SystemExit(main())
