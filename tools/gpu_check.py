"""`python tools/gpu_check.py [FILE.json]`: checks and times the GPU path on one GPU; see benchmarks/gpu_check/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from benchmarks.gpu_check.check import main

    sys.exit(main(sys.argv[1:]))
