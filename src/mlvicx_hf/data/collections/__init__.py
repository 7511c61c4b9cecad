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
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Collection

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


def collection_class(name: str) -> type[Collection]:
    """Import the class of a collection, by one of the names in `KINDS`."""
    kind: type[Collection] = getattr(import_module(f".{name}", __name__), KINDS[name])
    return kind
