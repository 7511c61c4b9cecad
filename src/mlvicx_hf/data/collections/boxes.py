"""Read boxes in the frame of NIH's images, which the RSNA challenge uses as well."""

from mlvicx_hf.common.errors import UserError

from .base import Box
from .tables import CellType

_SIDE = 1024
FRAME = (_SIDE, _SIDE)  # width and height of all released images, in which boxes are measured


def _pixels(text: str) -> float:
    number = float(text)
    if not 0 <= number <= _SIDE:
        raise ValueError
    return number


PIXELS = CellType(_pixels, f"pixels from 0 to {_SIDE}")


def add_box(
    where: str, others: tuple[Box, ...], label: str, x: float, y: float, width: float, height: float
) -> tuple[Box, ...]:
    """Add a box, in pixels of `FRAME`, to the other boxes of its image. `x` and `y` are the left and upper edge.

    Raises:
        UserError: the box is empty, leaves the frame, or is one of the others. The message begins with `where`.
    """
    if not (width and height) or x + width > _SIDE or y + height > _SIDE:
        raise UserError(
            f"{where}: a box of {width:g} x {height:g} pixels at ({x:g}, {y:g}) found; expected one inside "
            f"{_SIDE} x {_SIDE}, not empty"
        )
    box = Box(label, x, y, x + width, y + height)
    if box in others:
        raise UserError(f"{where}: a box of {label} found for the second time; expected each once")
    return (*others, box)
