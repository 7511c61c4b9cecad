#!/usr/bin/env bash
# Everything that must hold before a change lands: sets up .venv, then lint, format, types and tests.
#   scripts/test.sh          the tests of every change
#   scripts/test.sh --all    also what is slow by nature: the notebooks, the documentation site, thirty kills, the common
#                            tests of transformers and the benchmark; before a release
#   scripts/test.sh --lowest the tests, with the lowest version of every dependency that pyproject.toml allows;
#                            CI runs those marked so: scripts/test.sh --lowest -m lowest
# Tests on real radiographs run when MLVICX_REAL_DATA names their folder. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
chosen=(-m "not thorough and not documents")
environment=.venv
case "${1:-}" in
  --all) chosen=(); shift ;;
  --lowest) environment=.venv-lowest; shift ;;
esac
. scripts/setup.sh dev
export HF_HUB_OFFLINE=1
if [ "$environment" = .venv-lowest ]; then
  . scripts/setup_lowest.sh
else
  echo "== ruff"
  .venv/bin/ruff check .
  .venv/bin/ruff format --check .
  echo "== mypy"
  .venv/bin/mypy
fi
echo "== pytest"
"$environment/bin/python" -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder \
  ${chosen[@]+"${chosen[@]}"} "$@"
