"""Convert DICOM radiographs to 8-bit grey. Import this module only for a DICOM file: pydicom is an extra.

Two rules hold throughout. Check every size that a file declares before you use it, since a file can declare any size.
Quote no text of a file in a message, and no message of pydicom, which quotes the file: a damaged attribute may hold
the name of a patient.
"""

import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlvicx_hf.common.errors import MissingExtraError, UserError

from .errors import DAMAGED, UnreadableImageError
from .ranges import FEW_LEVELS, has_few_levels, is_eight_bit, robust_range

try:
    from pydicom.dataset import Dataset
    from pydicom.encaps import encapsulate, generate_fragments
    from pydicom.errors import BytesLengthException
    from pydicom.filereader import read_dataset, read_preamble
    from pydicom.multival import MultiValue
    from pydicom.pixels import apply_windowing, get_decoder
    from pydicom.tag import Tag
    from pydicom.uid import (
        JPEG2000,
        UID,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
        ImplicitVRLittleEndian,
        JPEG2000Lossless,
        JPEG2000TransferSyntaxes,
        JPEGBaseline8Bit,
        JPEGExtended12Bit,
        JPEGLossless,
        JPEGLosslessSV1,
        JPEGLSLossless,
        JPEGLSNearLossless,
        JPEGTransferSyntaxes,
        RLELossless,
    )
    from pydicom.valuerep import DSfloat
except ModuleNotFoundError as error:
    raise MissingExtraError('DICOM files need pydicom: pip install ".[dicom]" in the repository') from error

# Read these attributes alone, so that names, dates and numbers of patients are never in memory.
COLOURS = ("Red", "Green", "Blue")
OVERLAYS = range(0x6000, 0x6020, 2)  # groups of attributes
_TAGS = tuple(
    int(Tag(keyword))
    for keyword in (
        *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration", "PhotometricInterpretation"),
        *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
        *("PixelPaddingValue", "PixelPaddingRangeLimit"),
        *("ModalityLUTSequence", "RescaleSlope", "RescaleIntercept"),
        *("VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "PresentationLUTShape"),
        *(f"{colour}PaletteColorLookupTable{part}" for colour in COLOURS for part in ("Descriptor", "Data")),
        "PixelData",
    )
)
_TAGS += tuple(group << 16 | element for group in OVERLAYS for element in (0x0100, 0x0102))  # bits allocated, position
# pydicom's plug-in for each compressed transfer syntax. All have permissive licences. Use one plug-in only: where one
# decoder refuses a damaged file, another may fill the gap with grey. Do not give unknown files to gdcm's JPEG 2000
# decoder, which is too old.
PLUGIN = {
    JPEGBaseline8Bit: "pillow",
    JPEGExtended12Bit: "gdcm",
    JPEGLossless: "gdcm",
    JPEGLosslessSV1: "gdcm",
    JPEGLSLossless: "gdcm",
    JPEGLSNearLossless: "gdcm",
    JPEG2000Lossless: "pillow",
    JPEG2000: "pillow",
    RLELossless: "pydicom",
}
_PHOTOMETRIC = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
MAX_INFLATED = 256 * 2**20  # bytes of a deflated file: 1.5 times the largest 16-bit image that Pillow accepts
J2K_START = b"\xff\x4f\xff\x51"  # markers SOC and SIZ
MAX_CLIPPED = 0.95  # of the pixels that are not padding: a grey scale that clips more does not belong to them
MIN_LEVELS = 32  # a grey scale that leaves fewer does not belong to them either
_BLOCK = 2**16  # pixels to look up at a time, so that they fit into the processor's cache
# What pydicom and its plug-ins raise for damaged content, as well as Pillow's.
DAMAGED_DICOM = (
    *DAMAGED,
    BytesLengthException,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
    NameError,
)


class _RefusedError(UserError):
    """The reason why a file is not read. The message is safe to show."""


@dataclass(frozen=True)
class _Header:
    """Attributes that describe the pixel data. A damaged or dangerous file gives no header."""

    rows: int
    columns: int
    samples: int
    planar: int
    photometric: str
    allocated: int  # bits
    stored: int
    high: int
    signed: bool

    @property
    def container(self) -> int:
        """Bits of a decoded value."""
        return max(8, self.allocated)

    def stored_values(self) -> np.ndarray:
        """The value of each pattern of bits, [2**container]. Unused bits are ignored."""
        words = np.arange(2**self.container, dtype=f"u{self.container // 8}")
        aligned = (words << (self.container - 1 - self.high)).view(f"{'i' if self.signed else 'u'}{words.itemsize}")
        return aligned >> (self.container - self.stored)


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
        except _RefusedError as refusal:
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
    dataset, syntax = _read(data)
    if "PixelData" not in dataset:
        raise _RefusedError("no PixelData found; expected an image")
    header = _header(dataset)
    if syntax.is_encapsulated:
        if syntax not in PLUGIN:
            known = ", ".join(uid.name for uid in PLUGIN)
            raise _RefusedError(f"transfer syntax {syntax.name} found; expected an uncompressed one, {known}")
        frame, header = _check_codestream(_frame(dataset), header, syntax)
        pixels, photometric = _decompress(frame, header, syntax)
    else:
        pixels, photometric = _uncompressed(dataset, header, syntax)
    if header.samples == 3:
        gray = _luminance(pixels, photometric, header.stored)
        if header.stored == 16 and has_few_levels(gray):
            raise _RefusedError(FEW_LEVELS)
        return gray, ""
    words = pixels.view(f"{pixels.dtype.byteorder}u{pixels.dtype.itemsize}")
    if photometric == "PALETTE COLOR":
        return _look_up(_palette(dataset, header), words), ""
    return _monochrome(dataset, header, words)


def _read(data: bytes) -> tuple[Dataset, UID]:
    """Read the attributes in `_TAGS` and the transfer syntax of the pixel data."""
    stream = io.BytesIO(data)
    read_preamble(stream, force=True)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 2)
    syntax = UID(str(meta.get("TransferSyntaxUID") or ""))
    if syntax == DeflatedExplicitVRLittleEndian:
        stream = io.BytesIO(_inflate(data[stream.tell() :]))
    if not syntax:
        start = data[stream.tell() :][:2]  # the group of the first tag, a small number: 0008 in nearly all files
        syntax = ExplicitVRBigEndian if start[:1] == b"\0" else ImplicitVRLittleEndian
    if not syntax.is_transfer_syntax:
        raise _RefusedError("unknown transfer syntax")
    # pydicom looks at the first element to find out whether the VR is implicit, whatever the syntax says.
    dataset = read_dataset(stream, syntax.is_implicit_VR, syntax.is_little_endian, specific_tags=list(_TAGS))
    return dataset, syntax


def _inflate(deflated: bytes) -> bytes:
    """Inflate up to the largest size that is safe."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(deflated, MAX_INFLATED + 1)
    if len(inflated) > MAX_INFLATED:
        raise _RefusedError(f"suspiciously large (decompression bomb?): inflates to more than {MAX_INFLATED} bytes")
    if not inflater.eof:
        raise _RefusedError("deflated data end early")
    return inflated


def _integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    value = dataset.get(keyword)
    if isinstance(value, int):
        return int(value)
    if value in (None, "", b"") and default is not None:
        return default
    raise _RefusedError(f"{keyword} is {'absent' if value is None else 'no integer'}")


def _header(dataset: Dataset) -> _Header:
    """Read the attributes of the pixel data and check that each is supported.

    Raises:
        _RefusedError: an attribute is absent or not supported.
    """
    frames = _integer(dataset, "NumberOfFrames", 1) or 1
    rows, columns = _integer(dataset, "Rows"), _integer(dataset, "Columns")
    allocated = _integer(dataset, "BitsAllocated")
    stored = _integer(dataset, "BitsStored", allocated)
    samples = _integer(dataset, "SamplesPerPixel", 1)
    planar = _integer(dataset, "PlanarConfiguration", 0)
    signed = _integer(dataset, "PixelRepresentation", 0)
    high = _integer(dataset, "HighBit", stored - 1)
    photometric = str(dataset.get("PhotometricInterpretation") or "MONOCHROME2").strip().upper()
    if frames != 1:
        raise _RefusedError(f"NumberOfFrames {frames} found; expected 1")
    if not (0 < rows < 2**16 and 0 < columns < 2**16):
        raise _RefusedError(f"Rows {rows} and Columns {columns} found; expected 1 to 65535")
    limit = Image.MAX_IMAGE_PIXELS  # the same limit as for all other formats
    if limit is not None and rows * columns > limit:
        raise _RefusedError(
            f"suspiciously large (decompression bomb?): {columns} × {rows} pixels found; expected at most {limit}"
        )
    if photometric not in _PHOTOMETRIC.get(samples, ()):
        known = " or ".join(f"{count} of {', '.join(names)}" for count, names in _PHOTOMETRIC.items())
        found = photometric if photometric in _PHOTOMETRIC[1] + _PHOTOMETRIC[3] else "another interpretation"
        raise _RefusedError(f"SamplesPerPixel {samples} of {found} found; expected {known}")
    if allocated not in ((1, 8, 16) if samples == 1 else (8, 16)) or not 0 < stored <= allocated:
        raise _RefusedError(f"BitsAllocated {allocated} and BitsStored {stored} found; expected 8 or 16 allocated")
    if signed not in (0, 1) or planar not in (0, 1) or (signed and samples == 3):
        raise _RefusedError(
            f"PixelRepresentation {signed}, PlanarConfiguration {planar} and SamplesPerPixel {samples} found; "
            "expected 0 or 1, and unsigned colours"
        )
    if not stored - 1 <= high < allocated:
        high = stored - 1
    return _Header(rows, columns, samples, planar, photometric, allocated, stored, high, bool(signed))


def _options(header: _Header) -> dict[str, Any]:
    return {
        "rows": header.rows,
        "columns": header.columns,
        "samples_per_pixel": header.samples,
        "planar_configuration": header.planar,
        "photometric_interpretation": header.photometric,
        "bits_allocated": header.allocated,
        "bits_stored": header.stored,
        "pixel_representation": int(header.signed),
        "number_of_frames": 1,
        "pixel_keyword": "PixelData",
        "raw": True,
        "allow_excess_frames": False,
        "correct_unused_bits": False,  # `_Header.stored_values` does
    }


def _uncompressed(dataset: Dataset, header: _Header, syntax: UID) -> tuple[np.ndarray, str]:
    element = dataset["PixelData"]
    if element.is_undefined_length:
        raise _RefusedError("compressed PixelData without a transfer syntax that says how")
    bits = header.rows * header.columns * header.samples * header.allocated
    expected = math.ceil((bits * 2 // 3 if header.photometric == "YBR_FULL_422" else bits) / 8)
    found = len(element.value)
    if not expected <= found < 2 * expected:  # real files hold some padding; twice as much is another image
        raise _RefusedError(
            f"{found} bytes of PixelData found; expected {expected} for {header.columns} × {header.rows} pixels of "
            f"{header.samples} × {header.allocated} bits"
        )
    options = _options(header) | {"pixel_vr": element.VR, "view_only": True}
    pixels, properties = get_decoder(syntax).as_array(element.value, **options)
    return pixels, str(properties["photometric_interpretation"])


def _frame(dataset: Dataset) -> bytes:
    """Join all fragments of the only frame. Skip the first item, an offset table that one frame does not need."""
    return b"".join(list(generate_fragments(dataset["PixelData"].value))[1:])


def _check_codestream(frame: bytes, header: _Header, syntax: UID) -> tuple[bytes, _Header]:
    """Compare the size that a compressed frame declares with the file's, before a decoder uses it.

    Returns:
        The bytes to decode, and the header with the bits of the decoded values.

    Raises:
        _RefusedError: the sizes differ, or there is no such frame.
    """
    if syntax == RLELossless:
        count, size = header.samples * header.allocated // 8, header.rows * header.columns
        found = _rle_sizes(frame, 2 * size + 2)
        if len(found) != count or not size <= min(found) <= max(found) < 2 * size + 2:  # real files hold some padding
            raise _RefusedError(f"RLE segments of {found} bytes or more found; expected {count} of {size}")
        return frame, header
    if syntax in JPEG2000TransferSyntaxes:
        frame = frame[max(0, frame.find(J2K_START)) :]  # without JP2 boxes, which declare sizes too
        stream = _j2k_size(frame)
    else:
        stream = _jpeg_size(frame)
        if syntax in JPEGTransferSyntaxes and PLUGIN[syntax] == "gdcm":
            frame = _bare_jpeg(frame)
    if stream is None:
        raise _RefusedError(f"no {syntax.name} codestream found in PixelData")
    rows, columns, samples, bits = stream
    if (rows, columns, samples) != (header.rows, header.columns, header.samples) or bits > header.allocated:
        raise _RefusedError(
            f"codestream of {columns} × {rows} pixels of {samples} × {bits} bits found; expected {header.columns} × "
            f"{header.rows} of {header.samples} × {header.allocated} or fewer"
        )
    allocated = 8 if bits <= 8 else 16
    stored = min(header.stored, allocated) if syntax in JPEGTransferSyntaxes else bits
    return frame, replace(header, allocated=allocated, stored=stored, high=stored - 1)  # decoders align to the right


def _rle_sizes(frame: bytes, limit: int) -> list[int]:
    """Count the bytes that each segment of an RLE frame becomes, up to a limit: 2 may become 128 (PS3.5 G.3-G.5)."""
    count, *starts = struct.unpack_from("<16I", frame)
    if not 0 < count <= 15:
        raise _RefusedError("no RLE Lossless codestream found in PixelData")
    sizes, ends = [], [*starts[1:count], len(frame)]
    for position, end in zip(starts[:count], ends, strict=True):
        end, size = min(end, len(frame)), 0
        while position < end and size < limit:
            run = frame[position]
            position += 1
            if run < 128:
                size += min(run + 1, end - position)  # the last run may be cut
                position += run + 1
            elif run > 128 and position < end:
                size += 257 - run
                position += 1
        sizes.append(size)
    return sizes


def _jpeg_segments(frame: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and bytes of each segment of a JPEG or JPEG-LS codestream (ITU-T T.81 B.1), the image last.

    Raises:
        _RefusedError: the codestream is damaged before the image.
    """
    position = 2
    while frame[:2] == b"\xff\xd8" and len(frame) >= position + 4 and frame[position] == 0xFF:
        marker = frame[position + 1]
        end = position + 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
        if marker == 0xFF:  # a fill byte
            position += 1
        elif marker == 0xDA:
            yield marker, frame[position:]
            return
        else:
            yield marker, frame[position:end]
            position = end
    raise _RefusedError("no JPEG codestream found in PixelData")


def _is_frame_header(marker: int) -> bool:
    return marker == 0xF7 or (marker & 0xF0 == 0xC0 and marker not in (0xC4, 0xC8, 0xCC))


def _jpeg_size(frame: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, samples and bits of the frame header of a JPEG or JPEG-LS codestream (ITU-T T.81 B.2.2)."""
    headers = [segment for marker, segment in _jpeg_segments(frame) if _is_frame_header(marker)]
    if len(headers) != 1:  # of several headers, decoders use different ones
        return None
    bits, rows, columns, samples = struct.unpack_from(">BHHB", headers[0], 4)
    return rows, columns, samples, bits


def _bare_jpeg(frame: bytes) -> bytes:
    """Remove comments and application data from a JPEG codestream: damage there makes gdcm abort the process."""
    needed = (0xC4, 0xCC, 0xDA, 0xDB, 0xDD)  # tables, restart interval and the image
    segments = (part for marker, part in _jpeg_segments(frame) if marker in needed or _is_frame_header(marker))
    return b"\xff\xd8" + b"".join(segments)


def _j2k_size(frame: bytes) -> tuple[int, int, int, int] | None:
    """Rows, columns, samples and bits of the SIZ marker that a JPEG 2000 codestream starts with."""
    if not frame.startswith(J2K_START) or len(frame) < 43:
        return None
    right, bottom, left, top = struct.unpack_from(">4I", frame, 8)
    (samples,) = struct.unpack_from(">H", frame, 40)
    return bottom - top, right - left, samples, (frame[42] & 0x7F) + 1


def _decompress(frame: bytes, header: _Header, syntax: UID) -> tuple[np.ndarray, str]:
    """Values of a compressed frame, [H, W] or [H, W, 3], and their photometric interpretation."""
    if syntax == JPEGExtended12Bit:  # 8 bits are baseline; pydicom gives 12 bits to gdcm only under the lossless name
        syntax = JPEGBaseline8Bit if header.allocated == 8 else JPEGLossless
    decoder = get_decoder(syntax)
    if PLUGIN[syntax] not in decoder.available_plugins:
        raise MissingExtraError(f'{syntax.name} needs python-gdcm: pip install ".[dicom]" in the repository')
    pixels, properties = decoder.as_array(
        encapsulate([frame], has_bot=False),
        **_options(header),
        decoding_plugin=PLUGIN[syntax],
    )
    return pixels, str(properties["photometric_interpretation"])


def _luminance(pixels: np.ndarray, photometric: str, bits: int) -> np.ndarray:
    """Colours [H, W, 3] of `bits` bits to luminance [H, W]."""
    if bits != 8:
        pixels = (pixels * np.float32(255 / (2**bits - 1))).round().clip(0, 255).astype(np.uint8)
    if photometric.startswith("YBR"):
        return np.ascontiguousarray(pixels[..., 0])
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))


def _palette(dataset: Dataset, header: _Header) -> np.ndarray:
    """Luminance of each stored value of a palette image: [2**container]."""
    if "RedPaletteColorLookupTableData" not in dataset:
        raise _RefusedError("no palette found; segmented ones are not supported")
    values, channels = header.stored_values(), []
    for colour in COLOURS:
        keyword = f"{colour}PaletteColorLookupTable"
        channels.append(_apply_lut(values, *_entries(dataset, f"{keyword}Descriptor", f"{keyword}Data", dataset)))
    colours = np.stack(channels, axis=-1)[None]
    if colours.max() > 255:
        return _luminance(colours, "RGB", 16)[0]
    return _luminance(colours.astype(np.uint8), "RGB", 8)[0]


def _monochrome(dataset: Dataset, header: _Header, words: np.ndarray) -> tuple[np.ndarray, str]:
    """Convert bit patterns [H, W] to grey. Compute a table of all values, which is short, then look pixels up.

    Returns:
        The grey, uint8 [H, W], and why grey scales of the file were passed over: empty if none was.
    """
    if planes := _overlay_bits(dataset, header):
        words = words & words.dtype.type(2**header.container - 1 - planes)
    counts = np.zeros(2**header.container, np.intp)
    for block in _blocks(words):
        counts += np.bincount(block, minlength=len(counts))
    passed_over: list[str] = []
    if _uses_more_bits(dataset, header, words, counts):
        passed_over.append(f"BitsStored {header.stored} passed over, since the pixels use {header.container}")
        header = replace(header, stored=header.container, high=header.container - 1)
    values = header.stored_values()
    padding = _padding(dataset, header, values)
    outputs = _modality(dataset, values)
    shape = str(dataset.get("PresentationLUTShape") or "").strip().upper()
    invert = header.photometric == "MONOCHROME1" or shape == "INVERSE"
    inside: np.ndarray = np.where(padding, 0, counts) if counts[~padding].any() else counts
    for name, unit in _scales(dataset, outputs):
        if unit is None:
            passed_over.append(f"{name} cannot be read")
            continue
        table = _table(unit, padding, invert)
        reason = _misfit(table, values, inside)
        if reason is None:
            return _look_up(table, words), "; ".join(passed_over)
        passed_over.append(f"{name} {reason}")
    unit = _to_unit(outputs, *_own_range(values, outputs, inside, header.stored))
    if passed_over:
        passed_over[-1] += ": the range of the pixels was used"
    return _look_up(_table(unit, padding, invert), words), "; ".join(passed_over)


def _overlay_bits(dataset: Dataset, header: _Header) -> int:
    """The unused bits of the pixels that hold overlays, as files of before 2004 declare them (PS3.3 C.9.2, retired)."""
    found = 0
    for group in OVERLAYS:
        try:
            allocated, position = (dataset[group, element].value for element in (0x0100, 0x0102))
        except DAMAGED_DICOM:  # or absent
            continue
        if allocated == header.allocated and position in range(header.high + 1, header.container):
            found |= 1 << position
    return found


def _uses_more_bits(dataset: Dataset, header: _Header, words: np.ndarray, counts: np.ndarray) -> bool:
    """Whether bits above the stored ones hold the values, as in a film that was rescaled under its old header.

    Such bits may also hold an overlay, or anything. With the bits that belong to it, a picture is smoother.

    Args:
        dataset: the file's attributes.
        header: those of the pixels.
        words: bit patterns [H, W].
        counts: how many pixels have each pattern, [2**container].
    """
    present = np.flatnonzero(counts)
    present = present[present != _padding_word(dataset, header)]
    above = present >> (header.high + 1)
    if (
        header.signed
        and (above == (present >> header.high & 1) * (2 ** (header.container - 1 - header.high) - 1)).all()
    ):
        return False  # the sign, repeated
    varying = int(np.bitwise_or.reduce(above) & ~np.bitwise_and.reduce(above)) if len(above) else 0
    if not varying:
        return False
    whole = replace(header, stored=header.container, high=header.container - 1)
    (rough, spread), (whole_rough, whole_spread) = (
        _roughness(kind.stored_values()[words].astype(np.float32)) for kind in (header, whole)
    )
    several = varying & (varying - 1) != 0  # a single bit is often an overlay, whose areas have few edges
    return whole_rough < rough or (several and whole_rough * spread < rough * whole_spread)


def _roughness(values: np.ndarray) -> tuple[float, float]:
    """Mean difference of neighbours in a picture [H, W], and the standard deviation."""
    across = [np.abs(np.diff(values, axis=axis)).mean() for axis in (0, 1) if values.shape[axis] > 1]
    return float(sum(across)), float(values.std())


def _scales(dataset: Dataset, outputs: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
    """Name every VOI LUT and every window of the file, with what it makes of `outputs`; None for a damaged one."""
    for number in range(_length(dataset, "VOILUTSequence")):
        yield f"VOI LUT {number + 1}", _voi_lut(dataset, outputs, number)
    for number in range(_length(dataset, "WindowCenter")):
        yield f"window {number + 1}", _window(dataset, outputs, number)


def _length(dataset: Dataset, keyword: str) -> int:
    """How many values an attribute has: 0 where it is absent, 1 where it is damaged."""
    try:
        element = dataset[keyword]
        return element.VM if element.VR != "SQ" else len(element.value)
    except KeyError:
        return 0
    except DAMAGED_DICOM:
        return 1


def _misfit(table: np.ndarray, values: np.ndarray, counts: np.ndarray) -> str | None:
    """Say why a grey scale does not fit the pixels, None if it does.

    Args:
        table: grey of each value, uint8 [N].
        values: stored values, [N].
        counts: how many pixels have each value, padding left out: [N].
    """
    present = np.flatnonzero(counts)
    if len(present) > 2:  # the least and the greatest value may be a border without padding's mark
        counts = counts.copy()
        counts[present[[values[present].argmin(), values[present].argmax()]]] = 0
    levels = np.bincount(table, weights=counts, minlength=256)
    clipped = (levels[0] + levels[255]) / levels.sum()
    if clipped >= MAX_CLIPPED:
        return f"makes {100 * clipped:.1f} % of the pixels black or white"
    left = int(np.count_nonzero(levels))
    if left < min(MIN_LEVELS, int(np.count_nonzero(counts))):
        return f"leaves {left} grey levels"
    return None


def _own_range(values: np.ndarray, outputs: np.ndarray, counts: np.ndarray, bits: int) -> tuple[float, float]:
    """The outputs that become black and white where no grey scale of the file fits."""
    present = np.flatnonzero(counts)
    if bits >= 8:
        ends = float(values[present].min()), float(values[present].max())
        if is_eight_bit(*ends) and np.array_equal(values, outputs):
            return 0, 255
        distinct, places = np.unique(outputs[present], return_inverse=True)
        return robust_range(distinct, np.bincount(places, weights=counts[present]))
    return outputs[present].min(), outputs[present].max()


def _blocks(words: np.ndarray) -> Iterator[np.ndarray]:
    flat = words.reshape(-1)
    for start in range(0, len(flat), _BLOCK):
        yield flat[start : start + _BLOCK]


def _look_up(table: np.ndarray, words: np.ndarray) -> np.ndarray:
    gray = np.empty(words.size, np.uint8)
    for start, block in enumerate(_blocks(words)):
        np.take(table, block, out=gray[start * _BLOCK : start * _BLOCK + len(block)], mode="clip")
    return gray.reshape(words.shape)


def _table(unit: np.ndarray, padding: np.ndarray, invert: bool) -> np.ndarray:
    """Grey of each value, uint8 [2**container]. Values outside [0, 1] are clipped."""
    gray = np.round(unit.clip(0, 1) * 255).astype(np.uint8)
    if invert:
        gray = 255 - gray
    gray[padding] = 0
    return gray


def _padding_word(dataset: Dataset, header: _Header) -> int:
    """The bit pattern of a padding value that needs more bits than are stored, such as 65535 of 12 bits; else -1."""
    first = dataset.get("PixelPaddingValue")
    return first % 2**header.container if isinstance(first, int) and header.high == header.stored - 1 else -1


def _padding(dataset: Dataset, header: _Header, values: np.ndarray) -> np.ndarray:
    """Tell which values mark pixels outside the image (PS3.3 C.7.5.1.1.2)."""
    first = dataset.get("PixelPaddingValue")
    last = dataset.get("PixelPaddingRangeLimit")
    if not isinstance(first, int):
        return np.zeros(len(values), bool)
    ends = [_signed(end, values) for end in (first, last if isinstance(last, int) else first)]
    return (values >= min(ends)) & (values <= max(ends)) | (np.arange(len(values)) == _padding_word(dataset, header))


def _modality(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Apply the modality LUT or the rescale to stored values; gives float64 (PS3.3 C.11.1)."""
    lut = _lut(dataset, "ModalityLUTSequence")
    if lut is not None:
        return _apply_lut(values, *lut)
    slope, intercept = _number(dataset, "RescaleSlope"), _number(dataset, "RescaleIntercept")
    if slope is not None and intercept is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            rescaled = values * np.float64(slope) + intercept
            if 0 < np.ptp(rescaled) < np.inf:  # otherwise the rescale is damaged
                return rescaled
    return values.astype(np.float64)


def _lut(dataset: Dataset, keyword: str, number: int = 0) -> tuple[int, np.ndarray] | None:
    """Read a lookup table of a sequence, see `_entries`; None where there is no table.

    Raises:
        _RefusedError: the table is damaged.
    """
    try:
        sequence = dataset.get(keyword)
        if not sequence:
            return None
        return _entries(sequence[number], "LUTDescriptor", "LUTData", dataset)
    except DAMAGED_DICOM:
        raise _RefusedError(f"{keyword} is damaged") from None


def _entries(item: Dataset, descriptor: str, data: str, dataset: Dataset) -> tuple[int, np.ndarray]:
    """The stored value to which the first entry of a lookup table belongs, and all entries (PS3.3 C.11.1.1)."""
    count, first, _ = (int(number) for number in item[descriptor].value)
    count, content = count or 2**16, item[data].value
    if isinstance(content, bytes):
        wide = "<u2" if dataset.original_encoding[1] else ">u2"
        content = np.frombuffer(content + bytes(len(content) % 2), wide)
    words = np.atleast_1d(content).astype("<u2")
    entries = words if len(words) >= count else words.view(np.uint8)  # two entries in a word
    if len(entries) < count:
        raise _RefusedError(f"{len(entries)} entries of a lookup table found; expected {count}")
    return first, entries[:count].astype(np.float64)


def _apply_lut(values: np.ndarray, first: int, entries: np.ndarray) -> np.ndarray:
    """Look values up. Values beyond the ends get the outermost entries.

    pydicom's function wraps values that do not fit the type of the entries, and refuses modality LUTs of 10 to 15 bits.
    """
    return entries[(values - np.float64(_signed(first, values))).clip(0, len(entries) - 1).astype(np.intp)]


def _signed(number: int, values: np.ndarray) -> int:
    """Read an attribute as signed where the values are signed, although its own type (US) is not."""
    return number - 2**16 if number >= 2**15 and values.min() < 0 else number


def _number(dataset: Dataset, keyword: str, index: int = 0) -> float | None:
    """One value of a decimal string; None where it is absent or not finite."""
    try:
        value = dataset.get(keyword)
        number = float((value if isinstance(value, MultiValue) else [value])[index])
    except DAMAGED_DICOM:
        return None
    return number if math.isfinite(number) else None


def _voi_lut(dataset: Dataset, values: np.ndarray, number: int) -> np.ndarray | None:
    """Apply a VOI LUT, None if it is damaged; its least and greatest entries become 0 and 1 (PS3.3 C.11.2.1.1)."""
    try:
        lut = _lut(dataset, "VOILUTSequence", number)
    except _RefusedError:
        return None
    if lut is None or lut[1].min() == lut[1].max():
        return None
    return _to_unit(_apply_lut(values, *lut), lut[1].min(), lut[1].max())


def _window(dataset: Dataset, values: np.ndarray, index: int) -> np.ndarray | None:
    """Apply a window, None if it is damaged; its output range becomes 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    center, width = _number(dataset, "WindowCenter", index), _number(dataset, "WindowWidth", index)
    function = str(dataset.get("VOILUTFunction") or "LINEAR").strip().upper()
    if center is None or width is None or width <= 0 or (function == "LINEAR" and width < 1):
        return None
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        return None
    window = Dataset()
    window.PhotometricInterpretation = "MONOCHROME2"  # pydicom asks for this, and for some range of outputs
    window.BitsStored, window.PixelRepresentation = 16, 0
    window.WindowCenter, window.WindowWidth = (DSfloat(number, auto_format=True) for number in (center, width))
    window.VOILUTFunction = function
    with np.errstate(over="ignore"):  # the exponential of SIGMOID
        outputs = apply_windowing(np.append(values, (-np.inf, np.inf)), window)
    return _to_unit(outputs[:-2], outputs[-2], outputs[-1])


def _to_unit(outputs: np.ndarray, low: float, high: float) -> np.ndarray:
    return (outputs - low) / (high - low) if high > low else np.zeros(len(outputs))
