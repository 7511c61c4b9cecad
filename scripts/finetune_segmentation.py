#!/usr/bin/env python
"""Train a segmenter on a cache of chest radiographs with masks and test it once.

    python scripts/finetune_segmentation.py --model runs/first --freeze_backbone \
        --dataset CACHE --output_dir runs/lungs

`--model random` gives the same network without pretraining, `--recipe paper` the paper's settings. The HF Trainer's own
flags work too.
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.finetuning.segmentation import main

if __name__ == "__main__":
    run(main)
