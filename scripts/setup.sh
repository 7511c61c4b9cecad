# Sourced by quickstart.sh and test.sh, in the checkout: .venv with the package and an extra, reused when present.
extra=$1
is_installed() { [ -e ".venv/.installed-$1" ] && [ ! pyproject.toml -nt ".venv/.installed-$1" ]; }
if ! is_installed "$extra" && ! is_installed dev; then # dev includes every extra
  python=
  for candidate in python3 python python3.13 python3.12 python3.11; do
    if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || { echo "error: Python 3.11 or later is needed, none found" >&2; exit 2; }
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  echo "== Installing into .venv (several minutes the first time: PyTorch is large)"
  pip=".venv/bin/python -m pip --quiet --disable-pip-version-check"
  # uv takes a minute where pip takes five. pip also knows the index servers of pip.conf, which uv does not.
  { $pip install uv && .venv/bin/uv pip install --quiet --python .venv/bin/python --editable ".[$extra]"; } ||
    $pip install --editable ".[$extra]"
  touch ".venv/.installed-$extra"
fi
