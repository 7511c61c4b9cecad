# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Collections of radiographs, one module each; what they share is in `base`.

To add one, write a module with a subclass of `Collection` (or `ReleasedCollection`, where tables list the images):
`name`, `source`, a constructor whose parameters become options of `prepare_data.py`, and `read` (or `list_all`), which
returns a `Listing`. Then name it in `KINDS`. Findings that others have as well belong in `data.vocabulary`.
"""

from .base import SPLITS, Collection, Listing, Record
from .chexpert import CheXpertCollection
from .folder import FolderCollection
from .hf import HFCollection
from .mimic_cxr_jpg import MIMICCXRJPGCollection
from .nih14 import NIH14Collection
from .phantom import PhantomCollection
from .rsna import RSNACollection
from .siim import SIIMCollection
from .vinbigdata import VinBigDataCollection
from .vindr import VinDrCollection

KINDS: dict[str, type[Collection]] = {
    kind.name: kind
    for kind in (
        FolderCollection,
        HFCollection,
        NIH14Collection,
        VinBigDataCollection,
        VinDrCollection,
        RSNACollection,
        SIIMCollection,
        CheXpertCollection,
        MIMICCXRJPGCollection,
        PhantomCollection,
    )
}

__all__ = [
    "KINDS",
    "SPLITS",
    "CheXpertCollection",
    "Collection",
    "FolderCollection",
    "HFCollection",
    "Listing",
    "MIMICCXRJPGCollection",
    "NIH14Collection",
    "PhantomCollection",
    "RSNACollection",
    "Record",
    "SIIMCollection",
    "VinBigDataCollection",
    "VinDrCollection",
]
