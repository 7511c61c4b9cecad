#!/usr/bin/env python
"""Score a saved classifier on a prepared cache, of its own or another collection.

    python scripts/evaluate_classifier.py --model runs/nih --dataset caches/vinbig \
        --output runs/nih-on-vinbig/results.json

Labels are matched by what they mean; what is lost by that is printed and recorded. Research use only.
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.evaluation.transfer import main

if __name__ == "__main__":
    run(main)
