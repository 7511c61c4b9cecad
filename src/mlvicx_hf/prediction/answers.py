"""Answer "present", "absent" or "unsure", or a class, by the bands that a classifier is saved with."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.scoring.calibration import answer_classes, answer_findings


class Answers:
    """The answers of one classifier.

    Args:
        labels: names of the L logits.
        calibration: of the model's configuration; None for a model that has no bands.
        exclusive: every image has exactly one of the labels.

    Raises:
        UserError: a calibration that does not fit the labels.
    """

    def __init__(self, labels: Sequence[str], calibration: Mapping[str, Any] | None, exclusive: bool) -> None:
        self.labels, self.exclusive = labels, exclusive
        self.columns = ["answer"] if exclusive else [f"answer:{name}" for name in labels]
        self.bands: Any = None
        self.uncalibrated: list[str] = []  # labels that the calibration left out
        if calibration is None:
            return
        method = "temperature" if exclusive else "platt"
        if calibration.get("method") != method:
            raise UserError(f"calibration: method={calibration.get('method')!r} found; expected {method!r}")
        for field in ["counts"] if exclusive else ["counts", "values", "bands"]:
            value = calibration.get(field)
            if not isinstance(value, Mapping) or set(value) != set(labels):
                raise UserError(f"calibration: {field}={value} found; expected entries for {', '.join(labels)}")
        self.bands = bands = calibration.get("bands")
        if not isinstance(bands, (Mapping, type(None))):
            raise UserError(f"calibration: bands={bands} found; expected a mapping, or null")
        values = calibration.get("values") or {}
        self.uncalibrated = [name for name in labels if values.get("temperature" if exclusive else name) is None]
        lowest = None if self.bands is None else [self.bands.get("lowest")]
        for name, limits in {"lowest": lowest}.items() if exclusive else self.bands.items():
            fits = limits is None or (
                isinstance(limits, list)
                and len(limits) == (1 if exclusive else 2)
                and all(map(_is_probability, limits))
            )
            if not fits:
                raise UserError(f"calibration: bands: {limits} found for {name}; expected probabilities or null")

    def probabilities(self, logits: Tensor) -> list[float]:
        """Probabilities of logits [L], in float64, as thresholds and bands were chosen."""
        scores = logits.double()
        found: list[float] = (scores.softmax(0) if self.exclusive else scores.sigmoid()).tolist()
        return found

    def cells(self, probabilities: Sequence[float]) -> list[str]:
        """Answers to the calibrated probabilities [L] of an image, one a column; empty where there is no band."""
        if self.bands is None:
            return [""] * len(self.columns)
        given = np.array([probabilities], dtype=np.float64)  # [1, L]
        if self.exclusive:
            return [str(answer_classes(given, self.bands["lowest"], self.labels)[0])]
        bands = (self.bands[name] for name in self.labels)
        return [
            "" if band is None else str(answer_findings(column, band)[0])
            for column, band in zip(given.T, bands, strict=True)
        ]


def _is_probability(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1
