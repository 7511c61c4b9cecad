"""The lookup tables of a file."""

import numpy as np
from pydicom.dataset import Dataset

from .attributes import DAMAGED_DICOM, RefusedError


def sequence_lut(dataset: Dataset, keyword: str, number: int = 0) -> tuple[int, np.ndarray] | None:
    """Read a lookup table of a sequence, see `lut_entries`; None where there is no table.

    Raises:
        RefusedError: the table is damaged.
    """
    try:
        sequence = dataset.get(keyword)
        if not sequence:
            return None
        return lut_entries(sequence[number], "LUTDescriptor", "LUTData", dataset)
    except DAMAGED_DICOM:
        raise RefusedError(f"{keyword} is damaged") from None


def lut_entries(item: Dataset, descriptor: str, data: str, dataset: Dataset) -> tuple[int, np.ndarray]:
    """The stored value to which the first entry of a lookup table belongs, and all entries (PS3.3 C.11.1.1)."""
    count, first, _ = (int(number) for number in item[descriptor].value)
    count, content = count or 2**16, item[data].value
    if isinstance(content, bytes):
        wide = "<u2" if dataset.original_encoding[1] else ">u2"
        content = np.frombuffer(content + bytes(len(content) % 2), wide)
    words = np.atleast_1d(content).astype("<u2")
    entries = words if len(words) >= count else words.view(np.uint8)  # two entries in a word
    if len(entries) < count:
        raise RefusedError(f"{len(entries)} entries of a lookup table found; expected {count}")
    return first, entries[:count].astype(np.float64)


def apply_lut(values: np.ndarray, first: int, entries: np.ndarray) -> np.ndarray:
    """Look values up. Values beyond the ends get the outermost entries.

    pydicom's function wraps values that do not fit the type of the entries, and refuses modality LUTs of 10 to 15 bits.
    """
    return entries[(values - np.float64(as_signed(first, values))).clip(0, len(entries) - 1).astype(np.intp)]


def as_signed(number: int, values: np.ndarray) -> int:
    """Read an attribute as signed where the values are signed, although its own type (US) is not."""
    return number - 2**16 if number >= 2**15 and values.min() < 0 else number
