# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""To the Hub and back: code that goes along with a model, and downloads that are damaged.

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The classes that transformers loads from a repository where this package is not installed.
AUTO_MAP = {
    "AutoConfig": "configuration_mlvicx.MLVICXConfig",
    "AutoModel": "modeling_mlvicx.MLVICXModel",
    "AutoModelForPreTraining": "modeling_mlvicx.MLVICXForPreTraining",
    "AutoModelForImageClassification": "modeling_mlvicx.MLVICXForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_mlvicx.MLVICXForSemanticSegmentation",
    "AutoBackbone": "modeling_mlvicx.MLVICXBackbone",
}
# Name the backend: pipelines take a plain name for a video processor and ask the user whether to trust its code.
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": {"torchvision": "image_processing_mlvicx.MLVICXImageProcessor"}}


def save_code(folder: str | os.PathLike[str], found: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Copy this file and its neighbours, which the two maps name, into a folder.

    Args:
        folder: of the model.
        found: the map that the model has. transformers has put a subclass into it, and its file into the folder, if the
            user has registered it (`register_for_auto_class`).
        usual: one of the two maps.

    Returns:
        The usual map, with registered subclasses in it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for file in Path(__file__).parent.glob("*_mlvicx.py"):
        shutil.copyfile(file, Path(folder) / file.name)
    own = {name: code for name, code in found.items() if isinstance(code, str)}
    return {**usual, **{name: code for name, code in own.items() if Path(folder, f"{code.split('.')[0]}.py").is_file()}}


def check_download(file: Path) -> None:
    """Compare a file with its hash if it lies in the Hub's cache, and remove it from the cache if it is damaged.

    The Hub client checks the size of a download, not its content. In its cache, a snapshot is a folder of links to
    `blobs/`, where a large file has its SHA-256 hash as its name. Other files have no such record and are not checked:
    those of a user's folder, of a cache without links (Windows), and small files, which are named by a git hash.

    Raises:
        OSError: the content is not what was published.
    """
    if not file.is_symlink():
        return
    blob = Path(os.path.normpath(file.parent / os.readlink(file)))
    if blob.parent.name != "blobs" or len(blob.name) != 64:
        return
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != blob.name:
        for path in (file.resolve(), blob, file):  # the blob may itself be a link, to a store that models share
            path.unlink(missing_ok=True)
        repository = blob.parent.parent.name.removeprefix("models--").replace("--", "/")
        raise OSError(
            f"{repository}: {file.name} is damaged: SHA-256 hash {found[:12]}… found in the Hub's cache; expected "
            f"{blob.name[:12]}…; it was removed from the cache, so try again"
        )
