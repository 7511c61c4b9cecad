"""Publish a model or its page on the Hub: export, card, one commit, and a tag if wanted."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.provenance import git_commit

from .folder import export
from .spaces import write_space

# Files that earlier versions published, and that would no longer hold for new weights.
OF_OLD_VERSIONS = ["SHA256SUMS", "integrity_mlvicx.py"]


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
        repo_id: name on the Hub, "organisation/name"; a repository that does not exist is created.
        card: text of the model card.
        private: make the repository private.
        revision: branch, by default main; one that does not exist is created.
        tag: name for the new commit.
        message: of the commit.
        with_expanders: see `export`.
        dry_run: export into a temporary folder and say what would be sent, without using the network.

    Returns:
        `repo_id`, `private`, `revision`, `tag`, `files` (name → bytes), and unless `dry_run` `commit` and `url`.

    Raises:
        OSError: no right to write, no connection, a tag that exists; or as `export`.
        UserError: a name that the Hub would not take, or a public repository where a private one was wanted.
    """
    with user_input():
        validate_repo_id(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(source, Path(temporary) / "export", with_expanders=with_expanders, card=card)
        return _send(folder, repo_id, "model", private, revision, tag, message, dry_run)


def push_space(
    model: str | Path,
    repo_id: str,
    *,
    segmenter: str | Path | None = None,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Publish the page of `mlvicx demo` as a Space, in one commit.

    Args:
        model: folder or Hub name of a classifier.
        repo_id: name on the Hub, "organisation/name"; a Space that does not exist is created.
        segmenter: folder or Hub name of a segmenter, whose outlines the page shows.
        private: make the Space private.
        revision: branch, by default main; one that does not exist is created.
        tag: name for the new commit.
        message: of the commit.
        dry_run: write a temporary folder and say what would be sent, without using the network.

    Returns:
        As `push`.

    Raises:
        OSError: no right to write, no connection, a tag that exists; or as `write_space`.
        UserError: as `push` and `write_space`.
    """
    with user_input():
        validate_repo_id(repo_id)
    title = repo_id.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_space(Path(temporary) / "space", title, model=model, segmenter=segmenter)
        return _send(folder, repo_id, "space", private, revision, tag, message, dry_run)


def _send(
    folder: Path,
    repo_id: str,
    repo_type: str,
    private: bool,
    revision: str | None,
    tag: str | None,
    message: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    """Send a folder in one commit, and say what was sent, or would be."""
    paths = sorted(file for file in folder.rglob("*") if file.is_file())
    files = {file.relative_to(folder).as_posix(): file.stat().st_size for file in paths}
    plan = {"repo_id": repo_id, "private": private, "revision": revision or "main", "tag": tag, "files": files}
    if dry_run:
        return plan
    api, sdk = HfApi(), "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, repo_type=repo_type, space_sdk=sdk, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise UserError(f"{repo_id} is there already and is public; expected a private or a new repository")
    if revision is not None:
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        repo_type=repo_type,
        folder_path=folder,
        revision=revision,
        commit_message=message or f"mlvicx_hf {git_commit(Path(__file__).parent)[:12]}",
        delete_patterns=OF_OLD_VERSIONS,
    )
    if tag is not None:
        api.create_tag(repo_id, repo_type=repo_type, tag=tag, revision=done.oid)
    return plan | {"commit": done.oid, "url": done.commit_url}
