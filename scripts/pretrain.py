#!/usr/bin/env python
"""Pretrain MLVICX on a cache of chest radiographs.

    accelerate launch scripts/pretrain.py --recipe small --dataset CACHE --output_dir runs/first

Flags override the recipe. Several processes on the CPU:

    torchrun --nproc_per_node 2 scripts/pretrain.py …
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.pretraining.loop import main

if __name__ == "__main__":
    run(main)
