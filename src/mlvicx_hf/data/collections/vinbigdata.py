# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""VinBigData as released on Kaggle: 15,000 radiographs, 14 findings boxed by three readers each."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import Listing, ReleasedCollection
from .readers import (
    CORNERS,
    NO_FINDING_CLASS,
    SIZES,
    Reading,
    box_notes,
    check_readers,
    check_row,
    find_table,
    images_by_stem,
    make_record,
    parse_corners,
    votes_needed,
)
from .tables import Columns, read_columns, require_columns

_FINDINGS = (  # in the order of class_id
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
_CLASSES = {str(number): name for number, name in enumerate((*_FINDINGS, NO_FINDING_CLASS))}


class VinBigDataCollection(ReleasedCollection):
    """The competition's folder: `train.csv`, and images in `train/`, `images/` or the folder itself.

    The images are frontal (PA) and have no patients. The 3,000 test images have no labels and are not read. Boxes are
    in pixels of the original images. If the files on the disk are not DICOM, the original sizes come from the columns
    `width` and `height` of `train.csv`, or from `train_meta.csv` (`image_id, dim0, dim1`: height and width).

    Args:
        root: the folder.
        readers: "any" counts a finding that one reader saw; "majority" counts one that two of the three readers saw.
            Boxes are those of all readers, of the findings that count.
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
        files = images_by_stem([self.root / "train", self.root / "images", self.root])
        records = []
        for image, reading in readings.items():
            path = files.get(image, self.root / "train" / f"{image}.dicom")
            records.append(make_record(self.root, path, reading, _FINDINGS, self.needed, frame=sizes.get(image)))
        notes = [
            "14 findings are scored; No finding is no column",
            "the release has no patients: each image is counted as a patient of its own",
            "the competition's 3,000 test images have no labels and are left out",
            *box_notes(records, readings.values()),
        ]
        return Listing(records, _FINDINGS, notes=notes, policy={"readers": self.readers}, patients_known=False)

    def _sizes(self, table: Path, columns: Columns) -> dict[str, tuple[int, int]]:
        """Read width and height of the original images, if a table has them."""
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
    """Read the readings of each image, in the order of the table."""
    readings: dict[str, Reading] = defaultdict(Reading)
    rows = zip(*(columns[name] for name in ("image_id", "class_name", "class_id", "rad_id")), strict=True)
    corners = zip(*(columns[name] for name in CORNERS), strict=True)
    for number, ((image, name, key, reader), corner) in enumerate(zip(rows, corners, strict=True), start=1):
        check_row(table, number, image, reader)
        if _CLASSES.get(key) != name:
            raise UserError(
                f"{table}: row {number}, columns class_id, class_name: {key!r}, {name!r} found; expected one of "
                f"{some((f'{key} {name}' for key, name in _CLASSES.items()), 15)}"
            )
        readings[image].readers.add(reader)
        if name != NO_FINDING_CLASS:
            readings[image].votes[name].add(reader)
            readings[image].boxes.append(parse_corners(table, number, name, corner))
        elif any(corner):
            raise UserError(f"{table}: row {number}: a box found for {NO_FINDING_CLASS}; expected none")
    return dict(readings)
