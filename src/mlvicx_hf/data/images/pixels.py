"""Read any image file as 8-bit grey, and fit 8-bit grey to a square.

This module needs Pillow and NumPy alone: worker processes start without waiting for torch.
"""

import io
import logging
import os
import stat
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, UnidentifiedImageError

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .errors import DAMAGED, UnreadableImageError
from .ranges import FEW_LEVELS, count_values, has_few_levels, is_eight_bit, robust_range

DICOM_SUFFIXES = (".dcm", ".dicom")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".tif", ".tiff", ".webp", ".bmp", *DICOM_SUFFIXES)
# Try these formats alone: Pillow also opens formats that start other programs (EPS) or follow links.
FORMATS = ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "JPEG2000")

# First bytes of TIFF and BigTIFF; of these, PNG, JPEG, JPEG 2000 and its bare stream
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
SIGNATURES = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", *TIFF_SIGNATURES),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
)

# Pillow decodes floats of 64 bits, but does not list them among the TIFF files that it opens.
for _prefix, _order in ((b"II", ""), (b"MM", "B")):
    for _white in (0, 1):
        TiffImagePlugin.OPEN_INFO.setdefault((_prefix, _white, (3,), 1, (64,), ()), ("F", f"F;64{_order}F"))

CACHE_MARK = "cache.json"  # a folder with this file is a prepared cache
# A JPEG file is decoded at half its size if the half is still so many times as large as the square. Measured on squares
# of 131 radiographs as blurred as scanned films: 129 differ by 1 grey level at most, 2 by 2 levels in up to 0.01 % of
# their pixels. With 4 instead of 5 one in three differs by 2 levels somewhere, with 2 nearly all, by up to 8 levels.
HALVED_REDUCTION = 5
_ORIGINAL_SIZE = "original_size"  # key of `Image.info`
TURNED = "turned"  # key of `Image.info`: the EXIF orientation by which the image was turned upright
_ORIENTATION = 0x0112  # EXIF tag
MAX_BYTES = 2**30  # of a file: three times the size of the largest uncompressed image that Pillow accepts
# Tags of TIFF
_PHOTOMETRIC = 262  # 0 means that small values are white
_SAMPLE_FORMAT = 339  # 2 means numbers with a sign


def _fail(error: OSError) -> None:
    raise error


def image_files(
    folder: Path, skipped: Counter[str] | None = None, onerror: Callable[[OSError], None] | None = _fail
) -> Iterator[Path]:
    """Find the image files below a folder, in sorted order.

    A usual suffix, or else the content, makes a file an image. Skip hidden files and folders, prepared caches and
    `DICOMDIR`. Follow a link to a folder if it leads to a folder below the same root that is not read otherwise; its
    files come last.

    Args:
        folder: where to look.
        skipped: counts what is skipped, by kind.
        onerror: called with the error of a folder that cannot be listed; None skips such a folder.

    Raises:
        OSError: a folder that cannot be listed, unless `onerror` does otherwise.
    """
    skipped = Counter() if skipped is None else skipped
    root, seen = os.path.realpath(folder), set[str]()
    links: list[str] = []
    yield from _images_below(str(folder), onerror, skipped, links, seen)
    while links:
        link = links.pop(0)
        target = os.path.realpath(link)
        if target in seen:
            continue
        if not Path(target).is_relative_to(root):
            skipped["link to a folder outside"] += 1
            continue
        yield from _images_below(link, onerror, skipped, links, seen)


def _images_below(
    top: str, onerror: Callable[[OSError], None] | None, skipped: Counter[str], links: list[str], seen: set[str]
) -> Iterator[Path]:
    """Yield the images below a folder. Put links to folders into `links`, and the folders read into `seen`."""
    for parent, subfolders, files in os.walk(top, onerror=onerror):
        real = os.path.realpath(parent)
        if CACHE_MARK in files or real in seen:  # pictures of a cache are no radiographs
            skipped["prepared cache"] += CACHE_MARK in files
            subfolders.clear()
            continue
        seen.add(real)
        skipped["hidden"] += sum(name.startswith((".", "@")) for name in subfolders)  # @eaDir has a server's thumbnails
        skipped["hidden"] += sum(name.startswith(".") for name in files)
        visible = sorted(name for name in subfolders if not name.startswith((".", "@")))
        links += [path for path in (os.path.join(parent, name) for name in visible) if os.path.islink(path)]
        subfolders[:] = [name for name in visible if not os.path.islink(os.path.join(parent, name))]
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(parent) / name
            if name.lower().endswith(IMAGE_SUFFIXES) or (name.upper() != "DICOMDIR" and _has_signature(path)):
                yield path
            else:
                skipped[path.suffix.lower() or "no suffix"] += 1


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """List what `image_files` skipped, by kind; empty if there is nothing."""
    found = {kind: count for kind, count in skipped.items() if count}
    if not found:
        return ""
    listed = some((f"{kind} {count}" for kind, count in found.items()), 12)
    return f"skipped files that are no images: {sum(found.values())} ({listed})"


def _has_signature(path: Path) -> bool:
    """Check whether a file begins like an image, whatever its name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with path.open("rb") as file:
            head = file.read(132)
    except OSError:
        return False
    webp = head[:4] == b"RIFF" and head[8:12] == b"WEBP"
    bitmap = head[:2] == b"BM" and head[6:10] == bytes(4)  # reserved bytes of BMP
    return webp or bitmap or head.startswith(SIGNATURES) or is_dicom(head)


def read_gray(path: str | Path) -> Image.Image:
    """Read a PNG, JPEG, TIFF, WebP, BMP, JPEG 2000 or DICOM file of any mode as 8-bit grey.

    The content decides which format it is, not the file's name. Keep whole numbers from 0 to 255 and floats from 0 to
    1 as they are; stretch all others to the range of `ranges.robust_range`. Apply the EXIF orientation, drop
    transparency, and read the first of several frames. For DICOM files see `dicom.decode_dicom`.

    Returns:
        Picture of mode "L".

    Raises:
        UnreadableImageError: the file is truncated, empty, no image, or suspiciously large.
        FileNotFoundError: no such file.
        ImportError: the file is DICOM, and pydicom is not installed.
    """
    return decode_gray(read_content(path), path)


def read_content(path: str | Path) -> bytes:
    """Read the content of an image file.

    Raises:
        UnreadableImageError: it is larger than `MAX_BYTES`, or no regular file (reading a pipe might never end).
        OSError: it cannot be read.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError(path, "no regular file")
    if status.st_size > MAX_BYTES:
        raise UnreadableImageError(path, f"{status.st_size} bytes found; expected at most {MAX_BYTES}")
    return Path(path).read_bytes()


def decode_gray(data: bytes, file: str | Path, *, padded_to: int | None = None) -> Image.Image:
    """Do what `read_gray` does, with a file's content.

    Args:
        data: the content.
        file: its name in error messages.
        padded_to: side of the square to which the caller pads the picture. If it is given, a large grey JPEG file is
            decoded at half its size, which is faster: see `HALVED_REDUCTION`. `original_size` tells its true size.
    """
    if is_dicom(data):
        from .dicom.decoding import decode_dicom

        return decode_dicom(data, file)
    image = decode(data, file, padded_to=padded_to)
    try:
        gray = _gray(image)
    except UserError as error:
        raise UnreadableImageError(file, str(error)) from error
    gray.info |= {name: image.info[name] for name in (TURNED,) if name in image.info}
    return gray


def is_dicom(data: bytes) -> bool:
    """Check whether a file's content looks like DICOM.

    Either it has the prefix "DICM" after a preamble of 128 bytes. Or it is an old export without these, and starts with
    an attribute of group 2 or 8: its type follows in two capital letters, or, where types are implicit, a short and
    even length. No format that Pillow reads starts like this.
    """
    if data[128:132] == b"DICM":
        return True
    explicit = data[4:6].isalpha() and data[4:6].isupper()
    if data[:1] == b"\0":  # big-endian
        return data[1:2] in (b"\2", b"\x08") and explicit
    length = int.from_bytes(data[4:8], "little")
    return data[:2] in (b"\2\0", b"\x08\0") and len(data) > 8 and (explicit or (length < 1024 and length % 2 == 0))


def original_size(gray: Image.Image) -> tuple[int, int]:
    """Tell the width and height that the upright image has in its file, also after `decode_gray` halved it."""
    size: tuple[int, int] = gray.info.get(_ORIGINAL_SIZE, gray.size)
    return size


def decode(
    data: bytes, file: str | Path, formats: tuple[str, ...] = FORMATS, *, padded_to: int | None = None
) -> Image.Image:
    """Decode a file's content without changing its mode, and turn it upright as EXIF says.

    Args:
        data: the content.
        file: its name in error messages.
        formats: the formats of Pillow to try.
        padded_to: see `decode_gray`.

    Raises:
        UnreadableImageError: the content is truncated, empty, no image, or suspiciously large.
    """
    if not data:
        raise UnreadableImageError(file, "empty file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata in a file does not concern the user
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        tiff = logging.getLogger(
            TiffImagePlugin.__name__
        )  # it logs errors without the file's name, and raises them too
        tiff.disabled = True
        try:
            return _load(data, formats, padded_to)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise UnreadableImageError(file, f"suspiciously large (decompression bomb?): {error}") from error
        except UnidentifiedImageError as error:
            if "TIFF" in formats and data.startswith(TIFF_SIGNATURES):
                kinds = "such as floats of 16 bits or whole numbers of 64"
                raise UnreadableImageError(file, f"TIFF of a kind that is not read ({kinds}), or damaged") from error
            raise UnreadableImageError(file, f"content is none of {', '.join(formats)}") from error
        except DAMAGED as error:
            raise UnreadableImageError(file, f"damaged or unsupported: {' '.join(str(error).split())}") from error
        finally:
            tiff.disabled = False


def _load(data: bytes, formats: tuple[str, ...], padded_to: int | None) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=formats)
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format != "MPO":  # of a camera's MPO the first is the picture, and others are previews
        raise UserError(f"{pages} images in one file found; expected one")
    halved = padded_to is not None and _halve(image, padded_to)
    deep_colour = image.mode in ("RGB", "RGBA", "LA") and any(";16" in str(tile.args) for tile in image.tile)
    if not isinstance(image.info.get("xmp", b""), bytes):  # a damaged tag
        del image.info["xmp"]
    turned = image.tag_v2.get(_ORIENTATION) if isinstance(image, TiffImagePlugin.TiffImageFile) else None
    image.load()  # which turns a TIFF
    orientation = turned or image.getexif().get(_ORIENTATION)
    # A damaged tag cannot be written back, and "note" is what `decode_dicom` has to say, not a file's text.
    for name in ("exif", "Raw profile type exif", "note"):
        image.info.pop(name, None)
    ImageOps.exif_transpose(image, in_place=True)
    if orientation in range(2, 9):
        image.info[TURNED] = orientation
    image.info[_ORIGINAL_SIZE] = (2 * image.width, 2 * image.height) if halved else image.size
    channels = 1 if image.mode == "LA" else 3
    if deep_colour and has_few_levels(np.asarray(image)[..., :channels]):  # Pillow keeps the high bytes alone
        raise UserError(FEW_LEVELS)
    return image


def _halve(image: ImageFile.ImageFile, padded_to: int) -> bool:
    """Let libjpeg decode a large grey JPEG file at half its size, where the padded square stays nearly the same.

    The half of an odd side would shift the square. Return whether the file is decoded in this way.
    """
    width, height = image.size
    if image.format != "JPEG" or image.mode != "L" or width % 2 or height % 2:
        return False
    if max(image.size) < 2 * HALVED_REDUCTION * padded_to:
        return False
    image.draft("L", (width // 2, height // 2))
    assert image.size == (width // 2, height // 2)
    return True


def _gray(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to mode "L". For more than 8 bits follow the rule of the image processor."""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    signed = tags.get(_SAMPLE_FORMAT) in (2, (2,))
    if image.mode == "L" and not signed:
        return image
    if image.mode in ("LA", "La"):
        return image.getchannel(0)
    if not (image.mode in ("L", "F") or image.mode.startswith("I")):
        return image.convert("RGB").convert("L")  # 1, palette, RGB, RGBA, CMYK, YCbCr, LAB
    array = np.asarray(image)
    unit = _unit(array.view(np.int8) if image.mode == "L" else array)
    if tags.get(_PHOTOMETRIC) == 0 and image.mode != "L":
        unit = 1 - unit  # Pillow does this for 8 bits only
    unit *= 255  # in place: such an image may take 350 MB
    return Image.fromarray(np.round(unit, out=unit).astype(np.uint8))


def _unit(array: np.ndarray) -> np.ndarray:
    """Convert pixels of more than 8 bits to float32 in [0, 1].

    Whole numbers from 0 to 255 and floats from 0 to 1 are grey levels already. Stretch all others from black to white
    of `robust_range`. `to_unit_gray` of the image processor does the same; a test holds the two together.
    """
    low, high = float(array.min()), float(array.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise UserError("image with NaN or infinite pixels found; expected finite values")
    whole = array.dtype.kind in "iu"
    if is_eight_bit(low, high) if whole else low >= 0 and high <= 1:
        low, high = 0.0, 255.0 if whole else 1.0
    else:
        low, high = robust_range(*count_values(array))
    wide = array.dtype.itemsize > 2 and whole  # float32 holds no difference of large numbers
    unit: np.ndarray = array.astype(np.float64 if wide else np.float32)
    unit -= low
    unit /= max(high - low, np.finfo(np.float32).tiny)
    return unit.clip(0, 1, out=unit).astype(np.float32, copy=False)


def fit_square_gray(
    image: Image.Image, size: int, fit: str = "pad", resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Fit a picture of mode "L" to a square, with Pillow alone.

    The geometry is that of `fit_square` of the image processor, and the grey values agree within rounding; a test holds
    the two together.

    Args:
        image: mode "L".
        size: side of the result in pixels.
        fit: "pad", "squash" or "crop".
        resample: take the nearest pixel for class indices, which must not be mixed.

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
