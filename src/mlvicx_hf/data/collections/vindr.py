# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""VinDr-CXR as released on PhysioNet: 18,000 frontal radiographs, 27 findings, an official test part."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..splits import split_by_patient
from .base import Listing, Record, ReleasedCollection
from .readers import (
    CORNERS,
    NO_FINDING_CLASS,
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

LOCAL_FINDINGS = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Clavicle fracture",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Nodule/Mass",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
    "Rib fracture",
    "Other lesion",
)
DISEASES = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases")  # of the whole image: no boxes
VINDR_FINDINGS = (*LOCAL_FINDINGS, *DISEASES)
COMMON_NAMES = {"Other disease": "Other diseases"}  # the test tables' spelling to that of the training tables
CONSENSUS = "consensus"
_SHARES = {"train": 0.9, "validation": 0.1}  # of the training images; ours, the release has no validation part


class VinDrCollection(ReleasedCollection):
    """The release's folder: `annotations/`, `train/` and `test/`.

    Test is the official part, read by a consensus of five. Validation is a tenth of the training images, the same for
    any `readers` and any part of the images on the disk. The images are frontal (PA) and have no patients.

    Args:
        root: folder of the release.
        readers: "any" counts a finding of a training image that one reader saw; "majority" counts one that two of the
            three readers saw. Boxes are those of all readers, of the findings that count.
        seed: seed for the choice of the validation images.
    """

    name = "vindr"
    source = "vindr"

    def __init__(self, root: str | Path, *, readers: str = "any", seed: int = 0) -> None:
        self.root = Path(root)
        self.readers = readers
        self.seed = seed
        self.needed = votes_needed(readers)

    def list_all(self) -> Listing:
        """List the images of both parts."""
        train, test = self._readings("train"), self._readings("test")
        check_readers(self.root / "annotations" / "image_labels_train.csv", train)
        both = train.keys() & test.keys()
        if both:
            raise UserError(f"{self.root}: {len(both)} image(s) in both train and test: {some(sorted(both))}")
        records = self._carve(self._records("train", train, self.needed), train)
        records += self._records("test", test, 1)
        notes = [
            "27 findings are scored; No finding is no column",
            "the release has no patients: each image is counted as a patient of its own",
            f"validation: a tenth of the release's training images, seed {self.seed}; test: the release's own",
            *box_notes(records, [*train.values(), *test.values()]),
        ]
        return Listing(records, VINDR_FINDINGS, notes=notes, policy={"readers": self.readers}, patients_known=False)

    def _records(self, part: str, readings: dict[str, Reading], needed: int) -> list[Record]:
        files = images_by_stem([self.root / part])
        records = []
        for image, reading in readings.items():
            path = files.get(image, self.root / part / f"{image}.dicom")
            records.append(make_record(self.root, path, reading, VINDR_FINDINGS, needed, split=part))
        return records

    def _carve(self, records: list[Record], readings: dict[str, Reading]) -> list[Record]:
        """Move a tenth to validation. Stratify by what any reader saw, so that the policy does not matter."""
        seen = [reading.seen(1) for reading in readings.values()]
        labels = [[float(name in findings) for name in VINDR_FINDINGS] for findings in seen]
        splits = split_by_patient(list(readings), labels, _SHARES, self.seed)
        return [replace(record, split=split) for record, split in zip(records, splits, strict=True)]

    def _readings(self, part: str) -> dict[str, Reading]:
        """Read votes from `image_labels_*.csv` and boxes from `annotations_*.csv`, by image."""
        table = find_table(self.root, f"annotations/image_labels_{part}.csv")
        columns = read_columns(table)
        columns = {COMMON_NAMES.get(name, name): cells for name, cells in columns.items()}
        require_columns(table, columns, ("image_id", *VINDR_FINDINGS))
        if part == "test":
            columns["rad_id"] = [CONSENSUS] * len(columns["image_id"])
        require_columns(table, columns, ("rad_id",))
        readings = _read_votes(table, columns)
        table = find_table(self.root, f"annotations/annotations_{part}.csv")
        columns = read_columns(table)
        require_columns(table, columns, ("image_id", "class_name", *CORNERS))
        _read_boxes(table, columns, readings)
        return readings


def _read_votes(table: Path, columns: Columns) -> dict[str, Reading]:
    readings: dict[str, Reading] = defaultdict(Reading)
    images, readers = columns["image_id"], columns["rad_id"]
    for number, (image, reader) in enumerate(zip(images, readers, strict=True), start=1):
        check_row(table, number, image, reader)
        if reader in readings[image].readers:
            raise UserError(f"{table}: row {number}: image {image} of {reader} found again; expected one row each")
        readings[image].readers.add(reader)
    for name in VINDR_FINDINGS:
        for number, value in enumerate(columns[name]):
            if value not in ("0", "1", "0.0", "1.0"):
                raise UserError(f"{table}: row {number + 1}, column {name}: {value!r} found; expected 0 or 1")
            if float(value):
                readings[images[number]].votes[name].add(readers[number])
    return dict(readings)


def _read_boxes(table: Path, columns: Columns, readings: dict[str, Reading]) -> None:
    """Add the boxes. Rows of No finding and of diseases have none."""
    corners = zip(*(columns[name] for name in CORNERS), strict=True)
    rows = zip(columns["image_id"], columns["class_name"], corners, strict=True)
    for number, (image, written, corner) in enumerate(rows, start=1):
        name = COMMON_NAMES.get(written, written)
        if image not in readings:
            raise UserError(f"{table}: row {number}: image_id {image!r} found; expected one of the image labels")
        if name not in (*VINDR_FINDINGS, NO_FINDING_CLASS):
            raise UserError(
                f"{table}: row {number}, column class_name: {written!r} found; expected one of "
                f"{some((*VINDR_FINDINGS, NO_FINDING_CLASS), 30)}"
            )
        if name in LOCAL_FINDINGS:
            readings[image].boxes.append(parse_corners(table, number, name, corner))
        elif any(corner):
            raise UserError(f"{table}: row {number}: a box found for {written}; expected none")
