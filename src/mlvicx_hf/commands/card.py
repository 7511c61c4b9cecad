"""The command `mlvicx card`."""

from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.arguments import CommandParser


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "card",
        "--model DIR [options]",
        "Fill a model card from the files of finished runs.",
        ["mlvicx card --model runs/mine --results runs/*/results.json --repo_id org/mlvicx --output README.md"],
    )
    add = made.add_argument
    add("--model", type=Path, required=True, metavar="DIR", help="folder of the model")
    add("--output", type=Path, metavar="FILE", help="file to write (default: print the card)")
    add("--overwrite", action="store_true", help="replace that file")
    name = "org/mlvicx-resnet18"
    add("--repo_id", default=name, metavar="NAME", help=f"name on the Hub (default {name})")
    add_sources(made)
    add = made.advanced.add_argument
    text = "backbone, classifier or segmenter, or a changed copy of one of these (default: by the class of the model)"
    add("--template", metavar="NAME|FILE", help=text)
    add("--datasets", nargs="*", default=[], metavar="NAME", help="Hub names of the data sets trained on")
    add("--revision", default="main", metavar="NAME", help="revision that the examples load (default main)")
    add("--code_url", metavar="URL", help="address of the package's repository")
    return made


def add_sources(made: CommandParser) -> None:
    """Add the options that say where the figures of a card come from."""
    add = made.add_argument
    add("--results", type=Path, nargs="*", default=[], metavar="FILE", help="results.json files of evaluations")
    add("--pretraining", type=Path, metavar="PATH", help="run.json or folder of the pretraining run, if not --model")
    add("--cache", type=Path, metavar="CACHE", help="cache of pretraining, for collection and patients")
    add("--base_model", metavar="NAME", help="Hub name of the encoder that a head was trained on")


def find_template(model: Path, name: str | None = None) -> Path:
    """Find the template of this name or at this path; by default the one for the class of a saved model."""
    from mlvicx_hf.encoders.loading import saved_class
    from mlvicx_hf.hub.cards.rendering import CARD_KINDS, TEMPLATES

    if name is None:
        if not model.is_dir():
            raise FileNotFoundError(f"{model}: no such folder; expected that of a model")
        saved = saved_class(model).__name__
        name = next(kind for kind, facts in CARD_KINDS.items() if saved in facts.architectures)
    return TEMPLATES / f"{name}.md" if name in CARD_KINDS else Path(name)


def main(words: Sequence[str] | None = None) -> None:
    """Render a card."""
    given = vars(parser().parse_args(words))
    output, model, overwrite = (given.pop(name) for name in ("output", "model", "overwrite"))
    from mlvicx_hf.common.files import new_file
    from mlvicx_hf.hub.cards.rendering import render_card

    if output is not None and output.exists() and not overwrite:
        raise FileExistsError(f"{output} is there already; --overwrite replaces it")
    card = render_card(find_template(model, given.pop("template")), model, **given)
    if output is None:
        print(card)
        return
    with new_file(output) as temporary:
        card.save(temporary)
    print(f"card written to {output}")
