"""Scores against scikit-learn, with labels that are unknown or cannot be scored."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from mlvicx_hf.scoring.labels import score_accuracy, score_decisions, score_labels, score_precision, youden_thresholds
from mlvicx_hf.scoring.metrics import Accuracy, MultiLabelAUPRC, MultiLabelAUROC, SegmentationOverlap
from mlvicx_hf.scoring.overlap import overlap_counts, score_overlap

NAMES = ["a", "b", "c", "d"]


def random_table(seed: int, rows: int = 60, unknown: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = (generator.random((rows, len(NAMES))) < 0.4).astype(float)
    labels[generator.random(labels.shape) < unknown] = np.nan
    scores = np.round(generator.normal(size=labels.shape) + np.nan_to_num(labels), 1)  # rounded: with ties
    return scores, labels


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31))
def test_auroc_equals_scikit_learn(seed: int):
    scores, labels = random_table(seed)
    result = score_labels(scores, labels, NAMES)
    expected = {}
    for i, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, i])
        expected[name] = roc_auc_score(labels[known, i], scores[known, i])
    assert result["auroc"] == pytest.approx(expected, abs=1e-12)
    assert result["auroc_macro"] == pytest.approx(np.mean(list(expected.values())), abs=1e-12)
    assert result["num_scored_labels"] == 4


def test_auroc_is_the_share_of_ordered_pairs():
    scores, labels = random_table(3)
    known = ~np.isnan(labels[:, 0])
    positives, negatives = scores[known & (labels[:, 0] == 1), 0], scores[known & (labels[:, 0] == 0), 0]
    pairs = [(p > n) + (p == n) / 2 for p in positives for n in negatives]
    result = score_labels(scores, labels, NAMES)
    assert result["auroc"]["a"] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_label_with_one_value_is_not_scored_and_not_averaged():
    scores, labels = random_table(1)
    labels[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 0)
    labels[:, 3] = np.nan
    result = score_labels(scores, labels, NAMES)
    assert result["auroc"]["b"] == "n/a"
    assert result["auroc"]["d"] == "n/a"
    assert result["num_scored_labels"] == 2
    assert result["auroc_macro"] == pytest.approx((result["auroc"]["a"] + result["auroc"]["c"]) / 2)


def test_nothing_to_score():
    zeros = np.zeros((3, 2))
    result = score_labels(zeros, zeros, ["a", "b"])
    assert result == {"auroc_macro": "n/a", "auroc": {"a": "n/a", "b": "n/a"}, "num_scored_labels": 0}


def test_accuracy_counts_known_labels_only():
    scores, labels = random_table(5)
    known = ~np.isnan(labels)
    expected = np.mean([(s > 0) == (t == 1) for s, t in zip(scores[known], labels[known], strict=True)])
    result = score_accuracy(scores, labels)
    assert result["accuracy"] == pytest.approx(expected)
    nothing = score_accuracy(scores, labels * np.nan)
    assert nothing == {"accuracy": "n/a"}


def test_accuracy_of_exclusive_classes_takes_the_highest_score():
    scores = np.array([[0.1, 0.5, 0.2], [3.0, -1.0, 0.0], [-5.0, -4.0, -3.0]])
    labels = np.eye(3)[[1, 2, 2]]
    result = score_accuracy(scores, labels, exclusive=True)
    assert result["accuracy"] == pytest.approx(2 / 3)


# -- thresholds --------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31))
def test_no_other_threshold_has_a_larger_youden_index(seed: int):
    scores, labels = random_table(seed)
    probabilities = 1 / (1 + np.exp(-scores))
    chosen = youden_thresholds(probabilities, labels, NAMES)
    for i, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, i])
        truth, values = labels[known, i] == 1, probabilities[known, i]

        def youden(threshold: float, truth: np.ndarray = truth, values: np.ndarray = values) -> float:
            present = values >= threshold
            return float(present[truth].mean() - present[~truth].mean())

        assert youden(chosen[name]) == pytest.approx(max(youden(v) for v in np.unique(values)))


def test_a_label_with_one_value_has_no_threshold():
    labels = np.array([[1, 1], [0, 1], [1, np.nan]])
    chosen = youden_thresholds(np.array([[0.9, 0.5], [0.2, 0.4], [0.8, 0.1]]), labels, ["a", "b"])
    assert chosen == {"a": 0.8, "b": None}


# -- overlap -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 3))
def test_overlap_equals_sets_of_pixels(seed: int, labels: int):
    generator = np.random.default_rng(seed)
    truth = generator.integers(0, labels + 1, (5, 6, 4))
    truth[0] = 0
    found = np.where(generator.random(truth.shape) < 0.6, truth, generator.integers(0, labels + 1, truth.shape))
    truth[generator.random(truth.shape) < 0.1] = 255
    names = [f"class {i}" for i in range(1, labels + 1)]
    result = score_overlap(overlap_counts(found, truth, labels + 1), names)
    for index, name in enumerate(names, start=1):
        dice, iou, positive = [], [], []
        for p, t in zip(found, truth, strict=True):
            ours = {tuple(x) for x in np.argwhere((p == index) & (t != 255)).tolist()}
            theirs = {tuple(x) for x in np.argwhere(t == index).tolist()}
            both = len(ours) + len(theirs)
            dice.append(2 * len(ours & theirs) / both if both else 1)
            iou.append(len(ours & theirs) / len(ours | theirs) if both else 1)
            positive.append(bool(theirs))
        scores = result["per_label"][name]
        assert scores["dice"] == result["dice_per_class"][name] == pytest.approx(np.mean(dice))
        assert scores["iou"] == pytest.approx(np.mean(iou))
        assert scores["images_positive"] == sum(positive)
        expected = np.mean(np.array(dice)[positive]) if any(positive) else None
        assert scores["dice_positive"] == ("n/a" if expected is None else pytest.approx(expected))
    assert result["images"] == 5


def test_empty_masks():
    empty, full = np.zeros((1, 2, 2), int), np.ones((1, 2, 2), int)
    for predicted, true, expected in ((empty, empty, 1), (full, empty, 0), (empty, full, 0), (full, full, 1)):
        scores = score_overlap(overlap_counts(predicted, true, 2), ["a"])
        assert scores["dice"] == scores["iou"] == expected
    assert score_overlap(overlap_counts(empty, empty, 2), ["a"])["dice_positive"] == "n/a"
    with pytest.raises(ValueError, match=r"class maps of shapes \(1, 2, 2\) and \(1, 2, 3\) found"):
        overlap_counts(empty, np.zeros((1, 2, 3)), 2)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 2**31))
def test_average_precision_equals_scikit_learn(seed: int):
    scores, labels = random_table(seed)
    labels[:, 2] = np.nan
    result = score_precision(scores, labels, NAMES)
    expected: dict[str, Any] = {"c": "n/a"}
    for i, name in enumerate(NAMES):
        known = ~np.isnan(labels[:, i])
        if name != "c":
            expected[name] = average_precision_score(labels[known, i], scores[known, i])
    assert result["auprc"] == pytest.approx(expected, abs=1e-12)
    assert result["auprc_macro"] == pytest.approx(np.mean([v for v in expected.values() if v != "n/a"]), abs=1e-12)


def test_decisions_by_thresholds_of_another_split():
    probabilities = np.array([[0.2, 0.9], [0.6, 0.1], [0.8, 0.5], [0.5, 0.4]])
    labels = np.array([[0, np.nan], [1, np.nan], [1, np.nan], [0, np.nan]])
    found = score_decisions(probabilities, labels, {"a": 0.5, "b": 0.5})
    assert found["a"] == {"sensitivity": 1.0, "specificity": 0.5, "accuracy": 0.75}
    assert set(found["b"].values()) == {"n/a"}
    assert set(score_decisions(probabilities, labels, {"a": None, "b": None})["a"].values()) == {"n/a"}


def test_metrics_equal_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional")
    scores, labels = random_table(11)
    result = score_labels(scores, labels, NAMES)
    known = ~np.isnan(labels[:, 0])
    given, truth = torch.from_numpy(scores[known, 0]).sigmoid(), torch.from_numpy(labels[known, 0]).long()
    assert result["auroc"]["a"] == pytest.approx(float(functional.auroc(given, truth, "binary")), abs=1e-6)
    maps = np.random.default_rng(0).integers(0, 2, (2, 5, 8, 8))
    dice = [
        float(functional.f1_score(*(torch.from_numpy(m.flatten()) for m in pair), "binary"))
        for pair in zip(*maps, strict=True)
    ]
    counts = overlap_counts(maps[0], maps[1], 2)
    assert score_overlap(counts, ["a"])["dice"] == pytest.approx(np.mean(dice), abs=1e-6)


# -- the same for the library `evaluate` -------------------------------------------------------------------------------


def test_the_classes_for_evaluate_compute_the_same():
    scores, labels = random_table(2)
    given: dict[str, Any] = {"predictions": scores, "references": labels, "label_names": NAMES}
    assert MultiLabelAUROC().compute(**given) == score_labels(scores, labels, NAMES)
    assert MultiLabelAUPRC().compute(**given) == score_precision(scores, labels, NAMES)
    tables = {name: given[name] for name in ("predictions", "references")}
    assert Accuracy().compute(**tables, threshold=0.3) == score_accuracy(scores, labels, threshold=0.3)
    maps = np.random.default_rng(0).integers(0, 3, (2, 5, 6, 4))
    overlap = SegmentationOverlap().compute(predictions=maps[0], references=maps[1], label_names=["a", "b"])
    assert overlap == score_overlap(overlap_counts(*maps, 3), ["a", "b"])
    with pytest.raises(ValueError, match=r"\(60, 4\) found; expected \[N, 3\] twice"):
        MultiLabelAUROC().compute(**given | {"label_names": NAMES[:3]})
    with pytest.raises(ValueError, match="60"):
        MultiLabelAUROC().compute(**given | {"references": labels[:-1]})
