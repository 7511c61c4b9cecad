"""The command `mlvicx transfer`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.text import number
from mlvicx_hf.data.vocabulary import COLLECTIONS

from .startup import add_inference_options, start_inference


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "transfer",
        "--model MODEL --dataset CACHE --output FILE [options]",
        "Score a saved classifier on a prepared cache, of its own or another collection. Labels are matched by "
        "what they mean; what is lost by that is printed and recorded. Research use only.",
        ["mlvicx transfer --model runs/nih --dataset caches/vinbig --output runs/nih-on-vinbig/results.json"],
    )
    add = made.add_argument
    add("--model", required=True, metavar="MODEL", help="folder or Hub name of a classifier")
    add("--dataset", required=True, metavar="CACHE", help="labelled cache that mlvicx prepare wrote")
    add("--output", required=True, type=Path, metavar="FILE", help="results (.json); test_predictions.csv comes beside")
    add("--split", default="test", metavar="NAME", help="of the cache (default test)")
    add("--findings", nargs="+", metavar="NAME", help="score only these, by their common names")
    names = ", ".join(COLLECTIONS)
    add("--collection", metavar="NAME", help=f"whose labels the model knows, if its results.json does not say: {names}")
    add("--allow_overlap", action="store_true", help="go on with images that the model has seen in training")
    add_inference_options(made, batch_size=64)
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Score a classifier."""
    given = vars(parser().parse_args(words))
    start_inference(given["device"])
    from mlvicx_hf.evaluation.transfer import evaluate

    _report(evaluate(given.pop("model"), given.pop("dataset"), given.pop("output"), **given))


def _report(results: dict[str, Any]) -> None:
    """Print what was matched, what was lost, and the scores."""
    matching, test = results["matching"], results["test"]
    for name, found in matching["matched"].items():
        print(f"{name}: {', '.join(found['model'])} of the model, {', '.join(found['data'])} of the images")
        for note in found["lost"]:
            print(f"  {note}")
    for side, labels in (("the model", matching["model_only"]), ("the images", matching["data_only"])):
        if labels:
            print(f"without a counterpart, of {side}: {', '.join(labels)}")
    for name, value in [("macro", test["auroc_macro"]), *test["auroc"].items()]:
        print(f"test AUROC {name:24s} {number(value)}")
    not_scored = {value for value in test["auroc"].values() if isinstance(value, str)}
    if not_scored:
        print(f"{not_scored.pop()}: all known images of this split have one value")
