# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""NIH ChestX-ray14 as released: 112,120 frontal radiographs of 30,805 patients, 14 text-mined findings."""

from __future__ import annotations

import os
from pathlib import Path

from ..splits import check_no_patient_overlap, split_by_patient
from .base import Collection, Listing, Record, check_fields, normalize_view, read_csv, some
from .folder import split_findings

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
VALIDATION_SHARE = 0.1  # of the patients of train_val_list.txt; ours, the release has no validation part


class NIH14Collection(Collection):
    """The release's folder: table, official lists, and images flat in `images/` or in `images_001…012/images/`.

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
        table = self._find_table()
        rows = _read_table(table)
        names = [row[0] for row in rows]
        patients = [_patient(table, number, row) for number, row in enumerate(rows, start=1)]
        labels = [_labels(table, number, row[1]) for number, row in enumerate(rows, start=1)]
        splits = self._splits(names, patients, labels)
        files = self._find_images()
        records = [
            Record(name, patient, normalize_view(row[6]) or "UNKNOWN", label, split, files[name])
            for name, patient, row, label, split in zip(names, patients, rows, labels, splits, strict=True)
            if name in files
        ]
        missing = tuple(name for name in names if name not in files)
        return Listing(records, FINDINGS, missing=missing, notes=["14 findings are scored; No Finding is no column"])

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
        found = [folder for folder in folders if folder.is_dir()]
        if not found:
            raise FileNotFoundError(f"{self.root}: no images found; expected images/ or images_001/images/ and so on")
        return {
            entry.name: Path(entry.path)
            for folder in found
            for entry in os.scandir(folder)
            if entry.name.lower().endswith(".png") and entry.is_file()
        }

    def _splits(self, names: list[str], patients: list[str], labels: list[tuple[float, ...]]) -> list[str]:
        train_val = self._read_list("train_val_list.txt")
        test = self._read_list("test_list.txt")
        strays = [name for name in names if (name in train_val) == (name in test)]
        if strays:
            raise ValueError(
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
        raise ValueError(f"{table}: columns {', '.join(header)} found; expected {', '.join(HEADER)}")
    check_fields(table, header, rows)
    repeated = len(rows) - len({row[0] for row in rows})
    if repeated:
        raise ValueError(f"{table}: {repeated} image(s) found in more than one row; expected one row each")
    return rows


def _patient(table: Path, number: int, row: list[str]) -> str:
    """Patient of a file name such as 00000001_000.png, checked against the table's own column."""
    patient = row[0].split("_")[0]
    if not patient.isdigit() or not row[3].isdigit() or int(patient) != int(row[3]):
        raise ValueError(
            f"{table}: row {number}: Patient ID {row[3]!r} found for {row[0]!r}; expected its first number"
        )
    return patient


def _labels(table: Path, number: int, value: str) -> tuple[float, ...]:
    found = split_findings(table, number, "Finding Labels", value)
    if found is None or not found <= set(FINDINGS):
        raise ValueError(
            f"{table}: row {number}, column Finding Labels: {value!r} found; expected No Finding or, joined by |, "
            f"some of {', '.join(FINDINGS)}"
        )
    return tuple(float(finding in found) for finding in FINDINGS)
