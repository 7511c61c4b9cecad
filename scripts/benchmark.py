#!/usr/bin/env python
"""Speed as ratios within one run: the classifier's forward pass against timm's own network.

python scripts/benchmark.py --json benchmark.json
"""

from mlvicx_hf.benchmark import main
from mlvicx_hf.cli import run

if __name__ == "__main__":
    run(main)
