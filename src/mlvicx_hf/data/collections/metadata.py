"""Read what a table of any origin says of each image: patient, view, split, sex and age."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import SPLIT_NAMES, Record, normalize_view
from .labels import LONE_COLUMNS, RESERVED_COLUMNS
from .people import parse_age, parse_sex, plain_patient, read_patients
from .tables import Columns, parse_known, read_splits, read_views

MASK_COLUMN = "mask_file_name"
# Names of columns, without case, blanks and signs, that tell an official division into splits,
SPLIT_LIKE = re.compile(
    "subsets?|k?folds?|cvfold|set|partition|phase|usage|data(sub)?sets?|(data(set)?|official|original)split|splits|"
    "splitname|train(val)?test(split)?"
)
# the patient, here in English, German and Spanish, or a study, which is always of one patient,
PATIENT_LIKE = re.compile(
    "((anonymi[sz]ed|anon|deid(entified)?)?(patient|patienten|paciente|subject|person|participant|individual)s?"
    "(id|uid|identifier|no|nr|num|number|nummer|name|key|code)?|(pat|pt|case|fall|anon|deid)s?(id|uid|no|nr|num|number|nummer|code)|"
    "id(de|del|do)?(patient|paciente|pat)|pseudonym(id)?|hospitalnumber|nhs(no|nr|number)|pid|mrn|"
    "(study(instance)?|record|exam(ination)?|accession|visit)(id|uid|no|nr|num|number))"
)
# the view,
VIEW_LIKE = ("view", "viewposition", "projection", "frontallateral")
NO_VIEW = (None, "UNKNOWN")
# and sex and age, as headers of DICOM files call them.
PERSON_LIKE = {"patientsex": "sex", "patientgender": "sex", "gender": "sex", "patientage": "age"}


@dataclass(kw_only=True)
class TableOptions:
    """What the user says of a table of any origin: options that the collections `folder` and `hf` share.

    Args:
        patient_column: column of the patient; by default `patient_id`.
        patient_ids: what patients mean whose ids differ in zeros, `.0`, case or blanks alone: "normalised" (the same)
            or "exact" (others); by default it is an error.
        view_column: column of the view; by default `view`, or one of its usual names.
        sex_column: column of the sex, likewise.
        age_column: column of the age, likewise.
        label_columns: columns that are labels.
        label_names: names of the findings, in the order of lists of 0 and 1 in a column `labels`.
        mask_column: column of the mask, empty if it is unknown.
        mask_names: one structure (masks of 0 and 1, or 0 and 255), or the classes by pixel value, the background first.
        uncertain: what -1 in a label column means: "ignore" (unknown), "ones" or "zeros"; by default it is an error.
    """

    patient_column: str | None = None
    patient_ids: str | None = None
    view_column: str | None = None
    sex_column: str | None = None
    age_column: str | None = None
    label_columns: Sequence[str] | None = None
    label_names: Sequence[str] | None = None
    mask_column: str | None = None
    mask_names: Sequence[str] | None = None
    uncertain: str | None = None

    @property
    def policy(self) -> dict[str, str]:
        """What the user chose of all that makes the labels and patients, for `Listing.policy`."""
        chosen = {"uncertain": self.uncertain, "patient_ids": self.patient_ids}
        return {name: value for name, value in chosen.items() if value is not None}

    @property
    def meant(self) -> dict[str, str]:
        """View, sex or age → column that the user named."""
        named = {"view": self.view_column, "sex": self.sex_column, "age": self.age_column}
        return {meaning: column for meaning, column in named.items() if column is not None}


def usual_names(
    table: Path, columns: Columns, given: Sequence[str | None], meant: Mapping[str, str]
) -> tuple[Columns, list[str]]:
    """Rename `Patient ID` to `patient_id` and so on: otherwise a patient could silently be in two splits.

    A column that tells an official division, such as `subset`, becomes `split` if it holds the names of splits alone.
    One such as `Projection` becomes `view` if it holds views, and `PatientSex` becomes `sex`. Names that the user gave
    stay as they are, but for those of `TableOptions.meant`. Return the columns, and notes of renamed or ignored ones.

    Raises:
        UserError: two columns would have the same name, or one that the user named is absent or named twice.
    """
    given = [*given, *meant.values()]
    for meaning, name in meant.items():
        if name not in columns:
            raise UserError(f"{table}: columns {some(columns, 30)} found; expected the {meaning} in {name}")
        if given.count(name) > 1:
            raise UserError(f"{table}: column {name} named as {meaning} and as something else; expected one of them")
    # An empty column must not hide another one.
    filled = [name for name, cells in columns.items() if any(cells) or name in given]
    hiding = {*meant, *(VIEW_LIKE if "view" in meant or find_view(filled, given) else ())}
    columns = {name: cells for name, cells in columns.items() if name in filled or plain_name(name) not in hiding}
    usual = {plain_name(name): name for name in (*RESERVED_COLUMNS, *LONE_COLUMNS, MASK_COLUMN)}
    new = {name: name if name in given else usual.get(plain_name(name), name) for name in columns}
    new |= {name: meaning for meaning, name in meant.items()}
    twice = [name for name, count in Counter(new.values()).items() if count > 1]
    if twice:
        listed = some((name for name in columns if new[name] == twice[0]), 9)
        raise UserError(f"{table}: columns {listed} found; expected one of them as {twice[0]}")
    view = find_view(columns, given)
    if view and "view" not in new.values() and any(normalize_view(cell) not in NO_VIEW for cell in columns[view]):
        new[view] = "view"
    for name in (name for name in columns if name not in given):
        person = PERSON_LIKE.get(plain_name(name))
        if person and person not in new.values():
            new[name] = person
    unused = []
    for name in (name for name in columns if SPLIT_LIKE.fullmatch(plain_name(name)) and name not in given):
        if "split" not in new.values() and all(cell.lower() in SPLIT_NAMES for cell in columns[name]):
            new[name] = "split"
        elif any(columns[name]):
            values = some(sorted(set(columns[name]) - {""}), 8)
            unused.append(
                f"column {name} looks like an official division ({values}) and is not used"
                + ("" if "split" in new.values() else "; images are split anew unless --splits FILE says how")
            )
    notes = [f"column {old!r} is taken for {name}" for old, name in new.items() if old != name]
    return {new[name]: cells for name, cells in columns.items()}, [*notes, *unused]


def find_view(names: Iterable[str], given: Sequence[str | None] = ()) -> str | None:
    """Find the column of views by its name: `view`, or else one such as `View Position`; None if there is none."""
    spelled = {plain_name(name): name for name in names if name not in given}
    return next((spelled[name] for name in VIEW_LIKE if name in spelled), None)


def plain_name(name: str) -> str:
    """Write a column's name without case, blanks and signs."""
    return re.sub(r"[\W_]", "", name).lower()


def read_records(
    table: Path,
    columns: Columns,
    names: list[str],
    patient_column: str | None,
    notes: list[str],
    patient_ids: str | None = None,
) -> tuple[list[Record], bool]:
    """Make the records of a table, without labels and files.

    Args:
        table: the table, for messages.
        columns: its columns. `view`, `split`, `sex` and `age` are read if they exist.
        names: name of the image in each row.
        patient_column: column of the patient; by default `patient_id`, if it exists.
        notes: notes for the user, to which this appends.
        patient_ids: what patients mean that are spelled in two ways, see `people.read_patients`.

    Returns:
        The records, and whether their patients are known.

    Raises:
        UserError: the patient's column is absent, a patient is unknown or spelled in two ways, a split is unknown.
    """
    column = patient_column or "patient_id"
    known = column in columns
    if not known and patient_column is not None:
        raise UserError(f"{table}: columns {some(columns, 30)} found; expected the patient in {column}")
    if not known:
        _refuse_unnamed_patients(table, columns)
        notes.append(
            f"{table.name} has no column patient_id: each image is counted as a patient of its own, so one patient's "
            "images may fall into two splits (--patient_column names the column)"
        )
    patients = read_patients(table, column, columns[column], names, patient_ids) if known else names
    empty = [""] * len(names)
    views = read_views(columns.get("view", empty), notes)
    splits = read_splits(table, columns.get("split", empty))
    letters = {cell.strip().upper() for cell in columns.get("sex", empty)}
    if "M" in letters and letters & {"H", "V"}:  # hombre or varón, and mujer, where others would read M as male
        raise UserError(
            f"{table}: sexes {some(sorted(letters))} found; expected F and M, since M may mean a woman here"
        )
    sexes = parse_known("sexes", columns.get("sex", empty), parse_sex, "", notes)
    ages = parse_known("ages", columns.get("age", empty), parse_age, math.nan, notes)
    rows = zip(names, patients, views, splits, sexes, ages, strict=True)
    records = [
        Record(name, patient, view, split=split, sex=sex, age=age) for name, patient, view, split, sex, age in rows
    ]
    return records, known


def _refuse_unnamed_patients(table: Path, columns: Columns) -> None:
    """Refuse a column that seems to name the patients of several images each: they could fall into two splits."""
    for name, cells in columns.items():
        if PATIENT_LIKE.fullmatch(plain_name(name)) and len(set(map(plain_patient, cells))) < len(cells) and any(cells):
            raise UserError(
                f"{table}: column {name} found, which seems to tell the patient or a study, in several rows each, "
                f"and no column patient_id; expected --patient_column {name}, or another column that tells it"
            )
