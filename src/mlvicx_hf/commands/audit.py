"""The command `mlvicx audit`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser

_DESCRIPTION = (
    "Look for leaks in prepared caches: patients, files or copies of an image that two splits share.\n\n"
    "Every split is compared with every other one, of all caches. What the splits of one cache share is a leak, and so "
    "is what the train split of one cache shares with the validation or test split of another. The last line is `no "
    "leak found` with exit code 0, or `N leak(s)` with exit code 1. An error of the user has exit code 2. A crash has "
    "exit code 1, too, as always in Python, but it ends in a traceback, without this last line and without the JSON "
    "file."
)


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "audit",
        "CACHE [CACHE ...] [options]",
        _DESCRIPTION,
        ["mlvicx audit caches/nih14", "mlvicx audit caches/nih14 caches/rsna --json audit.json"],
    )
    add = made.add_argument
    add("caches", nargs="+", type=Path, metavar="CACHE", help="folder that mlvicx prepare wrote")
    add("--json", type=Path, metavar="FILE", help="write the whole result into this file")
    text = "the same patient_id is the same patient in all caches of kind folder, or hf, as in tables of one hospital"
    add("--same_ids", action="store_true", help=text)
    add("--quiet", action="store_true", help="show no progress bar, only leaks, what may be one, and the last line")
    text = "compare the pixels of two images whose hashes differ in up to N bits of 256 (default 56)"
    made.advanced.add_argument("--near", type=int, metavar="N", default=56, help=text)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Audit caches.

    Raises:
        SystemExit: with code 1 after a leak.
    """
    arguments = parser().parse_args(words)
    from mlvicx_hf.common.files import write_json
    from mlvicx_hf.data.cache.cache import load_cache
    from mlvicx_hf.data.copies.audit import audit_caches, report

    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise FileNotFoundError(f"{arguments.json}: no folder {arguments.json.parent} found; expected one to write in")
    caches = [load_cache(path, check=False) for path in arguments.caches]
    result = audit_caches(caches, near=arguments.near, same_ids=arguments.same_ids, progress=not arguments.quiet)
    if arguments.json is not None:
        write_json(arguments.json, result)
    lines = report(result).splitlines()
    if arguments.quiet:
        lines = [*(line for line in lines if line.startswith(("LEAK: ", "UNSURE: "))), lines[-1]]
    print("\n".join(lines))
    if result["leaks"]:
        raise SystemExit(1)
