"""Turn a record into what a cache holds of it: a square PNG, hashes, mask and boxes."""

import hashlib
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from mlvicx_hf.common.errors import UserError

from ..collections.base import Box, Record
from ..copies.duplicates import is_flat, perceptual_hash
from ..masks import Mask, class_indices, decode_mask, encode_mask
from .errors import UnreadableImageError
from .pixels import TURNED, decode_gray, fit_square_gray, original_size, read_content

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_EIGHT_BIT_GRAY = (8, 0, 0, 0, 0)  # end of the PNG header: depth, colour type, compression, filters, not interlaced
_UP = 2  # PNG filter: difference to the pixel above


@dataclass(frozen=True)
class Picture:
    """The prepared form of a record, or the reason why there is none."""

    png: bytes = b""  # 8-bit grey square
    sha256: str = ""  # hash of the original file, or of the drawn pixels
    phash: str = ""  # perceptual hash of the square
    width: int = 0  # width of the original, upright
    height: int = 0  # height of the original, upright
    mask: Mask | None = None  # None if it is unknown
    boxes: tuple[Box, ...] | None = None  # in pixels of the square; None if they are unknown
    reason: str = ""  # why there is no picture; empty if there is one
    note: str = ""  # what to know of its grey scale, or of a mask beside a turned image; mostly empty
    flat: bool = False  # whether the square is without contrast or texture


def make_picture(
    record: Record, size: int, fit: str, mask_names: Sequence[str] = (), content: bytes | None = None
) -> Picture:
    """Read or draw one image and its mask, fit them to squares of `size` pixels, and encode them.

    Without `mask_names` no mask is read. `content` is that of the image file, if it was read before.

    Raises:
        OSError: the disk does not give a file, which says nothing of its content.
        MissingExtraError: a DICOM file needs a library that is not installed.
    """
    drawn = None
    try:
        if record.draw is not None:
            drawing = record.draw()
            pixels, drawn = np.ascontiguousarray(drawing.pixels), drawing.mask
            content, gray = pixels.tobytes(), Image.fromarray(pixels)
        else:
            content = _read(record) if content is None else content
            gray = decode_gray(content, record.name, padded_to=size if fit == "pad" else None)
    except UnreadableImageError as error:
        return Picture(reason=error.reason)
    original = original_size(gray)
    try:
        mask = _make_mask(record, drawn, original, size, fit, mask_names) if mask_names else None
    except UnreadableImageError as error:
        return Picture(reason=f"mask {record.mask_path.name if record.mask_path else 'drawn'}: {error.reason}")
    square = fit_square_gray(gray, size, fit)
    boxes = None
    if record.boxes is not None:
        fitted = (fit_box(box, record.frame or original, size, fit) for box in record.boxes)
        boxes = tuple(box for box in fitted if box is not None)
    notes = [gray.info["note"]] if gray.info.get("note") else []
    if TURNED in gray.info and (mask is not None or boxes is not None):
        notes.append(f"turned by EXIF orientation {gray.info[TURNED]}; mask and boxes are taken as upright already")
    digest = hashlib.sha256(content).hexdigest()
    return Picture(
        encode_png(square),
        digest,
        perceptual_hash(square),
        *original,
        mask,
        boxes,
        note="; ".join(notes),
        flat=is_flat(square),
    )


def encode_png(gray: Image.Image) -> bytes:
    """Encode a picture of mode "L" as PNG, without loss.

    Pillow tries five filters on every row and keeps the best. Here every row holds its difference to the row above.
    This takes half the time to encode, and three quarters of it to decode, whenever training reads the cache.
    """
    pixels = np.asarray(gray)  # [H, W]
    height, width = pixels.shape
    rows = np.empty((height, 1 + width), np.uint8)
    rows[:, 0] = _UP
    rows[0, 1:] = pixels[0]  # above it are zeros
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])  # modulo 256, as the format wants it
    packer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_RLE)
    chunks = (
        (b"IHDR", struct.pack(">II5B", width, height, *_EIGHT_BIT_GRAY)),
        (b"IDAT", packer.compress(rows.data) + packer.flush()),
        (b"IEND", b""),
    )
    checked = ((kind + content, len(content)) for kind, content in chunks)
    return _SIGNATURE + b"".join(
        struct.pack(">I", length) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk, length in checked
    )


def _read(record: Record) -> bytes:
    if record.path is not None:
        return read_content(record.path)
    if record.load is not None:
        return record.load()
    raise UserError(f"{record.name}: neither a file nor a drawing found; expected one of them")


def _make_mask(
    record: Record,
    drawn: np.ndarray | None,
    image_size: tuple[int, int],
    size: int,
    fit: str,
    mask_names: Sequence[str],
) -> Mask | None:
    """Take the mask from the drawing, or else from the table or the file. Return None if there is none."""
    if drawn is None and record.draw_mask is not None:
        drawn = _scaled(record.draw_mask(), image_size)
    if drawn is not None:
        pixels, content = drawn, np.ascontiguousarray(drawn).tobytes()
    elif record.mask_path is not None:
        content = read_content(record.mask_path)
        pixels = decode_mask(content, record.mask_path)
    else:
        return None
    indices = class_indices(pixels, mask_names, image_size, record.mask_path or record.name)
    return encode_mask(indices, content, size, fit)


def _scaled(mask: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Resize the mask of a table to the image, by nearest pixels, if the two differ in resolution alone."""
    height, width = mask.shape
    if (width, height) == image_size or width * image_size[1] != height * image_size[0]:
        return mask  # `class_indices` refuses another size
    return np.asarray(Image.fromarray(mask).resize(image_size, Image.Resampling.NEAREST))


def fit_box(box: Box, frame: tuple[int, int], size: int, fit: str) -> Box | None:
    """Move a box as `fit_square_gray` moves the image, from pixels of its frame (width, height) to those of the square.

    Cut it at the edges. Return None if nothing of it is left.
    """
    width, height = frame
    left = top = 0.0
    if fit == "pad":
        scale = size / max(frame)
        inner = [max(1, round(side * scale)) for side in frame]
        scale_x, scale_y = inner[0] / width, inner[1] / height
        left, top = (size - inner[0]) // 2, (size - inner[1]) // 2
    elif fit == "crop":
        side = min(frame)
        scale_x = scale_y = size / side
        left, top = -round((width - side) / 2) * scale_x, -round((height - side) / 2) * scale_y
    else:
        scale_x, scale_y = size / width, size / height
    x_min, x_max = (min(max(x * scale_x + left, 0), size) for x in (box.x_min, box.x_max))
    y_min, y_max = (min(max(y * scale_y + top, 0), size) for y in (box.y_min, box.y_max))
    return Box(box.label, x_min, y_min, x_max, y_max) if x_min < x_max and y_min < y_max else None
