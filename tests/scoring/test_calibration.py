"""Calibration and answers, against closed forms, plain loops and other libraries."""

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, logit
from sklearn.linear_model import LogisticRegression
from torchmetrics.classification import BinaryCalibrationError

from mlvicx_hf.scoring.calibration import (
    answer_classes,
    answer_findings,
    calibration_error,
    conformal_band,
    fit_platt,
    fit_temperature,
    lowest_probability,
    score_answers,
    score_calibration,
    selective_errors,
)


def findings(images: int, seed: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a finding, and labels drawn from the probabilities σ(logit / scale - 1)."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.normal(0, 2, images)
    return logits, (rng.random(images) < expit(logits / scale - 1)).astype(float)


# -- fits --------------------------------------------------------------------------------------------------------------


def test_platt_gives_the_frequencies_of_a_logit_with_two_values():
    """Two unknowns, two groups: each group gets the mean of its targets."""
    logits = np.repeat([-1.0, 3.0], [40, 60])
    labels = np.concatenate([np.repeat([1.0, 0.0], [10, 30]), np.repeat([1.0, 0.0], [45, 15])])
    a, b = fit_platt(logits, labels)
    high, low = 56 / 57, 1 / 47  # Platt's targets of 55 positives and 45 negatives
    assert expit(-a + b) == pytest.approx((10 * high + 30 * low) / 40, abs=1e-7)
    assert expit(3 * a + b) == pytest.approx((45 * high + 15 * low) / 60, abs=1e-7)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_platt_is_a_logistic_regression_on_soft_targets(scale: float):
    logits, labels = findings(400, seed=1, scale=scale)
    a, b = fit_platt(logits, labels)
    positives, negatives = (labels == 1).sum(), (labels == 0).sum()
    targets = np.where(labels == 1, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    twice = np.concatenate([logits, logits])[:, None] / scale
    regression = LogisticRegression(C=1e12, solver="newton-cholesky", tol=1e-10)
    regression.fit(twice, np.repeat([1, 0], 400), sample_weight=np.concatenate([targets, 1 - targets]))
    assert a * scale == pytest.approx(regression.coef_[0, 0], rel=1e-5)
    assert b == pytest.approx(regression.intercept_[0], rel=1e-5)


def test_platt_of_logits_that_are_separated_constant_or_turned_round():
    labels = np.repeat([0.0, 1.0], 30)
    a, b = fit_platt(np.where(labels == 1, 2.0, -2.0), labels)
    assert expit(2 * a + b) == pytest.approx(31 / 32, abs=1e-6)
    assert fit_platt(np.full(60, 0.3), labels)[0] == 0
    assert fit_platt(-labels, labels)[0] < 0


def test_calibration_lowers_the_error_and_keeps_the_ranking():
    logits, labels = findings(4000, seed=2, scale=3.0)
    a, b = fit_platt(logits, labels)
    assert (a, b) == (pytest.approx(1 / 3, rel=0.1), pytest.approx(-1, rel=0.1))  # what the labels were drawn with
    np.testing.assert_array_equal(np.argsort(expit(a * logits + b)), np.argsort(logits))
    before, after = (calibration_error(labels, expit(values))["ece"] for values in (logits, a * logits + b))
    assert after < 0.03 < before


def test_the_temperature_is_the_best_of_a_grid():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 2, (500, 3))
    classes = np.array([rng.choice(3, p=np.exp(row)) for row in log_softmax(logits, axis=1)])
    found = fit_temperature(2.5 * logits, classes)
    assert found is not None

    def loss(temperature: float) -> float:
        return -sum(log_softmax(2.5 * row / temperature)[k] for row, k in zip(logits, classes, strict=True)) / 500

    assert all(loss(found) <= loss(value) for value in np.linspace(0.5, 8, 76))
    assert found == pytest.approx(2.5, rel=0.15)


def test_no_temperature_where_none_is_the_best():
    logits = np.eye(3)[np.arange(60) % 3]
    assert fit_temperature(logits, np.arange(60) % 3) is None  # all right: 0
    assert fit_temperature(logits, (np.arange(60) + 1) % 3) is None  # all wrong: infinite


# -- answers -----------------------------------------------------------------------------------------------------------


def test_the_band_has_the_ranks_of_the_conformal_quantiles():
    positives, negatives = np.arange(19) / 20 + 0.04, np.arange(29)[::-1] / 30
    low, high = conformal_band(positives, negatives, 0.9)
    assert low == positives[1]  # the 2nd of 19: (1 - 0.9) · 20, which is less than 2 in floating point
    assert high == np.sort(negatives)[26]  # the 27th of 29
    assert conformal_band(positives[:5], negatives[:5], 0.9) == (0.0, 1.0)  # too few for this level
    assert conformal_band(0.9 + positives / 20, negatives / 20, 0.9) == pytest.approx((26 / 600, 0.9 + 0.09 / 20))
    assert lowest_probability(positives, 0.9) == positives[1]


def test_answers_at_the_ends_of_a_band():
    found = answer_findings(np.array([0.1, 0.2, 0.3, 0.4, 0.5]), (0.2, 0.4))
    assert found.tolist() == ["absent", "unsure", "unsure", "unsure", "present"]
    table = np.array([[0.4, 0.35, 0.25], [0.6, 0.3, 0.1], [0.35, 0.34, 0.31], [0.1, 0.4, 0.5]])
    assert answer_classes(table, 0.4, ["a", "b", "c"]).tolist() == ["a", "a", "unsure", "unsure"]


@pytest.mark.parametrize("level", [0.7, 0.9])
def test_the_promise_holds_on_exchangeable_images(level: float):
    """On average over calibration splits of 40 images; with ranks that are one off it does not."""
    rng = np.random.default_rng(4)
    errors, misses = [], []
    for _ in range(1500):
        positives, negatives = rng.normal(0.3, 1, 240), rng.normal(-0.3, 1, 240)
        given = [expit(values) for values in (positives, negatives)]
        band = conformal_band(given[0][:40], given[1][:40], level)
        truth = np.repeat([1.0, 0.0], 200)
        found = score_answers(answer_findings(np.concatenate([values[40:] for values in given]), band), truth)
        errors.append([found["error_positives"], found["error_negatives"]])
        misses.append((given[0][40:] < lowest_probability(given[0][:40], level)).mean())
    rank = math.floor((1 - level) * 41 + 1e-9)
    # A new value lies below the lowest but r of n with the chance r / (n + 1).
    assert np.mean(misses) == pytest.approx(rank / 41, abs=0.005)
    np.testing.assert_allclose(np.mean(errors, 0), rank / 41, rtol=0, atol=0.005)
    assert rank / 41 <= 1 - level


def test_scores_of_answers_are_those_of_a_loop():
    answers = np.array(["absent", "present", "unsure", "present", "absent", "unsure", "present"])
    labels = np.array([1, 1, 0, 0, 0, 1, np.nan])
    assert score_answers(answers, labels) == {
        "unsure": 2 / 6,
        "error": 2 / 4,
        "error_positives": 1 / 3,
        "error_negatives": 1 / 3,
    }
    nothing = score_answers(np.array(["unsure"]), np.array([0.0]))
    assert nothing == {"unsure": 1.0, "error": "n/a", "error_positives": "n/a", "error_negatives": 0.0}


def test_errors_at_coverages():
    confidences, right = np.array([0.6, 0.9, 0.7, 0.8, 0.5]), np.array([False, True, True, True, False])
    assert selective_errors(confidences, right) == [0.4, 0.4, 0.25, 0.25, 0.0, 0.0]


# -- scores of probabilities -------------------------------------------------------------------------------------------


def test_calibration_error_of_a_few_images():
    labels = np.array([0, 0, 1, 1, np.nan, 1])
    found = calibration_error(labels, np.array([0.12, 0.13, 0.11, 0.95, 0.5, 1.0]))
    assert [row["images"] for row in found["bins"]] == [3, 2]
    first, last = found["bins"]
    assert first["probability"] == pytest.approx(0.36 / 3)
    assert first["frequency"] == pytest.approx(1 / 3)
    expected = (3 * abs(0.36 / 3 - 1 / 3) + 2 * abs(last["probability"] - 1)) / 5
    assert found["ece"] == pytest.approx(expected)


def test_calibration_error_is_that_of_a_loop_and_of_torchmetrics():
    logits, labels = findings(700, seed=5)
    given = expit(2 * logits)
    found = calibration_error(labels, given)["ece"]
    expected = 0.0
    for place in range(15):
        inside = [i for i in range(700) if place / 15 <= given[i] < (place + 1) / 15 or (place == 14 and given[i] == 1)]
        if inside:
            expected += abs(sum(given[i] for i in inside) - sum(labels[i] for i in inside)) / 700
    assert found == pytest.approx(expected, rel=1e-12)
    second = BinaryCalibrationError(n_bins=15, norm="l1")(torch.from_numpy(given), torch.from_numpy(labels).long())
    assert found == pytest.approx(float(second), abs=1e-5)


def test_true_probabilities_are_calibrated():
    rng = np.random.default_rng(0)
    probabilities = rng.random(20000)
    labels = (rng.random(20000) < probabilities).astype(float)
    assert calibration_error(labels, probabilities)["ece"] < 0.02
    assert calibration_error(labels, probabilities**3)["ece"] > 0.1


@pytest.mark.parametrize(("labels", "scores"), [([np.nan], [0.5]), ([1], [1.2])])
def test_what_calibration_error_refuses(labels: list[float], scores: list[float]):
    with pytest.raises(ValueError, match="expected"):
        calibration_error(np.array(labels, float), np.array(scores))


def test_scores_by_label_leave_out_what_is_unknown():
    labels = np.array([[1, np.nan], [0, np.nan], [np.nan, np.nan]])
    found = score_calibration(expit(np.full((3, 2), logit(0.3))), labels, ["a", "b"])
    assert found["brier"] == {"a": pytest.approx((0.49 + 0.09) / 2), "b": "n/a"}
    assert found["ece"] == {"a": pytest.approx(0.2), "b": "n/a"}
    assert (found["brier_macro"], found["ece_macro"]) == (found["brier"]["a"], found["ece"]["a"])
