"""What a DICOM file says about its pixels: the attributes that are read, and the checks that each is supported."""

import io
import math
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.errors import BytesLengthException
from pydicom.filereader import read_dataset, read_preamble
from pydicom.multival import MultiValue
from pydicom.tag import Tag
from pydicom.uid import UID, DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from mlvicx_hf.common.errors import UserError

from ..errors import DAMAGED

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
_PHOTOMETRIC = {
    1: ("MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"),
    3: ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"),
}
MAX_INFLATED = 256 * 2**20  # bytes of a deflated file: 1.5 times the largest 16-bit image that Pillow accepts
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


class RefusedError(UserError):
    """The reason why a file is not read. The message is safe to show."""


@dataclass(frozen=True)
class PixelHeader:
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


def read_attributes(data: bytes) -> tuple[Dataset, UID]:
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
        raise RefusedError("unknown transfer syntax")
    # pydicom looks at the first element to find out whether the VR is implicit, whatever the syntax says.
    dataset = read_dataset(stream, syntax.is_implicit_VR, syntax.is_little_endian, specific_tags=list(_TAGS))
    return dataset, syntax


def _inflate(deflated: bytes) -> bytes:
    """Inflate up to the largest size that is safe."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = inflater.decompress(deflated, MAX_INFLATED + 1)
    if len(inflated) > MAX_INFLATED:
        raise RefusedError(f"suspiciously large (decompression bomb?): inflates to more than {MAX_INFLATED} bytes")
    if not inflater.eof:
        raise RefusedError("deflated data end early")
    return inflated


def _integer(dataset: Dataset, keyword: str, default: int | None = None) -> int:
    value = dataset.get(keyword)
    if isinstance(value, int):
        return int(value)
    if value in (None, "", b"") and default is not None:
        return default
    raise RefusedError(f"{keyword} is {'absent' if value is None else 'no integer'}")


def decimal(dataset: Dataset, keyword: str, index: int = 0) -> float | None:
    """One value of a decimal string; None where it is absent or not finite."""
    try:
        value = dataset.get(keyword)
        number = float((value if isinstance(value, MultiValue) else [value])[index])
    except DAMAGED_DICOM:
        return None
    return number if math.isfinite(number) else None


def pixel_header(dataset: Dataset) -> PixelHeader:
    """Read the attributes of the pixel data and check that each is supported.

    Raises:
        RefusedError: an attribute is absent or not supported.
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
        raise RefusedError(f"NumberOfFrames {frames} found; expected 1")
    if not (0 < rows < 2**16 and 0 < columns < 2**16):
        raise RefusedError(f"Rows {rows} and Columns {columns} found; expected 1 to 65535")
    limit = Image.MAX_IMAGE_PIXELS  # the same limit as for all other formats
    if limit is not None and rows * columns > limit:
        raise RefusedError(
            f"suspiciously large (decompression bomb?): {columns} × {rows} pixels found; expected at most {limit}"
        )
    if photometric not in _PHOTOMETRIC.get(samples, ()):
        known = " or ".join(f"{count} of {', '.join(names)}" for count, names in _PHOTOMETRIC.items())
        found = photometric if photometric in _PHOTOMETRIC[1] + _PHOTOMETRIC[3] else "another interpretation"
        raise RefusedError(f"SamplesPerPixel {samples} of {found} found; expected {known}")
    if allocated not in ((1, 8, 16) if samples == 1 else (8, 16)) or not 0 < stored <= allocated:
        raise RefusedError(f"BitsAllocated {allocated} and BitsStored {stored} found; expected 8 or 16 allocated")
    if signed not in (0, 1) or planar not in (0, 1) or (signed and samples == 3):
        raise RefusedError(
            f"PixelRepresentation {signed}, PlanarConfiguration {planar} and SamplesPerPixel {samples} found; "
            "expected 0 or 1, and unsigned colours"
        )
    if not stored - 1 <= high < allocated:
        high = stored - 1
    return PixelHeader(rows, columns, samples, planar, photometric, allocated, stored, high, bool(signed))
