"""Segmentation masks: read files of several kinds as class indices, and fit these to the squares of a cache."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .images.errors import UnreadableImageError
from .images.pixels import decode, fit_square_gray

MASK_FORMATS = ("PNG",)  # lossless, and the format of annotation tools
MAX_CLASSES = 256  # of an 8-bit mask


@dataclass(frozen=True)
class Mask:
    """A mask in a cache."""

    png: bytes  # 8-bit PNG of class indices
    sha256: str  # hash of the original file, or of the drawn pixels
    values: tuple[int, ...]  # class indices that occur in `png`, ascending


def check_mask_names(names: Sequence[str]) -> None:
    """Check the names of classes.

    Raises:
        UserError: a name is empty or repeated, or there are too many for 8 bits.
    """
    if not all(names) or len(set(names)) < len(names) or len(names) > MAX_CLASSES:
        raise UserError(
            f"mask_names={','.join(names)!r} found; expected one structure, or up to {MAX_CLASSES} classes with the "
            "background first, each name once"
        )


def foreground(names: Sequence[str]) -> dict[str, int]:
    """Map each structure to its pixel value. The first of several names is the background; a single name is not."""
    return {name: value for value, name in enumerate(names if len(names) > 1 else ("", *names)) if value}


def decode_mask(data: bytes, file: str | Path) -> np.ndarray:
    """Read the values [H, W] of a mask file: grey values, palette indices, or one of several equal channels.

    Args:
        data: the file's content.
        file: its name in error messages.

    Raises:
        UnreadableImageError: the file is no readable PNG, has colours, or a transparency that varies.
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
    """Check a mask against its classes and its image, and turn it into class indices.

    Args:
        pixels: values [H, W]; a binary mask holds 0 and 1, or 0 and 255.
        names: the one structure of a binary mask, or the classes in the order of their values.
        size: width and height of the upright image.
        file: the mask's name in error messages.

    Returns:
        Class indices, uint8 [H, W]; 0 is the background.

    Raises:
        UnreadableImageError: the mask has another size than its image, or values that are no class.
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
        raise UnreadableImageError(file, f"value(s) {some(map(str, strange))} found; expected {expected}")
    return (pixels > 0 if len(names) == 1 else pixels).astype(np.uint8)


def encode_mask(indices: np.ndarray, content: bytes, size: int, fit: str) -> Mask:
    """Fit class indices, uint8 [H, W], to the square of the cache, as the image and without mixing classes.

    Padding is background. `content` is what is hashed.
    """
    square = fit_square_gray(Image.fromarray(indices), size, fit, Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    values = tuple(value for value, count in enumerate(square.histogram()) if count)
    return Mask(buffer.getvalue(), hashlib.sha256(content).hexdigest(), values)
