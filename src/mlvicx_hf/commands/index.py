"""The command `mlvicx index`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser

from .startup import add_inference_options, start_inference


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "index",
        "--model MODEL --dataset CACHE --output INDEX [options]",
        "Index the images of a prepared cache by their embeddings, so that `mlvicx similar` can search them. The "
        "validation split says below which similarity an image is unlike all indexed ones. Research use only.",
        [
            "mlvicx index --model runs/mine --dataset caches/mine --output indexes/mine",
            "mlvicx index --model runs/mine --dataset caches/other --add_to indexes/mine --output indexes/both",
        ],
    )
    add = made.add_argument
    add("--model", required=True, metavar="MODEL", help="folder or Hub name of a saved model of any kind")
    add("--dataset", required=True, type=Path, metavar="CACHE", help="prepared cache")
    add("--output", required=True, type=Path, metavar="INDEX", help="folder of the index, absent or empty")
    add("--splits", nargs="+", default=["train"], metavar="NAME", help="splits to index (default train)")
    add("--add_to", type=Path, metavar="INDEX", help="also take the images of this index, which stays as it is")
    add("--approximate", action="store_true", help="also write a graph for approximate searches (extra search)")
    add("--quiet", action="store_true", help="show no progress bar")
    add_inference_options(made, batch_size=64, workers=False)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Index."""
    given = vars(parser().parse_args(words))
    output, quiet = given.pop("output"), given.pop("quiet")
    start_inference(given["device"])
    from mlvicx_hf.prediction.indexing import build_index
    from mlvicx_hf.scoring.neighbours import PRECISION_TOP

    content = build_index(given.pop("model"), given.pop("dataset"), output, **given, progress=not quiet)
    print(f"{output}: {content['images']} images")
    if content["unlike_threshold"] is None:
        print("note: no validation images to compare, so there is no threshold for unlike images and no precision")
        return
    print(f"an image is unlike all of them if its greatest cosine is below {content['unlike_threshold']:.6f}")
    macro = content[f"precision_at_{PRECISION_TOP}"]["macro"]
    if macro["precision"] is not None:
        print(
            f"precision@{PRECISION_TOP} on validation images: {macro['precision']:.3f} (chance {macro['chance']:.3f})"
        )
    if content["validation"]["own_patient_left_out"]:
        print("note: patients of the validation images are indexed, too; no image was compared with its own patient")
