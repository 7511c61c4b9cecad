#!/usr/bin/env python
"""Compare fine-tuned runs with baselines on the same test split.

python scripts/compare_runs.py --runs runs/pretrained-* --baselines runs/random-*
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.evaluation.statistics import main

if __name__ == "__main__":
    run(main)
