"""The study of confounding updates: python -m benchmark.confounding, see benchmark/studies/confounding.py"""

from benchmark.studies.confounding import main

if __name__ == "__main__":
    raise SystemExit(main())
