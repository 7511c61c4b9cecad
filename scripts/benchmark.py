#!/usr/bin/env python
"""Speed as ratios within one run: the training step and its parts, the whole command, inference.

python scripts/benchmark.py --json benchmark.json
python scripts/benchmark.py --sections step covariance --batch_size 16
"""

from functools import partial
from pathlib import Path

from mlvicx_hf.benchmarks.command import main
from mlvicx_hf.cli import run

if __name__ == "__main__":
    run(partial(main, Path(__file__).with_name("pretrain.py")))
