"""The command `mlvicx similar`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser

from .startup import add_inference_options, print_images, start_inference


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "similar",
        "--index INDEX --input PATH [PATH ...] --output FILE [options]",
        "Find the indexed images that are most similar to image files, by the cosine of their embeddings, and say "
        "which files are unlike all of them. A record (.json) lies beside the table. Research use only.",
        ["mlvicx similar --index indexes/mine --input radiographs --output similar/out.csv --sheet similar/out.png"],
    )
    add = made.add_argument
    add("--index", required=True, type=Path, metavar="INDEX", help="folder that `mlvicx index` wrote")
    add("--input", required=True, nargs="+", type=Path, metavar="PATH", help="images, and folders of images")
    add("--output", required=True, type=Path, metavar="FILE", help="table, one row a file and neighbour (.csv)")
    add("--top", type=int, default=5, metavar="N", help="neighbours of each file (default 5)")
    add("--sheet", type=Path, metavar="FILE", help="picture of the first 50 files with their neighbours (.png)")
    add("--model", metavar="MODEL", help="folder or Hub name of the index's model (default the one it names)")
    add("--overwrite", action="store_true", help="replace earlier outputs once the new ones are complete")
    add("--quiet", action="store_true", help="show no progress bar")
    add = made.advanced.add_argument
    add("--approximate", action="store_true", help="search the graph of `mlvicx index --approximate`")
    add_inference_options(made, batch_size=32)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Search."""
    given = vars(parser().parse_args(words))
    output, quiet = given.pop("output"), given.pop("quiet")
    start_inference(given["device"])
    from mlvicx_hf.prediction.similar import find_similar

    record = find_similar(given.pop("index"), given.pop("input"), output, **given, progress=not quiet)
    print_images(output, record)
    if record["unlike"] is None:
        print("note: the index has no threshold, so column unlike is empty")
    else:
        print(f"{record['unlike']} images are unlike all indexed images")
    if record["sheet"] and record["sheet"]["images"] < record["images"] - record["errors"]:
        print(f"note: {record['sheet']['file']} shows the first {record['sheet']['images']} images")
