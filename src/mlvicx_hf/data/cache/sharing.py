# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Publish a prepared cache as a dataset on the Hub, where `datasets` reads it, and fetch it for `load_cache`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id

from mlvicx_hf.common.errors import UserError

from .cache import load_cache


def push_cache(
    path: str | Path,
    repo_id: str,
    *,
    public: bool = False,
    revision: str | None = None,
    message: str | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Send a cache in one commit, with its card, split file, hashes and lists of rejected and duplicate images.

    Args:
        path: folder of the cache. No patient may be in two splits.
        repo_id: name on the Hub, "organisation/name". A repository that does not exist is created.
        public: let everybody read it. By default the repository is private, as radiographs should be.
        revision: branch; created if it does not exist. By default main.
        message: message of the commit.
        dry_run: return what would be sent, without the network.

    Returns:
        `repo_id`, `public`, `revision`, `files` (name → size in bytes); without `dry_run` also `commit` and `url`.

    Raises:
        ValueError: the Hub does not allow this name, or the repository is public and a private one was wanted.
        OSError: there is no cache, no right to write, or no connection.
    """
    validate_repo_id(repo_id)
    cache = load_cache(path)
    files = {
        str(file.relative_to(cache.path)): file.stat().st_size
        for file in sorted(cache.path.rglob("*"))
        if file.is_file() and not file.name.startswith("cache-")  # intermediate files of `datasets`
    }
    plan = {"repo_id": repo_id, "public": public, "revision": revision or "main", "files": files}
    if dry_run:
        return plan
    api = HfApi()
    api.create_repo(repo_id, repo_type="dataset", private=not public, exist_ok=True)
    if not public and not api.dataset_info(repo_id).private:
        raise UserError(f"{repo_id} is there already and is public; expected a private or a new repository")
    if revision is not None:
        api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
    done = api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=cache.path,
        allow_patterns=list(files),
        delete_patterns="*.arrow",  # of an earlier cache
        revision=revision,
        commit_message=message or f"{cache.manifest['collection']}, split hash {cache.manifest['split_hash'][:12]}",
    )
    return plan | {"commit": done.oid, "url": done.commit_url}


def fetch_cache(repo_id: str, revision: str | None = None) -> Path:
    """Download a published cache. Return its folder in the Hub's cache on this machine, for `load_cache`.

    Raises:
        OSError: there is no such dataset, no right to read it, or no connection.
    """
    return Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
