"""Convert DICOM radiographs to 8-bit grey. Import this module only for a DICOM file: pydicom is an extra.

Two rules hold in this folder. Check every size that a file declares before you use it, since a file can declare any
size. Quote no text of a file in a message, and no message of pydicom, which quotes the file: a damaged attribute may
hold the name of a patient.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset

from mlvicx_hf.common.errors import MissingExtraError

from ..errors import UnreadableImageError
from ..ranges import FEW_LEVELS, has_few_levels
from .attributes import DAMAGED_DICOM, PixelHeader, RefusedError, pixel_header, read_attributes
from .codestreams import PLUGIN, check_codestream
from .colours import luminance, palette_luminance
from .frames import decompress, joined_frame, uncompressed
from .grey_scales import grey_scales, misfit, modality_outputs, own_range, to_unit
from .stored_bits import overlay_bits, padding_mask, uses_more_bits

_BLOCK = 2**16  # pixels to look up at a time, so that they fit into the processor's cache


def decode_dicom(data: bytes, file: str | Path) -> Image.Image:
    """Convert the content of a DICOM file, of any modality, body part and view, to 8-bit grey.

    All uncompressed transfer syntaxes can be read, and deflated, JPEG (8 bits), JPEG Lossless, JPEG-LS, JPEG 2000 and
    RLE, with 1, 8 or 16 bits allocated. Where preamble, meta information or transfer syntax are missing, the first
    bytes tell little from big endian. Old ACR-NEMA files lack attributes: one unsigned sample, MONOCHROME2 is assumed.

    Grey values pass through these steps (PS3.3 C.11): the modality LUT or the rescale; a grey scale; the inversion of
    MONOCHROME1, or of any image whose PresentationLUTShape is INVERSE. The grey scale is the first that fits of these:
    each VOI LUT, each window (LINEAR, LINEAR_EXACT, SIGMOID), and last the range of the image's own values (from 8
    bits on by the rule of `ranges`, as of PNG and TIFF files). The output range of a window, or the range of the
    entries of a VOI LUT, becomes 0 to 255.

    A VOI LUT or window does not fit if it is damaged, if its width is not a number or is too small (below 1 for
    LINEAR, 0 or less for the others), or if, of the pixels that are not padding, it makes 95 % or more black or white,
    or leaves fewer than 32 grey levels of an image that has more. A rescale is ignored if it holds no numbers or leaves
    one value. Pixels of the padding value or range become black. Colours become luminance. Bits above BitsStored count
    where the picture is smoother with them.

    The grid of the file stays as it is, also where pixels are not square, since boxes and masks refer to that grid.
    Overlays are not drawn. A file with several frames is refused.

    Args:
        data: the content.
        file: name to use in errors.

    Returns:
        Picture of mode "L", Columns × Rows. Where a grey scale or BitsStored of the file does not fit, `info["note"]`
        says why.

    Raises:
        UnreadableImageError: the file holds no image or several frames, or is damaged, suspiciously large, or of a
            kind that is not supported.
        MissingExtraError: it is compressed in a way that only python-gdcm reads, which is not installed.
    """
    with _silence():
        try:
            gray, note = _decode(data)
            image = Image.fromarray(gray)
            image.info |= {"note": note} if note else {}
            return image
        except MissingExtraError:  # the file may be whole
            raise
        except RefusedError as refusal:
            reason = str(refusal)
        except DAMAGED_DICOM as damage:  # its message may quote the file
            reason = f"damaged or unsupported DICOM: {type(damage).__name__}"
    raise UnreadableImageError(file, reason)  # raised here, it does not carry the other error as its context


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the warnings and log records of pydicom, which quote the file."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _decode(data: bytes) -> tuple[np.ndarray, str]:
    """Grey of the pixels, uint8 [H, W], and a note on it, mostly empty."""
    dataset, syntax = read_attributes(data)
    if "PixelData" not in dataset:
        raise RefusedError("no PixelData found; expected an image")
    header = pixel_header(dataset)
    if syntax.is_encapsulated:
        if syntax not in PLUGIN:
            known = ", ".join(uid.name for uid in PLUGIN)
            raise RefusedError(f"transfer syntax {syntax.name} found; expected an uncompressed one, {known}")
        frame, header = check_codestream(joined_frame(dataset), header, syntax)
        pixels, photometric = decompress(frame, header, syntax)
    else:
        pixels, photometric = uncompressed(dataset, header, syntax)
    if header.samples == 3:
        gray = luminance(pixels, photometric, header.stored)
        if header.stored == 16 and has_few_levels(gray):
            raise RefusedError(FEW_LEVELS)
        return gray, ""
    words = pixels.view(f"{pixels.dtype.byteorder}u{pixels.dtype.itemsize}")
    if photometric == "PALETTE COLOR":
        return _look_up(palette_luminance(dataset, header), words), ""
    return _monochrome(dataset, header, words)


def _monochrome(dataset: Dataset, header: PixelHeader, words: np.ndarray) -> tuple[np.ndarray, str]:
    """Convert bit patterns [H, W] to grey. Compute a table of all values, which is short, then look pixels up.

    Returns:
        The grey, uint8 [H, W], and why grey scales of the file were passed over: empty if none was.
    """
    if planes := overlay_bits(dataset, header):
        words = words & words.dtype.type(2**header.container - 1 - planes)
    counts = np.zeros(2**header.container, np.intp)
    for block in _blocks(words):
        counts += np.bincount(block, minlength=len(counts))
    passed_over: list[str] = []
    if uses_more_bits(dataset, header, words, counts):
        passed_over.append(f"BitsStored {header.stored} passed over, since the pixels use {header.container}")
        header = replace(header, stored=header.container, high=header.container - 1)
    values = header.stored_values()
    padding = padding_mask(dataset, header, values)
    outputs = modality_outputs(dataset, values)
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    invert = header.photometric == "MONOCHROME1" or shape == "INVERSE"
    inside: np.ndarray = np.where(padding, 0, counts) if counts[~padding].any() else counts
    for name, unit in grey_scales(dataset, outputs):
        if unit is None:
            passed_over.append(f"{name} cannot be read")
            continue
        table = _table(unit, padding, invert)
        reason = misfit(table, values, inside)
        if reason is None:
            return _look_up(table, words), "; ".join(passed_over)
        passed_over.append(f"{name} {reason}")
    unit = to_unit(outputs, *own_range(values, outputs, inside, header.stored))
    if passed_over:
        passed_over[-1] += ": the range of the pixels was used"
    return _look_up(_table(unit, padding, invert), words), "; ".join(passed_over)


def _table(unit: np.ndarray, padding: np.ndarray, invert: bool) -> np.ndarray:
    """Grey of each value, uint8 [2**container]. Values outside [0, 1] are clipped."""
    gray = np.round(unit.clip(0, 1) * 255).astype(np.uint8)
    if invert:
        gray = 255 - gray
    gray[padding] = 0
    return gray


def _blocks(words: np.ndarray) -> Iterator[np.ndarray]:
    flat = words.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK]


def _look_up(table: np.ndarray, words: np.ndarray) -> np.ndarray:
    gray = np.empty(words.size, np.uint8)
    for start, block in enumerate(_blocks(words)):
        np.take(table, block, out=gray[start * _BLOCK : start * _BLOCK + len(block)], mode="clip")
    return gray.reshape(words.shape)
