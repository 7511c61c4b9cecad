#!/usr/bin/env bash
# Everything that must hold before a change lands: sets up .venv, then lint, format, types and tests.
#   scripts/test.sh          the tests of every change
#   scripts/test.sh --all    also what is slow by nature: the notebooks and the documentation site
# Tests on real radiographs run when MLVICX_REAL_DATA names their folder. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=(-m "not thorough")
if [ "${1:-}" = --all ]; then
  chosen=()
  shift
fi
. scripts/setup.sh dev
export HF_HUB_OFFLINE=1
echo "== ruff"
.venv/bin/ruff check .
.venv/bin/ruff format --check .
echo "== mypy"
.venv/bin/mypy
echo "== pytest"
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile ${chosen[@]+"${chosen[@]}"} "$@"
