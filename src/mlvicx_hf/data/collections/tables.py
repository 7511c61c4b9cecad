# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables of metadata: .csv (perhaps .gz), .jsonl and .parquet, by column and all as text."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import check_fields, read_csv

Columns = dict[str, list[str]]  # a table by column, all text
UNCERTAIN = {"ignore": math.nan, "ones": 1.0, "zeros": 0.0}  # what a label of -1 becomes, by policy
SEXES = {"f": "F", "female": "F", "woman": "F", "m": "M", "male": "M", "man": "M", "unknown": "", "": ""}
AGE = re.compile(r"(\d+(?:\.\d+)?)([YMWD]?)", re.IGNORECASE)
UNITS_PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
OLDEST = 120  # years; more is a mistake of the table


def read_columns(table: Path) -> Columns:
    """A .csv (or .csv.gz), .jsonl or .parquet table by column, all as text; what is absent is empty."""
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
    """Refuse a table that lacks one of these columns; further ones are ignored."""
    names = list(names)
    absent = [name for name in names if name not in columns]
    if absent:
        raise UserError(
            f"{table}: columns {some(columns, 30)} found; expected {some(absent, 30)} as well (all of "
            f"{some(names, 30)})"
        )


def parse_sex(text: str) -> str | None:
    """F, M, or empty for unknown; None for what is not understood."""
    return SEXES.get(text.strip().lower())


def parse_age(text: str) -> float | None:
    """Years of `45`, `045Y` or `018M` (Y, M, W, D as in DICOM); NaN for unknown; None where unreadable or above 120."""
    text = text.strip()
    if text.lower() in ("", "unknown"):
        return math.nan
    found = AGE.fullmatch(text)
    if found is None:
        return None
    years = float(found[1]) / UNITS_PER_YEAR[found[2].upper()]
    return years if years <= OLDEST else None


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
    return {name: [_text(row.get(name)) for row in rows] for name in names}


def _read_parquet(table: Path) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(table).to_pydict()
    except pyarrow.ArrowException as error:
        raise UserError(f"{table}: not a readable parquet file: {error}") from error
    return {name: [_text(value) for value in values] for name, values in columns.items()}


def _text(value: Any) -> str:
    """A cell of a typed table as a CSV file would hold it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, list):
        return "|".join(_text(item) for item in value)
    return str(value).strip()
