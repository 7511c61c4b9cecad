"""Which bits of a word belong to the picture, and which values are padding."""

from dataclasses import replace

import numpy as np
from pydicom.dataset import Dataset

from .attributes import DAMAGED_DICOM, OVERLAYS, PixelHeader
from .lookup_tables import as_signed


def overlay_bits(dataset: Dataset, header: PixelHeader) -> int:
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


def uses_more_bits(dataset: Dataset, header: PixelHeader, words: np.ndarray, counts: np.ndarray) -> bool:
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


def _padding_word(dataset: Dataset, header: PixelHeader) -> int:
    """The bit pattern of a padding value that needs more bits than are stored, such as 65535 of 12 bits; else -1."""
    first = dataset.get("PixelPaddingValue")
    return first % 2**header.container if isinstance(first, int) and header.high == header.stored - 1 else -1


def padding_mask(dataset: Dataset, header: PixelHeader, values: np.ndarray) -> np.ndarray:
    """Tell which values mark pixels outside the image (PS3.3 C.7.5.1.1.2)."""
    first = dataset.get("PixelPaddingValue")
    last = dataset.get("PixelPaddingRangeLimit")
    if not isinstance(first, int):
        return np.zeros(len(values), bool)
    ends = [as_signed(end, values) for end in (first, last if isinstance(last, int) else first)]
    return (values >= min(ends)) & (values <= max(ends)) | (np.arange(len(values)) == _padding_word(dataset, header))
