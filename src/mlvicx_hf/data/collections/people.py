# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read sex and age as tables spell them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from mlvicx_hf.common.errors import UserError

SEXES = {"f": "F", "female": "F", "woman": "F", "m": "M", "male": "M", "man": "M", "unknown": "", "": ""}
AGE = re.compile(r"(\d+(?:\.\d+)?)([YMWD]?)", re.IGNORECASE)
UNITS_PER_YEAR = {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}
OLDEST = 120  # years; a higher age is a mistake of the table


def parse_sex(text: str) -> str | None:
    """Read a sex as F, M, or empty for unknown. Return None if it is not understood."""
    return SEXES.get(text.strip().lower())


def parse_age(text: str) -> float | None:
    """Read an age such as `45`, `045Y` or `018M` (Y, M, W, D as in DICOM) in years.

    Return NaN for unknown, and None if it is unreadable or above 120.
    """
    text = text.strip()
    if text.lower() in ("", "unknown"):
        return math.nan
    found = AGE.fullmatch(text)
    if found is None:
        return None
    years = float(found[1]) / UNITS_PER_YEAR[found[2].upper()]
    return years if years <= OLDEST else None


def check_sex(where: str, value: str) -> str:
    """Read a sex as F, M, or empty for unknown. Refuse anything else."""
    sex = parse_sex(value)
    if sex is None:
        raise UserError(f"{where}: {value!r} found; expected F, M or nothing")
    return sex


def check_age(where: str, value: str) -> float:
    """Read an age in years. Return NaN if it is empty or implausible (old releases have 411); refuse other text."""
    age = parse_age(value)
    if age is None and not AGE.fullmatch(value):
        raise UserError(f"{where}: {value!r} found; expected an age such as 57, 058Y, 013M or 011D")
    return math.nan if age is None else age


def note_ages(values: Sequence[str], ages: Sequence[float]) -> list[str]:
    """Note the ages that were given and not believed."""
    count = sum(bool(value) and math.isnan(age) for value, age in zip(values, ages, strict=True))
    return [f"{count} age(s) above {OLDEST} years are counted as unknown"] if count else []
