"""The command `mlvicx convert`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "convert",
        "CHECKPOINT DIR [options]",
        "Convert the authors' MLVICX checkpoint, or a plain network such as ImageNet's, to a folder for "
        "from_pretrained. The keys tell the authors' checkpoint, ResNets and EfficientNet-Lite0; any other network "
        "needs its --backbone.",
        [
            "mlvicx convert resnet18_nih_64_300.pth models/mlvicx-official",
            "mlvicx convert resnet18-imagenet.safetensors models/resnet18-grey",
            "mlvicx convert dino_vits16.pth models/dino --backbone vit_small_patch16_224.dino",
        ],
    )
    made.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="file of weights: .pth or .safetensors")
    made.add_argument("output_dir", type=Path, metavar="DIR", help="folder to write, absent or empty")
    text = "of a plain network: 1 (default) for grey images, 3 keeps the first kernels"
    made.add_argument("--num_channels", type=int, metavar="N", help=text)
    text = "timm name of a plain network; its tag tells how images are normalised"
    made.add_argument("--backbone", metavar="NAME", help=text)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Convert a checkpoint."""
    arguments = parser().parse_args(words)
    from mlvicx_hf.encoders.conversion import convert_checkpoint

    given = arguments.num_channels, arguments.backbone
    print(convert_checkpoint(arguments.checkpoint, arguments.output_dir, *given))
