"""Scores against scikit-learn, with labels that are unknown or cannot be scored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from mlvicx_hf.metrics import Accuracy, MultiLabelAUROC

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
    result = MultiLabelAUROC().compute(predictions=scores, references=labels, label_names=NAMES)
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
    result = MultiLabelAUROC().compute(predictions=scores, references=labels, label_names=NAMES)
    assert result["auroc"]["a"] == pytest.approx(np.mean(pairs), abs=1e-12)


def test_a_label_with_one_value_is_not_scored_and_not_averaged():
    scores, labels = random_table(1)
    labels[:, 1] = np.where(np.isnan(labels[:, 1]), np.nan, 0)
    labels[:, 3] = np.nan
    result = MultiLabelAUROC().compute(predictions=scores, references=labels, label_names=NAMES)
    assert result["auroc"]["b"] == "n/a"
    assert result["auroc"]["d"] == "n/a"
    assert result["num_scored_labels"] == 2
    assert result["auroc_macro"] == pytest.approx((result["auroc"]["a"] + result["auroc"]["c"]) / 2)


def test_nothing_to_score():
    zeros = np.zeros((3, 2))
    result = MultiLabelAUROC().compute(predictions=zeros, references=zeros, label_names=["a", "b"])
    assert result == {"auroc_macro": "n/a", "auroc": {"a": "n/a", "b": "n/a"}, "num_scored_labels": 0}


@pytest.mark.parametrize("metric", [MultiLabelAUROC, Accuracy])
def test_tables_of_another_width_are_refused(metric: type):
    scores, labels = random_table(0)
    with pytest.raises(ValueError, match=r"\(60, 4\) found; expected \[N, 3\]"):
        metric().compute(predictions=scores, references=labels, label_names=NAMES[:3])


@pytest.mark.parametrize("metric", [MultiLabelAUROC, Accuracy])
def test_tables_of_different_length_are_refused(metric: type):
    scores, labels = random_table(0)
    with pytest.raises(ValueError, match="60"):
        metric().compute(predictions=scores, references=labels[:-1], label_names=NAMES)


def test_accuracy_counts_known_labels_only():
    scores, labels = random_table(5)
    known = ~np.isnan(labels)
    expected = np.mean([(s > 0) == (t == 1) for s, t in zip(scores[known], labels[known], strict=True)])
    result = Accuracy().compute(predictions=scores, references=labels, label_names=NAMES)
    assert result["accuracy"] == pytest.approx(expected)
    nothing = Accuracy().compute(predictions=scores, references=labels * np.nan, label_names=NAMES)
    assert nothing == {"accuracy": "n/a"}


def test_accuracy_of_exclusive_classes_takes_the_highest_score():
    scores = np.array([[0.1, 0.5, 0.2], [3.0, -1.0, 0.0], [-5.0, -4.0, -3.0]])
    labels = np.eye(3)[[1, 2, 2]]
    result = Accuracy().compute(predictions=scores, references=labels, label_names=["a", "b", "c"], exclusive=True)
    assert result["accuracy"] == pytest.approx(2 / 3)
