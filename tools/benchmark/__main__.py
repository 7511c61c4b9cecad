"""Speed as ratios within one run: the training step and its parts, the whole command, inference.

PYTHONPATH=tools python -m benchmark --json benchmark.json
PYTHONPATH=tools python -m benchmark --sections step covariance --batch_size 16
"""

from functools import partial
from pathlib import Path

from mlvicx_hf.common.errors import run

from .command import main

if __name__ == "__main__":
    run(partial(main, Path(__file__).parents[2] / "scripts" / "pretrain.py"))
