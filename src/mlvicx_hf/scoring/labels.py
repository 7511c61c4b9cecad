"""Scores and thresholds of labels. A label may be unknown for some images (NaN), and then is scored on the others."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

NOT_SCORED = "n/a"


def score_labels(scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """Area under the ROC curve of every label, and their mean.

    Args:
        scores: [N, L], any monotone function of the probability.
        labels: [N, L], 1, 0 or NaN for unknown; exclusive classes are one-hot.
        label_names: the L names.

    Returns:
        `auroc` (value by label), `auroc_macro` (mean over the scored labels) and `num_scored_labels`. A label with a
        single value has no ROC curve: its value is "n/a", and the mean leaves it out.
    """
    values, macro = _score_each(roc_auc_score, scores, labels, label_names)
    scored = sum(value != NOT_SCORED for value in values.values())
    return {"auroc_macro": macro, "auroc": values, "num_scored_labels": scored}


def score_precision(scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """Average precision of every label (`auprc`) and their mean (`auprc_macro`), with the rules of `score_labels`.

    A score without skill gets the share of positives, so compare values on the same images only.
    """
    values, macro = _score_each(average_precision_score, scores, labels, label_names)
    return {"auprc_macro": macro, "auprc": values}


def score_accuracy(
    scores: np.ndarray, labels: np.ndarray, exclusive: bool = False, threshold: float = 0.0
) -> dict[str, Any]:
    """Share of right decisions (`accuracy`), or "n/a" when no label is known.

    Args:
        scores: [N, L].
        labels: [N, L], 1, 0 or NaN for unknown; exclusive classes are one-hot.
        exclusive: the decision is the class with the highest score, not every label with a score above the threshold.
        threshold: above which a label counts as present.
    """
    if exclusive:
        return {"accuracy": float((scores.argmax(1) == labels.argmax(1)).mean())}
    known = ~np.isnan(labels)
    right = ((scores > threshold) == (labels > 0.5))[known]
    return {"accuracy": float(right.mean()) if right.size else NOT_SCORED}


def _score_each(
    metric: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, float | str], float | str]:
    """Compute a metric of labels and scores for every label, over the images where it is known, and the mean."""
    if scores.shape != labels.shape or scores.shape[1:] != (len(names),):
        raise ValueError(f"shapes {scores.shape} and {labels.shape} found; expected [N, {len(names)}] twice")
    values: dict[str, float | str] = {}
    for i, name in enumerate(names):
        known = ~np.isnan(labels[:, i])
        values[name] = NOT_SCORED
        if has_both_values(labels[:, i]):
            values[name] = float(metric(labels[known, i], scores[known, i]))
    return values, mean_scored(values.values())


def has_both_values(labels: np.ndarray) -> bool:
    """Whether a label, [N] of 1, 0 or NaN for unknown, is present in some images and absent in others."""
    return len(np.unique(labels[~np.isnan(labels)])) > 1


def mean_scored(values: Iterable[float | str]) -> float | str:
    """Mean of the scores, without those that could not be computed; "n/a" if there is none."""
    scored = [value for value in values if not isinstance(value, str)]
    return float(np.mean(scored)) if scored else NOT_SCORED


def youden_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, label_names: Sequence[str]
) -> dict[str, float | None]:
    """Find the probability of each label at which sensitivity + specificity - 1 (Youden's J) is largest.

    Args:
        probabilities: [N, L].
        labels: [N, L], 1, 0 or NaN for unknown.
        label_names: the L names.

    Returns:
        Threshold by label: the label is present where its probability is at least that. None for a label with a single
        value.
    """
    thresholds: dict[str, float | None] = {}
    for i, name in enumerate(label_names):
        known = ~np.isnan(labels[:, i])
        thresholds[name] = None
        if has_both_values(labels[:, i]):
            false, true, values = roc_curve(labels[known, i], probabilities[known, i])
            thresholds[name] = float(values[1:][(true - false)[1:].argmax()])  # the first is infinite
    return thresholds


def score_decisions(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: Mapping[str, float | None]
) -> dict[str, dict[str, float | str]]:
    """Sensitivity, specificity and accuracy of decisions by thresholds that were chosen on another split.

    Args:
        probabilities: [N, L].
        labels: [N, L], 1, 0 or NaN for unknown.
        thresholds: by label, in the order of the columns, as `youden_thresholds` gives them.

    Returns:
        `sensitivity`, `specificity` and `accuracy` by label, over the images where it is known; "n/a" where no image
        counts, or where there is no threshold.
    """
    found: dict[str, dict[str, float | str]] = {}
    for (name, threshold), given, truth in zip(thresholds.items(), probabilities.T, labels.T, strict=True):
        right = (given >= (threshold or 0)) == (truth == 1)
        counted = {"sensitivity": truth == 1, "specificity": truth == 0, "accuracy": ~np.isnan(truth)}
        found[name] = {
            score: float(right[rows].mean()) if threshold is not None and rows.any() else NOT_SCORED
            for score, rows in counted.items()
        }
    return found
