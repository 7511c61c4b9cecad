#!/usr/bin/env python
"""Fill a model card from the files of finished runs.

    python scripts/render_card.py --template model_cards/backbone.md --model runs/mine \
        --results runs/*/results.json --repo_id org/mlvicx-resnet18 --output README.md
"""

from mlvicx_hf.cards import main
from mlvicx_hf.cli import run

if __name__ == "__main__":
    run(main)
