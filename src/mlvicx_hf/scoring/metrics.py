# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""The package's scores as metrics of the library `evaluate`, for use outside of it: `metric.compute(…)`.

Each class calls a function of `labels` or `overlap`, which fine-tuning calls directly, without the Arrow tables that
`evaluate` builds. So both give the same numbers. Nothing is read from the network or kept on the disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from .labels import score_accuracy, score_labels, score_precision
from .overlap import overlap_counts, score_overlap


class _Metric(evaluate.Metric):
    """A metric whose predictions and references have the same type."""

    values: Any = datasets.Sequence(datasets.Value("float64"))
    inputs = "predictions: scores [N, L]; references: labels [N, L], 1, 0 or NaN; label_names: the L names."

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="Pedregosa et al., Scikit-learn: Machine Learning in Python, JMLR 12, 2011.",
            inputs_description=self.inputs,
            features=datasets.Features({"predictions": self.values, "references": self.values}),
        )


class MultiLabelAUROC(_Metric):
    """Area under the ROC curve of every label, and their mean: `scoring.labels.score_labels`."""

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str]
    ) -> dict[str, Any]:
        return score_labels(_table(predictions, label_names), _table(references, label_names), label_names)


class MultiLabelAUPRC(_Metric):
    """Average precision of every label, and their mean: `scoring.labels.score_precision`."""

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str]
    ) -> dict[str, Any]:
        return score_precision(_table(predictions, label_names), _table(references, label_names), label_names)


class Accuracy(_Metric):
    """Share of right decisions: `scoring.labels.score_accuracy`."""

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str], **options: Any
    ) -> dict[str, Any]:
        return score_accuracy(_table(predictions, label_names), _table(references, label_names), **options)


class SegmentationOverlap(_Metric):
    """Dice and intersection over union of masks, averaged over images: `scoring.overlap.score_overlap`."""

    values = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
    inputs = "predictions, references: class maps [N, H, W]; label_names: of classes 1 and up."

    def _compute(
        self, predictions: Sequence[Any], references: Sequence[Any], label_names: Sequence[str], ignore_index: int = 255
    ) -> dict[str, Any]:
        counts = [
            overlap_counts(np.asarray(p)[None], np.asarray(r)[None], len(label_names) + 1, ignore_index)
            for p, r in zip(predictions, references, strict=True)
        ]
        return score_overlap(np.concatenate(counts), label_names)


def _table(rows: Sequence[Any], label_names: Sequence[str]) -> np.ndarray:
    table = np.asarray(rows, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != len(label_names):
        raise ValueError(f"table of shape {table.shape} found; expected [N, {len(label_names)}], a column a label")
    return table
