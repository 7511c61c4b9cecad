#!/usr/bin/env python
"""Look for leaks in prepared caches: patients, files or copies of an image that two splits share.

python scripts/audit_data.py caches/nih14
python scripts/audit_data.py caches/nih14 caches/rsna --json audit.json

Every split is compared with every other one, of all caches. What the splits of one cache share is a leak, and so is
what the train split of one cache shares with the validation or test split of another. The last line is `no leak found`
with exit code 0, or `N leak(s)` with exit code 1; an error of the user has exit code 2. Python gives exit code 1 to a
crash, too: that one ends in a traceback, without this last line and without the JSON file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlvicx_hf.common.errors import run
from mlvicx_hf.common.files import write_json
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.copies.audit import audit, report
from mlvicx_hf.data.copies.duplicates import NEAR


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="+", type=Path, metavar="CACHE", help="folder that prepare_data.py wrote")
    parser.add_argument(
        "--near",
        type=int,
        default=NEAR,
        help=f"bits of 256 up to which the pixels of two images are compared (default {NEAR})",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="file for the whole result")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, and only leaks and the last line")
    return parser.parse_args()


def main() -> None:
    """Audit caches; exit code 1 for a leak."""
    arguments = parse()
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"{arguments.json}: no folder {arguments.json.parent} found; expected one to write in")
    caches = [load_cache(path, check=False) for path in arguments.caches]
    result = audit(caches, near=arguments.near, progress=not arguments.quiet)
    if arguments.json is not None:
        write_json(arguments.json, result)
    lines = report(result).splitlines()
    if arguments.quiet:
        lines = [*(line for line in lines if line.startswith("LEAK: ")), lines[-1]]
    print("\n".join(lines))
    if result["leaks"]:
        raise SystemExit(1)


if __name__ == "__main__":
    run(main)
