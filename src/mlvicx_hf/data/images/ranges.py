"""Choose the values that become black and white where a file does not say so: one rule for DICOM, PNG and TIFF."""

import numpy as np

TAIL = 0.005  # of the pixels at each end may be clipped: a marker or a dead pixel must not darken the film
FEW_LEVELS = "16 bits a channel of which 14 or fewer are used; expected such depth in one-channel files only"


def is_eight_bit(low: float, high: float) -> bool:
    """Whether whole numbers from `low` to `high` are grey levels of 8 bits already."""
    return low >= 0 and high <= 255


def count_values(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values that occur in an array, ascending, and how often each does."""
    if array.dtype.kind in "iu" and array.min() >= 0 and array.max() < 2**16:  # counts faster than sorting
        counts = np.bincount(array.reshape(-1))
        values = np.flatnonzero(counts)
        return values, counts[values]
    return np.unique(array, return_counts=True)


def robust_range(values: np.ndarray, counts: np.ndarray) -> tuple[float, float]:
    """Find the values that become black and white: the 0.5th and 99.5th percentile of the pixels off the border.

    Border pixels are those of the least and of the greatest value: collimation, padding, direct exposure, markers.
    Where nothing or one value alone is left without them, they count as well.

    The image processor has the same rule, since it travels without this package; a test holds the two together.

    Args:
        values: each value that occurs, ascending: [N].
        counts: how many pixels have it: [N].
    """
    for kept in (slice(1, -1), slice(None)):
        inner, reached = values[kept], np.cumsum(counts[kept])
        if len(inner):
            ends = np.searchsorted(reached, (TAIL * reached[-1], (1 - TAIL) * reached[-1]))
            low, high = (float(value) for value in inner[np.minimum(ends, len(inner) - 1)])
            if low < high:
                return low, high
    return float(values[0]), float(values[-1])


def has_few_levels(high_bytes: np.ndarray) -> bool:
    """Whether next to nothing is left of colours of 16 bits in their high bytes, uint8, a marker aside."""
    return robust_range(*count_values(high_bytes))[1] < 64
