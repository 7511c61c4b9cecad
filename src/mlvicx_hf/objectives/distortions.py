"""Distortions that a network has to undo: boxes of an image that are erased or overwritten."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

LEAVE, ERASE, ERASE_OUTSIDE, COPY = range(4)  # what happens to an image


class DistortedBox(NamedTuple):
    """A box in pixels, and where its content is copied from: so many pixels to the right and further down."""

    left: int
    top: int
    width: int
    height: int
    right_by: int = 0
    down_by: int = 0


class BoxPlan(NamedTuple):
    """What happens to B images, with K boxes each; boxes without area fill up the rows."""

    kind: Tensor  # LEAVE, ERASE, ERASE_OUTSIDE or COPY, int64 [B]
    boxes: Tensor  # the fields of `DistortedBox`, int64 [B, K, 6]


class Distortion(ABC):
    """Draws boxes for every image."""

    boxes: ClassVar[int]  # most boxes of an image
    fill: ClassVar[float | None]  # grey value in [0, 1] of what is erased; None for the mean of the normalisation

    @abstractmethod
    def draw(self, generator: np.random.Generator, side: int) -> tuple[int, list[DistortedBox]]:
        """Kind and boxes for one image of this side in pixels."""

    def plan(self, generators: Sequence[np.random.Generator], side: int) -> BoxPlan:
        """Plan images, one a generator, on the CPU."""
        kinds = torch.zeros(len(generators), dtype=torch.long)
        boxes = torch.zeros(len(generators), self.boxes, len(DistortedBox._fields), dtype=torch.long)
        for row, generator in enumerate(generators):
            kind, found = self.draw(generator, side)
            kinds[row] = kind
            if found:
                boxes[row, : len(found)] = torch.tensor(found)
        return BoxPlan(kinds, boxes)


class CutOut(Distortion):
    """Three boxes of 32 pixels of 224, anywhere inside the image, become the mean grey, as in PCRL."""

    boxes = 3
    fill = None

    def draw(self, generator: np.random.Generator, side: int) -> tuple[int, list[DistortedBox]]:
        """Three boxes, which may overlap."""
        width = max(1, round(side * 32 / 224))
        places = generator.integers(0, side - width + 1, (self.boxes, 2))
        return ERASE, [DistortedBox(int(left), int(top), width, width) for left, top in places]


def distort(images: Tensor, plan: BoxPlan, fill: float) -> Tensor:
    """Erase or overwrite the planned boxes.

    Args:
        images: [B, 1, S, S].
        plan: on the same device.
        fill: value of what is erased.
    """
    side = images.shape[-1]
    place = torch.arange(side, device=images.device)
    left, top, width, height, right_by, down_by = (each[..., None] for each in plan.boxes.unbind(-1))  # [B, K, 1]
    columns = (place >= left) & (place < left + width)  # [B, K, S]
    rows = (place >= top) & (place < top + height)
    inside = rows[..., None] & columns[:, :, None]  # [B, K, S, S]
    kind = plan.kind[:, None, None]
    source = (place[:, None] * side + place).expand(len(images), -1, -1)  # each pixel's own number
    shift = (down_by * side + right_by)[..., None]  # [B, K, 1, 1]
    for box in range(plan.boxes.shape[1]):  # a later copy lies over an earlier one
        source = torch.where(inside[:, box] & (kind == COPY), place[:, None] * side + place + shift[:, box], source)
    copied = images.flatten(1).gather(1, source.flatten(1)).view_as(images)
    hole = inside.any(1)
    erased = ((kind == ERASE) & hole) | ((kind == ERASE_OUTSIDE) & ~hole)
    return torch.where(erased[:, None], fill, copied)
