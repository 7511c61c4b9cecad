# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""VinBigData as released on Kaggle: 15,000 radiographs, 14 findings boxed by three readers each.

Also what it shares with `vindr`, the same radiographs as released on PhysioNet.
"""

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
from .base import Box, Listing, Record, ReleasedCollection
from .tables import Columns, read_columns, require_columns

FINDINGS = (  # in the order of class_id
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Nodule/Mass",
    "Other lesion",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
)
NO_FINDING = "No finding"
CLASSES = {str(number): name for number, name in enumerate((*FINDINGS, NO_FINDING))}
CORNERS = ("x_min", "y_min", "x_max", "y_max")
NUM_READERS = 3
READERS = {"any": 1, "majority": 2}  # how many of the three must see a finding
SUFFIXES = (*DICOM_SUFFIXES, ".jpeg", ".jpg", ".png")
SIZES = "train_meta.csv"


@dataclass
class Reading:
    """What the readers of one image said: who they are, who saw each finding, and the boxes of all."""

    readers: set[str] = field(default_factory=set)
    votes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    boxes: list[Box] = field(default_factory=list)

    def seen(self, needed: int) -> set[str]:
        """Findings that so many readers saw."""
        return {finding for finding, readers in self.votes.items() if len(readers) >= needed}


class VinBigDataCollection(ReleasedCollection):
    """The competition's folder: `train.csv`, and images in `train/`, `images/` or the folder itself.

    The images are frontal (PA) and have no patients. The 3,000 test images have no labels and are left alone. Boxes
    are in pixels of the original images: where those on disk are no DICOM files, their sizes come from the columns
    `width` and `height` of `train.csv`, or from `train_meta.csv` (`image_id, dim0, dim1`: height and width).

    Args:
        root: the folder.
        readers: "any" counts a finding that one reader saw, "majority" one that two of the three saw. Boxes are all
            readers' boxes of the findings that count.
    """

    name = "vinbigdata"
    source = "vinbigdata"

    def __init__(self, root: str | Path, *, readers: str = "any") -> None:
        self.root = Path(root)
        self.readers = readers
        self.needed = votes_needed(readers)

    def list_all(self) -> Listing:
        """List the images of `train.csv`."""
        table = find_table(self.root, "train.csv")
        columns = read_columns(table)
        require_columns(table, columns, ("image_id", "class_name", "class_id", "rad_id", *CORNERS))
        readings = _readings(table, columns)
        check_readers(table, readings)
        sizes = self._sizes(table, columns)
        files = find_images([self.root / "train", self.root / "images", self.root])
        records = []
        for image, reading in readings.items():
            path = files.get(image, self.root / "train" / f"{image}.dicom")
            records.append(make_record(self.root, path, reading, FINDINGS, self.needed, frame=sizes.get(image)))
        notes = [
            "14 findings are scored; No finding is no column",
            "the release has no patients: each image is counted as a patient of its own",
            "the competition's 3,000 test images have no labels and are left out",
            *box_notes(records, readings.values()),
        ]
        return Listing(records, FINDINGS, notes=notes, policy={"readers": self.readers}, patients_known=False)

    def _sizes(self, table: Path, columns: Columns) -> dict[str, tuple[int, int]]:
        """Width and height of the original images, where a table has them."""
        names = ("width", "height")
        if (self.root / SIZES).is_file():
            table, names = self.root / SIZES, ("dim1", "dim0")
            columns = read_columns(table)
            require_columns(table, columns, ("image_id", *names))
        elif not set(names) <= columns.keys():
            return {}
        for name in names:
            for number, value in enumerate(columns[name], start=1):
                if not value.isdecimal() or int(value) == 0:
                    raise UserError(f"{table}: row {number}, column {name}: {value!r} found; expected pixels")
        images, widths, heights = (columns[name] for name in ("image_id", *names))
        return {image: (int(width), int(height)) for image, width, height in zip(images, widths, heights, strict=True)}


def _readings(table: Path, columns: Columns) -> dict[str, Reading]:
    """Readings by image, in the order of the table."""
    readings: dict[str, Reading] = defaultdict(Reading)
    rows = zip(*(columns[name] for name in ("image_id", "class_name", "class_id", "rad_id")), strict=True)
    corners = zip(*(columns[name] for name in CORNERS), strict=True)
    for number, ((image, name, key, reader), corner) in enumerate(zip(rows, corners, strict=True), start=1):
        check_row(table, number, image, reader)
        if CLASSES.get(key) != name:
            raise UserError(
                f"{table}: row {number}, columns class_id, class_name: {key!r}, {name!r} found; expected one of "
                f"{some((f'{key} {name}' for key, name in CLASSES.items()), 15)}"
            )
        readings[image].readers.add(reader)
        if name != NO_FINDING:
            readings[image].votes[name].add(reader)
            readings[image].boxes.append(parse_box(table, number, name, corner))
        elif any(corner):
            raise UserError(f"{table}: row {number}: a box found for {NO_FINDING}; expected none")
    return dict(readings)


def votes_needed(readers: str) -> int:
    """How many readers must see a finding.

    Raises:
        ValueError: another policy than "any" and "majority".
    """
    if readers not in READERS:
        raise UserError(f"readers={readers!r} found; expected one of {', '.join(READERS)}")
    return READERS[readers]


def check_row(table: Path, number: int, image: str, reader: str) -> None:
    """Refuse a row whose image is no plain name, or which has no reader."""
    if Path(image).name != image or "\\" in image or not image or not reader:
        raise UserError(
            f"{table}: row {number}: image_id {image!r}, rad_id {reader!r} found; expected a file's name and a reader"
        )


def check_readers(table: Path, readings: dict[str, Reading]) -> None:
    """Refuse images that have not got their three readers: what a majority is would be undefined."""
    counts = {image: len(reading.readers) for image, reading in readings.items()}
    strange = [f"{image} ({count})" for image, count in counts.items() if count != NUM_READERS]
    if strange:
        raise UserError(
            f"{table}: {len(strange)} image(s) with more or fewer readers found: {some(strange)}; expected "
            f"{NUM_READERS} different rad_id each"
        )


def find_table(root: Path, name: str) -> Path:
    """The file `name` below `root`; raises FileNotFoundError where it is not there."""
    path = root / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the release's table {name} below {root}")
    return path


def find_images(folders: Iterable[Path]) -> dict[str, Path]:
    """Image files by name without suffix; earlier folders first, and DICOM before other files of one name."""
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_file()):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    found.setdefault(stem, folder / name)
    return found


def parse_box(table: Path, number: int, label: str, corners: tuple[str, ...]) -> Box:
    """The box of a row.

    Raises:
        ValueError: corners that are no numbers, or that enclose nothing.
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
    """Record of an image. Its boxes are unknown where it is no DICOM file and the size of the original is unknown."""
    seen = reading.seen(needed)
    labels = tuple(float(name in seen) for name in names)
    boxes = tuple(box for box in reading.boxes if box.label in seen)
    framed = frame is not None or path.suffix.lower() in DICOM_SUFFIXES
    name = path.relative_to(root).as_posix()
    return Record(name, path.stem, "PA", labels, split, path, boxes=boxes if framed else None, frame=frame)


def box_notes(records: list[Record], readings: Iterable[Reading]) -> list[str]:
    """How many boxes of the records were left out, and why."""
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
