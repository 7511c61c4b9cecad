# Sourced by test.sh, in the checkout: .venv-lowest with the lowest versions that pyproject.toml allows, and nothing else.
# `uv pip sync` also removes what an earlier run left, so the list printed here is exactly what the tests see.
echo "== Installing the lowest versions into .venv-lowest"
list=.venv-lowest/versions.txt
[ -x .venv-lowest/bin/python ] || .venv/bin/uv venv --quiet --python .venv/bin/python .venv-lowest
.venv/bin/uv pip compile --quiet --no-header --no-annotate --python .venv-lowest/bin/python \
  --upgrade --resolution lowest-direct --extra test --output-file "$list" pyproject.toml >/dev/null
.venv/bin/uv pip sync --quiet --python .venv-lowest/bin/python "$list"
.venv/bin/uv pip install --quiet --no-deps --python .venv-lowest/bin/python --editable .
cat "$list"
