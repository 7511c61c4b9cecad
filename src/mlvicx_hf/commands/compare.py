"""The command `mlvicx compare`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.text import number


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "compare",
        "--runs DIR [DIR ...] --baselines DIR [DIR ...] [options]",
        "Compare the macro AUROC or Dice of fine-tuned runs with that of baselines on the same test split, with a "
        "95 % interval of the difference.",
        ["mlvicx compare --runs runs/pretrained-* --baselines runs/random-*"],
    )
    add = made.add_argument
    add("--runs", nargs="+", type=Path, required=True, metavar="DIR", help="folders of fine-tuned runs, one a seed")
    add("--baselines", nargs="+", type=Path, required=True, metavar="DIR", help="folders to compare with")
    add("--output", type=Path, metavar="FILE", help="JSON file for the figures")
    made.advanced.add_argument(
        "--samples", type=int, default=1000, metavar="N", help="draws of patients (default 1000)"
    )
    made.advanced.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Compare runs."""
    arguments = parser().parse_args(words)
    from mlvicx_hf.common.files import write_json
    from mlvicx_hf.common.provenance import code_version
    from mlvicx_hf.evaluation.statistics import compare_runs

    if arguments.output and arguments.output.exists():
        raise FileExistsError(f"{arguments.output} is there already; expected a new file")
    found = compare_runs(arguments.runs, arguments.baselines, arguments.samples, arguments.seed)
    ours, theirs = (f"{number(found[name])} (SD {number(found[f'{name}_sd'])})" for name in ("runs", "baselines"))
    gain, low, high = (number(found[name], "+.4f") for name in ("difference", "low", "high"))
    print(f"test {found['metric']} {ours} against {theirs}: difference {gain}, 95 % interval {low} to {high}")
    if found["patients_known"] is False:
        print("note: the patients are not known, so each image counts as one: the interval may be too narrow")
    if arguments.output:
        found |= {"samples": arguments.samples, "seed": arguments.seed, "code": code_version()}
        groups = {"run_folders": arguments.runs, "baseline_folders": arguments.baselines}
        write_json(arguments.output, found | {name: list(map(_describe, group)) for name, group in groups.items()})


def _describe(run: Path) -> dict[str, Any]:
    """Folder of a run, and what its results say about seed, share of the labels, data and code."""
    from mlvicx_hf.common.files import read_json

    results = read_json(run / "results.json") if (run / "results.json").is_file() else {}
    kept = ("protocol", "label_fraction", "seed", "data", "code")
    return {"folder": str(run), **{name: results[name] for name in kept if name in results}}
