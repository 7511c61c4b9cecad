"""What pretraining minimises. A new method is one file beside `mlvicx.py` and one line here."""

from __future__ import annotations

from .base import Objective
from .mlvicx import MLVICXObjective

OBJECTIVES: dict[str, type[Objective]] = {  # by the name that --objective takes
    "mlvicx": MLVICXObjective,
}
