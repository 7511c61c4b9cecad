#!/usr/bin/env python
"""Publish on the Hub: a model (weights, code, hashes, a card whose figures come from the runs' files), or a cache.

    python scripts/push_to_hub.py --model runs/mine --repo_id org/mlvicx-resnet18 --results runs/*/results.json \
        --private --dry_run
    python scripts/push_to_hub.py --dataset caches/mine --repo_id org/radiographs --dry_run  # private

Needs a token that may write: `hf auth login`, or the variable HF_TOKEN.
"""

from functools import partial
from importlib.resources import files

from mlvicx_hf.common.errors import run
from mlvicx_hf.hub.publishing import main

if __name__ == "__main__":
    run(partial(main, files("mlvicx_hf.hub.cards") / "templates"))
