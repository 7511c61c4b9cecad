# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""NIH ChestX-ray14 as released: 112,120 frontal radiographs of 30,805 patients, 14 text-mined findings."""

from __future__ import annotations

import os
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..splits import check_no_patient_overlap, split_by_patient
from .base import Box, Listing, Record, ReleasedCollection, check_fields, normalize_view, read_csv
from .boxes import FRAME, add_box, parse_framed_box
from .labels import split_findings
from .people import check_age, check_sex, note_ages

NIH_FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
HEADER = [
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width",  # the release does not quote the comma in the brackets
    "Height]",
    "OriginalImagePixelSpacing[x",
    "y]",
]
BOXES = "BBox_List_2017.csv"
BOX_HEADER = ["Image Index", "Finding Label", "Bbox [x", "y", "w", "h]"]  # empty columns follow
BOX_LABELS = {"Infiltrate": "Infiltration"}  # how the list of boxes spells it
VALIDATION_SHARE = 0.1  # of the patients of train_val_list.txt; ours, the release has no validation part


class NIH14Collection(ReleasedCollection):
    """The release's folder: table, official lists, and images flat in `images/` or in `images_001…012/images/`.

    If `BBox_List_2017.csv` is there, the images that it lists have boxes. The boxes of other images are unknown.

    Test is the official list. Validation is a tenth of the patients of `train_val_list.txt`, drawn from the whole list
    whatever part of the images is on the disk.

    Args:
        root: folder of the release.
        metadata: the table; by default the 2020 version, else the 2017 one.
        seed: seed for the choice of the validation patients.
    """

    name = "nih14"
    source = "nih14"

    def __init__(self, root: str | Path, metadata: str | Path | None = None, *, seed: int = 0) -> None:
        self.root = Path(root)
        self.metadata = metadata
        self.seed = seed

    def read(self) -> Listing:
        """List the images of the table that are on disk."""
        listing = super().read()
        if not listing.records:
            raise FileNotFoundError(f"{self.root}: no images found; expected images/ or images_001/images/ and so on")
        return listing

    def list_all(self) -> Listing:
        """List the images of the table."""
        table = self._find_table()
        rows = _read_table(table)
        names = [row[0] for row in rows]
        patients = [_patient(table, number, row) for number, row in enumerate(rows, start=1)]
        labels = [_labels(table, number, row[1]) for number, row in enumerate(rows, start=1)]
        splits = self._splits(names, patients, labels)
        files = self._find_images()
        boxes = self._read_boxes()
        records = []
        for index, (name, row) in enumerate(zip(names, rows, strict=True)):
            where = f"{table}: row {index + 1}, column "
            records.append(
                Record(
                    name,
                    patients[index],
                    normalize_view(row[6]) or "UNKNOWN",
                    labels[index],
                    splits[index],
                    files.get(name),
                    boxes=boxes.get(name),
                    frame=FRAME,
                    sex=check_sex(f"{where}Patient Gender", row[5]),
                    age=check_age(f"{where}Patient Age", row[4]),
                )
            )
        notes = ["14 findings are scored; No Finding is no column"]
        notes += note_ages([row[4] for row in rows], [record.age for record in records])
        strays = len(boxes.keys() - set(names))
        if strays:
            notes.append(f"{BOXES} lists {strays} image(s) that {table.name} does not: their boxes are left out")
        return Listing(records, NIH_FINDINGS, notes=notes)

    def _find_table(self) -> Path:
        candidates = [Path(self.metadata)] if self.metadata is not None else []
        candidates += [self.root / name for name in ((self.metadata,) if self.metadata is not None else _TABLES)]
        for path in candidates:
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root}: none of {some(map(str, candidates))} found; expected NIH's table")

    def _find_images(self) -> dict[str, Path]:
        """Find the PNG files of `images/` and `images_*/images/` by name."""
        folders = [self.root / "images", *(folder / "images" for folder in sorted(self.root.glob("images_*")))]
        return {
            entry.name: Path(entry.path)
            for folder in folders
            if folder.is_dir()
            for entry in os.scandir(folder)
            if entry.name.lower().endswith(".png") and entry.is_file()
        }

    def _read_boxes(self) -> dict[str, tuple[Box, ...]]:
        """Read the boxes of each image, if their list exists."""
        table = self.root / BOXES
        if not table.is_file():
            return {}
        header, rows = read_csv(table)
        header, rows = _without_empty_end(header), [_without_empty_end(row) for row in rows]
        if header != BOX_HEADER:
            raise UserError(f"{table}: columns {', '.join(header)} found; expected {', '.join(BOX_HEADER)}")
        check_fields(table, header, rows)
        boxes: dict[str, tuple[Box, ...]] = {}
        for number, (name, finding, *corner) in enumerate(rows, start=1):
            label = BOX_LABELS.get(finding, finding)
            if label not in NIH_FINDINGS:
                expected = some((*NIH_FINDINGS, *BOX_LABELS), 99)
                raise UserError(
                    f"{table}: row {number}, column Finding Label: {finding!r} found; expected one of {expected}"
                )
            box = parse_framed_box(f"{table}: row {number}", label, BOX_HEADER[2:], corner)
            boxes[name] = add_box(f"{table}: row {number}", boxes.get(name, ()), box)
        return boxes

    def _splits(self, names: list[str], patients: list[str], labels: list[tuple[float, ...]]) -> list[str]:
        train_val = self._read_list("train_val_list.txt")
        test = self._read_list("test_list.txt")
        strays = [name for name in names if (name in train_val) == (name in test)]
        if strays:
            raise UserError(
                f"{self.root}: {len(strays)} image(s) of the table in neither or both of train_val_list.txt and "
                f"test_list.txt: {some(strays)}; expected each in one of them"
            )
        rows = [index for index, name in enumerate(names) if name in train_val]
        train_patients = [patients[index] for index in rows]
        test_patients = [patient for name, patient in zip(names, patients, strict=True) if name in test]
        check_no_patient_overlap({"train_val_list.txt": train_patients, "test_list.txt": test_patients})
        shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
        carved = split_by_patient(train_patients, [labels[index] for index in rows], shares, self.seed)
        split = dict(zip(rows, carved, strict=True))
        return [split.get(index, "test") for index in range(len(names))]

    def _read_list(self, name: str) -> set[str]:
        path = self.root / name
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected NIH's official list, one image a line")
        return {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}


def _read_table(table: Path) -> list[list[str]]:
    """Read rows of 11 fields. Drop the empty twelfth field of the 2017 release."""
    header, rows = read_csv(table)
    if header[-1] == "" and all(row[-1] == "" for row in rows if len(row) == len(header)):
        length = len(header)
        header, rows = header[:-1], [row[:-1] if len(row) == length else row for row in rows]
    if header != HEADER:
        raise UserError(f"{table}: columns {', '.join(header)} found; expected {', '.join(HEADER)}")
    check_fields(table, header, rows)
    repeated = len(rows) - len({row[0] for row in rows})
    if repeated:
        raise UserError(f"{table}: {repeated} image(s) found in more than one row; expected one row each")
    return rows


def _without_empty_end(row: list[str]) -> list[str]:
    end = len(row)
    while end and not row[end - 1]:
        end -= 1
    return row[:end]


def _patient(table: Path, number: int, row: list[str]) -> str:
    """Find the patient of a file such as 00000001_000.png, and compare it with the table's own column."""
    patient = row[0].split("_")[0]
    if not patient.isdigit() or not row[3].isdigit() or int(patient) != int(row[3]):
        raise UserError(f"{table}: row {number}: Patient ID {row[3]!r} found for {row[0]!r}; expected its first number")
    return patient


def _labels(table: Path, number: int, value: str) -> tuple[float, ...]:
    found = split_findings(table, number, "Finding Labels", value)
    if found is None or not found <= set(NIH_FINDINGS):
        raise UserError(
            f"{table}: row {number}, column Finding Labels: {value!r} found; expected No Finding or, joined by |, "
            f"some of {', '.join(NIH_FINDINGS)}"
        )
    return tuple(float(finding in found) for finding in NIH_FINDINGS)
