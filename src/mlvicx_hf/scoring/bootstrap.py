"""The bootstrap over patients: a draw of them is a weight of every image, and a metric scores many draws at once."""

from collections.abc import Iterator

import numpy as np

DRAWS_AT_ONCE = 100  # so that the weights of a large test split fit into memory


def draw_patients(patients: np.ndarray, samples: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Draw as many patients as there are, with replacement, and yield how often every image is in each draw.

    A single patient would be the same in every draw. There, the weights are NaN, so that no score has an interval.

    Args:
        patients: of N images; all images of a patient are drawn together.
        samples: draws.
        seed: the same patients and seed give the same draws.

    Yields:
        Weights [D, N] of some of the draws, float64.
    """
    names, owner = np.unique(patients, return_inverse=True)
    generator = np.random.default_rng(seed)
    for start in range(0, samples, DRAWS_AT_ONCE):
        drawn = generator.integers(len(names), size=(min(DRAWS_AT_ONCE, samples - start), len(names)))
        counts = np.stack([np.bincount(draw, minlength=len(names)) for draw in drawn])
        yield np.where(len(names) > 1, counts[:, owner].astype(float), np.nan)


def weighted_areas(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Area under the ROC curve (a tie counts half) and average precision (as in scikit-learn) of every draw.

    Args:
        labels: [N], 1, 0 or NaN; unknown ones do not count.
        scores: [N].
        weights: [D, N].

    Returns:
        [D] each; NaN for a draw without positives or without negatives.
    """
    positive, negative = _by_score(labels, scores, weights)  # highest score first
    positives, negatives = positive.sum(1), negative.sum(1)
    found, false = positive.cumsum(1), negative.cumsum(1)
    with np.errstate(invalid="ignore"):
        beaten = negatives[:, None] - false + negative / 2
        auroc = (positive * beaten).sum(1) / (positives * negatives)
        average = (positive * np.nan_to_num(found / (found + false))).sum(1) / positives
    return auroc, np.where(negatives > 0, average, np.nan)


def _by_score(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights of the positives and of the negatives at each distinct score, highest first, [D, S] each."""
    known = ~np.isnan(labels)
    if not known.any():
        return np.zeros((len(weights), 1)), np.zeros((len(weights), 1))
    order = np.argsort(-scores[known], kind="stable")
    truth, ordered, drawn = labels[known][order], scores[known][order], weights[:, known][:, order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    positive, negative = (np.add.reduceat(drawn * (truth == value), starts, axis=1) for value in (1, 0))
    return positive, negative


def weighted_mean(values: np.ndarray, weights: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Mean of values [N] in every draw [D, N], over the images that count; NaN for a draw without any of them."""
    if counted is not None:
        values, weights = values[counted], weights[:, counted]
    with np.errstate(invalid="ignore"):
        return weights @ values / weights.sum(1)
