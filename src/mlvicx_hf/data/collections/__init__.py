# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Collections of radiographs, one module each; what they share is in `base`."""

from .base import SPLITS, Collection, Listing, Record
from .folder import FolderCollection
from .nih14 import NIH14Collection
from .phantom import PhantomCollection

__all__ = ["SPLITS", "Collection", "FolderCollection", "Listing", "NIH14Collection", "PhantomCollection", "Record"]
