"""The command `mlvicx explain`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import number

from .startup import start_inference

SCORES = ("mean", "low", "high", "chance", "usual_place")


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "explain",
        "--models NAME=MODEL [NAME=MODEL ...] --dataset CACHE --output DIR [options]",
        "Draw Grad-CAM heat maps of saved classifiers on a prepared cache, and measure whether they point at the "
        'findings. Needs the extra explain (pip install ".[explain]" in the repository). Research use only.',
        [
            "mlvicx explain --models MLVICX=runs/finetuned random=runs/baseline --dataset caches/vinbig \\",
            '    --output explanations --findings Cardiomegaly "Pleural effusion" --score',
        ],
    )
    add = made.add_argument
    add("--models", nargs="+", required=True, metavar="NAME=MODEL", help="folders or Hub names of classifiers")
    add("--dataset", required=True, metavar="CACHE", help="labelled cache that mlvicx prepare wrote")
    add("--output", required=True, type=Path, metavar="DIR", help="new folder for pictures and explanations.json")
    add("--split", default="test", metavar="NAME", help="of the cache (default test)")
    add("--findings", nargs="+", metavar="NAME", help="labels of the cache (default all that the models know)")
    add("--max_images", type=int, default=8, metavar="N", help="pictures a finding and model (default 8)")
    add("--score", action="store_true", help="compare the heat maps with boxes and masks, with intervals")
    add = made.advanced.add_argument
    text = "level whose refined map is explained, 0 the finest (default last)"
    add("--level", type=_level, metavar="last|N", help=text)
    add("--mask_name", metavar="NAME", help="structure of the masks that is the finding, if it has another name")
    add("--tolerance", type=float, default=0, metavar="X", help="pixels a maximum may miss a region by (default 0)")
    add("--batch_size", type=int, default=16, metavar="N", help="images a pass (default 16)")
    add("--device", metavar="NAME", help="cpu, cuda or cuda:N (default a GPU where there is one)")
    return made


def _level(text: str) -> int | None:
    return None if text == "last" else int(text)


def parse_models(words: Sequence[str]) -> dict[str, str]:
    """Read words of the form NAME=MODEL. Return name → folder or Hub name.

    Raises:
        UserError: another form, or a name for the second time.
    """
    models: dict[str, str] = {}
    for word in words:
        name, _, source = word.partition("=")
        if not (name and source):
            raise UserError(f"--models {word!r} found; expected NAME=FOLDER or NAME=HUB_NAME")
        if name in models:
            raise UserError(f"--models {name}={models[name]} and {word} found; expected each name once")
        models[name] = source
    return models


def main(words: Sequence[str] | None = None) -> None:
    """Explain classifiers."""
    given = vars(parser().parse_args(words))
    models = parse_models(given.pop("models"))
    start_inference(given["device"])
    from mlvicx_hf.evaluation.explanation.explaining import explain

    results = explain(models, given.pop("dataset"), given.pop("output"), **given)
    for finding, found in results["findings"].items():
        print(f"{finding}: {found['images']} images, {found['located']} with a known region")
        if isinstance(found.get("scores"), Mapping):  # neither absent nor "n/a"
            _report(found)


def _report(found: dict[str, Any]) -> None:
    """Print the scores of a finding, model by model."""
    for model, scores in found["scores"].items():
        values = []
        for score, found_of in scores.items():
            mean, low, high, chance, usual = (number(found_of[key], ".3f") for key in SCORES)
            values.append(f"{score} {mean} ({low} to {high}, chance {chance}, usual place {usual})")
        print(f"  {model}: {'; '.join(values)}; {found['empty_maps'][model]} empty maps")
    first = next(iter(found["scores"]))
    for other, scores in found["differences"].items():
        values = []
        for score, found_of in scores.items():
            gain, low, high = (number(found_of[key], "+.3f") for key in ("difference", "low", "high"))
            values.append(f"{score} {gain} ({low} to {high})")
        print(f"  {first} over {other}: {'; '.join(values)}")
