"""Read sex, age and patient as tables spell them."""

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..options import check_choice
from .tables import CellType, numbered

SEXES = dict.fromkeys(("f", "female", "woman", "w", "weiblich", "femenino", "féminin"), "F")
SEXES |= dict.fromkeys(("m", "male", "man", "männlich", "masculino", "masculin"), "M") | {"unknown": "", "": ""}
_IN_YEARS = r"Y|yrs?|years?|J|Jahre?|ans?|años?"
# 57M may be a man of 57.
_AGE = re.compile(rf"(\d+(?:[.,]\d+)?)(?:\s*(?:{_IN_YEARS}))?|(\d{{3,}})([MWD])", re.IGNORECASE)
UNITS_PER_YEAR = {"M": 12, "W": 52.18, "D": 365.25}
OLDEST = 120  # years; a higher age is a mistake of the table


def parse_sex(text: str) -> str | None:
    """Read a sex as F, M, or empty for unknown. Return None if it is not understood."""
    return SEXES.get(text.strip().lower())


def parse_age(text: str) -> float | None:
    """Read an age such as `45`, `45 years`, `045Y` or `018M` (Y, M, W, D as in DICOM) in years.

    Return NaN for unknown, and None if it is unreadable or above 120.
    """
    try:
        years = _years(text)
    except ValueError:
        return None
    return None if years > OLDEST else years


def _years(text: str) -> float:
    text = text.strip()
    if text.lower() in ("", "unknown"):
        return math.nan
    found = _AGE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    if found[1]:
        return float(found[1].replace(",", "."))
    return float(found[2]) / UNITS_PER_YEAR[found[3].upper()]


SEX = CellType(lambda text: SEXES[text.lower()], "F, M or nothing")
AGE = CellType(_years, "an age such as 57, 058Y, 013M or 011D")  # in years, as high as it is written


def believe_ages(ages: Sequence[float]) -> tuple[list[float], list[str]]:
    """Count ages above 120 years as unknown (old releases have 411). Return the ages, and a note of these."""
    count = sum(age > OLDEST for age in ages)
    notes = [f"{count} age(s) above {OLDEST} years are counted as unknown"] if count else []
    return [math.nan if age > OLDEST else age for age in ages], notes


PATIENT_IDS = ("exact", "normalised")  # what ids mean that differ in their spelling alone
_DECIMALS = re.compile(r"(?<=\d)[.,]0+$")
_SHORTENED = re.compile(r"\d([.,]\d+)?E\+\d+", re.IGNORECASE)  # 1.2346E+11, of a spreadsheet
_ZEROS = re.compile(r"(?<![\d.])0+(?=\d)")


def plain_patient(patient: str) -> str:
    """Write a patient without leading zeros, a final `.0`, upper case and blanks: 001, 1.0, 1,0 and 1 are the same.

    So is '001, whose apostrophe tells Excel that it is text.

    An ü of one character and one of two (u and dots, as macOS writes it) are the same, and so are all kinds of dashes.
    Characters that cannot be seen, which come along when a cell is copied from a document, do not count.
    """
    text = unicodedata.normalize("NFKC", "".join(patient.split())).casefold()
    kinds = [(character, unicodedata.category(character)) for character in text]
    text = "".join("-" if kind == "Pd" else character for character, kind in kinds if kind not in ("Cf", "Cc"))
    return _ZEROS.sub("", _DECIMALS.sub("", text.removeprefix("'")))


def spelled_alike(patients: Iterable[str]) -> list[list[str]]:
    """Group patients that `plain_patient` writes alike. Leave out groups of one."""
    groups: dict[str, list[str]] = defaultdict(list)
    for patient in dict.fromkeys(patients):
        groups[plain_patient(patient)].append(patient)
    return [sorted(group) for group in groups.values() if len(group) > 1]


def read_patients(
    table: Path, column: str, values: Sequence[str], names: Sequence[str], spelling: str | None
) -> list[str]:
    """Read the patients of a table.

    Args:
        table: the table, for messages.
        column: its column of patients.
        values: the cells.
        names: name of the image in each row.
        spelling: one of `PATIENT_IDS`; None if the user did not say.

    Raises:
        UserError: a patient is unknown, or a number that a spreadsheet shortened, so that several patients share it; or
            two are spelled alike, and `spelling` is None.
    """
    if spelling is not None:
        check_choice("patient_ids", spelling, PATIENT_IDS)
    for (row, value), name in zip(numbered(table, values), names, strict=True):
        if not plain_patient(value):  # also of characters that cannot be seen
            raise UserError(f"{table}: row {row} ({name}): empty {column} found; expected a patient")
        if _SHORTENED.fullmatch(value):
            raise UserError(
                f"{table}: row {row} ({name}): {column} {value} found, a number that a spreadsheet shortened; expected "
                "all its digits: export the column as text"
            )
    if spelling == "normalised":
        return [plain_patient(value) for value in values]
    alike = spelled_alike(values) if spelling is None else []
    if alike:
        listed = some((" = ".join(group) for group in alike), 3)
        raise UserError(
            f"{table}: column {column}: {len(alike)} patient(s) found in several spellings, such as {listed}; expected "
            "one spelling each, or --patient_ids normalised (they are the same) or exact (they are not)"
        )
    return list(values)
