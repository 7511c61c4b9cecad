#!/usr/bin/env python
"""Write a saved model for the Hub, or for another library.

python scripts/export_model.py --model runs/mine --output exports/mine --format hub
python scripts/export_model.py --model runs/mine --output exports/mine-timm --format timm

hub: a folder to publish, with its code and hashes; of a pretraining run the encoder alone, unless --with_expanders.
timm, torchvision: the plain trunk without context bottlenecks; its features differ from the model's.
onnx: the whole model as a graph, compared with torch; needs pip install "mlvicx-hf[onnx]".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mlvicx_hf.common.errors import run
from mlvicx_hf.hub.exports import export_onnx, export_timm, export_torchvision
from mlvicx_hf.hub.folder import export

FORMATS = ("hub", "timm", "torchvision", "onnx")


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub name of a saved model")
    parser.add_argument("--output", required=True, type=Path, help="folder to write, absent or empty")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--with_expanders", action="store_true", help="hub: keep the heads of a pretraining run")
    return parser.parse_args()


def main() -> None:
    """Export a model."""
    arguments = parse()
    source, output = arguments.model, arguments.output
    if arguments.with_expanders and arguments.format != "hub":
        raise ValueError(f"--with_expanders found; --format {arguments.format} does not take it")
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
