"""Draws of patients, and metrics of weighted images against scikit-learn and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from mlvicx_hf.scoring.bootstrap import draw_patients, weighted_areas, weighted_mean


def random_scores(seed: int, images: int = 50, levels: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Labels, some unknown, and scores with many ties."""
    generator = np.random.default_rng(seed)
    labels = (generator.random(images) < 0.4).astype(float)
    scores = np.floor(levels * (generator.random(images) + 0.4 * labels)) / levels
    labels[generator.random(images) < 0.15] = np.nan
    return labels, scores


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31))
def test_areas_equal_scikit_learn_on_the_drawn_images(seed: int):
    labels, scores = random_scores(seed)
    patients = np.arange(50) // 2
    weights = np.concatenate(list(draw_patients(patients, 20, seed)))
    auroc, precision = weighted_areas(labels, scores, weights)
    for row, drawn in enumerate(weights):
        rows = np.repeat(np.arange(50), drawn.astype(int))
        rows = rows[~np.isnan(labels[rows])]
        if len(set(labels[rows])) < 2:
            assert np.isnan([auroc[row], precision[row]]).all()
        else:
            assert auroc[row] == pytest.approx(roc_auc_score(labels[rows], scores[rows]), abs=1e-12)
            assert precision[row] == pytest.approx(average_precision_score(labels[rows], scores[rows]), abs=1e-12)


def test_areas_equal_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    labels, scores = random_scores(7)
    known = ~np.isnan(labels)
    auroc, precision = weighted_areas(labels, scores, np.ones((1, 50)))
    given_scores, truth = torch.from_numpy(scores[known] / 2), torch.from_numpy(labels[known]).long()
    assert auroc[0] == pytest.approx(float(functional.binary_auroc(given_scores, truth)), abs=1e-6)
    assert precision[0] == pytest.approx(float(functional.binary_average_precision(given_scores, truth)), abs=1e-6)


@pytest.mark.parametrize("labels", [[0, 0, 0], [1, 1, 1], [np.nan] * 3, [np.nan, 1, 1]])
def test_what_cannot_be_scored_is_nan(labels: list[float]):
    areas = weighted_areas(np.array(labels, float), np.array([0.1, 0.2, 0.3]), np.ones((2, 3)))
    assert np.isnan(areas).all()


def test_images_of_a_patient_are_drawn_together_and_draws_repeat():
    patients = np.array(["a", "a", "b", "c", "c", "c"])
    draws = list(draw_patients(patients, 250, seed=3))
    assert [len(part) for part in draws] == [100, 100, 50]
    weights = np.concatenate(draws)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()  # as many patients as there are
    np.testing.assert_array_equal(weights, np.concatenate(list(draw_patients(patients, 250, seed=3))))
    assert weights[:, [0, 2, 3]].mean(0) == pytest.approx([1, 1, 1], abs=0.15)


def test_a_single_patient_has_no_spread():
    (weights,) = draw_patients(np.array(["a", "a"]), 10)
    labels, scores = np.array([1.0, 0]), np.array([0.7, 0.2])
    for values in (*weighted_areas(labels, scores, weights), weighted_mean(scores, weights)):
        assert np.isnan(values).all()


def test_weighted_mean_of_what_counts():
    weights = np.array([[1.0, 2, 0], [0, 0, 5]])
    found = weighted_mean(np.array([1.0, 4, 9]), weights, np.array([True, True, False]))
    assert found[0] == 3
    assert np.isnan(found[1])


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """Clusters of three equal images: draws of images instead of patients would cover far less often."""
    covered = []
    for seed in range(150):
        generator = np.random.default_rng(seed)
        labels = np.repeat(generator.random(60) < 0.5, 3).astype(float)
        scores = np.repeat(generator.normal(size=60), 3) + labels
        patients = np.repeat(np.arange(60), 3)
        draws = np.concatenate([weighted_areas(labels, scores, w)[0] for w in draw_patients(patients, 200, seed)])
        low, high = np.nanpercentile(draws, [2.5, 97.5])
        covered.append(low <= 0.7602 <= high)  # Φ(1 / √2)
    assert 0.88 <= np.mean(covered) <= 0.99
