"""Read the labels of a table: columns of 0 and 1, class names, or findings. `cells` reads each cell."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..options import check_once
from ..vocabulary import common_name
from .cells import (
    BINARY,
    MINUS_ONE,
    NO_FINDING,
    SEPARATORS,
    UNCERTAIN,
    FindingsReader,
    is_literal,
    is_number,
    is_unknown,
    label_cells,
    one_spelling,
    plain_cell,
    same_name,
)
from .tables import CellType, Columns, numbered, read_cells, require_columns

MANY_CLASSES = 10  # and more, of which most have one row and more characters than this, are texts of reports
TEXT_LENGTH = 30

FILE_COLUMNS = ("file_name", "file", "image", "path")
RESERVED_COLUMNS = (*FILE_COLUMNS, "patient_id", "view", "split", "sex", "age", "source")
LONE_COLUMNS = ("label", "labels")  # a column that holds all labels of an image
_WHOLE = re.compile(r"[+-]?\d+")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
# A column of 0 and 1 with one of these words in its name describes the image or the patient, and is no finding.
NOT_FINDINGS = re.compile(
    "patients?|subject|person|sex|gender|male|female|age|study|series|images?|file|folder|index|idx|ids?|unnamed|rows?|"
    "folds?|splits?|subset|set|partition|phase|number|view|projection|position|orientation|frontal|lateral|portable|"
    "supine|erect|width|height|date|time|year|device|scanner|vendor|manufacturer|model|site|hospital|cent(er|re)|"
    "institution|source|sample|weight|quality|selected|include|exclude",
    re.IGNORECASE,
)
EXPECTED_FINDINGS = (
    "names joined by |, or No Finding alone, or a list of names such as ['Edema', 'Mass'], or an object such as "
    '{"Edema": 1, "Mass": 0}, or nothing for unknown. Numbers are no names; --label_names gives the names of lists of '
    "0 and 1"
)


@dataclass(frozen=True)
class LabelTable:
    """Labels of all rows, [N][L], and their names."""

    rows: list[tuple[float, ...]]
    names: tuple[str, ...] = ()
    exclusive: bool = False
    notes: tuple[str, ...] = ()


def read_labels(
    table: Path,
    columns: Columns,
    explicit: Sequence[str] | None = None,
    skip: Sequence[str | None] = (),
    uncertain: str | None = None,
    label_names: Sequence[str] | None = None,
) -> LabelTable:
    """Read the labels of a table. `FolderCollection` says which columns are labels.

    Args:
        table: the table, for messages.
        columns: its columns.
        explicit: columns that are labels, chosen by the user.
        skip: columns that are no labels.
        uncertain: see `cells.label_cells`.
        label_names: names of the findings in the order of lists of 0 and 1.

    Raises:
        UserError: a column or value does not fit. The message names file, row, column and value.
    """
    hint = "" if uncertain else f" (--uncertain {'|'.join(UNCERTAIN)} says what -1 means)"
    others = "" if explicit is not None else "; --label_columns names the label columns if this is none"
    cell_type = label_cells(uncertain, hint + others)
    lone = _lone_column(table, columns, explicit)
    rest = [name for name in columns if name not in (*RESERVED_COLUMNS, *skip) and not name.endswith("_file_name")]
    check_once("label_names", label_names or ())
    if label_names is not None and lone is None:
        raise UserError(
            f"{table}: columns {some(columns, 30)} found; expected labels in label or labels, for --label_names"
        )
    if lone is not None:
        ignored = _note_beside(lone, rest) if explicit is None else ()
        return _lone_labels(table, lone, columns[lone], FindingsReader("|", label_names, uncertain), ignored)
    if explicit is not None:
        require_columns(table, columns, explicit)
        check_once("label_columns", explicit)
        return LabelTable(binary_labels(table, columns, explicit, cell_type), tuple(explicit))
    chosen, notes = _label_columns(table, columns, rest)
    return LabelTable(binary_labels(table, columns, chosen, cell_type), tuple(chosen), notes=notes)


def _lone_column(table: Path, columns: Columns, explicit: Sequence[str] | None) -> str | None:
    """Find the column that holds all labels, if there is one."""
    if explicit is not None:
        lone = explicit[0] if len(explicit) == 1 else ""
        cells = columns.get(lone, [])
        if lone in LONE_COLUMNS:  # with a comma it may be a list of two numbers
            return None if all(_is_flag(cell) and "," not in cell for cell in cells) else lone
        known = [cell for cell in cells if not is_unknown(cell)]
        return lone if known and not any(_is_flag(cell) or is_number(cell) for cell in known) else None
    # An empty column, as of an annotation that never began, must not hide columns of findings.
    filled = [name for name in LONE_COLUMNS if not all(map(is_unknown, columns.get(name, ())))]
    if len(filled) > 1:
        raise UserError(f"{table}: columns label and labels found; expected one of them (or --label_columns)")
    return filled[0] if filled else None


def _is_flag(text: str) -> bool:
    return plain_cell(text) in BINARY or plain_cell(text) == MINUS_ONE


def note_ignored(columns: Iterable[str]) -> tuple[str, ...]:
    """Note the columns that are not read."""
    listed = some(columns, 30)
    return (f"columns ignored: {listed}",) if listed else ()


def _note_beside(lone: str, columns: Sequence[str]) -> tuple[str, ...]:
    """Note what is not read beside a column of all labels."""
    named = [name for name in columns if common_name(None, name) and name != lone]
    listed = (
        f"columns named for a finding that are not read beside {lone}: {some(named, 30)} (--label_columns takes them)"
    )
    return (*note_ignored(name for name in columns if name not in (lone, *named)), *([listed] if named else []))


def _label_columns(table: Path, columns: Columns, candidates: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """Find the columns that hold labels, and note the others."""
    ignored: list[str] = []
    lost: list[str] = []
    chosen, described = [], []
    for name in candidates:
        known = [value for value in columns[name] if not is_unknown(value)]
        strange = [value for value in known if not _is_flag(value)]
        words = [value for value in strange if not is_number(value)]
        # A column with labels and words: report the words as mistakes later, do not lose the column. A column of other
        # numbers holds measurements, unless most of them are labels.
        if not known or (len(known) <= 2 * len(strange) and (not words or len(strange) == len(known))):
            found = lost if strange and common_name(None, name) else ignored
            found.append(f"{name} ({f'holds {strange[0][:40]!r}' if strange else 'empty'})")
        elif not name or any(map(NOT_FINDINGS.fullmatch, _WORDS.findall(name))):
            described.append(name or "the first, without a name")
        else:
            chosen.append(name)
    _check_spellings(table, chosen)
    listed = f"columns of 0 and 1 whose names are of no finding: {some(described, 30)} (--label_columns takes them)"
    named = f"columns named for a finding that hold other values than 0 and 1, no labels: {some(lost, 30)}"
    return chosen, (*note_ignored(ignored), *([listed] if described else []), *([named] if lost else []))


def _check_spellings(table: Path, names: Sequence[str]) -> None:
    """Refuse two columns for one finding, which differ in case or blanks alone."""
    alike: dict[str, list[str]] = defaultdict(list)
    for name in names:
        alike[same_name(name)].append(name)
    twice = [found for found in alike.values() if len(found) > 1]
    if twice:
        raise UserError(f"{table}: columns {some(twice[0])} found for one finding; expected one, or --label_columns")


def binary_labels(table: Path, columns: Columns, names: Sequence[str], cell_type: CellType) -> list[tuple[float, ...]]:
    """Read the labels of all rows, [N][L], from one column of `label_cells` per label."""
    if not names:
        return [()] * len(next(iter(columns.values())))
    return list(zip(*(read_cells(table, name, columns[name], cell_type) for name in names), strict=True))


def _lone_labels(
    table: Path, column: str, values: list[str], reader: FindingsReader, notes: tuple[str, ...]
) -> LabelTable:
    """Read a column that holds all labels of an image."""
    lists = any(map(is_literal, values))
    numbers = all(is_number(value) or is_unknown(value) for value in values) and not lists
    if reader.uncertain is not None and not (lists or numbers):
        raise UserError(f"{table}: column {column} holds names, where no -1 can be; --uncertain does not fit")
    if column == "labels" or lists or reader.names is not None or any("|" in value for value in values):
        return _findings(table, column, values, reader, notes)
    if numbers:
        values = _settle_uncertain(table, column, values, reader.uncertain)
    return _class_labels(table, column, values, notes)


def _settle_uncertain(table: Path, column: str, values: list[str], uncertain: str | None) -> list[str]:
    """Write what -1 means in a column of numbers, which is no class: 0, 1, or nothing for unknown."""
    for row, value in numbered(table, values):
        if uncertain is None and plain_cell(value) == MINUS_ONE:
            raise UserError(
                f"{table}: row {row}, column {column}: {value!r} found; expected the number of a class, from 0 on "
                f"(--uncertain {'|'.join(UNCERTAIN)} says what -1 means)"
            )
        if uncertain in ("ones", "zeros") and not (_is_flag(value) or is_unknown(value)):
            raise UserError(
                f"{table}: row {row}, column {column}: {value!r} found; expected 0, 1 or -1 with "
                f"--uncertain {uncertain} (ignore goes with any classes)"
            )
    meant = {"ignore": "", "ones": "1", "zeros": "0"}[uncertain or "ignore"]
    return [meant if plain_cell(value) == MINUS_ONE else value for value in values]


def _class_labels(table: Path, column: str, values: list[str], notes: tuple[str, ...]) -> LabelTable:
    """Read one class name per row. Sort whole numbers as numbers, names alphabetically."""
    flags = all(plain_cell(value) in ("true", "false", "0", "1") or is_unknown(value) for value in values)
    kind = CellType(lambda text: _class_name(text, flags), "a class name or whole number")
    read = read_cells(table, column, values, kind)
    spelling = one_spelling(name for name in read if name)
    classes = [spelling.get(name, "") for name in read]
    for row, name in numbered(table, classes):
        parts = {spelling.get(part.strip()) for part in re.split(r"[;,]", name)}
        if len(parts) > 1 and parts & set(classes):
            raise UserError(
                f"{table}: row {row}, column {column}: {name!r} found, and a part of it alone in other rows; "
                "expected one class in each (a column of several findings must be called labels)"
            )
    names = set(classes) - {""}
    if len(names) > 2 and {plain_cell(name) for name in names} <= BINARY.keys():
        raise UserError(
            f"{table}: column {column}: {some(sorted(names))} found, several words for yes and no; expected one of each"
        )
    texts = [name for name, count in Counter(classes).items() if count == 1 and len(name) > TEXT_LENGTH]
    if len(names) >= MANY_CLASSES and 2 * len(texts) > len(names):
        raise UserError(
            f"{table}: column {column}: {len(names)} classes found, {len(texts)} of them long and in one row alone, "
            f"such as {texts[0][:60]!r}; expected short names that rows share: texts of reports are no classes"
        )
    whole = all(_WHOLE.fullmatch(name) for name in names)
    ordered = sorted(names, key=lambda name: (int(name) if whole else 0, name))
    rows = [tuple(float(value == name) if value else math.nan for name in ordered) for value in classes]
    return LabelTable(rows, tuple(ordered), exclusive=True, notes=(*notes, *_note_spellings(spelling)))


def _class_name(text: str, flags: bool) -> str:
    """Refuse numbers that are not whole: a score is no class. `flags`: all cells are true or false."""
    if is_unknown(text):
        return ""
    if flags:
        return str(int(BINARY[plain_cell(text)]))
    if _WHOLE.fullmatch(text):
        return str(int(text))  # 01 is 1
    if not _NUMBER.fullmatch(text.strip()):  # such as 1_000, which Python would take for one
        return text.strip()
    if not float(text).is_integer():
        raise ValueError(text)
    return str(int(float(text)))


def _findings(
    table: Path, column: str, values: list[str], reader: FindingsReader, notes: tuple[str, ...]
) -> LabelTable:
    """Read the findings of each row."""
    held = [mark for mark in SEPARATORS if any(mark in value for value in values if not is_literal(value))]
    if len(held) > 1:
        raise UserError(
            f"{table}: column {column} with {' and '.join(map(repr, held))} between names found; expected one of them, "
            "or lists such as ['Edema', 'Mass']"
        )
    reader = FindingsReader(held[0] if held else "|", reader.names, reader.uncertain)
    findings = read_cells(table, column, values, CellType(reader.read, EXPECTED_FINDINGS))
    spelling = one_spelling(name for found in findings for name in found.values)
    names = tuple(reader.names or sorted({spelling[name] for name in spelling if same_name(name) != NO_FINDING}))
    rows = []
    for row, found in numbered(table, findings):
        merged: dict[str, float] = {}
        for name, value in found.values.items():
            if merged.setdefault(spelling[name], value) != value and not math.isnan(value):
                raise UserError(f"{table}: row {row}, column {column}: {name} found twice with two values")
        rows.append(tuple(merged.get(name, found.others) for name in names))
    return LabelTable(rows, names, notes=(*notes, *_note_spellings(spelling)))


def _note_spellings(spelling: dict[str, str]) -> list[str]:
    """Note the labels that are written in several ways."""
    others = Counter(chosen for name, chosen in spelling.items() if name != chosen)
    if not others:
        return []
    listed = some(
        f"{chosen} ({some(n for n in spelling if spelling[n] == chosen and n != chosen)})" for chosen in others
    )
    return [f"labels written in several ways are one: {listed}"]
