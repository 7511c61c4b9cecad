"""The command `mlvicx export`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import UserError, run

_DESCRIPTION = """\
Write a saved model for the Hub, or for another library.

hub: a folder to publish, with its code; of a pretraining run the encoder alone, unless --with_expanders.
timm, torchvision: the plain trunk without context bottlenecks; its features differ from the model's.
onnx: the whole model as a graph, compared with torch; needs pip install ".[onnx]" in the repository."""
_FORMATS = ("hub", "timm", "torchvision", "onnx")


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "export",
        "--model MODEL --output DIR --format FORMAT [options]",
        _DESCRIPTION,
        [
            "mlvicx export --model runs/mine --output exports/mine --format hub",
            "mlvicx export --model runs/mine --output exports/mine-timm --format timm",
        ],
    )
    add = made.add_argument
    add("--model", required=True, metavar="MODEL", help="folder or Hub name of a saved model")
    add("--output", required=True, type=Path, metavar="DIR", help="folder to write, absent or empty")
    add("--format", required=True, choices=_FORMATS, help="see above")
    add("--with_expanders", action="store_true", help="hub: keep the heads of a pretraining run")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Export a model."""
    arguments = parser().parse_args(words)
    source, output = arguments.model, arguments.output
    if arguments.with_expanders and arguments.format != "hub":
        raise UserError(f"--with_expanders found; --format {arguments.format} does not take it")
    from mlvicx_hf.hub.exports import export_onnx, export_timm, export_torchvision
    from mlvicx_hf.hub.folder import export

    if arguments.format == "onnx":
        difference = export_onnx(source, output)
        print(f"{output}: differs from torch by {difference:.1e} at most")
        return
    if arguments.format == "hub":
        export(source, output, with_expanders=arguments.with_expanders)
    else:
        {"timm": export_timm, "torchvision": export_torchvision}[arguments.format](source, output)
    print(f"{output}: {', '.join(sorted(file.name for file in output.iterdir()))}")


if __name__ == "__main__":
    run(main)
