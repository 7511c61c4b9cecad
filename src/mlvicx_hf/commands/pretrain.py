"""The command `mlvicx pretrain`."""

import sys
from collections.abc import Sequence

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import run
from mlvicx_hf.pretraining.arguments import (
    SECTIONS_OF_PRETRAINING,
    DataArguments,
    ModelArguments,
    PretrainingArguments,
)
from mlvicx_hf.recipes import add_recipe, fill_sections


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "pretrain",
        "--dataset CACHE --output_dir DIR [options]",
        "Train an encoder on a cache of chest radiographs, without labels. Flags override the recipe.",
        [
            "mlvicx pretrain --recipe small --dataset caches/mine --output_dir runs/first",
            "mlvicx pretrain --recipe small --dataset caches/mine --output_dir runs/first --resume",
            "accelerate launch -m mlvicx_hf.commands.pretrain --dataset caches/mine --output_dir runs/first",
        ],
    )
    add_recipe(made, "pretraining", *SECTIONS_OF_PRETRAINING)
    return made


def parse_pretraining(words: Sequence[str] | None) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
    """Read the recipe, then the flags, which override it."""
    model, data, training = fill_sections(SECTIONS_OF_PRETRAINING, vars(parser().parse_args(words)), "pretraining")
    return model, data, training


def main(words: Sequence[str] | None = None) -> None:
    """Pretrain.

    Raises:
        SystemExit: stopped by a signal; 128 and its number.
    """
    arguments = parse_pretraining(words)
    import transformers
    from accelerate import PartialState

    from mlvicx_hf.common.signals import StoppedError
    from mlvicx_hf.pretraining.loop import pretrain

    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    try:
        pretrain(*arguments)
    except StoppedError as stopped:
        if PartialState().is_main_process:
            print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None


if __name__ == "__main__":
    run(main)
