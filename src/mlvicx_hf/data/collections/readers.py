# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read findings that several readers drew, as VinBigData and VinDr-CXR release them."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import DICOM_SUFFIXES
from .base import Box, Record

NO_FINDING_CLASS = "No finding"
CORNERS = ("x_min", "y_min", "x_max", "y_max")
NUM_READERS = 3
READERS = {"any": 1, "majority": 2}  # policy → how many of the three readers must see a finding
SUFFIXES = (*DICOM_SUFFIXES, ".jpeg", ".jpg", ".png")
SIZES = "train_meta.csv"


@dataclass
class Reading:
    """The readers of one image, the readers who saw each finding, and the boxes of all."""

    readers: set[str] = field(default_factory=set)
    votes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    boxes: list[Box] = field(default_factory=list)

    def seen(self, needed: int) -> set[str]:
        """Find the findings that at least so many readers saw."""
        return {finding for finding, readers in self.votes.items() if len(readers) >= needed}


def votes_needed(readers: str) -> int:
    """Find how many readers must see a finding.

    Raises:
        UserError: the policy is neither "any" nor "majority".
    """
    if readers not in READERS:
        raise UserError(f"readers={readers!r} found; expected one of {', '.join(READERS)}")
    return READERS[readers]


def check_row(table: Path, number: int, image: str, reader: str) -> None:
    """Refuse a row whose image is not a plain name, or that has no reader."""
    if Path(image).name != image or "\\" in image or not image or not reader:
        raise UserError(
            f"{table}: row {number}: image_id {image!r}, rad_id {reader!r} found; expected a file's name and a reader"
        )


def check_readers(table: Path, readings: dict[str, Reading]) -> None:
    """Refuse images without exactly three readers, for which a majority would be undefined."""
    counts = {image: len(reading.readers) for image, reading in readings.items()}
    strange = [f"{image} ({count})" for image, count in counts.items() if count != NUM_READERS]
    if strange:
        raise UserError(
            f"{table}: {len(strange)} image(s) with more or fewer readers found: {some(strange)}; expected "
            f"{NUM_READERS} different rad_id each"
        )


def find_table(root: Path, name: str) -> Path:
    """Find the table `name` below `root`. Raise FileNotFoundError if it is absent."""
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the release's table {name} below {root}")
    return path


def images_by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    """Map names without suffix to image files. Prefer earlier folders, and DICOM files over others."""
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_file()):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    found.setdefault(stem, folder / name)
    return found


def parse_corners(table: Path, number: int, label: str, corners: tuple[str, ...]) -> Box:
    """Read the box of a row.

    Raises:
        UserError: the corners are no numbers, or enclose nothing.
    """
    try:
        box = Box(label, *map(float, corners))
    except ValueError:
        box = None
    if box is None or not all(map(math.isfinite, box[1:])) or box.x_min >= box.x_max or box.y_min >= box.y_max:
        raise UserError(
            f"{table}: row {number}, columns {', '.join(CORNERS)}: {', '.join(map(repr, corners))} found for {label}; "
            "expected numbers with min below max"
        )
    return box


def make_record(
    root: Path,
    path: Path,
    reading: Reading,
    names: tuple[str, ...],
    needed: int,
    *,
    split: str | None = None,
    frame: tuple[int, int] | None = None,
) -> Record:
    """Make the record of an image. Its boxes are unknown if it is no DICOM file and its original size is unknown."""
    seen = reading.seen(needed)
    labels = tuple(float(name in seen) for name in names)
    boxes = tuple(box for box in reading.boxes if box.label in seen)
    framed = frame is not None or path.suffix.lower() in DICOM_SUFFIXES
    name = path.relative_to(root).as_posix()
    return Record(name, path.stem, "PA", labels, split, path, boxes=boxes if framed else None, frame=frame)


def box_notes(records: list[Record], readings: Iterable[Reading]) -> list[str]:
    """Note how many boxes were left out, and why."""
    outvoted = sum(
        len(reading.boxes) - len(record.boxes)
        for record, reading in zip(records, readings, strict=True)
        if record.boxes is not None
    )
    unframed = sum(record.boxes is None for record in records)
    notes = [f"{outvoted} boxes left out, of findings that too few readers saw"] if outvoted else []
    if unframed:
        notes.append(
            f"boxes of {unframed} images left out: the files are no DICOM and may have been resized, and no table "
            f"gives the size of the originals ({SIZES} with image_id, dim0, dim1)"
        )
    return notes
