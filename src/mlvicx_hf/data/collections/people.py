# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read sex and age as tables spell them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from .tables import CellType

SEXES = {"f": "F", "female": "F", "woman": "F", "m": "M", "male": "M", "man": "M", "unknown": "", "": ""}
_AGE = re.compile(r"(\d+(?:\.\d+)?)([YMWD]?)", re.IGNORECASE)
UNITS_PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
OLDEST = 120  # years; a higher age is a mistake of the table


def parse_sex(text: str) -> str | None:
    """Read a sex as F, M, or empty for unknown. Return None if it is not understood."""
    return SEXES.get(text.strip().lower())


def parse_age(text: str) -> float | None:
    """Read an age such as `45`, `045Y` or `018M` (Y, M, W, D as in DICOM) in years.

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
    return float(found[1]) / UNITS_PER_YEAR[found[2].upper()]


SEX = CellType(lambda text: SEXES[text.lower()], "F, M or nothing")
AGE = CellType(_years, "an age such as 57, 058Y, 013M or 011D")  # in years, as high as it is written


def believe_ages(ages: Sequence[float]) -> tuple[list[float], list[str]]:
    """Count ages above 120 years as unknown (old releases have 411). Return the ages, and a note of these."""
    count = sum(age > OLDEST for age in ages)
    notes = [f"{count} age(s) above {OLDEST} years are counted as unknown"] if count else []
    return [math.nan if age > OLDEST else age for age in ages], notes
