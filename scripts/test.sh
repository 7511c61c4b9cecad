#!/usr/bin/env bash
# Everything that must hold before a change lands: sets up .venv, then lint, format, types and tests.
# Tests on real radiographs run when MLVICX_REAL_DATA names their folder. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh dev
export HF_HUB_OFFLINE=1
echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "== mypy"
.venv/bin/mypy
echo "== pytest"
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile "$@"
