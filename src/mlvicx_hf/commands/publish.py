"""The command `mlvicx publish`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlvicx_hf.common.arguments import CommandParser
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import read_text

from .card import add_sources, find_template

OF_MODEL = ("private", "with_expanders")
OF_SPACE = ("private", "segmenter")
OF_CARD = ("card", "results", "pretraining", "cache", "base_model")
OF_ALL = ("revision", "tag", "message", "dry_run")


def parser() -> CommandParser:
    """Make the parser."""
    made = CommandParser(
        "publish",
        "(--model DIR [--space] | --dataset CACHE) --repo_id NAME [options]",
        "Publish on the Hub: a model (weights, code, and a card whose figures come from the files of runs), "
        "its page as a Space, or a cache. Needs a token that may write: hf auth login, or the variable HF_TOKEN.",
        [
            "mlvicx publish --model runs/mine --repo_id org/mlvicx-resnet18 --results runs/*/results.json \\",
            "    --private --dry_run",
            "mlvicx publish --model runs/frozen --space --repo_id org/demo --private --dry_run",
            "mlvicx publish --dataset caches/mine --repo_id org/radiographs --dry_run  # private unless --public",
        ],
    )
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", metavar="DIR", help="folder of a pretraining run, a classifier or a segmenter")
    what.add_argument("--dataset", metavar="CACHE", help="cache that mlvicx prepare wrote; private unless --public")
    add = made.add_argument
    add("--repo_id", required=True, metavar="NAME", help="organisation/name")
    add("--dry_run", action="store_true", help="say what would be sent, and print the card")
    add("--space", action="store_true", help="with --model: publish the page of mlvicx demo, with this classifier")
    add("--private", action="store_true", help="with --model: make the repository private")
    add("--public", action="store_true", help="with --dataset: everybody may read it")
    add_sources(made)
    add = made.advanced.add_argument
    add("--card", metavar="FILE", help="with --model: a card that is ready, instead of one from the files of the runs")
    add("--with_expanders", action="store_true", help="with --model: publish what pretraining needs to go on, too")
    add("--segmenter", metavar="DIR", help="with --space: a segmenter, whose outlines the page shows")
    add("--tag", metavar="NAME", help="name for the new commit, such as v1.0")
    add("--revision", metavar="NAME", help="branch (default main), made if it is not there")
    add("--message", metavar="TEXT", help="of the commit")
    return made


def main(words: Sequence[str] | None = None) -> None:
    """Publish a model, its page or a cache."""
    arguments = parser().parse_args(words)
    taken = {"dataset": ("public",), "space": ("space", *OF_SPACE), "model": OF_MODEL + OF_CARD}
    kind = "dataset" if arguments.dataset is not None else "space" if arguments.space else "model"
    known = dict.fromkeys(name for names in taken.values() for name in names)
    given = [f"--{name}" for name in known if name not in taken[kind] and getattr(arguments, name)]
    if given:
        raise UserError(f"{', '.join(given)} found; --{kind} does not take it")
    from mlvicx_hf.hub.publishing import push, push_cache, push_space

    of_cards = [f"--{name}" for name in ("results", "pretraining", "cache", "base_model") if getattr(arguments, name)]
    if arguments.card is not None and of_cards:
        raise UserError(f"{', '.join(of_cards)} found with --card; expected a card, or what it is made of")
    repo_id, how = arguments.repo_id, _chosen(arguments, *OF_ALL)
    if kind == "dataset":
        from mlvicx_hf.data.cache.summary import CARD

        done = push_cache(arguments.dataset, repo_id, private=not arguments.public, **how)
        text = (Path(arguments.dataset) / CARD).read_text(encoding="utf-8")
    elif kind == "space":
        text = ""
        done = push_space(arguments.model, repo_id, **how, **_chosen(arguments, *OF_SPACE))
    else:
        text = _make_card(arguments)
        done = push(arguments.model, repo_id, text, **how, **_chosen(arguments, *OF_MODEL))
    _report(arguments, done, text)


def _chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _make_card(arguments: argparse.Namespace) -> str:
    """Read the card that was given, or fill the template of the model's kind from its runs."""
    if arguments.card is not None:
        return read_text(Path(arguments.card))
    from mlvicx_hf.hub.cards.rendering import RESULTS_NAME, render_card

    model = Path(arguments.model)
    results = [file for file in arguments.results if file != model / RESULTS_NAME]
    options = _chosen(arguments, "repo_id", "pretraining", "cache", "base_model")
    options |= {"revision": arguments.tag or arguments.revision or "main"}
    try:
        return str(render_card(find_template(model), model, results, **options))
    except FileNotFoundError as error:  # of a model that no command of ours has trained
        raise FileNotFoundError(f"{error}; or the text of a card: --card FILE") from error


def _report(arguments: argparse.Namespace, done: dict[str, Any], card: str) -> None:
    """Print what was sent, or would be."""
    megabytes = sum(done["files"].values()) / 1e6
    if not arguments.dry_run:
        print(f"{len(done['files'])} files, {megabytes:.1f} MB, published as {done['repo_id']} at {done['commit']}")
        print(done["url"])
        return
    print(card)
    for name, size in done["files"].items():
        print(f"{size:12,} bytes  {name}")
    tag = f", tag {arguments.tag}" if arguments.tag else ""
    seen_by = "private" if done["private"] else "public"
    where = f"{done['repo_id']} ({seen_by}, {done['revision']}{tag})"
    if arguments.dataset is not None:
        print("note: patient ids and file names go along, in the columns of the images and in splits.csv")
    print(f"dry run: {len(done['files'])} files, {megabytes:.1f} MB, would go to {where}; nothing was sent")
