"""Grey scales: the modality LUT or the rescale, VOI LUTs and windows, and whether one fits the pixels."""

from collections.abc import Iterator

import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels import apply_windowing
from pydicom.valuerep import DSfloat

from ..ranges import is_eight_bit, robust_range
from .attributes import DAMAGED_DICOM, RefusedError, decimal
from .lookup_tables import apply_lut, sequence_lut

MAX_CLIPPED = 0.95  # of the pixels that are not padding: a grey scale that clips more does not belong to them
MIN_LEVELS = 32  # a grey scale that leaves fewer does not belong to them either


def grey_scales(dataset: Dataset, outputs: np.ndarray) -> Iterator[tuple[str, np.ndarray | None]]:
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


def _voi_lut(dataset: Dataset, values: np.ndarray, number: int) -> np.ndarray | None:
    """Apply a VOI LUT, None if it is damaged; its least and greatest entries become 0 and 1 (PS3.3 C.11.2.1.1)."""
    try:
        lut = sequence_lut(dataset, "VOILUTSequence", number)
    except RefusedError:
        return None
    if lut is None or lut[1].min() == lut[1].max():
        return None
    return to_unit(apply_lut(values, *lut), lut[1].min(), lut[1].max())


def _window(dataset: Dataset, values: np.ndarray, index: int) -> np.ndarray | None:
    """Apply a window, None if it is damaged; its output range becomes 0 to 1 (PS3.3 C.11.2.1.2 and C.11.2.1.3)."""
    center, width = decimal(dataset, "WindowCenter", index), decimal(dataset, "WindowWidth", index)
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
    return to_unit(outputs[:-2], outputs[-2], outputs[-1])


def misfit(table: np.ndarray, values: np.ndarray, counts: np.ndarray) -> str | None:
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


def own_range(values: np.ndarray, outputs: np.ndarray, counts: np.ndarray, bits: int) -> tuple[float, float]:
    """The outputs that become black and white where no grey scale of the file fits."""
    present = np.flatnonzero(counts)
    if bits >= 8:
        ends = float(values[present].min()), float(values[present].max())
        if is_eight_bit(*ends) and np.array_equal(values, outputs):
            return 0, 255
        distinct, places = np.unique(outputs[present], return_inverse=True)
        return robust_range(distinct, np.bincount(places, weights=counts[present]))
    return outputs[present].min(), outputs[present].max()


def modality_outputs(dataset: Dataset, values: np.ndarray) -> np.ndarray:
    """Apply the modality LUT or the rescale to stored values; gives float64 (PS3.3 C.11.1)."""
    lut = sequence_lut(dataset, "ModalityLUTSequence")
    if lut is not None:
        return apply_lut(values, *lut)
    slope, intercept = decimal(dataset, "RescaleSlope"), decimal(dataset, "RescaleIntercept")
    if slope is not None and intercept is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            rescaled = values * np.float64(slope) + intercept
            if 0 < np.ptp(rescaled) < np.inf:  # otherwise the rescale is damaged
                return rescaled
    return values.astype(np.float64)


def to_unit(outputs: np.ndarray, low: float, high: float) -> np.ndarray:
    """Move `low` to 0 and `high` to 1."""
    return (outputs - low) / (high - low) if high > low else np.zeros(len(outputs))
