"""Dice and intersection over union of masks, averaged over images. A mask may be empty."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from .labels import NOT_SCORED, mean_scored

EMPTY_MASKS = "of an image: 1 when predicted and true mask are both empty, 0 when one of them is"


def overlap_counts(
    predictions: np.ndarray, references: np.ndarray, num_classes: int, ignore_index: int = 255
) -> np.ndarray:
    """Count the pixels of overlap, prediction and truth for every image and foreground class.

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
        raise ValueError(
            f"class maps of shapes {predictions.shape} and {references.shape} found; expected two equal [B, H, W]"
        )
    known = references != ignore_index
    counts = []
    for index in range(1, num_classes):
        predicted, true = (predictions == index) & known, references == index
        counts.append([mask.sum((1, 2)) for mask in (predicted & true, predicted, true)])
    return np.moveaxis(np.array(counts, dtype=np.int64), -1, 0)


def overlap_per_image(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute Dice and intersection over union, [N, L] each, of every image and structure.

    Both are 1 where predicted and true mask are both empty, 0 where one of them is.

    Args:
        counts: of `overlap_counts`, [N, L, 3].
    """
    overlap, predicted, true = np.moveaxis(counts, -1, 0)
    both = predicted + true
    dice = np.where(both == 0, 1.0, 2 * overlap / np.maximum(both, 1))
    return dice, np.where(both == 0, 1.0, overlap / np.maximum(both - overlap, 1))


def score_overlap(counts: np.ndarray, label_names: Sequence[str]) -> dict[str, Any]:
    """Average the overlap of all images.

    Args:
        counts: of `overlap_counts`, [N, L, 3].
        label_names: the L names, without the background.

    Returns:
        `dice`, `dice_positive`, `iou`, `iou_positive`: means over the labels; `dice_per_class`: `dice` by label;
        `per_label`: the four and `images_positive` by label; `images`. The positive ones count only the images whose
        true mask is not empty; they are "n/a" where there is none.
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
    means = {
        key: mean_scored(scores[key] for scores in per_label.values())
        for key in ("dice", "dice_positive", "iou", "iou_positive")
    }
    return means | {
        "dice_per_class": {name: scores["dice"] for name, scores in per_label.items()},
        "per_label": per_label,
        "images": len(counts),
    }
