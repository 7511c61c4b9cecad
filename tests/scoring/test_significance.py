from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from mlvicx_hf.scoring.significance import delong_test, paired_tests


def naive_delong(labels: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Difference and standard error by all pairs of a positive and a negative image, as the paper writes them."""
    kernels = []
    for scores in (ours, theirs):
        pairs = scores[labels == 1][:, None] - scores[labels == 0][None]
        kernels.append((pairs > 0) + 0.5 * (pairs == 0))  # [m, n]
    aucs = [kernel.mean() for kernel in kernels]
    of_positives = np.cov([kernel.mean(1) for kernel in kernels])
    of_negatives = np.cov([kernel.mean(0) for kernel in kernels])
    m, n = kernels[0].shape
    covariance = of_positives / m + of_negatives / n
    contrast = np.array([1, -1])
    return aucs[0] - aucs[1], float(np.sqrt(contrast @ covariance @ contrast))


@pytest.mark.parametrize("levels", [1000, 4])  # few levels: many ties
def test_delong_equals_all_pairs(levels: int):
    rng = np.random.default_rng(3)
    labels = (rng.random(60) < 0.4).astype(float)
    ours = np.floor(levels * (rng.random(60) + 0.3 * labels))
    theirs = np.floor(levels * (rng.random(60) + 0.1 * labels))
    found = delong_test(labels, ours, theirs)
    difference, error = naive_delong(labels, ours, theirs)
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, ours))
    assert found["other_auroc"] == pytest.approx(roc_auc_score(labels, theirs))
    assert found["difference"] == pytest.approx(difference)
    assert found["se"] == pytest.approx(error)
    assert found["p"] == pytest.approx(2 * stats.norm.sf(abs(difference / error)))


def test_delong_leaves_unknown_labels_out_and_is_symmetric():
    rng = np.random.default_rng(4)
    labels = (rng.random(40) < 0.5).astype(float)
    ours, theirs = rng.random((2, 40))
    expected = delong_test(labels[:30], ours[:30], theirs[:30])
    labels[30:] = np.nan
    assert delong_test(labels, ours, theirs) == pytest.approx(expected)
    other = delong_test(labels, theirs, ours)
    assert (other["difference"], other["p"]) == pytest.approx((-expected["difference"], expected["p"]))


def test_delong_keeps_its_promise_where_nothing_differs():
    """Of many pairs of equally good scores some 5 % have p < 0.05."""
    rng = np.random.default_rng(5)
    labels = (np.arange(120) < 60).astype(float)
    values = [delong_test(labels, *(rng.normal(size=(2, 120)) + labels))["p"] for _ in range(400)]
    assert 0.02 < np.mean(np.array(values) < 0.05) < 0.09


def test_delong_of_the_same_scores_and_of_perfect_ones():
    labels = np.array([0.0, 0, 1, 1])
    assert delong_test(labels, labels, labels)["p"] == 1
    for other in (1 - labels, np.full(4, 0.5)):  # no variance: a chance of four images and no proof
        found = delong_test(labels, labels, other)
        assert found["difference"] > 0.4
        assert math.isnan(found["p"])


def test_delong_of_a_small_difference_of_many_images():
    labels = np.arange(2000) % 2 == 0
    ours = labels + np.arange(2000) * 1e-9
    theirs = ours.copy()
    theirs[[0, 1]] = theirs[[1, 0]]  # one pair is ranked the wrong way round
    found = delong_test(labels.astype(float), ours, theirs)
    assert 0 < found["se"] < 1e-2
    assert 0 < found["p"] < 1
    many = np.tile([1.0, 0.0], 20000)
    near = many + np.arange(40000) * 1e-9
    swapped = near.copy()
    swapped[np.argsort(near)[19999:20001]] = swapped[np.argsort(near)[[20000, 19999]]]
    found = delong_test(many, near, swapped)  # one pair of 4e8
    assert 0 < found["difference"] < 1e-8
    assert 0.1 < found["p"] < 1


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([1, 1, np.nan], [1, 2, 3], "2 positive and 0 negative"),
        ([1, 0, 0], [1, 2, 3], "1 positive and 2 negative"),
        ([1, 1, 0, 0], [np.inf, 0, 0, 0], "not finite"),
    ],
)
def test_what_delong_refuses(labels: list[float], scores: list[float], message: str):
    with pytest.raises(ValueError, match=message):
        delong_test(np.array(labels, float), np.array(scores, float), np.array(scores, float))


def test_tests_over_seeds():
    ours, theirs = [0.81, 0.83, 0.80, 0.84, 0.82], [0.80, 0.80, 0.79, 0.80, 0.80]
    found = paired_tests(ours, theirs)
    assert found["seeds"] == 5
    assert found["difference"] == pytest.approx(0.022)
    assert found["t_p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert found["wilcoxon_p"] == 0.0625  # the least that five seeds can give
    assert paired_tests([0.8, 0.9], [0.8, 0.9]) == {"seeds": 2, "difference": 0, "t_p": 1, "wilcoxon_p": 1}


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [([0.8], [0.7], "1 and 1 scores"), ([0.8, 0.9], [0.7], "2 and 1"), ([0.8, np.nan], [0.7, 0.7], "not finite")],
)
def test_what_tests_over_seeds_refuse(ours: Any, theirs: Any, message: str):
    with pytest.raises(ValueError, match=message):
        paired_tests(ours, theirs)
