"""Files and folders that are either whole or absent, and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hash of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_output(output: Path) -> Path:
    """Refuse to write over something.

    Raises:
        FileExistsError: a file, or a folder with something in it.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; expected a new or an empty folder")
    return output


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A file that appears at `path` only when it is complete and on the disk; yields the temporary one beside it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears at `path` only when everything in it is written and on the disk.

    An existing `path` is replaced; until the new one is in its place it stays whole: after a kill between two renames
    beside it, under the name `.NAME.old`.

    Yields:
        The temporary folder beside it. An exception removes it and leaves `path` as it was; an earlier kill's is
        removed first.
    """
    temporary, old = (path.with_name(f".{path.name}.{ending}") for ending in ("tmp", "old"))
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)  # only now: without `path` it is all there is
            os.replace(path, old)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
