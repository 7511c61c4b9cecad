"""Metrics as `evaluate.Metric` classes: labels of which some are unknown or cannot be scored, and masks, some empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from mlvicx_hf.common.errors import UserError

NOT_SCORED = "n/a"
EMPTY_MASKS = "of an image: 1 when predicted and true mask are both empty, 0 when one of them is"

_CITATION = "Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011."
_INPUTS = """
    predictions: scores [N, L], any monotone function of the probability.
    references: labels [N, L], 1, 0 or NaN for unknown; exclusive classes one-hot.
    label_names: the L names.
"""


class _MultiLabelMetric(evaluate.Metric):
    """Scores and labels [N, L]; nothing is read from the network and nothing is kept on the disk."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        row = datasets.Sequence(datasets.Value("float64"))
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": row, "references": row}),
        )


class MultiLabelAUROC(_MultiLabelMetric):
    """Area under the ROC curve of every label, and their mean.

    A label counts over the images where it is known. One with a single value there has no ROC curve: "n/a", and the
    macro mean leaves it out.

    Returns `auroc` (name → value or "n/a"), `auroc_macro` (mean over the scored labels, "n/a" if none) and
    `num_scored_labels`.
    """

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str]
    ) -> dict[str, Any]:
        return score_labels(_table(predictions, label_names), _table(references, label_names), label_names)


class MultiLabelAUPRC(_MultiLabelMetric):
    """Area under the precision-recall curve (average precision) of every label, and their mean.

    Its value without any skill is the share of positives, so it is compared only on the same images. Which labels
    count, and over which images, is as for `MultiLabelAUROC`.

    Returns `auprc` (name → value or "n/a") and `auprc_macro`.
    """

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str]
    ) -> dict[str, Any]:
        return score_precision(_table(predictions, label_names), _table(references, label_names), label_names)


class Accuracy(_MultiLabelMetric):
    """Share of right decisions: of exclusive classes the highest score, of other labels the score's sign, if known.

    Returns `accuracy`, or "n/a" when no label is known.
    """

    def _compute(
        self,
        predictions: Sequence[Any],
        references: Sequence[Any],
        label_names: Sequence[str],
        exclusive: bool = False,
        threshold: float = 0.0,
    ) -> dict[str, Any]:
        return score_accuracy(_table(predictions, label_names), _table(references, label_names), exclusive, threshold)


def score_labels(scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """What `MultiLabelAUROC` computes, from arrays [N, L]."""
    values, macro = _score_each(roc_auc_score, scores, labels, label_names)
    scored = sum(value != NOT_SCORED for value in values.values())
    return {"auroc_macro": macro, "auroc": values, "num_scored_labels": scored}


def score_precision(scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """What `MultiLabelAUPRC` computes, from arrays [N, L]."""
    values, macro = _score_each(average_precision_score, scores, labels, label_names)
    return {"auprc_macro": macro, "auprc": values}


def score_accuracy(
    scores: np.ndarray, labels: np.ndarray, exclusive: bool = False, threshold: float = 0.0
) -> dict[str, Any]:
    """What `Accuracy` computes, from arrays [N, L]."""
    if exclusive:
        return {"accuracy": float((scores.argmax(1) == labels.argmax(1)).mean())}
    known = ~np.isnan(labels)
    right = ((scores > threshold) == (labels > 0.5))[known]
    return {"accuracy": float(right.mean()) if right.size else NOT_SCORED}


def _score_each(
    metric: Callable[[np.ndarray, np.ndarray], float], scores: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, float | str], float | str]:
    """A metric of labels and scores by label, over the images where it is known, and the mean."""
    values: dict[str, float | str] = {}
    for i, name in enumerate(names):
        known = ~np.isnan(labels[:, i])
        both = len(np.unique(labels[known, i])) > 1
        values[name] = float(metric(labels[known, i], scores[known, i])) if both else NOT_SCORED
    scored = [value for value in values.values() if isinstance(value, float)]
    return values, float(np.mean(scored)) if scored else NOT_SCORED


def _table(rows: Sequence[Any], label_names: Sequence[str]) -> np.ndarray:
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(label_names):
        raise UserError(f"table of shape {table.shape} found; expected [N, {len(label_names)}], a column a label")
    return table


def youden_thresholds(
    probabilities: np.ndarray, labels: np.ndarray, label_names: Sequence[str]
) -> dict[str, float | None]:
    """Probability of each label from which sensitivity + specificity - 1 (Youden's J) is largest.

    Args:
        probabilities: [N, L].
        labels: [N, L], 1, 0 or NaN for unknown.
        label_names: the L names.

    Returns:
        Threshold by name: present where the probability is at least that; None where a label has one value only.
    """
    thresholds: dict[str, float | None] = {}
    for i, name in enumerate(label_names):
        known = ~np.isnan(labels[:, i])
        thresholds[name] = None
        if len(np.unique(labels[known, i])) > 1:
            false, true, values = roc_curve(labels[known, i], probabilities[known, i])
            thresholds[name] = float(values[1:][(true - false)[1:].argmax()])  # the first is infinite
    return thresholds


def score_decisions(
    probabilities: np.ndarray, labels: np.ndarray, thresholds: Mapping[str, float | None]
) -> dict[str, dict[str, float | str]]:
    """Sensitivity, specificity and accuracy of deciding by thresholds that another split has chosen.

    Args:
        probabilities: [N, L].
        labels: [N, L], 1, 0 or NaN for unknown.
        thresholds: by label, in the order of the columns, as `youden_thresholds` gives them.

    Returns:
        Label → `sensitivity`, `specificity`, `accuracy` over its known images; "n/a" where no image counts, or where
        there is no threshold.
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


class SegmentationOverlap(evaluate.Metric):
    """Dice and intersection over union of masks, averaged over images.

    An image whose predicted and true mask are both empty counts 1, one where only one of them is counts 0.
    `dice_positive` and `iou_positive` are over the images whose true mask is not empty.

    Takes class maps [N, H, W] as predictions and references, and label_names: the classes behind the background,
    class 0. Returns what `score_overlap` does.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation=_CITATION,
            inputs_description="predictions, references: class maps [N, H, W]; label_names: of classes 1 and up.",
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str], ignore_index: int = 255
    ) -> dict[str, Any]:
        counts = [
            overlap_counts(np.asarray(p)[None], np.asarray(r)[None], len(label_names) + 1, ignore_index)
            for p, r in zip(predictions, references, strict=True)
        ]
        return score_overlap(np.concatenate(counts), label_names)


def overlap_counts(
    predictions: np.ndarray, references: np.ndarray, num_classes: int, ignore_index: int = 255
) -> np.ndarray:
    """Pixels of overlap, prediction and truth of every image and foreground class.

    Args:
        predictions: class maps [B, H, W].
        references: true class maps [B, H, W].
        num_classes: background included.
        ignore_index: value of true pixels that do not count.

    Returns:
        [B, num_classes - 1, 3], int64.

    Raises:
        ValueError: maps of different shapes.
    """
    if predictions.shape != references.shape or predictions.ndim != 3:
        raise UserError(
            f"class maps of shapes {predictions.shape} and {references.shape} found; expected two equal [B, H, W]"
        )
    known = references != ignore_index
    counts = []
    for index in range(1, num_classes):
        predicted, true = (predictions == index) & known, references == index
        counts.append([mask.sum((1, 2)) for mask in (predicted & true, predicted, true)])
    return np.moveaxis(np.array(counts, dtype=np.int64), -1, 0)


def overlap_per_image(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice and intersection over union of every image and structure, [N, L] each, from `overlap_counts`, [N, L, 3].

    1 where predicted and true mask are both empty, 0 where one of them is.
    """
    overlap, predicted, true = np.moveaxis(counts, -1, 0)
    both = predicted + true
    dice = np.where(both == 0, 1.0, 2 * overlap / np.maximum(both, 1))
    return dice, np.where(both == 0, 1.0, overlap / np.maximum(both - overlap, 1))


def score_overlap(counts: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """Scores from `overlap_counts`, [N, L, 3].

    Returns:
        `dice`, `dice_positive`, `iou`, `iou_positive`: means over the labels; `dice_per_class`: `dice` by label;
        `per_label`: the four and `images_positive` by label; `images`. "n/a" where no image has the structure.
    """
    all_dice, all_iou = overlap_per_image(counts)
    per_label = {}
    for i, name in enumerate(label_names):
        dice, iou, positive = all_dice[:, i], all_iou[:, i], counts[:, i, 2] > 0
        per_label[name] = {
            "dice": float(dice.mean()),
            "dice_positive": float(dice[positive].mean()) if positive.any() else NOT_SCORED,
            "iou": float(iou.mean()),
            "iou_positive": float(iou[positive].mean()) if positive.any() else NOT_SCORED,
            "images_positive": int(positive.sum()),
        }
    means: dict[str, Any] = {}
    for key in ("dice", "dice_positive", "iou", "iou_positive"):
        scored = [float(v[key]) for v in per_label.values() if v[key] != NOT_SCORED]
        means[key] = float(np.mean(scored)) if scored else NOT_SCORED
    return means | {
        "dice_per_class": {name: scores["dice"] for name, scores in per_label.items()},
        "per_label": per_label,
        "images": len(counts),
    }
