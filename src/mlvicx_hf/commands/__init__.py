"""The command `mlvicx`. Each command is a module of its name with `parser()` and `main(words)`.

`parser` and what a module imports at its top import neither torch nor transformers: `--help` must be quick.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from functools import partial

from mlvicx_hf import __version__
from mlvicx_hf.common.errors import run

# Threads of torch that wait for one another run in loops unless told before torch is imported. Where other processes
# use the cores as well, one of them would then wait for whole time slices, and a step takes several times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

COMMANDS = {
    "prepare": "read a collection of radiographs once and write a cache",
    "audit": "look for leaks in caches: patients or images that two splits share",
    "pretrain": "train an encoder on a cache, without labels",
    "classify": "train and test a classifier on a labelled cache",
    "segment": "train and test a segmenter on a cache with masks",
    "evaluate": "run a grid of models, protocols, label fractions and seeds, and write a report",
    "transfer": "score a saved classifier on another cache",
    "compare": "compare finished runs on the same test split",
    "explain": "draw and score heat maps of classifiers",
    "predict": "run a saved model on image files",
    "index": "index the images of a cache, for a search of similar ones",
    "similar": "find the indexed images that are most similar to image files",
    "demo": "serve a page that shows what a model says of a radiograph",
    "export": "write a saved model for the Hub, timm, torchvision or ONNX",
    "publish": "publish a model, its page or a cache on the Hub",
    "card": "write a model card from the files of finished runs",
    "convert": "convert the authors' checkpoint or ImageNet weights",
    "quickstart": "do all of it on synthetic radiographs, or on your own, in minutes",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run `mlvicx`.

    Args:
        argv: the command's name and its options; None for those of `sys.argv`.

    Raises:
        SystemExit: with code 2 after an error that the user can mend.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = words[0] if words else "--help"
    if name in ("-h", "--help"):
        _show(_help())
    elif name == "--version":
        _show(f"mlvicx {__version__}")
    elif name in COMMANDS:
        command = importlib.import_module(f".{name}", __name__)
        run(partial(command.main, words[1:]))
    else:
        close = difflib.get_close_matches(name, COMMANDS) or list(COMMANDS)
        print(
            f"mlvicx: error: command {name!r} found; expected {' or '.join(close)}; see mlvicx --help", file=sys.stderr
        )
        raise SystemExit(2)


def _show(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has left, such as `head`; at the end Python would write once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    return "\n".join(
        [
            "usage: mlvicx COMMAND [options]",
            "",
            "Self-supervised learning on chest radiographs. Research use only.",
            "",
            *(f"  {name:12}{text}" for name, text in COMMANDS.items()),
            "",
            "mlvicx COMMAND --help shows the options of a command, mlvicx --version the version.",
        ]
    )
