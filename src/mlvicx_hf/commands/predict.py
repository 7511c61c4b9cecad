"""The command `mlvicx predict`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser

from .startup import add_inference_options, print_images, start_inference


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "predict",
        "--model MODEL --input PATH [PATH ...] --output FILE [options]",
        "Run a saved model on image files: probabilities and decisions, masks, or embeddings. A record beside the "
        "table, of the same name (.json), says which model and code made it. Research use only.",
        [
            "mlvicx predict --model runs/frozen --input radiographs --output predictions/out.csv",
            "mlvicx predict --model runs/lungs --input radiographs --output predictions/lungs.csv --masks lung_masks",
            "mlvicx predict --model runs/first --input a.png b.png --output out.csv --embeddings out.safetensors",
        ],
    )
    add = made.add_argument
    add("--model", required=True, metavar="MODEL", help="folder or Hub name of a saved model")
    add("--input", required=True, nargs="+", type=Path, metavar="PATH", help="images, and folders of images")
    add("--output", required=True, type=Path, metavar="FILE", help="table, one row an image (.csv)")
    add("--embeddings", type=Path, metavar="FILE", help="embeddings of the images (.safetensors or .parquet)")
    add("--masks", type=Path, metavar="DIR", help="folder of a segmenter's masks, absent or empty")
    add("--overwrite", action="store_true", help="replace earlier outputs once the new ones are complete")
    add("--quiet", action="store_true", help="show no progress bar")
    add_inference_options(made, batch_size=32)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Predict."""
    given = vars(parser().parse_args(words))
    output, quiet = given.pop("output"), given.pop("quiet")
    start_inference(given["device"])
    from mlvicx_hf.prediction.prediction import predict

    record = predict(given.pop("model"), given.pop("input"), output, **given, progress=not quiet)
    print_images(output, record)
    values = (record["calibration"] or {}).get("values") or {}
    if names := [name for name, value in values.items() if value is None]:
        if len(names) == len(values):
            print("note: no finding is calibrated: validation knew too few positives or negatives; read them as ranks")
        else:
            print(f"note: not calibrated, so not to be compared with the others: {', '.join(names)}")
