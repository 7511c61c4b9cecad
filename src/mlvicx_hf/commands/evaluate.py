"""The command `mlvicx evaluate`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.recipes import recipe_names


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "evaluate",
        "SUITE --output DIR [options]",
        "Run a grid of models, protocols, label fractions, seeds and tasks, and write a report. The same command "
        "goes on where it was stopped.",
        ["mlvicx evaluate suite.yaml --output evaluation", "mlvicx evaluate small --output evaluation --report_only"],
    )
    made.add_argument("suite", metavar="SUITE", help=f"YAML file, or one of {', '.join(recipe_names('suite'))}")
    made.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the cells and of the report")
    made.add_argument("--report_only", action="store_true", help="report on the cells that are finished; run none")
    add = made.advanced.add_argument
    add("--keep_models", action="store_true", help="keep the weights of every cell: 45 MB with ResNet-18")
    add("--samples", type=int, default=1000, metavar="N", help="draws of patients for every interval (default 1000)")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Run the cells that are not finished, and report on those that are.

    Raises:
        SystemExit: with code 1 when a cell failed.
    """
    given = vars(parser().parse_args(words))
    output = given.pop("output")
    import transformers

    from mlvicx_hf.evaluation.suite.report import describe_briefly
    from mlvicx_hf.evaluation.suite.running import evaluate_suite

    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    transformers.utils.logging.set_verbosity_error()  # every run begins with a head that no checkpoint has
    outcome = evaluate_suite(given.pop("suite"), output, **given)
    if outcome.report is not None:
        print(describe_briefly(outcome.report))
        print(f"report: {output / 'report.html'}, report.md and report.json beside it")
    print(f"{outcome.finished} of {outcome.planned} cells finished, {outcome.failed} failed")
    if outcome.failed:
        raise SystemExit(1)
