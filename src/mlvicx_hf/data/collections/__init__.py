# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Collections of radiographs, one module each.

To add one, write a module here with a subclass of `Collection`, or of `ReleasedCollection` where tables list the
images. Give it a `name` (that of the module), a `source`, parameters that become options of `mlvicx prepare`, and
`read` (or `list_all`), which returns a `Listing`. Then add it to `KINDS`. `tables` reads tables whose columns a
collection declares; `labels`, `people`, `boxes`, `readers` and `metadata` hold what several collections need. Findings
that other collections have as well belong in `data.vocabulary`.

Importing this package imports none of the collections, so that commands start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import Collection, Listing, Record
    from .folder import FolderCollection
    from .nih14 import NIH14Collection
    from .phantom import PhantomCollection

# The class of each collection, by the name of its module, which is also what `--collection` takes.
KINDS = {
    "folder": "FolderCollection",
    "hf": "HFCollection",
    "nih14": "NIH14Collection",
    "vinbigdata": "VinBigDataCollection",
    "vindr": "VinDrCollection",
    "rsna": "RSNACollection",
    "siim": "SIIMCollection",
    "chexpert": "CheXpertCollection",
    "mimic_cxr_jpg": "MIMICCXRJPGCollection",
    "phantom": "PhantomCollection",
}
_BASE = ("Collection", "Listing", "Record")

__all__ = ["KINDS", "Collection", "FolderCollection", "Listing", "NIH14Collection", "PhantomCollection", "Record"]


def collection_class(name: str) -> type[Collection]:
    """Import the class of a collection, by one of the names in `KINDS`."""
    kind: type[Collection] = getattr(import_module(f".{name}", __name__), KINDS[name])
    return kind


def __getattr__(name: str) -> Any:
    if name in _BASE:
        return getattr(import_module(".base", __name__), name)
    for kind, class_name in KINDS.items():
        if class_name == name:
            return collection_class(kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
