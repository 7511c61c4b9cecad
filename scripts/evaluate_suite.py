#!/usr/bin/env python
"""Run a grid of models, protocols, label fractions, seeds and tasks; the same command goes on where it was stopped.

python scripts/evaluate_suite.py suite.yaml --output evaluation
"""

from mlvicx_hf.common.errors import run
from mlvicx_hf.evaluation.suite.command import main

if __name__ == "__main__":
    run(main)
