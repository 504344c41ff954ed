"""The study of confounding updates: python -m benchmark.confounding, see benchmark/studies/confounding.py"""

from benchmark.common import speak_utf8
from benchmark.studies.confounding import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
