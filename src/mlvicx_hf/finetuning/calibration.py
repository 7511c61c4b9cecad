"""Calibrate a classifier on its validation split, and fold the result into its linear layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import nn

from mlvicx_hf.common.text import some
from mlvicx_hf.scoring.calibration import (
    ABSENT,
    PRESENT,
    UNSURE,
    answer_classes,
    answer_findings,
    conformal_band,
    fit_platt,
    fit_temperature,
    lowest_probability,
    score_answers,
)
from mlvicx_hf.scoring.labels import NOT_SCORED, mean_scored

FEWEST_TO_CALIBRATE = 20  # of either value of a label, to fit anything


@dataclass(frozen=True)
class Calibration:
    """What the validation split says of a classifier's L logits: calibrated logits are `scale` · logits + `shift`."""

    scale: np.ndarray  # [L], above 0; 1 where nothing was fitted
    shift: np.ndarray  # [L]; 0 where nothing was fitted
    record: dict[str, Any]  # `calibration` of the model's configuration
    not_fitted: dict[str, str]  # label → why nothing was fitted for it

    def apply(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated logits [N, L] in float64."""
        return logits.astype(np.float64) * self.scale + self.shift

    @torch.no_grad()
    def fold(self, layer: nn.Linear) -> None:
        """Make a linear layer give the calibrated logits."""
        scale, shift = (torch.from_numpy(values).to(layer.bias) for values in (self.scale, self.shift))
        layer.weight.mul_(scale[:, None])
        layer.bias.mul_(scale).add_(shift)

    def score_answers(self, probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
        """Score the answers to calibrated probabilities [N, L].

        Labels are [N, L], 1, 0 or NaN; exclusive classes are one-hot.

        Returns:
            `labels`, what `scoring.calibration.score_answers` gives by label, without those that have no band; and
            `unsure` and `error`: means over these labels, but of exclusive classes shares of the images and of those
            with an answer.
        """
        bands, found = self.record["bands"], {}
        if self.record["method"] == "platt":
            for name, given, truth in zip(names, probabilities.T, labels.T, strict=True):
                if bands[name] is not None:
                    found[name] = score_answers(answer_findings(given, bands[name]), truth)
            means = {kind: mean_scored(scores[kind] for scores in found.values()) for kind in ("unsure", "error")}
            return {"labels": found} | means
        if bands is None:
            return {"labels": {}, "unsure": NOT_SCORED, "error": NOT_SCORED}
        answers = answer_classes(probabilities, bands["lowest"], names)
        unsure = answers == UNSURE
        for name, truth in zip(names, labels.T, strict=True):
            each = np.select([unsure, answers == name], [UNSURE, PRESENT], ABSENT)
            found[name] = score_answers(each, truth)
        wrong = (answers != np.array(names, dtype=object)[labels.argmax(1)])[~unsure]
        error = float(wrong.mean()) if wrong.size else NOT_SCORED
        return {"labels": found, "unsure": float(unsure.mean()), "error": error}


def calibrate(
    logits: np.ndarray, labels: np.ndarray, names: Sequence[str], level: float, hashes: Mapping[str, str]
) -> Calibration:
    """Fit temperature (exclusive classes) or Platt scaling (findings), and the bands of unsure answers.

    Args:
        logits: of the validation split, [N, L].
        labels: [N, L], 1, 0 or NaN for unknown; of exclusive classes the indices [N].
        names: of the L labels.
        level: of the bands, see `conformal_band` and `lowest_probability`.
        hashes: `split_hash` and `data_hash` of the images.
    """
    fit = _fit_classes if labels.ndim == 1 else _fit_findings
    scale, shift, found, not_fitted = fit(logits.astype(np.float64), labels, names, level)
    record = found | {"folded": True, "level": level, "split": "validation"} | dict(hashes)
    return Calibration(scale, shift, record, not_fitted)


Fitted = tuple[np.ndarray, np.ndarray, dict[str, Any], dict[str, str]]  # the fields of `Calibration`


def _fit_findings(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], level: float) -> Fitted:
    scale, shift = np.ones(len(names)), np.zeros(len(names))
    values: dict[str, Any] = dict.fromkeys(names)
    bands: dict[str, Any] = dict.fromkeys(names)
    counts, not_fitted = {}, {}
    for i, name in enumerate(names):
        positive, negative = labels[:, i] == 1, labels[:, i] == 0
        counts[name] = [int(positive.sum()), int(negative.sum())]
        if min(counts[name]) < FEWEST_TO_CALIBRATE:
            not_fitted[name] = _too_few("{} positives and {} negatives".format(*counts[name]))
            continue
        known = positive | negative
        a, b = fit_platt(logits[known, i], labels[known, i])
        if a <= 0:
            not_fitted[name] = f"a slope of {a:.3g}, which would turn the ranking round; expected one above 0"
            continue
        scale[i], shift[i] = a, b
        values[name] = {"scale": a, "shift": b}
        probabilities = expit(a * logits[:, i] + b)
        bands[name] = list(conformal_band(probabilities[positive], probabilities[negative], level))
    return scale, shift, {"method": "platt", "values": values, "bands": bands, "counts": counts}, not_fitted


def _fit_classes(logits: np.ndarray, labels: np.ndarray, names: Sequence[str], level: float) -> Fitted:
    classes = labels.astype(int)
    images = np.bincount(classes, minlength=len(names)).tolist()
    counts = {name: [count, len(classes) - count] for name, count in zip(names, images, strict=True)}
    not_fitted = {name: _too_few(f"{n} images") for name, (n, _) in counts.items() if n < FEWEST_TO_CALIBRATE}
    temperature = None if not_fitted else fit_temperature(logits, classes)
    if temperature is None:  # one temperature serves all classes, or none of them
        reason = "every image is classified rightly, or the logits are no better than chance"
        reason = f"too few images of {some(not_fitted)}" if not_fitted else reason
        not_fitted = {name: not_fitted.get(name, reason) for name in names}
    bands = None
    if temperature is not None:
        true = softmax(logits / temperature, axis=1)[np.arange(len(classes)), classes]
        bands = {"lowest": lowest_probability(true, level)}
    record = {"method": "temperature", "values": {"temperature": temperature}, "bands": bands, "counts": counts}
    scale = np.full(len(names), 1.0 if temperature is None else 1 / temperature)
    return scale, np.zeros(len(names)), record, not_fitted


def _too_few(found: str) -> str:
    return f"{found} in the validation split; expected {FEWEST_TO_CALIBRATE} of each at least"
