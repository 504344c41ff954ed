"""How fast the Atari scripts are: python -m benchmark.throughput, see benchmark/studies/throughput.py"""

from benchmark.common import speak_utf8
from benchmark.studies.throughput import main

if __name__ == "__main__":
    speak_utf8()
    raise SystemExit(main())
