# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Published hashes: weights whose content is not what was published are refused before they are used.

A Hub client checks the size of a download, not its content. An exported model therefore has a file `SHA256SUMS` (as
`sha256sum` writes it), which every `from_pretrained` of this package checks for the weights.

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError  # of the HTTP library that the client uses
from transformers.utils import cached_file

SUMS = "SHA256SUMS"
WEIGHTS = (".safetensors", ".bin")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(path: Path) -> dict[str, str]:
    """Hash by file name from a `SHA256SUMS` file.

    Raises:
        ValueError: a line that is not a hash and a name.
    """
    sums = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        digest, _, name = line.partition("  ")
        if len(digest) != 64 or not name:
            raise ValueError(f"{path}: line {line[:80]!r} found; expected a SHA-256 hash, two blanks and a file name")
        sums[name] = digest
    return sums


def check_weights(source: str | Path, **hub_arguments: Any) -> bool:
    """Compare the weights of a folder or repository with its published hashes, where it has any.

    A file of the Hub's cache that does not fit is removed, so that the next attempt downloads it anew.

    Args:
        source: folder, or name on the Hub; weights not there yet are downloaded.
        hub_arguments: those of `from_pretrained` that say where on the Hub, and which cache.

    Returns:
        Whether there are published hashes.

    Raises:
        OSError: weights whose content is not what was published, or a download that broke off.
    """
    where = {name: value for name, value in hub_arguments.items() if name in HUB_ARGUMENTS and value is not None}
    quiet = {
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    listing = cached_file(str(source), SUMS, **where, **quiet)
    if listing is None:
        return False
    for name, expected in read_sums(Path(listing)).items():
        if not name.endswith(WEIGHTS):
            continue
        try:
            found = cached_file(str(source), name, **where, **quiet)
        except HTTPError as error:
            raise OSError(f"{source}: the download of {name} broke off ({error}); try again") from error
        if found is not None and sha256(Path(found)) != expected:
            raise OSError(f"{source}: {name} is damaged: {_discard(Path(found))} ({SUMS} says {expected[:12]}…)")
    return True


def _discard(path: Path) -> str:
    """Remove a file if it lies in the Hub's cache (a link to a blob), and say what happened."""
    if not path.is_symlink():
        return f"its SHA-256 hash is {sha256(path)[:12]}…"
    digest, blob = sha256(path), path.resolve()
    path.unlink()
    blob.unlink()
    return f"what was downloaded has the SHA-256 hash {digest[:12]}…; it was removed from the cache, so try again"
