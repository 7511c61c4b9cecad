"""Publish a model, its page or a cache on the Hub: one commit, and a tag if wanted."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.provenance import package_commit
from mlvicx_hf.common.text import some
from mlvicx_hf.data.cache.assembly import is_of_cache
from mlvicx_hf.data.cache.cache import load_cache

from .folder import export
from .spaces import write_space

# Files of an earlier commit that would not hold for the new one: of earlier versions, and shards of an earlier cache.
OUTDATED = {"model": ["SHA256SUMS", "integrity_mlvicx.py"], "dataset": ["*.arrow"], "space": []}


class Sending(TypedDict, total=False):
    """How to publish; nothing of it is required."""

    private: bool  # make the repository private, as that of a cache is by default
    revision: str | None  # branch, by default main; one that does not exist is created
    tag: str | None  # name for the new commit
    message: str | None  # of the commit
    dry_run: bool  # say what would be sent, without using the network


def push(
    source: str | Path, repo_id: str, card: str, *, with_expanders: bool = False, **how: Unpack[Sending]
) -> dict[str, Any]:
    """Export a saved model and publish it as one commit, so that a repository never holds half of it.

    Args:
        source: folder of a saved model of any class.
        repo_id: name on the Hub, "organisation/name"; a repository that does not exist is created.
        card: text of the model card.
        with_expanders: see `export`.
        how: see `Sending`.

    Returns:
        `repo_id`, `private`, `revision`, `tag`, `files` (name → bytes), and unless `dry_run` `commit` and `url`.

    Raises:
        OSError: no right to write, no connection, a tag that exists; or as `export`.
        UserError: a name that the Hub would not take, or a public repository where a private one was wanted.
    """
    _check_name(repo_id)
    with tempfile.TemporaryDirectory() as temporary:
        folder = export(source, Path(temporary) / "export", with_expanders=with_expanders, card=card)
        return _send(folder, repo_id, "model", **how)


def push_space(
    model: str | Path, repo_id: str, *, segmenter: str | Path | None = None, **how: Unpack[Sending]
) -> dict[str, Any]:
    """Publish the page of `mlvicx demo` as a Space, in one commit.

    Args:
        model: folder or Hub name of a classifier.
        repo_id: as in `push`.
        segmenter: folder or Hub name of a segmenter, whose outlines the page shows.
        how: see `Sending`.

    Returns:
        As `push`.

    Raises:
        OSError: as `push` and `write_space`.
        UserError: as `push` and `write_space`.
    """
    _check_name(repo_id)
    title = repo_id.rpartition("/")[2]
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_space(Path(temporary) / "space", title, model=model, segmenter=segmenter)
        return _send(folder, repo_id, "space", **how)


def push_cache(path: str | Path, repo_id: str, **how: Unpack[Sending]) -> dict[str, Any]:
    """Publish a prepared cache in one commit, with its card, splits, hashes and lists of rejected and duplicate images.

    `load_cache(snapshot_download(repo_id, repo_type="dataset"))` reads it again.

    Args:
        path: folder of the cache. No patient may be in two splits.
        repo_id: as in `push`.
        how: see `Sending`. Without `private=False` the repository is private, as radiographs should be.

    Returns:
        As `push`.

    Raises:
        OSError: no such cache; or as `push`.
        UserError: as `push`.
    """
    _check_name(repo_id)
    cache = load_cache(path)
    about = f"{cache.manifest['collection']}, split hash {cache.manifest['split_hash'][:12]}"
    usual: Sending = {"private": True}
    return _send(cache.path, repo_id, "dataset", **(usual | how | {"message": how.get("message") or about}))


def _check_name(repo_id: str) -> None:
    with user_input():
        validate_repo_id(repo_id)


def _refuse_strangers(cache: Path, paths: Sequence[Path]) -> None:
    """Refuse files that `prepare` did not write: they may hold what nobody means to publish."""
    strange = [path for path in paths if not is_of_cache(path, cache)]
    if strange:
        names = some(str(path.relative_to(cache)) for path in strange)
        raise UserError(f"{cache}: {names} found, which `mlvicx prepare` did not write; expected its files alone")


def _send(
    folder: Path,
    repo_id: str,
    repo_type: str,
    *,
    private: bool = False,
    revision: str | None = None,
    tag: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Send a folder in one commit, and say what was sent, or would be."""
    paths = sorted(file for file in folder.rglob("*") if file.is_file())
    paths = [path for path in paths if not path.name.startswith("cache-")]  # intermediate files of `datasets`
    if repo_type == "dataset":
        _refuse_strangers(folder, paths)
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    plan = {"repo_id": repo_id, "private": private, "revision": revision or "main", "tag": tag, "files": files}
    if dry_run:
        return plan
    api, sdk = HfApi(), "gradio" if repo_type == "space" else None
    api.create_repo(repo_id, repo_type=repo_type, space_sdk=sdk, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id, repo_type=repo_type).private:
        raise UserError(f"{repo_id} is there already and is public; expected a private or a new repository")
    if tag is not None and tag in {found.name for found in api.list_repo_refs(repo_id, repo_type=repo_type).tags}:
        raise FileExistsError(f"{repo_id} has the tag {tag} already; expected a new one. Nothing was published")
    if revision is not None:
        api.create_branch(repo_id, repo_type=repo_type, branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        repo_type=repo_type,
        folder_path=folder,
        allow_patterns=list(files),
        revision=revision,
        commit_message=message or f"mlvicx_hf {package_commit()[:12]}",
        delete_patterns=OUTDATED[repo_type],
    )
    if tag is not None:
        api.create_tag(repo_id, repo_type=repo_type, tag=tag, revision=done.oid)
    return plan | {"commit": done.oid, "url": done.commit_url}
