# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read tables of metadata, .csv (perhaps .gz), .jsonl and .parquet, by column and as text."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import SPLIT_NAMES, check_fields, normalize_view, read_csv

Columns = dict[str, list[str]]  # a table by column, all text


def read_columns(table: Path) -> Columns:
    """Read a .csv (or .csv.gz), .jsonl or .parquet table by column, all as text. Absent values are empty."""
    suffix = (table.with_suffix("") if table.suffix.lower() == ".gz" else table).suffix.lower()
    if suffix == ".csv":
        header, rows = read_csv(table)
        check_fields(table, header, rows)
        repeated = [name for name, count in Counter(header).items() if count > 1]
        if repeated:
            raise UserError(f"{table}: column(s) {some(repeated)} found twice; expected each name once")
        columns = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    elif suffix == ".jsonl":
        columns = _read_jsonl(table)
    elif suffix == ".parquet":
        columns = _read_parquet(table)
    else:
        raise UserError(f"{table}: {suffix or 'no suffix'} found; expected a .csv, .jsonl or .parquet file")
    if not any(columns.values()):
        raise UserError(f"{table}: no rows found; expected one row an image")
    return columns


def require_columns(table: Path, columns: Columns, names: Iterable[str]) -> None:
    """Refuse a table that lacks one of these columns. Further columns are ignored."""
    names = list(names)
    absent = [name for name in names if name not in columns]
    if absent:
        raise UserError(
            f"{table}: columns {some(columns, 30)} found; expected {some(absent, 30)} as well (all of "
            f"{some(names, 30)})"
        )


def _read_jsonl(table: Path) -> Columns:
    rows = []
    for number, line in enumerate(table.read_text(encoding="utf-8-sig").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{table}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{table}: line {number} is a {type(row).__name__}; expected an object")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [as_text(row.get(name)) for row in rows] for name in names}


def _read_parquet(table: Path) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(table).to_pydict()
    except pyarrow.ArrowException as error:
        raise UserError(f"{table}: not a readable parquet file: {error}") from error
    return {name: [as_text(value) for value in values] for name, values in columns.items()}


def as_text(value: Any) -> str:
    """Write a cell of a typed table as in a CSV file."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return "|".join(as_text(item) for item in value)
    return str(value).strip()


Value = TypeVar("Value")


def read_views(values: list[str], notes: list[str]) -> list[str]:
    """Read views by their common names. Views that are not understood become UNKNOWN; append a note of them."""
    return parse_known("views", values, normalize_view, "UNKNOWN", notes)


def parse_known(
    what: str, values: list[str], parse: Callable[[str], Value | None], unknown: Value, notes: list[str]
) -> list[Value]:
    """Parse a column. A value for which `parse` gives None becomes `unknown`; append a note of these."""
    parsed = [parse(value) for value in values]
    strange = Counter(value for value, cell in zip(values, parsed, strict=True) if cell is None)
    if strange:
        listed = ", ".join(f"{value!r} ({count})" for value, count in strange.most_common(5))
        notes.append(f"{what} not understood, kept as unknown: {strange.total()}, such as {listed}")
    return [unknown if cell is None else cell for cell in parsed]


def read_splits(table: Path, values: list[str]) -> list[str | None]:
    """Read splits by their common names. Return None for all rows if the column is empty.

    Raises:
        UserError: a row has no split, or another word.
    """
    if not any(values):
        return [None] * len(values)
    for number, value in enumerate(values, start=1):
        if value.lower() not in SPLIT_NAMES:
            raise UserError(
                f"{table}: row {number}, column split: {value!r} found; expected train, validation (or val, "
                "valid, dev) or test in every row"
            )
    return [SPLIT_NAMES[value.lower()] for value in values]


def check_unique(table: Path, names: list[str]) -> None:
    """Refuse a table that lists an image, or a study, twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{table}: {len(repeated)} found in more than one row: {some(repeated)}; expected one row each")
