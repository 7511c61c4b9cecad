# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read what a table of any origin says of each image: patient, view, split, sex and age."""

from __future__ import annotations

import math
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import Record
from .people import parse_age, parse_sex
from .tables import Columns, parse_known, read_splits, read_views


def read_records(
    table: Path, columns: Columns, names: list[str], patient_column: str | None, notes: list[str]
) -> tuple[list[Record], bool]:
    """Make the records of a table, without labels and files.

    Args:
        table: the table, for messages.
        columns: its columns. `view`, `split`, `sex` and `age` are read if they exist.
        names: name of the image in each row.
        patient_column: column of the patient; by default `patient_id`, if it exists.
        notes: notes for the user, to which this appends.

    Returns:
        The records, and whether their patients are known.

    Raises:
        UserError: the patient's column is absent, a patient is empty, or a split is not understood.
    """
    column = patient_column or "patient_id"
    known = column in columns
    if known and "" in columns[column]:
        row = columns[column].index("")
        raise UserError(f"{table}: row {row + 1} ({names[row]}): empty {column} found; expected a patient")
    if not known and patient_column is not None:
        raise UserError(f"{table}: columns {some(columns, 30)} found; expected the patient in {column}")
    if not known:
        notes.append(
            f"{table.name} has no column patient_id: each image is counted as a patient of its own, so one patient's "
            "images may fall into two splits (--patient_column names the column)"
        )
    empty = [""] * len(names)
    views = read_views(columns.get("view", empty), notes)
    splits = read_splits(table, columns.get("split", empty))
    sexes = parse_known("sexes", columns.get("sex", empty), parse_sex, "", notes)
    ages = parse_known("ages", columns.get("age", empty), parse_age, math.nan, notes)
    rows = zip(names, columns[column] if known else names, views, splits, sexes, ages, strict=True)
    records = [
        Record(name, patient, view, split=split, sex=sex, age=age) for name, patient, view, split, sex, age in rows
    ]
    return records, known
