"""Distortions that a network has to undo: boxes of an image that are erased or overwritten."""

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


RIGHT_BY, DOWN_BY = (DistortedBox._fields.index(name) for name in ("right_by", "down_by"))


class BoxPlan(NamedTuple):
    """What happens to B images, with K boxes each; boxes without area fill up the rows."""

    kind: Tensor  # LEAVE, ERASE, ERASE_OUTSIDE or COPY, int64 [B]
    boxes: Tensor  # the fields of `DistortedBox`, int64 [B, K, 6]
    copied: Tensor  # numbers of the images with the kind COPY, int64 [b]
    erased: Tensor  # numbers of those with the other two kinds, int64 [e]


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
        copied = kinds == COPY
        return BoxPlan(kinds, boxes, copied.nonzero()[:, 0], (~copied & (kinds != LEAVE)).nonzero()[:, 0])


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
    """Erase or overwrite the planned boxes, in place.

    Args:
        images: [B, 1, S, S].
        plan: on the same device.
        fill: value of what is erased.
    """
    if len(plan.copied):
        some, boxes = images[plan.copied], plan.boxes[plan.copied]
        images.index_copy_(0, plan.copied, _copied(some, boxes))
    if len(plan.erased):
        some, boxes, outside = (each[plan.erased] for each in (images, plan.boxes, plan.kind == ERASE_OUTSIDE))
        hole = torch.stack([_inside(box, some.shape[-1]) for box in boxes.unbind(1)]).any(0) != outside[:, None, None]
        images.index_copy_(0, plan.erased, some.masked_fill(hole[:, None], fill))
    return images


def _copied(images: Tensor, boxes: Tensor) -> Tensor:
    side = images.shape[-1]
    numbers = torch.arange(side * side, device=images.device).view(side, side)  # of the pixels
    source = numbers.expand(len(images), -1, -1)
    for box in boxes.unbind(1):  # a later copy lies over an earlier one, and all are taken from the image as it was
        shift = box[:, DOWN_BY] * side + box[:, RIGHT_BY]
        source = torch.where(_inside(box, side), numbers + shift[:, None, None], source)
    return images.flatten(1).gather(1, source.flatten(1)).view_as(images)


def _inside(box: Tensor, side: int) -> Tensor:
    """Which pixels lie in a box of each image: [B, 6] to [B, S, S]."""
    place = torch.arange(side, device=box.device)
    left, top, width, height = box[:, :4, None].unbind(1)  # [B, 1] each
    columns, rows = (place >= left) & (place < left + width), (place >= top) & (place < top + height)
    return rows[:, :, None] & columns[:, None]
