# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Any folder of radiographs, with or without a table of metadata (the `imagefolder` convention)."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import IMAGE_SUFFIXES, image_files
from .base import Collection, Listing, Record, file_below
from .labels import FILE_COLUMNS, RESERVED_COLUMNS, label_values, read_labels
from .people import parse_age, parse_sex
from .tables import Columns, parse_known, read_columns, read_splits, read_views

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
MASK_COLUMN = "mask_file_name"


class FolderCollection(Collection):
    """Images below a folder.

    Without metadata every image found counts. With metadata (`metadata.csv`, `.jsonl` or `.parquet` in the folder, or
    the given file) the listed images count. Labels are the first of these: the columns of `label_columns` (0, 1, or
    empty for unknown); a column `label` with one class name per row; a column `labels` with names joined by `|`
    (`No Finding` for none, empty for unknown); all other columns that hold mostly 0, 1 and empty cells. Columns `sex`
    (F, M, female, male and the like) and `age` (years) are read if they exist.

    Args:
        root: the folder. Nothing outside it is read, not even through a link.
        metadata: table, found from the working directory or else from the root.
        file_column: column of the file, relative to the root; by default the first of `FILE_COLUMNS`.
        patient_column: column of the patient; by default `patient_id`.
        label_columns: columns that are labels.
        mask_column: column of the mask's file, relative to the root, empty if the mask is unknown; by default
            `mask_file_name` if it exists.
        mask_names: one structure (masks of 0 and 1, or 0 and 255), or the classes by pixel value, the background first.
        uncertain: what -1 in a label column means: "ignore" (unknown), "ones" or "zeros"; by default it is an error.
    """

    name = "folder"
    source = "folder"

    def __init__(
        self,
        root: str | Path,
        metadata: str | Path | None = None,
        *,
        file_column: str | None = None,
        patient_column: str | None = None,
        label_columns: Sequence[str] | None = None,
        mask_column: str | None = None,
        mask_names: Sequence[str] | None = None,
        uncertain: str | None = None,
    ) -> None:
        label_values(uncertain)  # refuse an unknown policy before anything is read
        self.root = Path(root)
        self.metadata = metadata
        self.file_column = file_column
        self.patient_column = patient_column
        self.label_columns = label_columns
        self.mask_column = mask_column
        self.mask_names = mask_names
        self.uncertain = uncertain

    def read(self) -> Listing:
        """List the images of the metadata, or those found."""
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: no such folder; expected --root to be a folder of images")
        table = self._find_metadata()
        if table is not None:
            return self._read_table(table)
        if self.mask_column is not None or self.mask_names is not None:
            raise FileNotFoundError(
                f"{self.root}: none of {', '.join(METADATA_NAMES)} found; expected a table with the masks in column "
                f"{self.mask_column or MASK_COLUMN}"
            )
        if self.uncertain is not None:
            raise FileNotFoundError(
                f"{self.root}: none of {', '.join(METADATA_NAMES)} found; --uncertain expects a table with labels"
            )
        return self._scan()

    def _find_metadata(self) -> Path | None:
        if self.metadata is not None:
            for path in (Path(self.metadata), self.root / self.metadata):
                if path.is_file():
                    return path
            raise FileNotFoundError(f"{self.metadata}: no such file, neither here nor in {self.root}")
        found = [self.root / name for name in METADATA_NAMES if (self.root / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{some(map(str, found))} found; say which one counts with --metadata")
        return found[0] if found else None

    def _scan(self) -> Listing:
        """List every image below the root, sorted. Skip hidden files and links that lead outside."""
        names, outside = [], 0
        for file in image_files(self.root):
            name = file.relative_to(self.root).as_posix()
            try:
                file_below(self.root, name)
            except ValueError:
                outside += 1
                continue
            names.append(name)
        skipped = f" ({outside} links that lead outside were skipped)" if outside else ""
        if not names:
            raise UserError(
                f"{self.root}: no images found{skipped}; expected files ending in {some(IMAGE_SUFFIXES, 99)}"
            )
        notes = ["no metadata, so no patients are known: each image is counted as a patient of its own"]
        if outside:
            notes.append(f"{outside} links that lead out of {self.root} were skipped")
        records = [Record(name, patient_id=name, path=self.root / name) for name in names]
        return Listing(records, notes=notes, patients_known=False)

    def _read_table(self, table: Path) -> Listing:
        given = (self.file_column, self.patient_column, self.mask_column, *(self.label_columns or ()))
        columns, renamed = _usual_names(table, read_columns(table), given)
        file_column = self._choose_file_column(table, columns)
        names = columns[file_column]
        _check_files(table, file_column, names)
        empty = [""] * len(names)
        patients, notes = self._patients(table, columns, names)
        notes = [*renamed, *notes]
        views = read_views(columns.get("view", empty), notes)
        splits = read_splits(table, columns.get("split", empty))
        sexes = parse_known("sexes", columns.get("sex", empty), parse_sex, "", notes)
        ages = parse_known("ages", columns.get("age", empty), parse_age, math.nan, notes)
        mask_column = self._choose_mask_column(table, columns)
        masks = empty if mask_column is None else columns[mask_column]
        skip = (file_column, self.patient_column, mask_column)
        labels = read_labels(table, columns, self.label_columns, [name for name in skip if name], self.uncertain)
        records, missing = [], []
        for number, (name, mask) in enumerate(zip(names, masks, strict=True)):
            where = f"{table}: row {number + 1}: "
            path, mask_path = file_below(self.root, name, where), file_below(self.root, mask, where) if mask else None
            if not path.is_file():
                missing.append(name)
            elif mask_path is not None and not mask_path.is_file():
                missing.append(f"{mask} (mask of {name})")
            else:
                row = (patients[number], views[number], labels.rows[number], splits[number])
                records.append(Record(name, *row, path, mask_path=mask_path, sex=sexes[number], age=ages[number]))
        mask_names = () if mask_column is None else tuple(("mask",) if self.mask_names is None else self.mask_names)
        policy = {} if self.uncertain is None else {"uncertain": self.uncertain}
        known = (self.patient_column or "patient_id") in columns
        notes = [*notes, *labels.notes]
        return Listing(
            records, labels.names, labels.exclusive, tuple(missing), notes, mask_names, policy, patients_known=known
        )

    def _choose_file_column(self, table: Path, columns: Columns) -> str:
        candidates = FILE_COLUMNS if self.file_column is None else (self.file_column,)
        for name in candidates:
            if name in columns:
                return name
        raise UserError(
            f"{table}: columns {some(columns, 30)} found; expected the file in {' or '.join(candidates)} "
            "(--file_column names another)"
        )

    def _choose_mask_column(self, table: Path, columns: Columns) -> str | None:
        column = self.mask_column or MASK_COLUMN
        if column in columns:
            return column
        if self.mask_column is None and self.mask_names is None:
            return None
        raise UserError(
            f"{table}: columns {some(columns, 30)} found; expected the mask in {column} (--mask_column names another)"
        )

    def _patients(self, table: Path, columns: Columns, names: list[str]) -> tuple[list[str], list[str]]:
        column = self.patient_column or "patient_id"
        if column in columns:
            for number, patient in enumerate(columns[column], start=1):
                if not patient:
                    raise UserError(f"{table}: row {number}: empty {column} found; expected a patient")
            return columns[column], []
        if self.patient_column is not None:
            raise UserError(f"{table}: columns {some(columns, 30)} found; expected the patient in {column}")
        return names, [
            f"{table.name} has no column patient_id: each image is counted as a patient of its own, so one patient's "
            "images may fall into two splits (--patient_column names the column)"
        ]


def _usual_names(table: Path, columns: Columns, given: Sequence[str | None]) -> tuple[Columns, list[str]]:
    """Rename `Patient ID` to `patient_id`, `Split` to `split` and so on.

    Otherwise a patient could silently be in two splits.

    Args:
        table: the file, for error messages.
        columns: columns of the table.
        given: names that the user chose, which stay as they are.

    Returns:
        The columns, and notes of renamed ones.

    Raises:
        UserError: two columns would get the same name.
    """
    usual = {_plain(name): name for name in (*RESERVED_COLUMNS, MASK_COLUMN)}
    new = {name: name if name in given else usual.get(_plain(name), name) for name in columns}
    twice = [name for name, count in Counter(new.values()).items() if count > 1]
    if twice:
        listed = some((name for name in columns if new[name] == twice[0]), 9)
        raise UserError(f"{table}: columns {listed} found; expected one of them as {twice[0]}")
    notes = [f"column {old!r} is taken for {name}" for old, name in new.items() if old != name]
    return {new[name]: cells for name, cells in columns.items()}, notes


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def _check_files(table: Path, column: str, names: list[str]) -> None:
    for number, name in enumerate(names, start=1):
        if not name:
            raise UserError(f"{table}: row {number}: empty {column} found; expected a file")
    repeated = [name for name, count in Counter(os.path.normpath(name) for name in names).items() if count > 1]
    if repeated:
        raise UserError(
            f"{table}: {len(repeated)} file(s) in more than one row: {some(repeated)}; expected one row each"
        )
