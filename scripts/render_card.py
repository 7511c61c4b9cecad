#!/usr/bin/env python
"""Fill a model card from the files of finished runs.

    python scripts/render_card.py --template model_cards/backbone.md --model runs/mine \
        --results runs/*/results.json --repo_id org/mlvicx-resnet18 --output README.md
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.hub.cards.rendering import main

if __name__ == "__main__":
    run(main)
