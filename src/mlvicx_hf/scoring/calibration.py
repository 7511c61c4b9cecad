"""Calibrated probabilities, answers that may be "unsure", and how good both are. Arrays in, numbers out, in float64."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax, logit

from mlvicx_hf.common.errors import UserError

from .labels import NOT_SCORED, mean_scored

ABSENT, PRESENT, UNSURE = "absent", "present", "unsure"  # answers
CALIBRATION_BINS = 15  # of equal width
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # shares of the images that are answered
_ROUNDING = 1e-9  # (1 - 0.9) · 20 is a little less than 2 in floating point, but the rank is 2


def fit_platt(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Find a and b of p = σ(a · logit + b) by maximum likelihood (Platt, Advances in Large Margin Classifiers, 1999).

    The targets are Platt's: (n₁ + 1) / (n₁ + 2) for each of n₁ positives, 1 / (n₀ + 2) for each of n₀ negatives. With
    targets of 1 and 0 there would be no maximum where a threshold separates positives from negatives.

    Args:
        logits: [N].
        labels: [N], 1 or 0, both of which occur.

    Returns:
        a and b. With a ≤ 0 the classifier ranks positives no higher than negatives.
    """
    positive = labels == 1
    targets = np.where(positive, (positive.sum() + 1) / (positive.sum() + 2), 1 / ((~positive).sum() + 2))
    centre, deviation = logits.mean(dtype=np.float64), logits.std(dtype=np.float64) or 1.0
    scaled = (logits - centre) / deviation  # so that one tolerance fits logits of any scale

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        scores = values[0] * scaled + values[1]
        errors = expit(scores) - targets
        cross_entropy = np.mean(np.logaddexp(0, scores) - targets * scores)
        return float(cross_entropy), np.array([np.mean(errors * scaled), errors.mean()])

    start = np.array([0.0, logit(targets.mean())])
    slope, intercept = minimize(loss, start, jac=True, method="BFGS", options={"gtol": 1e-8}).x
    return float(slope / deviation), float(intercept - slope / deviation * centre)


def fit_temperature(logits: np.ndarray, classes: np.ndarray) -> float | None:
    """Find the T of softmax(logits / T) with the lowest negative log-likelihood (Guo et al., ICML 2017, section 4.2).

    Args:
        logits: [N, L].
        classes: [N], indices of the true classes.

    Returns:
        T. None where no T has the lowest value: every image is classified rightly, so that T would fall to 0; or the
        logits are no better than chance, so that T would grow without an end.
    """
    scores, rows = logits.astype(np.float64), np.arange(len(classes))
    # In 1/T the loss is convex. Its slope at 1/T = 0 is the difference of these means.
    if (scores.argmax(1) == classes).all() or scores[rows, classes].mean() <= scores.mean():
        return None
    scale = scores.std()  # so that one range fits logits of any scale

    def loss(log_temperature: float) -> float:
        return float(-log_softmax(scores / (scale * math.exp(log_temperature)), axis=1)[rows, classes].mean())

    found = minimize_scalar(loss, bounds=(-10, 10), method="bounded", options={"xatol": 1e-9}).x
    return float(scale * math.exp(found))


# -- answers -----------------------------------------------------------------------------------------------------------


def conformal_band(positives: np.ndarray, negatives: np.ndarray, level: float) -> tuple[float, float]:
    """Find the band of probabilities that are answered "unsure": class-conditional split-conformal prediction.

    q₁ is the ⌊(1 - level)(n₁ + 1)⌋-th lowest probability of the n₁ positives, and q₀ the ⌈level · (n₀ + 1)⌉-th lowest
    of the n₀ negatives (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; label-conditional:
    Sadinle, Lei and Wasserman, JASA 114, 2019). The band is [min(q₀, q₁), max(q₀, q₁)]. So for a new image,
    exchangeable with these, P(absent | positive) ≤ 1 - level and P(present | negative) ≤ 1 - level.

    Args:
        positives: probabilities of the positives, [n₁].
        negatives: of the negatives, [n₀].
        level: above 0.5 and below 1.

    Returns:
        Lower and upper end. With too few images for the level, q₁ is 0 and q₀ is 1.
    """
    low = _ranked(positives, math.floor((1 - level) * (len(positives) + 1) + _ROUNDING))
    high = _ranked(negatives, math.ceil(level * (len(negatives) + 1) - _ROUNDING))
    return min(low, high), max(low, high)


def lowest_probability(true: np.ndarray, level: float) -> float:
    """Find the q above which a class is possible: the least ambiguous sets (LAC; Sadinle, Lei and Wasserman, 2019).

    For a new exchangeable image the classes with a probability of at least q hold the true one with P ≥ level.

    Args:
        true: probabilities of the true classes, [N].
        level: above 0.5 and below 1.

    Returns:
        The ⌊(1 - level)(N + 1)⌋-th lowest of the probabilities; 0 with too few images for the level.
    """
    return _ranked(true, math.floor((1 - level) * (len(true) + 1) + _ROUNDING))


def _ranked(values: np.ndarray, rank: int) -> float:
    """The value of a rank from 1 on; 0 below the first, 1 above the last."""
    if rank < 1:
        return 0.0
    return 1.0 if rank > len(values) else float(np.sort(values)[rank - 1])


def answer_findings(probabilities: np.ndarray, band: Sequence[float]) -> np.ndarray:
    """Answer "absent" below a band (low, high), "present" above it, "unsure" within it, ends included; [N] of each."""
    return np.select([probabilities < band[0], probabilities > band[1]], [ABSENT, PRESENT], UNSURE)


def answer_classes(probabilities: np.ndarray, lowest: float, names: Sequence[str]) -> np.ndarray:
    """Answer the one class whose probability [N, L] is at least `lowest`; "unsure" if there is none or several; [N]."""
    possible = probabilities >= lowest
    return np.where(possible.sum(1) == 1, np.array(names, dtype=object)[possible.argmax(1)], UNSURE)


def score_answers(answers: np.ndarray, labels: np.ndarray) -> dict[str, float | str]:
    """Score the answers [N] to a finding with labels [N], 1, 0 or NaN; unknown ones are left out.

    Returns:
        `unsure` (share), `error` (share of the answered that are wrong), `error_positives` (share of all positives that
        are answered absent), `error_negatives` (share of all negatives that are answered present); "n/a" where no image
        counts.
    """
    unsure, positive, negative = answers == UNSURE, labels == 1, labels == 0
    known, wrong = positive | negative, (positive & (answers == ABSENT)) | (negative & (answers == PRESENT))
    parts = {"unsure": (unsure, known), "error": (wrong, known & ~unsure)}
    parts |= {"error_positives": (wrong, positive), "error_negatives": (wrong, negative)}
    return {name: float(what[of].mean()) if of.any() else NOT_SCORED for name, (what, of) in parts.items()}


# -- scores of probabilities -------------------------------------------------------------------------------------------


def calibration_error(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, Any]:
    """Compute the expected calibration error and the points of a reliability diagram (Guo et al., ICML 2017).

    ECE = Σ over the bins of (images in the bin / N) · |mean probability - frequency of positives|.

    Args:
        labels: [N], 1, 0 or NaN; unknown ones are left out.
        probabilities: of label 1, [N], in [0, 1].

    Returns:
        `ece`, and `bins`, those that hold images: `images`, mean `probability`, `frequency` of positives.

    Raises:
        UserError: no known label, or a value outside [0, 1].
    """
    known = ~np.isnan(labels)
    truth, given = labels[known], np.asarray(probabilities, float)[known]
    if not len(truth):
        raise UserError("no known label found; expected one or more")
    if not ((given >= 0) & (given <= 1)).all():
        raise UserError(f"probabilities from {given.min()} to {given.max()} found; expected values in [0, 1]")
    places = np.minimum((given * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    rows = []
    for place in np.unique(places):
        inside = places == place
        means = {"probability": float(given[inside].mean()), "frequency": float(truth[inside].mean())}
        rows.append({"images": int(inside.sum())} | means)
    error = sum(row["images"] * abs(row["probability"] - row["frequency"]) for row in rows) / len(truth)
    return {"ece": float(error), "bins": rows}


def score_calibration(probabilities: np.ndarray, labels: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Expected calibration error and Brier score of every label, and their means over the labels.

    The Brier score is the mean of (p - y)² (Brier, Monthly Weather Review 78, 1950).

    Args:
        probabilities: [N, L].
        labels: [N, L], 1, 0 or NaN for unknown; exclusive classes are one-hot, each against the rest.
        names: of the L labels.

    Returns:
        `ece_macro`, `brier_macro`, and by label `ece`, `brier`; "n/a" where no image is known.
    """
    found: dict[str, dict[str, float | str]] = {"ece": {}, "brier": {}}
    for name, given, truth in zip(names, probabilities.T, labels.T, strict=True):
        known = ~np.isnan(truth)
        found["ece"][name] = calibration_error(truth, given)["ece"] if known.any() else NOT_SCORED
        found["brier"][name] = float(((given - truth)[known] ** 2).mean()) if known.any() else NOT_SCORED
    return {f"{kind}_macro": mean_scored(values.values()) for kind, values in found.items()} | found


def selective_errors(confidences: np.ndarray, right: np.ndarray) -> list[float]:
    """Compute the error of the most confident images (El-Yaniv and Wiener, JMLR 11, 2010).

    Args:
        confidences: [N], one or more.
        right: [N], whether the likeliest answer is right.

    Returns:
        The share of wrong answers among the ⌈coverage · N⌉ most confident images, one for each of `COVERAGES`.
    """
    wrong = ~right[np.argsort(-confidences, kind="stable")]
    return [float(wrong[: math.ceil(share * len(wrong) - _ROUNDING)].mean()) for share in COVERAGES]
