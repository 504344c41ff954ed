"""Turn finished runs into committed tables: python -m benchmark.collect, see benchmark/report/collect.py"""

from benchmark.report.collect import main

if __name__ == "__main__":
    raise SystemExit(main())
