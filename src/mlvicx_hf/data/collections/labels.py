# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read the labels of a table: columns of 0 and 1, class names, or lists of findings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .tables import Columns

FILE_COLUMNS = ("file_name", "file", "image", "path")
RESERVED_COLUMNS = (*FILE_COLUMNS, "patient_id", "view", "split", "sex", "age", "source")
NO_FINDING = "no finding"
BINARY = {"0": 0.0, "0.0": 0.0, "1": 1.0, "1.0": 1.0, "": math.nan}
MINUS_ONE = ("-1", "-1.0")  # text of an uncertain label
UNCERTAIN = {"ignore": math.nan, "ones": 1.0, "zeros": 0.0}  # policy → value of an uncertain label


@dataclass(frozen=True)
class LabelTable:
    """Labels of all rows, [N][L], and their names."""

    rows: list[tuple[float, ...]]
    names: tuple[str, ...] = ()
    exclusive: bool = False
    notes: tuple[str, ...] = ()


def label_values(uncertain: str | None) -> dict[str, float]:
    """Map the text of a label to its value.

    Args:
        uncertain: what -1 becomes: "ignore" (unknown), "ones" or "zeros". With None it is no label.

    Raises:
        UserError: `uncertain` has another value.
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
    """Read the labels of a table. `FolderCollection` says which columns are labels.

    Raises:
        UserError: a column or value does not fit. The message names file, row, column and value.
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
    """Find the columns that hold mostly labels, and note the others."""
    ignored, chosen = [], []
    for name in candidates:
        strange = [value for value in columns[name] if value not in BINARY and value not in MINUS_ONE]
        other = strange[0] if strange else None
        # Keep a column with mostly labels: report its few other values as mistakes later, do not lose the column.
        if any(columns[name]) and 2 * len(strange) < sum(map(bool, columns[name])):
            chosen.append(name)
        else:
            ignored.append(f"{name} ({'empty' if other is None else f'holds {other[:40]!r}'})")
    return chosen, (f"columns ignored: {some(ignored, 30)}",) if ignored else ()


def binary_labels(
    table: Path, columns: Columns, names: Sequence[str], values: Mapping[str, float], hint: str = ""
) -> list[tuple[float, ...]]:
    """Read the labels of all rows, [N][L], from one column per label.

    Args:
        table: the file, for error messages.
        columns: columns of the table.
        names: names of the label columns.
        values: text → value.
        hint: end of the error message for a text that is not among `values`.

    Raises:
        UserError: a text is not among `values`. The message names file, row, column and value.
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
    """Read one class name per row. Sort whole numbers as numbers, names alphabetically."""
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
    """Read names joined by `|`; `No Finding` means none of them, empty means unknown."""
    findings = [split_findings(table, number, "labels", value) for number, value in enumerate(values, start=1)]
    names = sorted(set().union(*(found for found in findings if found is not None)))
    rows = [tuple(math.nan if found is None else float(name in found) for name in names) for found in findings]
    return LabelTable(rows, tuple(names), notes=notes)


def split_findings(table: Path, number: int, column: str, value: str) -> set[str] | None:
    """Split `Edema|Mass` into its names. `No Finding` gives no names, an empty text gives None (unknown)."""
    if not value:
        return None
    parts = {part.strip() for part in value.split("|")}
    normal = {part for part in parts if part.lower() == NO_FINDING}
    if "" in parts or (normal and len(parts) > 1):
        raise UserError(
            f"{table}: row {number}, column {column}: {value!r} found; expected names joined by |, or No Finding alone"
        )
    return parts - normal
