"""The package's scores as metrics of the library `evaluate`, for use outside of it: `metric.compute(…)`.

Each class calls a function of `labels` or `overlap`, which fine-tuning calls directly, without the Arrow tables that
`evaluate` builds. So both give the same numbers. Nothing is read from the network or kept on the disk.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from .labels import score_accuracy, score_labels, score_precision
from .overlap import overlap_counts, score_overlap


class _LabelMetric(evaluate.Metric):
    """A score of tables [N, L]: `predictions`, `references` (1, 0 or NaN), and the options of the function."""

    score: ClassVar[Callable[..., dict[str, Any]]]
    values: ClassVar[Any] = datasets.Sequence(datasets.Value("float64"))

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(keep_in_memory=True, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=str(type(self).__doc__),
            citation="",
            features=datasets.Features({"predictions": self.values, "references": self.values}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, Any]:
        return type(self).score(np.asarray(predictions, np.float64), np.asarray(references, np.float64), **options)


class MultiLabelAUROC(_LabelMetric):
    """Area under the ROC curve of every label, and their mean: `scoring.labels.score_labels`."""

    score = staticmethod(score_labels)


class MultiLabelAUPRC(_LabelMetric):
    """Average precision of every label, and their mean: `scoring.labels.score_precision`."""

    score = staticmethod(score_precision)


class Accuracy(_LabelMetric):
    """Share of right decisions: `scoring.labels.score_accuracy`."""

    score = staticmethod(score_accuracy)


class SegmentationOverlap(_LabelMetric):
    """Dice and intersection over union of class maps [N, H, W]: `scoring.overlap.score_overlap`."""

    values = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any], **options: Any) -> dict[str, Any]:
        names, ignored = options["label_names"], options.get("ignore_index", 255)
        counts = [  # one by one: the images may have different sizes
            overlap_counts(np.asarray(p)[None], np.asarray(r)[None], len(names) + 1, ignored)
            for p, r in zip(predictions, references, strict=True)
        ]
        return score_overlap(np.concatenate(counts), names)
