"""Read tables: .csv (perhaps .gz), .json, .jsonl and .parquet. A collection declares what each column holds."""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import SPLIT_NAMES, normalize_view

DELIMITERS = (",", ";", "\t")  # of CSV files, the most frequent in the header line
NO_VALUE = ("", "nan", "na", "n/a", "#n/a", "<na>", "none", "null")  # cells without a value, in any case
Columns = dict[str, list[str]]  # a table by column, all text
Value = TypeVar("Value")


class CellType(NamedTuple):
    """What the cells of a column hold."""

    read: Callable[[str], Any]  # gives the value of a cell. Raises ValueError or KeyError for a text that does not fit
    expected: str  # what the error message says was expected


def one_of(values: Mapping[str, Any] | Iterable[str]) -> CellType:
    """Make the type of cells that hold one of a few texts. A mapping gives the value of each."""
    values = values if isinstance(values, Mapping) else {text: text for text in values}
    return CellType(values.__getitem__, f"one of {some(values, 99)}")


def _check(fits: Callable[[str], Any]) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not fits(text):
            raise ValueError
        return text

    return read


TEXT = CellType(str, "text")
FILLED = CellType(_check(bool), "a text that is not empty")
PLAIN_NAME = CellType(_check(lambda text: text and not {"/", "\\"} & set(text) and text != ".."), "a file's name")
DIGITS = CellType(_check(str.isdecimal), "a whole number")
ZERO_OR_ONE = CellType({"0": False, "0.0": False, "1": True, "1.0": True}.__getitem__, "0 or 1")
SPLIT = CellType(lambda text: SPLIT_NAMES[text.lower()], "train, validation (or val, valid, dev) or test in every row")
VIEW = CellType(lambda text: normalize_view(text) or "UNKNOWN", "a view")


def read_table(
    table: Path, types: Mapping[str, CellType], *, key: tuple[str, ...] = (), renamed: Mapping[str, str] | None = None
) -> list[tuple[Any, ...]]:
    """Read the declared columns of a table and ignore the others.

    Args:
        table: the file.
        types: column → what its cells hold.
        key: columns whose values, taken together, may occur in one row alone.
        renamed: another spelling → the name of a column in `types`, if the table has no column of this name.

    Returns:
        The values of each row, in the order of `types`.

    Raises:
        UserError: a column is absent, a cell does not fit, or a key occurs twice.
    """
    columns = read_columns(table)
    for spelling, name in (renamed or {}).items():
        if spelling in columns:
            columns.setdefault(name, columns[spelling])
    require_columns(table, columns, types)
    if key:
        check_unique(table, [" ".join(values) for values in zip(*(columns[name] for name in key), strict=True)])
    values = [read_cells(table, name, columns[name], cell_type) for name, cell_type in types.items()]
    return list(zip(*values, strict=True))


def read_cells(table: Path, column: str, cells: Iterable[str], cell_type: CellType) -> list[Any]:
    """Read the cells of a column.

    Raises:
        UserError: a cell does not fit. The message names file, row, column and value.
    """
    values = []
    for row, cell in numbered(table, cells):
        try:
            values.append(cell_type.read(cell))
        except (ValueError, KeyError):
            raise UserError(
                f"{table}: row {row}, column {column}: {cell!r} found; expected {cell_type.expected}"
            ) from None
    return values


def numbered(table: Path, rows: Iterable[Value]) -> Iterator[tuple[int, Value]]:
    """Give each row of a table its number, as a spreadsheet shows it: in CSV files the header is row 1.

    Empty lines are not counted.
    """
    is_csv = table.name.lower().endswith((".csv", ".csv.gz", ".tsv"))
    return enumerate(rows, start=2 if is_csv else 1)


def find_table(root: Path, *names: str, expected: str, given: str | Path | None = None) -> Path:
    """Find the table `given` by the user, from the working directory or else from the root, or the first of `names`.

    Raises:
        FileNotFoundError: there is none of them.
    """
    candidates = [root / name for name in names] if given is None else [Path(given), root / given]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"{' or '.join(map(str, candidates))}: no such file; expected {expected}")


def read_columns(table: Path) -> Columns:
    """Read a .csv (or .csv.gz), .tsv, .json, .jsonl or .parquet table by column, all as text. Unknown values are empty.

    R writes NA into every empty cell, and others NaN or null.

    Raises:
        UserError: the file is damaged, of another kind, or has no rows.
    """
    suffix = (table.with_suffix("") if table.suffix.lower() == ".gz" else table).suffix.lower()
    readers = dict.fromkeys((".csv", ".tsv"), _read_csv)
    readers |= {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if suffix not in readers:
        raise UserError(f"{table}: {suffix or 'no suffix'} found; expected a .csv, .tsv, .jsonl or .parquet file")
    columns = readers[suffix](table)
    if not any(columns.values()):
        raise UserError(f"{table}: no rows found; expected one row an image")
    return {name: ["" if cell.lower() in NO_VALUE else cell for cell in cells] for name, cells in columns.items()}


def require_columns(table: Path, columns: Columns, names: Iterable[str]) -> None:
    """Refuse a table that lacks one of these columns. Further columns are ignored."""
    names = list(names)
    absent = [name for name in names if name not in columns]
    if absent:
        raise UserError(
            f"{table}: columns {some(columns, 30)} found; expected {some(absent, 30)} as well (all of "
            f"{some(names, 30)})"
        )


def _read_csv(table: Path) -> Columns:
    """Read text separated by commas, semicolons or tabs without surrounding blanks.

    Skip empty lines, lines of separators alone at the end, empty columns at the end (NIH's), and Excel's first line
    `sep=;`.
    """
    text = io.StringIO(_read_text(table), newline="")
    start, header_line, skipped = 0, text.readline(), 0
    if re.fullmatch(r'"?sep=[,;\t]"?', header_line.strip()):
        start, header_line, skipped = text.tell(), text.readline(), 1
    text.seek(start)
    # A quotation mark that nothing closes would swallow the rows after it: `strict` refuses it.
    lines = csv.reader(text, delimiter=max(DELIMITERS, key=header_line.count), strict=True)
    rows, begun = [], skipped + 1
    try:
        for row in lines:
            if row:
                rows.append([field.strip() for field in row])
            begun = skipped + lines.line_num + 1
    except csv.Error as error:
        raise UserError(f"{table}: the row that begins in line {begun} is no CSV: {error}") from error
    if not rows:
        raise UserError(f"{table}: empty file found; expected a header line")
    header, *rows = rows
    while rows and not any(rows[-1]):  # spreadsheets leave lines of separators at the end
        rows.pop()
    while header and not header[-1]:
        header.pop()
    width = len(header)
    for number, row in numbered(table, rows):
        if len(row) < width or any(row[width:]):
            raise UserError(f"{table}: row {number} has {len(row)} fields; expected {width} as in the header")
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise UserError(f"{table}: column(s) {some(map(repr, repeated))} found twice; expected each name once")
    return {name: [row[index] for row in rows] for index, name in enumerate(header)}


def _read_text(table: Path) -> str:
    try:
        data = table.read_bytes()
        data = gzip.decompress(data) if table.suffix.lower() == ".gz" else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{table}: not a readable gzip file: {error}") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{table}: byte 0x{data[error.start]:02x} found in line {line}; expected UTF-8, which spreadsheets call "
            "'CSV UTF-8'"
        ) from error


def _read_json(table: Path) -> Columns:
    """Read a list of objects."""
    try:
        rows = json.loads(table.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{table}: not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{table}: no list of objects found; expected one object an image")
    return _by_column(rows)


def _read_jsonl(table: Path) -> Columns:
    rows = []
    try:
        lines = table.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not JSON in UTF-8: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{table}: line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{table}: line {number} is a {type(row).__name__}; expected an object")
        rows.append(row)
    return _by_column(rows)


def _by_column(rows: list[dict[str, Any]]) -> Columns:
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
    """Write a cell of a typed table as in a CSV file, and a list or an object as JSON."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, (list, tuple, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, bytes):  # text that some programs write without saying so
        value = value.decode(errors="backslashreplace")
    return str(value).strip()


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
    return read_cells(table, "split", values, SPLIT) if any(values) else [None] * len(values)


def check_unique(table: Path, names: list[str]) -> None:
    """Refuse a table that lists an image, or a study, twice."""
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"{table}: {len(repeated)} found in more than one row: {some(repeated)}; expected one row each")
