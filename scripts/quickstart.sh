#!/usr/bin/env bash
# The whole of MLVICX on this machine: sets up .venv, then prepares, pretrains, classifies and reports in quickstart/.
#   scripts/quickstart.sh                 synthetic radiographs, offline
#   scripts/quickstart.sh --images DIR    your own folder of radiographs
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

# Paths are the caller's; the commands run in the checkout.
arguments=()
while [ $# -gt 0 ]; do
  case $1 in
    --images | --metadata | --output)
      [ $# -gt 1 ] || { echo "error: $1 needs a path" >&2; exit 2; }
      arguments+=("$1" "$(realpath -m "$2")")
      shift 2
      ;;
    *) arguments+=("$1"); shift ;;
  esac
done

cd "$root"
. scripts/setup.sh report,dicom
exec .venv/bin/python -m mlvicx_hf.commands quickstart ${arguments[@]+"${arguments[@]}"}
