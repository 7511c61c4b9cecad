"""The command `mlvicx demo`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import require

from .startup import start_inference


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "demo",
        "--model MODEL [--segmenter MODEL] [--index INDEX] [options]",
        "Serve a page on this machine: drop a radiograph, and see probabilities, heat maps, outlines and similar known "
        'images. Nothing is kept. Needs the extra demo (pip install ".[demo]" in the repository). Research use only.',
        [
            "mlvicx demo --model runs/frozen",
            "mlvicx demo --model runs/frozen --segmenter runs/lungs --index indexes/mine --port 7861",
        ],
    )
    add = made.add_argument
    add("--model", required=True, metavar="MODEL", help="folder or Hub name of a classifier")
    add("--segmenter", metavar="MODEL", help="folder or Hub name of a segmenter, whose outlines are shown")
    add("--index", type=Path, metavar="INDEX", help="folder that mlvicx index wrote with this model")
    add("--port", type=int, default=7860, metavar="N", help="of the page (default 7860; 0 for any free one)")
    add = made.advanced.add_argument
    text = "explanations.json of mlvicx explain --score (default the one in the model's folder, if there is one)"
    add("--explanations", type=Path, metavar="FILE", help=text)
    text = "address to listen at (default 127.0.0.1: this machine alone; 0.0.0.0: everybody who can reach it)"
    add("--host", default="127.0.0.1", metavar="NAME", help=text)
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default a GPU where there is one)")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Serve the page until Ctrl-C."""
    given = vars(parser().parse_args(words))
    require("the page", "demo", "captum", "gradio", "matplotlib")
    host, port = given.pop("host"), given.pop("port")
    start_inference(given["device"])
    from mlvicx_hf.common.machine import choose_device
    from mlvicx_hf.demo.page import serving
    from mlvicx_hf.demo.reading import Reader

    given["device"] = choose_device(given["device"])
    with serving(Reader(**given), host, port) as (page, where):
        print(f"the page is at {where}; Ctrl-C ends it", flush=True)
        page.block_thread()
