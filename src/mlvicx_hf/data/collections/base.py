# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""What a collection of radiographs is, and what all of them need: tables, views, file names."""

from __future__ import annotations

import csv
import gzip
import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from mlvicx_hf.common.errors import UserError

from ..masks import check_mask_names

SPLITS = ("train", "validation", "test")
VIEWS = {"PA": "PA", "AP": "AP", "L": "LATERAL", "LL": "LATERAL", "RL": "LATERAL", "LATERAL": "LATERAL"}
UNKNOWN_VIEWS = ("", "UNKNOWN")


class Box(NamedTuple):
    """Where a finding is, in pixels of the record's `frame`; the lower right corner is exclusive.

    Attributes:
        label: name of the finding, as the collection spells its labels.
        x_min: left edge.
        y_min: upper edge.
        x_max: right edge.
        y_max: lower edge.
    """

    label: str
    x_min: float
    y_min: float
    x_max: float
    y_max: float


class Drawing(NamedTuple):
    """A drawn radiograph.

    Attributes:
        pixels: uint8 [H, W].
        mask: values [H, W] as a mask file holds them; None where it is unknown.
    """

    pixels: np.ndarray
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One radiograph: where its pixels come from (a file, or a drawing) and what is known of it.

    Attributes:
        name: what the collection calls it, usually the file relative to the root.
        patient_id: no patient is ever in two splits.
        view: PA, AP, LATERAL or UNKNOWN.
        labels: 1, 0 or NaN (unknown) in the order of the collection's label names; empty without labels.
        split: train, validation or test where the collection says so.
        path: file to read.
        draw: where there is no file, draws the pixels and perhaps their mask; it must pickle.
        load: where the file is inside another one, gives its content; it must pickle.
        mask_path: file of the mask; None where it is unknown or drawn.
        draw_mask: where the mask is in no file but in a table, draws its values [H, W] as a mask file holds them, with
            the aspect ratio of the image; it must pickle.
        boxes: None where they are unknown; empty where somebody looked and drew none.
        frame: width and height in pixels that the boxes are measured in; None for the image's own.
        sex: F, M, or empty for unknown.
        age: years; NaN for unknown.
    """

    name: str
    patient_id: str
    view: str = "UNKNOWN"
    labels: tuple[float, ...] = ()
    split: str | None = None
    path: Path | None = None
    draw: Callable[[], Drawing] | None = None
    load: Callable[[], bytes] | None = None
    mask_path: Path | None = None
    draw_mask: Callable[[], np.ndarray] | None = None
    boxes: tuple[Box, ...] | None = None
    frame: tuple[int, int] | None = None
    sex: str = ""
    age: float = math.nan


@dataclass(frozen=True)
class Listing:
    """What a collection holds, before any pixel is read.

    Attributes:
        records: the radiographs that are there.
        label_names: names of the labels.
        exclusive: exactly one label of each image is positive (one class each).
        missing: files that are listed but absent.
        notes: what the user should know, one line each.
        mask_names: empty without masks. One name: binary masks of that structure. Several: classes by pixel value, of
            which 0 is the background.
        policy: choices that made the labels, such as {"readers": "any"}; every result names them.
        patients_known: false where each image counts as a patient of its own, for lack of anything better.
        patient_source: whose patient numbers these are, where it is not the collection itself: caches with the same
            one can be compared patient by patient.
        contents: for collections that can only be read in order: the content of every record from a given one on.

    Raises:
        ValueError: mask names that are empty or repeated.
    """

    records: list[Record]
    label_names: tuple[str, ...] = ()
    exclusive: bool = False
    missing: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    mask_names: tuple[str, ...] = ()
    policy: dict[str, str] = field(default_factory=dict)
    patients_known: bool = True
    patient_source: str | None = None
    contents: Callable[[int], Iterator[bytes]] | None = None

    def __post_init__(self) -> None:
        check_mask_names(self.mask_names)


class Collection(ABC):
    """A collection of radiographs. To add one, say its name and list its records.

    Attributes:
        name: how `prepare_data.py --collection` calls it.
        source: how the cache names where an image comes from.
        synthetic: drawn, not taken of a patient.
    """

    name: str
    source: str
    synthetic: bool = False

    @abstractmethod
    def read(self) -> Listing:
        """List the radiographs; raises ValueError or OSError for files that do not look as expected."""


class ReleasedCollection(Collection):
    """A collection whose release brings tables of its own."""

    @abstractmethod
    def list_all(self) -> Listing:
        """Everything that the tables list, whether or not its files are there."""

    def read(self) -> Listing:
        """List the radiographs whose files are there; the others are `missing`."""
        listing = self.list_all()
        records, missing = keep_present(listing.records)
        return replace(listing, records=records, missing=missing)


def keep_present(records: Iterable[Record]) -> tuple[list[Record], tuple[str, ...]]:
    """Records whose image, and mask where there is one, are on the disk; and the names of the others.

    Folders are listed once each, which is faster than to ask for every file.
    """
    files: dict[str, set[str]] = {}

    def there(path: Path) -> bool:
        folder, name = os.path.split(path)
        if folder not in files:
            with suppress(OSError), os.scandir(folder) as entries:
                files[folder] = {entry.name for entry in entries if entry.is_file()}
        return name in files.setdefault(folder, set())

    present, missing = [], []
    for record in records:
        if not (there(record.path) if record.path is not None else record.draw or record.load):
            missing.append(record.name)
        elif record.mask_path is not None and not there(record.mask_path):
            missing.append(f"{record.mask_path.name} (mask of {record.name})")
        else:
            present.append(record)
    return present, tuple(missing)


def normalize_view(view: str) -> str | None:
    """PA, AP, LATERAL or UNKNOWN; None for a view that is not understood. `AP Supine` counts as AP."""
    word = view.strip().upper()
    if word in UNKNOWN_VIEWS:
        return "UNKNOWN"
    return VIEWS.get(word) or VIEWS.get(word.split()[0])


def read_csv(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comma-separated file (perhaps .gz), all text, without surrounding blanks.

    Empty lines are skipped. Rows may have fewer or more fields than the header: `check_fields` judges.
    """
    try:
        opener = gzip.open if path.suffix.lower() == ".gz" else open
        with opener(path, "rt", newline="", encoding="utf-8-sig") as file:
            rows = [[field.strip() for field in row] for row in csv.reader(file) if row]
    except (csv.Error, UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable CSV file in UTF-8: {error}") from error
    if not rows:
        raise UserError(f"{path}: empty file found; expected a header line")
    return rows[0], rows[1:]


def check_fields(path: Path, header: list[str], rows: list[list[str]]) -> None:
    """Refuse rows that are not as long as the header."""
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise UserError(f"{path}: row {number} has {len(row)} fields; expected {len(header)} as in the header")


@cache
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def file_below(root: Path, name: str, where: str = "") -> Path:
    """The file `name` below `root`, which may not lead out of it by `..`, an absolute path or a link.

    Args:
        root: folder.
        name: relative path.
        where: how the error message begins.

    Raises:
        ValueError: it does.
    """
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or Path(name).is_absolute():
        raise UserError(f"{where}file {name!r} found; expected a path below the root {root}")
    path = root / relative
    real = os.path.realpath(path) if path.is_symlink() else os.path.join(_real(str(path.parent)), path.name)
    if not Path(real).is_relative_to(_real(str(root))):
        raise UserError(f"{where}file {name!r} is a link that leads out of the root {root}")
    return path
