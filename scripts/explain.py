#!/usr/bin/env python
"""Heat maps of saved classifiers on a prepared cache, and whether they point at the findings.

    python scripts/explain.py --models MLVICX=runs/finetuned random=runs/baseline --dataset caches/vinbig \
        --output explanations --findings Cardiomegaly "Pleural effusion" --score

Needs `pip install "mlvicx-hf[explain]"`. Research use only.
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.evaluation.explanation.explaining import main

if __name__ == "__main__":
    run(main)
