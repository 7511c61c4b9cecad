# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read the labels of a table: columns of 0 and 1, class names, or lists of findings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..options import check_choice
from .tables import CellType, Columns, read_cells, require_columns

FILE_COLUMNS = ("file_name", "file", "image", "path")
RESERVED_COLUMNS = (*FILE_COLUMNS, "patient_id", "view", "split", "sex", "age", "source")
NO_FINDING = "no finding"
BINARY = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": math.nan}
MINUS_ONE = ("-1", "-1.0")  # text of an uncertain label
_WHOLE = re.compile(r"[+-]?\d+")
UNCERTAIN = {"ignore": math.nan, "ones": 1.0, "zeros": 0.0}  # policy → value of an uncertain label


@dataclass(frozen=True)
class LabelTable:
    """Labels of all rows, [N][L], and their names."""

    rows: list[tuple[float, ...]]
    names: tuple[str, ...] = ()
    exclusive: bool = False
    notes: tuple[str, ...] = ()


def label_cells(uncertain: str | None, hint: str = "") -> CellType:
    """Make the type of cells that hold labels: 0, 1, empty for unknown, and -1 for uncertain.

    Args:
        uncertain: what -1 becomes: "ignore" (unknown), "ones" or "zeros". With None it is no label.
        hint: end of the error message.

    Raises:
        UserError: `uncertain` has another value.
    """
    if uncertain is None:
        return CellType(BINARY.__getitem__, f"0, 1, or empty for unknown{hint}")
    value = UNCERTAIN[check_choice("uncertain", uncertain, UNCERTAIN)]
    return CellType((BINARY | dict.fromkeys(MINUS_ONE, value)).__getitem__, f"0, 1, -1, or empty for unknown{hint}")


def read_labels(
    table: Path,
    columns: Columns,
    explicit: Sequence[str] | None = None,
    skip: Sequence[str | None] = (),
    uncertain: str | None = None,
) -> LabelTable:
    """Read the labels of a table. `FolderCollection` says which columns are labels.

    Raises:
        UserError: a column or value does not fit. The message names file, row, column and value.
    """
    hint = "" if uncertain else f" (--uncertain {'|'.join(UNCERTAIN)} says what -1 means)"
    cell_type = label_cells(uncertain, f"{hint}; --label_columns names the label columns if this is none")
    if explicit is not None:
        require_columns(table, columns, explicit)
        return LabelTable(binary_labels(table, columns, explicit, cell_type), tuple(explicit))
    if "label" in columns and "labels" in columns:
        raise UserError(f"{table}: columns label and labels found; expected one of them (or --label_columns)")
    rest = [name for name in columns if name not in (*RESERVED_COLUMNS, *skip) and not name.endswith("_file_name")]
    for lone, reader in (("label", _class_labels), ("labels", _joined_labels)):
        if lone in columns:
            if uncertain is not None:
                raise UserError(f"{table}: column {lone} holds names, where no -1 can be; --uncertain does not fit")
            return reader(table, columns[lone], note_ignored(name for name in rest if name != lone))
    chosen, notes = _label_columns(columns, rest)
    return LabelTable(binary_labels(table, columns, chosen, cell_type), tuple(chosen), notes=notes)


def note_ignored(columns: Iterable[str]) -> tuple[str, ...]:
    """Note the columns that are not read."""
    listed = some(columns, 30)
    return (f"columns ignored: {listed}",) if listed else ()


def _label_columns(columns: Columns, candidates: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Find the columns that hold mostly labels, and note the others."""
    ignored, chosen = [], []
    for name in candidates:
        strange = [value for value in columns[name] if value not in BINARY and value not in MINUS_ONE]
        # Keep a column with mostly labels: report its few other values as mistakes later, do not lose the column.
        if any(columns[name]) and 2 * len(strange) < sum(map(bool, columns[name])):
            chosen.append(name)
        else:
            ignored.append(f"{name} ({f'holds {strange[0][:40]!r}' if strange else 'empty'})")
    return chosen, note_ignored(ignored)


def binary_labels(table: Path, columns: Columns, names: Sequence[str], cell_type: CellType) -> list[tuple[float, ...]]:
    """Read the labels of all rows, [N][L], from one column of `label_cells` per label."""
    if not names:
        return [()] * len(next(iter(columns.values())))
    return list(zip(*(read_cells(table, name, columns[name], cell_type) for name in names), strict=True))


def _class_labels(table: Path, values: list[str], notes: tuple[str, ...]) -> LabelTable:
    """Read one class name per row. Sort whole numbers as numbers, names alphabetically."""
    values = read_cells(table, "label", values, CellType(_class_name, "a class name or whole number"))
    names = set(values) - {""}
    if not names:
        return LabelTable([()] * len(values), notes=(*notes, "column label is empty: no labels"))
    whole = all(_WHOLE.fullmatch(name) for name in names)
    ordered = sorted(names, key=lambda name: (int(name) if whole else 0, name))
    rows = [tuple(float(value == name) if value else math.nan for name in ordered) for value in values]
    return LabelTable(rows, tuple(ordered), exclusive=True, notes=notes)


def _class_name(text: str) -> str:
    """Refuse numbers that are not whole: a score is no class."""
    try:
        float(text)
    except ValueError:
        return text
    if not _WHOLE.fullmatch(text):
        raise ValueError(text)
    return text


def _joined_labels(table: Path, values: list[str], notes: tuple[str, ...]) -> LabelTable:
    """Read names joined by `|`; `No Finding` means none of them, empty means unknown."""
    findings = read_cells(table, "labels", values, CellType(split_findings, "names joined by |, or No Finding alone"))
    names = sorted(set().union(*(found for found in findings if found is not None)))
    rows = [tuple(math.nan if found is None else float(name in found) for name in names) for found in findings]
    return LabelTable(rows, tuple(names), notes=notes)


def split_findings(text: str) -> set[str] | None:
    """Split `Edema|Mass` into its names. `No Finding` gives no names, an empty text gives None (unknown).

    Raises:
        ValueError: a name is empty, or `No Finding` is not alone.
    """
    if not text:
        return None
    parts = {part.strip() for part in text.split("|")}
    normal = {part for part in parts if part.lower() == NO_FINDING}
    if "" in parts or (normal and len(parts) > 1):
        raise ValueError(text)
    return parts - normal
