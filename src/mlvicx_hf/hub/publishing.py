"""Publish on the Hub: a model (export, card, one commit, and a tag if wanted), or a prepared cache."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.provenance import git_commit
from mlvicx_hf.data.cache.sharing import push_cache
from mlvicx_hf.data.cache.summary import CARD
from mlvicx_hf.encoders.loading import saved_class

from .cards.rendering import KINDS, RESULTS, render_card
from .folder import export

PUSH_OPTIONS = ("revision", "message", "dry_run")  # of models and of caches


def push(
    source: str | Path,
    repo_id: str,
    card: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    with_expanders: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Export a saved model and publish it as one commit, so that a repository never holds half of it.

    Args:
        source: folder of a saved model of any class.
        repo_id: name on the Hub, "organisation/name"; the repository is made if it is not there.
        card: text of the model card.
        private: make the repository private.
        revision: branch, made if it is not there; by default main.
        tag: name for the new commit.
        message: of the commit.
        with_expanders: see `hub.export`.
        dry_run: export into a temporary folder and say what would be sent, without the network.

    Returns:
        `repo_id`, `private`, `revision`, `tag`, `files` (name → bytes), and unless `dry_run` `commit` and `url`.

    Raises:
        OSError: no right to write, no connection, a tag that is there; see also `hub.export`.
        ValueError: a name that the Hub would not take, or a public repository where a private one was wanted.
    """
    validate_repo_id(repo_id)
    message = message or f"mlvicx_hf {git_commit(Path(__file__).parent)[:12]}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(source, Path(temporary) / "export", with_expanders=with_expanders, card=card)
        files = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
        plan = {"repo_id": repo_id, "private": private, "revision": revision or "main", "tag": tag, "files": files}
        if dry_run:
            return plan
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(f"{repo_id} is there already and is public; expected a private or a new repository")
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        if tag is not None:
            api.create_tag(repo_id, tag=tag, revision=done.oid)
        return plan | {"commit": done.oid, "url": done.commit_url}


def make_card(arguments: argparse.Namespace, templates: Path) -> str:
    """Text of the card: the file given, or the template of the model's kind filled from its runs.

    Raises:
        FileNotFoundError: no such card.
        ValueError: a figure without a source, see `cards.render_card`.
    """
    if arguments.card is not None:
        return Path(arguments.card).read_text(encoding="utf-8")
    name = saved_class(arguments.model).__name__
    kind = next(kind for kind, facts in KINDS.items() if name in facts.architectures)
    results: Sequence[Path] = [file for file in arguments.results if file != Path(arguments.model) / RESULTS]
    card = render_card(
        templates / f"{kind}.md",
        Path(arguments.model),
        results,
        repo_id=arguments.repo_id,
        pretraining=arguments.pretraining,
        cache=arguments.cache,
        base_model=arguments.base_model,
    )
    return str(card)


def main(templates: Path) -> None:
    """The command `scripts/push_to_hub.py`.

    Args:
        templates: folder of the card templates.
    """
    parser = argparse.ArgumentParser(description="Publish a saved model or a prepared cache on the Hub.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="folder of a pretraining run, a classifier or a segmenter")
    what.add_argument("--dataset", help="cache that prepare_data.py wrote; it is private unless --public")
    parser.add_argument("--repo_id", required=True, help="organisation/name")
    parser.add_argument("--revision", help="branch (default main), made if it is not there")
    parser.add_argument("--message", help="of the commit")
    parser.add_argument("--dry_run", action="store_true", help="say what would be sent and print the card")
    parser.add_argument("--public", action="store_true", help="of --dataset: everybody may read it")
    model = parser.add_argument_group("of --model")
    model.add_argument("--private", action="store_true", help="make the repository private")
    model.add_argument("--tag", help="name for the new commit, such as v1.0")
    model.add_argument("--with_expanders", action="store_true", help="publish what pretraining needs to go on, too")
    card = parser.add_argument_group("card of --model")
    card.add_argument("--card", help="a card that is ready; by default it is rendered from the files of the runs:")
    card.add_argument("--results", type=Path, nargs="*", default=[], help="results.json files of evaluations")
    card.add_argument("--pretraining", type=Path, help="run.json or folder of the pretraining run, if not --model")
    card.add_argument("--cache", type=Path, help="cache of pretraining, for collection and patients")
    card.add_argument("--base_model", help="Hub name of the encoder that a head was trained on")
    arguments = parser.parse_args()
    _check_options(arguments)
    if arguments.dataset is not None:
        text = (Path(arguments.dataset) / CARD).read_text(encoding="utf-8")
        done = push_cache(arguments.dataset, arguments.repo_id, **_chosen(arguments, *PUSH_OPTIONS, "public"))
        kind = "public" if arguments.public else "private"
    else:
        text = make_card(arguments, templates)
        options = (*PUSH_OPTIONS, "private", "tag", "with_expanders")
        done = push(arguments.model, arguments.repo_id, text, **_chosen(arguments, *options))
        kind = "private" if arguments.private else "public"
    megabytes = sum(done["files"].values()) / 1e6
    if arguments.dry_run:
        print(text)
        for name, size in done["files"].items():
            print(f"{size:12,} bytes  {name}")
        tag = f", tag {arguments.tag}" if arguments.tag else ""
        where = f"{done['repo_id']} ({kind}, {done['revision']}{tag})"
        if arguments.dataset is not None:
            print("note: patient ids and file names go along, in the columns of the images and in splits.csv")
        print(f"dry run: {len(done['files'])} files, {megabytes:.1f} MB, would go to {where}; nothing was sent")
    else:
        print(f"{len(done['files'])} files, {megabytes:.1f} MB, published as {done['repo_id']} at {done['commit']}")
        print(done["url"])


def _chosen(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options of a model for a data set, and the other way round."""
    of_model = ("private", "tag", "with_expanders", "card", "results", "pretraining", "cache", "base_model")
    kind, strange = ("dataset", of_model) if arguments.dataset is not None else ("model", ("public",))
    given = [f"--{name}" for name in strange if getattr(arguments, name)]
    if given:
        raise UserError(f"{', '.join(given)} found; --{kind} does not take it")
