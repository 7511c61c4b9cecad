# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Segmentation masks: from the files that people have to class indices, and to the cache's squares."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mlvicx_hf.common.errors import UserError

from .images.errors import UnreadableImageError
from .images.pixels import decode, fit_square_gray

MASK_FORMATS = ("PNG",)  # lossless, and what annotation tools write
MAX_CLASSES = 256  # of an 8-bit mask


@dataclass(frozen=True)
class Mask:
    """A mask as the cache holds it.

    Attributes:
        png: 8-bit PNG of class indices.
        sha256: of the file, or of the drawn pixels.
        values: class indices that occur in `png`, ascending.
    """

    png: bytes
    sha256: str
    values: tuple[int, ...]


def check_mask_names(names: Sequence[str]) -> None:
    """Refuse names of classes that are empty, repeated or too many for 8 bits.

    Raises:
        ValueError: they are.
    """
    if not all(names) or len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        raise UserError(
            f"mask_names={','.join(names)!r} found; expected one structure, or up to {MAX_CLASSES} classes with the "
            "background first, each name once"
        )


def foreground(names: Sequence[str]) -> dict[str, int]:
    """Pixel value of each structure; a lone name is the structure itself, else the first is the background."""
    return {name: value for value, name in enumerate(names if len(names) > 1 else ("", *names)) if value}


def decode_mask(data: bytes, file: str | Path) -> np.ndarray:
    """Values [H, W] of a mask file: grey values or palette indices, or the channel that equal channels share.

    Args:
        data: the file's content.
        file: what errors call it.

    Raises:
        UnreadableImageError: no readable PNG, colours that are no grey, or a shape that is in the transparency alone.
    """
    pixels = np.asarray(decode(data, file, MASK_FORMATS))
    if pixels.ndim == 2:
        return pixels
    values, others = pixels[..., 0], pixels[..., 1:]
    alpha = others[..., -1] if others.shape[-1] in (1, 3) else None
    if alpha is not None and alpha.min() != alpha.max() and not np.array_equal(alpha, values):
        raise UnreadableImageError(file, "transparency that varies found; expected an opaque mask")
    colours = others if alpha is None else others[..., :-1]
    if (colours != values[..., None]).any():
        raise UnreadableImageError(file, "colours found; expected one channel, a palette, or equal channels")
    return values


def class_indices(pixels: np.ndarray, names: Sequence[str], size: tuple[int, int], file: str | Path) -> np.ndarray:
    """Check a mask against its classes and its image.

    Args:
        pixels: values [H, W]; a binary mask holds 0 and 1, or 0 and 255.
        names: one structure, or the classes by value.
        size: width and height of the image, upright.
        file: what errors call the mask.

    Returns:
        Class indices, uint8 [H, W]; 0 is the background.

    Raises:
        UnreadableImageError: another size than the image's, or values out of range.
    """
    height, width = pixels.shape
    if (width, height) != size:
        expected = f"{size[0]} x {size[1]} as its image"
        raise UnreadableImageError(file, f"{width} x {height} pixels found; expected {expected}")
    found = np.unique(pixels).tolist()
    if len(names) == 1:
        fits = set(found) <= {0, 1} or set(found) <= {0, 255}
        allowed, expected = {0, 1, 255}, f"0 and 1, or 0 and 255 ({names[0]})"
    else:
        allowed, expected = set(range(len(names))), f"0 to {len(names) - 1} ({', '.join(names)})"
        fits = set(found) <= allowed
    if not fits:
        strange = [value for value in found if value not in allowed] or found
        listed = ", ".join(map(str, strange[:5])) + (", …" if len(strange) > 5 else "")
        raise UnreadableImageError(file, f"value(s) {listed} found; expected {expected}")
    return (pixels > 0 if len(names) == 1 else pixels).astype(np.uint8)


def encode_mask(indices: np.ndarray, content: bytes, size: int, fit: str) -> Mask:
    """Class indices [H, W] to the cache's square, with the geometry of the image and without mixing classes.

    Args:
        indices: uint8 [H, W].
        content: what is hashed.
        size: side of the square in pixels.
        fit: "pad" (with background), "squash" or "crop".
    """
    square = fit_square_gray(Image.fromarray(indices), size, fit, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    values = tuple(value for value, count in enumerate(square.histogram()) if count)
    return Mask(buffer.getvalue(), hashlib.sha256(content).hexdigest(), values)
