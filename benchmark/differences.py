"""Do two algorithms of a suite differ?: python -m benchmark.differences, see benchmark/report/differences.py"""

from benchmark.report.differences import main

if __name__ == "__main__":
    raise SystemExit(main())
