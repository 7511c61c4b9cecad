# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Any image file to 8-bit grey, and 8-bit grey to a square.

Only Pillow and NumPy are imported at the top: worker processes read ordinary files without waiting for torch.
"""

from __future__ import annotations

import io
import logging
import os
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mlvicx_hf.common.errors import UserError

from .errors import DAMAGED, UnreadableImageError

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", *DICOM_SUFFIXES)
# The only formats tried: Pillow also opens formats that start other programs (EPS) or follow links.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "JPEG2000")

CACHE_MARK = "cache.json"  # what a prepared cache is known by
MAX_BYTES = 2**30  # of a file; three times what the largest uncompressed image takes that Pillow accepts
_BLOCK = 64  # rows that are converted at a time where float64 of all would need much memory
_PHOTOMETRIC = 262  # TIFF tag; 0 means that small values are white


def image_files(folder: Path, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """Files below a folder that are called like images, in sorted order; hidden ones and prepared caches are skipped.

    Args:
        folder: links to folders in it are not followed.
        onerror: told of folders that cannot be listed, which are skipped otherwise.
    """
    for parent, subfolders, files in os.walk(folder, onerror=onerror):
        if CACHE_MARK in files:  # its pictures are no radiographs
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(parent) / name


def read_gray(path: str | Path) -> Image.Image:
    """Read a PNG, JPEG, TIFF, WebP, BMP, JPEG 2000 or DICOM file of any mode as 8-bit grey.

    The content decides, not the file's name. 16-bit files are rescaled, never saturated (see `full_scale`); float
    files in [0, 1] are taken as they are, others from their minimum to their maximum. An EXIF orientation is applied,
    transparency is dropped. Of several frames the first is read. Of DICOM see `dicom.decode_dicom`.

    Returns:
        Picture of mode "L".

    Raises:
        UnreadableImageError: truncated, empty, no image, or suspiciously large.
        FileNotFoundError: no such file.
        ImportError: a DICOM file, and pydicom is not installed.
    """
    return decode_gray(read_content(path), path)


def read_content(path: str | Path) -> bytes:
    """Content of an image file, which is never larger than `MAX_BYTES`, nor a pipe that would be waited for.

    Raises:
        UnreadableImageError: it is.
        OSError: it cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError(path, "no regular file")
    if status.st_size > MAX_BYTES:
        raise UnreadableImageError(path, f"{status.st_size} bytes found; expected at most {MAX_BYTES}")
    return Path(path).read_bytes()


def decode_gray(data: bytes, file: str | Path) -> Image.Image:
    """`read_gray` for a file's content; `file` is only what errors call it."""
    if is_dicom(data):
        from .dicom import decode_dicom

        return decode_dicom(data, file)
    image = decode(data, file)
    try:
        return _gray(image)
    except ValueError as error:  # a depth or range that the image processor refuses too
        raise UnreadableImageError(file, str(error)) from error


def is_dicom(data: bytes) -> bool:
    """Whether a file's content looks like DICOM.

    It has the prefix after the preamble, or else starts like old exports without either: with an attribute of group 2
    or 8, of a known type in capitals, or of a short even length where types are implicit. No format of Pillow's does.
    """
    if data[128:132] == b"DICM":
        return True
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    if data[:1] == b"\0":  # big endian
        return data[1:2] in (b"\2", b"\x08") and explicit
    length = int.from_bytes(data[4:8], "little")
    return data[:2] in (b"\2\0", b"\x08\0") and len(data) > 8 and (explicit or (length < 1024 and length % 2 == 0))


def decode(data: bytes, file: str | Path, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A file's content in the mode that it has, turned upright as EXIF says.

    Args:
        data: the content.
        file: what errors call it.
        formats: those of Pillow's that are tried.

    Raises:
        UnreadableImageError: as `read_gray`.
    """
    if not data:
        raise UnreadableImageError(file, "empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata in a file is no concern of the user's
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        tiff = logging.getLogger(TiffImagePlugin.__name__)  # it logs errors without a name, and raises them as well
        tiff.disabled = True
        try:
            return _load(data, formats)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UnreadableImageError(file, f"suspiciously large (decompression bomb?): {error}") from error
        except UnidentifiedImageError as error:
            raise UnreadableImageError(file, f"content is none of {', '.join(formats)}") from error
        except DAMAGED as error:
            raise UnreadableImageError(file, f"damaged or unsupported: {' '.join(str(error).split())}") from error
        finally:
            tiff.disabled = False


def _load(data: bytes, formats: tuple[str, ...]) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    deep_colour = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile)
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if deep_colour and np.asarray(image)[..., : 1 if image.mode == "LA" else 3].max() < 64:
        # Pillow keeps the high byte: right when all 16 bits are used, next to nothing when 14 or fewer are.
        raise UserError(
            "16 bits a channel of which 14 or fewer are used; expected such depth in one-channel files only"
        )
    return image


def _gray(image: Image.Image) -> Image.Image:
    """Picture of any mode to mode "L", through the image processor's own rule where there are more than 8 bits."""
    if image.mode == "L":
        return image
    if image.mode in ("LA", "La"):
        return image.getchannel(0)
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image.convert("RGB").convert("L")  # 1, palette, RGB, RGBA, CMYK, YCbCr, LAB
    from mlvicx_hf.models.image_processing_mlvicx import to_unit_gray

    unit = to_unit_gray(_unit_float(image) if image.mode == "F" else image)[0].numpy()  # [H, W]
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0:
        unit = 1 - unit  # Pillow does this for 8 bits only
    unit *= 255  # in place: such an image may take 350 MB
    return Image.fromarray(np.round(unit, out=unit).astype(np.uint8))


def _unit_float(image: Image.Image) -> np.ndarray:
    """Float picture to [0, 1]: as it is where it fits, else from minimum to maximum."""
    array = np.asarray(image)
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)) or (low >= 0 and high <= 1):
        return array  # `to_unit_gray` refuses what is not finite
    span = float(high) - float(low)
    unit = np.zeros_like(array)
    for top in range(0, len(array) if span > 0 else 0, _BLOCK):
        unit[top : top + _BLOCK] = (array[top : top + _BLOCK] - np.float64(low)) / span
    return unit


def fit_square_gray(
    image: Image.Image, size: int, fit: str = "pad", resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """`fit_square` of the image processor for pictures of mode "L", with Pillow alone.

    The geometry is the same and the grey values agree within rounding; a test holds them together.

    Args:
        image: mode "L".
        size: side of the result in pixels.
        fit: "pad", "squash" or "crop".
        resample: nearest for class indices, which must not be mixed.

    Returns:
        Mode "L", `size` × `size`.
    """
    if fit == "squash":
        return image.resize((size, size), resample)
    width, height = image.size
    if fit == "crop":
        side = min(width, height)
        left, top = round((width - side) / 2), round((height - side) / 2)
        return image.crop((left, top, left + side, top + side)).resize((size, size), resample)
    if fit != "pad":
        raise UserError(f"fit={fit!r} found; expected one of pad, squash, crop")
    scale = size / max(width, height)
    width, height = max(1, round(width * scale)), max(1, round(height * scale))
    square = Image.new("L", (size, size))
    square.paste(image.resize((width, height), resample), ((size - width) // 2, (size - height) // 2))
    return square
