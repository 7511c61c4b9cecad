# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""NIH ChestX-ray14 as released: 112,120 frontal radiographs of 30,805 patients, 14 text-mined findings."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..splits import check_no_patient_overlap, split_by_patient
from .base import Box, Listing, Record, ReleasedCollection, check_fields, normalize_view, read_csv
from .folder import split_findings
from .tables import AGE, OLDEST, parse_age, parse_sex

FINDINGS = (
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
TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
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
FRAME = (1024, 1024)  # pixels that boxes are measured in: the released size of all images
VALIDATION_SHARE = 0.1  # of the patients of train_val_list.txt; ours, the release has no validation part


class NIH14Collection(ReleasedCollection):
    """The release's folder: table, official lists, and images flat in `images/` or in `images_001…012/images/`.

    Where `BBox_List_2017.csv` lies there, the images that it lists have boxes; of the others none are known.

    Test is the official list. Validation is a tenth of the patients of `train_val_list.txt`, drawn over the whole list
    whatever part of the images is on disk.

    Args:
        root: folder of the release.
        metadata: the table; by default the 2020 version, else the 2017 one.
        seed: seeds the choice of the validation patients.
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
        return Listing(records, FINDINGS, notes=notes)

    def _find_table(self) -> Path:
        candidates = [Path(self.metadata)] if self.metadata is not None else []
        candidates += [self.root / name for name in ((self.metadata,) if self.metadata is not None else TABLES)]
        for path in candidates:
            if path.is_file():
                return path
        raise FileNotFoundError(f"{self.root}: none of {some(map(str, candidates))} found; expected NIH's table")

    def _find_images(self) -> dict[str, Path]:
        """PNG files by name over `images/` and `images_*/images/`."""
        folders = [self.root / "images", *(folder / "images" for folder in sorted(self.root.glob("images_*")))]
        return {
            entry.name: Path(entry.path)
            for folder in folders
            if folder.is_dir()
            for entry in os.scandir(folder)
            if entry.name.lower().endswith(".png") and entry.is_file()
        }

    def _read_boxes(self) -> dict[str, tuple[Box, ...]]:
        """Boxes by image, where the list is there."""
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
            if label not in FINDINGS:
                expected = some((*FINDINGS, *BOX_LABELS), 99)
                raise UserError(
                    f"{table}: row {number}, column Finding Label: {finding!r} found; expected one of {expected}"
                )
            box = parse_box(f"{table}: row {number}", label, BOX_HEADER[2:], corner)
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
    """Rows of 11 fields; the empty twelfth of the 2017 release is dropped from header and rows."""
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


def parse_box(where: str, label: str, columns: Sequence[str], values: Sequence[str]) -> Box:
    """Box in `FRAME` from left edge, upper edge, width and height; for RSNA's boxes as well.

    Args:
        where: how the error message begins.
        label: finding.
        columns: names of the four columns.
        values: their cells.

    Raises:
        ValueError: no numbers, or a box that is empty or leaves the frame.
    """
    side = FRAME[0]
    numbers = []
    for column, value in zip(columns, values, strict=True):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= side:
            raise UserError(f"{where}, column {column}: {value!r} found; expected pixels from 0 to {side}")
        numbers.append(number)
    x, y, width, height = numbers
    if not (width and height) or x + width > side or y + height > side:
        raise UserError(
            f"{where}: a box of {width:g} x {height:g} pixels at ({x:g}, {y:g}) found; expected one inside "
            f"{side} x {side}, not empty"
        )
    return Box(label, x, y, x + width, y + height)


def add_box(where: str, boxes: tuple[Box, ...], box: Box) -> tuple[Box, ...]:
    """The boxes of an image and one more, which must be another one."""
    if box in boxes:
        raise UserError(f"{where}: a box of {box.label} found for the second time; expected each once")
    return (*boxes, box)


def check_sex(where: str, value: str) -> str:
    """F, M, or empty for unknown; anything else is refused."""
    sex = parse_sex(value)
    if sex is None:
        raise UserError(f"{where}: {value!r} found; expected F, M or nothing")
    return sex


def check_age(where: str, value: str) -> float:
    """Years; NaN where it is empty or implausible (old releases have 411), and what is no age is refused."""
    age = parse_age(value)
    if age is None and not AGE.fullmatch(value):
        raise UserError(f"{where}: {value!r} found; expected an age such as 57, 058Y, 013M or 011D")
    return math.nan if age is None else age


def note_ages(values: Sequence[str], ages: Sequence[float]) -> list[str]:
    """What the user should know of the ages that were given and not believed."""
    count = sum(bool(value) and math.isnan(age) for value, age in zip(values, ages, strict=True))
    return [f"{count} age(s) above {OLDEST} years are counted as unknown"] if count else []


def _patient(table: Path, number: int, row: list[str]) -> str:
    """Patient of a file name such as 00000001_000.png, checked against the table's own column."""
    patient = row[0].split("_")[0]
    if not patient.isdigit() or not row[3].isdigit() or int(patient) != int(row[3]):
        raise UserError(f"{table}: row {number}: Patient ID {row[3]!r} found for {row[0]!r}; expected its first number")
    return patient


def _labels(table: Path, number: int, value: str) -> tuple[float, ...]:
    found = split_findings(table, number, "Finding Labels", value)
    if found is None or not found <= set(FINDINGS):
        raise UserError(
            f"{table}: row {number}, column Finding Labels: {value!r} found; expected No Finding or, joined by |, "
            f"some of {', '.join(FINDINGS)}"
        )
    return tuple(float(finding in found) for finding in FINDINGS)
