# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Any folder of radiographs, with or without a table of metadata beside it (the `imagefolder` convention)."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import IMAGE_SUFFIXES, image_files
from .base import SPLITS, Collection, Listing, Record, file_below, normalize_view
from .tables import UNCERTAIN, Columns, parse_age, parse_sex, read_columns

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_COLUMNS = ("file_name", "file", "image", "path")
MASK_COLUMN = "mask_file_name"
RESERVED_COLUMNS = (*FILE_COLUMNS, "patient_id", "view", "split", "sex", "age", "source")
SPLIT_NAMES = {name: name for name in SPLITS} | dict.fromkeys(("val", "valid", "dev"), "validation")
NO_FINDING = "no finding"
BINARY = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": math.nan}
MINUS_ONE = ("-1", "-1.0")  # a label's text for "uncertain"

Cell = TypeVar("Cell")


@dataclass(frozen=True)
class LabelTable:
    """Labels of all rows, [N][L], and what they are called."""

    rows: list[tuple[float, ...]]
    names: tuple[str, ...] = ()
    exclusive: bool = False
    notes: tuple[str, ...] = ()


class FolderCollection(Collection):
    """Images below a folder.

    Without metadata every image found counts. With metadata (`metadata.csv`, `.jsonl` or `.parquet` in the folder, or
    the file given) the listed images count. Labels are, in this order: the columns named by `label_columns` (0, 1,
    or empty for unknown); a column `label` with one class name a row; a column `labels` with names joined by `|`
    (`No Finding` for none, empty for unknown); every other column that holds mostly 0 and 1, or nothing else but
    empty cells. Columns `sex` (F, M, female, male and the like) and `age` (years) are read where they are there.

    Args:
        root: the folder. Nothing outside it is read, not through a link either.
        metadata: table, found from the working directory or else from the root.
        file_column: column of the file, relative to the root; by default the first of `FILE_COLUMNS`.
        patient_column: column of the patient; by default `patient_id`.
        label_columns: columns that are labels.
        mask_column: column of the mask's file, relative to the root, empty where the mask is unknown; by default
            `mask_file_name` where there is one.
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
        label_values(uncertain)  # refuses what is no policy before anything is read
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
        """Every image below the root, sorted; hidden files and links that lead outside are left alone."""
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
        splits = _splits(table, columns.get("split", empty))
        sexes = _understood("sexes", columns.get("sex", empty), parse_sex, "", notes)
        ages = _understood("ages", columns.get("age", empty), parse_age, math.nan, notes)
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
    """`Patient ID` is `patient_id`, `Split` is `split` and so on: else a patient would silently be in two splits.

    Args:
        table: what errors call the file.
        columns: of the table.
        given: names that the user chose, which stay as they are.

    Returns:
        The columns, and notes of what was renamed.

    Raises:
        ValueError: two columns that would get one name.
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


def read_views(values: list[str], notes: list[str]) -> list[str]:
    """Views by their common names; those not understood are UNKNOWN and counted in a note that is appended."""
    return _understood("views", values, normalize_view, "UNKNOWN", notes)


def _understood(
    what: str, values: list[str], parse: Callable[[str], Cell | None], unknown: Cell, notes: list[str]
) -> list[Cell]:
    """Parse a column; what `parse` makes None of is kept as unknown and counted in a note."""
    parsed = [parse(value) for value in values]
    strange = Counter(value for value, cell in zip(values, parsed, strict=True) if cell is None)
    if strange:
        listed = ", ".join(f"{value!r} ({count})" for value, count in strange.most_common(5))
        notes.append(f"{what} not understood, kept as unknown: {strange.total()}, such as {listed}")
    return [unknown if cell is None else cell for cell in parsed]


def _splits(table: Path, values: list[str]) -> list[str | None]:
    if not any(values):
        return [None] * len(values)
    for number, value in enumerate(values, start=1):
        if value.lower() not in SPLIT_NAMES:
            raise UserError(
                f"{table}: row {number}, column split: {value!r} found; expected train, validation (or val, "
                "valid, dev) or test in every row"
            )
    return [SPLIT_NAMES[value.lower()] for value in values]


def label_values(uncertain: str | None) -> dict[str, float]:
    """What the text of a label means.

    Args:
        uncertain: what -1 becomes: "ignore" (unknown), "ones" or "zeros"; with None it is no label.

    Raises:
        ValueError: another policy.
    """
    if uncertain is None:
        return BINARY
    if uncertain not in UNCERTAIN:
        raise UserError(f"uncertain={uncertain!r} found; expected one of {', '.join(UNCERTAIN)}")
    return BINARY | dict.fromkeys(MINUS_ONE, UNCERTAIN[uncertain])


def read_labels(
    table: Path,
    columns: Columns,
    explicit: Sequence[str] | None = None,
    skip: Sequence[str] = (),
    uncertain: str | None = None,
) -> LabelTable:
    """Labels of a table, see `FolderCollection` for where they are looked for.

    Raises:
        ValueError: naming file, row, column and value found, and what was expected.
    """
    values = label_values(uncertain)
    hint = "" if uncertain else f" (--uncertain {'|'.join(UNCERTAIN)} says what -1 means)"
    hint += "; --label_columns names the label columns if this is none"
    if explicit is not None:
        absent = [name for name in explicit if name not in columns]
        if absent:
            raise UserError(f"{table}: columns {some(columns, 30)} found; expected the label(s) {some(absent)} as well")
        return LabelTable(binary_labels(table, columns, explicit, values, hint), tuple(explicit))
    if "label" in columns and "labels" in columns:
        raise UserError(f"{table}: columns label and labels found; expected one of them (or --label_columns)")
    rest = [name for name in columns if name not in (*RESERVED_COLUMNS, *skip) and not name.endswith("_file_name")]
    for lone, reader in (("label", _class_labels), ("labels", _joined_labels)):
        if lone in columns:
            if uncertain is not None:
                raise UserError(f"{table}: column {lone} holds names, where no -1 can be; --uncertain does not fit")
            ignored = [name for name in rest if name != lone]
            return reader(table, columns[lone], (f"columns ignored: {some(ignored, 30)}",) if ignored else ())
    chosen, notes = _label_columns(columns, rest)
    return LabelTable(binary_labels(table, columns, chosen, values, hint), tuple(chosen), notes=notes)


def _label_columns(columns: Columns, candidates: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Columns that hold mostly labels, and a note of the others."""
    ignored, chosen = [], []
    for name in candidates:
        strange = [value for value in columns[name] if value not in BINARY and value not in MINUS_ONE]
        other = strange[0] if strange else None
        # Mostly labels: the few other values are mistakes to report, not a reason to lose the column.
        if any(columns[name]) and 2 * len(strange) < sum(map(bool, columns[name])):
            chosen.append(name)
        else:
            ignored.append(f"{name} ({'empty' if other is None else f'holds {other[:40]!r}'})")
    return chosen, (f"columns ignored: {some(ignored, 30)}",) if ignored else ()


def binary_labels(
    table: Path, columns: Columns, names: Sequence[str], values: Mapping[str, float], hint: str = ""
) -> list[tuple[float, ...]]:
    """Labels of all rows, [N][L], from one column each.

    Args:
        table: what errors call the file.
        columns: of the table.
        names: of the label columns.
        values: what each text means.
        hint: how the error message ends for a text that is not among them.

    Raises:
        ValueError: naming file, row, column and value found, and what was expected.
    """
    if not names:
        return [()] * len(next(iter(columns.values())))
    expected = "0, 1, -1" if "-1" in values else "0, 1"
    decoded = []
    for name in names:
        try:
            decoded.append([values[text] for text in columns[name]])
        except KeyError as error:
            number = columns[name].index(error.args[0]) + 1
            raise UserError(
                f"{table}: row {number}, column {name}: {error.args[0]!r} found; expected {expected}, or empty for "
                f"unknown{hint}"
            ) from None
    return list(zip(*decoded, strict=True))


def _class_labels(table: Path, values: list[str], notes: tuple[str, ...]) -> LabelTable:
    """One class name a row; whole numbers are sorted as numbers, names by the alphabet."""
    names = set(values) - {""}
    for name in names:
        if not name.lstrip("+-").isdigit() and _is_number(name):
            row = values.index(name) + 1
            raise UserError(f"{table}: row {row}, column label: {name!r} found; expected a class name or whole number")
    if not names:
        return LabelTable([()] * len(values), notes=(*notes, "column label is empty: no labels"))
    whole = all(name.lstrip("+-").isdigit() for name in names)
    ordered = sorted(names, key=lambda name: (int(name) if whole else 0, name))
    rows = [tuple(float(value == name) if value else math.nan for name in ordered) for value in values]
    return LabelTable(rows, tuple(ordered), exclusive=True, notes=notes)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _joined_labels(table: Path, values: list[str], notes: tuple[str, ...]) -> LabelTable:
    """Names joined by `|`; `No Finding` for none of them, empty for unknown."""
    findings = [split_findings(table, number, "labels", value) for number, value in enumerate(values, start=1)]
    names = sorted(set().union(*(found for found in findings if found is not None)))
    rows = [tuple(math.nan if found is None else float(name in found) for name in names) for found in findings]
    return LabelTable(rows, tuple(names), notes=notes)


def split_findings(table: Path, number: int, column: str, value: str) -> set[str] | None:
    """`Edema|Mass` to its names, `No Finding` to none, empty to None (unknown)."""
    if not value:
        return None
    parts = {part.strip() for part in value.split("|")}
    normal = {part for part in parts if part.lower() == NO_FINDING}
    if "" in parts or (normal and len(parts) > 1):
        raise UserError(
            f"{table}: row {number}, column {column}: {value!r} found; expected names joined by |, or No Finding alone"
        )
    return parts - normal
