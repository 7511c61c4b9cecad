"""Metrics as `evaluate.Metric` classes over scikit-learn, for labels of which some are unknown or cannot be scored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from sklearn.metrics import roc_auc_score

NOT_SCORED = "n/a"

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
        scores, labels = _table(predictions, label_names), _table(references, label_names)
        if exclusive:
            return {"accuracy": float((scores.argmax(1) == labels.argmax(1)).mean())}
        known = ~np.isnan(labels)
        right = ((scores > threshold) == (labels > 0.5))[known]
        return {"accuracy": float(right.mean()) if right.size else NOT_SCORED}


def score_labels(scores: np.ndarray, labels: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """What `MultiLabelAUROC` computes, from arrays [N, L]."""
    values = {name: _auroc(scores[:, i], labels[:, i]) for i, name in enumerate(label_names)}
    scored = [value for value in values.values() if isinstance(value, float)]
    macro = float(np.mean(scored)) if scored else NOT_SCORED
    return {"auroc_macro": macro, "auroc": values, "num_scored_labels": len(scored)}


def _table(rows: Sequence[Any], label_names: Sequence[str]) -> np.ndarray:
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(label_names):
        raise ValueError(f"table of shape {table.shape} found; expected [N, {len(label_names)}], a column a label")
    return table


def _auroc(scores: np.ndarray, labels: np.ndarray) -> float | str:
    known = ~np.isnan(labels)
    if len(np.unique(labels[known])) < 2:
        return NOT_SCORED
    return float(roc_auc_score(labels[known], scores[known]))
