"""How fast the Atari scripts are: python -m benchmark.throughput, see benchmark/studies/throughput.py"""

from benchmark.studies.throughput import main

if __name__ == "__main__":
    raise SystemExit(main())
