#!/usr/bin/env python
"""Train a classifier on a labelled cache of chest radiographs and test it once.

    python scripts/finetune_classification.py --model runs/first --freeze_backbone \
        --dataset CACHE --output_dir runs/frozen

`--model random` gives the same network without pretraining. The HF Trainer's own flags work too.
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.finetuning.classification import main

if __name__ == "__main__":
    run(main)
