"""The command `mlvicx segment`."""

from collections.abc import Sequence
from typing import Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import run
from mlvicx_hf.common.text import number
from mlvicx_hf.finetuning.arguments import SEGMENTATION_SCORES, SEGMENTATION_SECTIONS
from mlvicx_hf.recipes import add_recipe, fill_sections


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "segment",
        "--model MODEL --dataset CACHE --output_dir DIR [options]",
        "Train a segmenter on a cache of chest radiographs with masks and test it once. The arguments of "
        "transformers' Trainer work as well. Flags override the recipe.",
        [
            "mlvicx segment --model runs/first --freeze_backbone --dataset caches/lungs --output_dir runs/lungs",
            "mlvicx segment --model random --recipe paper --dataset caches/lungs --output_dir runs/baseline",
        ],
    )
    add_recipe(made, "segmentation", *SEGMENTATION_SECTIONS)
    return made


def parse_segmentation(words: Sequence[str] | None) -> tuple[Any, ...]:
    """Read the recipe, then the flags, which override it."""
    return fill_sections(SEGMENTATION_SECTIONS, vars(parser().parse_args(words)), "segmentation")


def main(words: Sequence[str] | None = None) -> None:
    """Train and test a segmenter."""
    arguments = parse_segmentation(words)
    import transformers
    from accelerate import PartialState

    from mlvicx_hf.finetuning.segmentation import finetune_segmenter

    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    test = finetune_segmenter(*arguments)["test"]
    if PartialState().is_main_process:
        for name, scores in [("macro", test), *test["per_label"].items()]:
            shown = (f"{key} {number(value)}" for key, value in scores.items() if key in SEGMENTATION_SCORES)
            print(f"test {name}: {', '.join(shown)}")


if __name__ == "__main__":
    run(main)
