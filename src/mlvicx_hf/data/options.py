"""Refuse options that do not fit, with the name and the value in the message."""

import math
from collections import Counter
from collections.abc import Iterable

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some


def check_choice(name: str, value: str, choices: Iterable[str]) -> str:
    """Return the value of an option if it is one of the choices."""
    if value not in choices:
        raise UserError(f"{name}={value!r} found; expected one of {', '.join(choices)}")
    return value


def check_once(option: str, values: Iterable[str]) -> None:
    """Refuse a value that is given twice."""
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UserError(f"{option} with {some(twice)} twice found; expected each once")


def check_least(least: int, **options: float | None) -> None:
    """Refuse numbers that are too small or not finite. None stands for an option that is not given."""
    for name, value in options.items():
        if value is not None and not least <= value < math.inf:  # also NaN
            kind = "a finite number, " if value == math.inf else ""
            raise UserError(f"{name}={value} found; expected {kind}{least} or more")
