# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read boxes in the frame of NIH's images, which the RSNA challenge uses as well."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlvicx_hf.common.errors import UserError

from .base import Box

FRAME = (1024, 1024)  # width and height of all released images, in which boxes are measured


def parse_framed_box(where: str, label: str, columns: Sequence[str], values: Sequence[str]) -> Box:
    """Read a box in `FRAME` from its left edge, upper edge, width and height.

    Args:
        where: beginning of the error message.
        label: the finding.
        columns: names of the four columns.
        values: their cells.

    Raises:
        UserError: a cell is no number, or the box is empty or leaves the frame.
    """
    side = FRAME[0]
    numbers = []
    for column, value in zip(columns, values, strict=True):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 <= number <= side:
            raise UserError(f"{where}, column {column}: {value!r} found; expected pixels from 0 to {side}")
        numbers.append(number)
    x, y, width, height = numbers
    if not (width and height) or x + width > side or y + height > side:
        raise UserError(
            f"{where}: a box of {width:g} x {height:g} pixels at ({x:g}, {y:g}) found; expected one inside "
            f"{side} x {side}, not empty"
        )
    return Box(label, x, y, x + width, y + height)


def add_box(where: str, boxes: tuple[Box, ...], box: Box) -> tuple[Box, ...]:
    """Add a box to those of an image. Refuse a box that is among them."""
    if box in boxes:
        raise UserError(f"{where}: a box of {box.label} found for the second time; expected each once")
    return (*boxes, box)
