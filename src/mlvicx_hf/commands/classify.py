"""The command `mlvicx classify`."""

from collections.abc import Sequence
from typing import Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import run
from mlvicx_hf.common.text import number
from mlvicx_hf.finetuning.arguments import CLASSIFICATION_SECTIONS
from mlvicx_hf.recipes import add_recipe, fill_sections


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "classify",
        "--model MODEL --dataset CACHE --output_dir DIR [options]",
        "Train a classifier on a labelled cache of chest radiographs and test it once. The arguments of "
        "transformers' Trainer work as well. Flags override the recipe.",
        [
            "mlvicx classify --model runs/first --freeze_backbone --dataset caches/mine --output_dir runs/frozen",
            "mlvicx classify --model random --dataset caches/mine --output_dir runs/baseline  # without pretraining",
        ],
    )
    add_recipe(made, "classification", *CLASSIFICATION_SECTIONS)
    return made


def parse_classification(words: Sequence[str] | None) -> tuple[Any, ...]:
    """Read the recipe, then the flags, which override it."""
    return fill_sections(CLASSIFICATION_SECTIONS, vars(parser().parse_args(words)), "classification")


def main(words: Sequence[str] | None = None) -> None:
    """Train and test a classifier."""
    arguments = parse_classification(words)
    import transformers
    from accelerate import PartialState

    from mlvicx_hf.finetuning.classification import finetune_classifier

    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    results = finetune_classifier(*arguments)
    test, calibration = results["test"], results["test"]["calibration"]
    if PartialState().is_main_process:
        for name, value in [("macro", test["auroc_macro"]), *test["auroc"].items()]:
            print(f"test AUROC {name:24s} {number(value)}")
        for score, name in (("ece_macro", "calibration error"), ("brier_macro", "Brier score")):
            before, after = (number(calibration[when][score]) for when in ("before", "after"))
            print(f"test {name}, macro: {before} before calibration, {after} after it")
        for name, reason in results["calibration"]["not_fitted"].items():
            print(f"not calibrated: {name}: {reason}")


if __name__ == "__main__":
    run(main)
