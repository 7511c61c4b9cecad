"""The command `mlvicx quickstart`."""

import importlib
import os
from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "quickstart",
        "[--images DIR] [options]",
        "Prepare, pretrain, load, classify against random weights, and report: on synthetic radiographs, or on "
        "your own folder. Nothing is downloaded. Each step is shown as a command that you can repeat.",
        ["mlvicx quickstart", "mlvicx quickstart --images my_images --output my_report"],
    )
    add = made.add_argument
    add("--images", type=Path, metavar="DIR", help="your own folder of radiographs (default synthetic ones)")
    add("--metadata", type=Path, metavar="FILE", help="table of that folder (default metadata.csv in it, if any)")
    add(
        "--output",
        type=Path,
        metavar="DIR",
        default=Path("quickstart"),
        help="folder of the report (default quickstart)",
    )
    add("--seed", type=int, metavar="N", default=0, help="of everything (default 0)")
    text = "images seen in pretraining, epochs times images (default 8500)"
    add("--pretraining_images", type=int, metavar="N", default=8500, help=text)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Run the quick start."""
    given = vars(parser().parse_args(words))
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    from mlvicx_hf.demo.quickstart import Quickstart

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    Quickstart(_command, **given).run()


def _command(words: Sequence[str]) -> None:
    importlib.import_module(f".{words[0]}", __package__).main(words[1:])
