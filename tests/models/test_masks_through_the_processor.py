"""Masks on their way into and out of a model: one geometry with their images."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlvicx_hf import MLVICXImageProcessor
from mlvicx_hf.models.image_processing_mlvicx import FITS


def outputs(classes: torch.Tensor, labels: int) -> Any:
    """Logits that decide for these classes, [B, H, W]."""
    if labels == 1:
        return SimpleNamespace(logits=classes[:, None].float() - 0.5)
    return SimpleNamespace(logits=torch.nn.functional.one_hot(classes, labels).movedim(-1, 1).float())


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FITS), st.integers(20, 90), st.integers(20, 90), st.sampled_from([1, 3]))
def test_there_and_back(fit: str, height: int, width: int, labels: int):
    """A rectangle comes back where it was, but for its outline and what "crop" cut off."""
    mask = np.zeros((height, width), np.uint8)
    top, left = height // 4, width // 4
    mask[top : top + height // 2, left : left + width // 2] = max(1, labels - 1)
    processor = MLVICXImageProcessor(64, fit=fit)
    made = processor(Image.fromarray(mask * 100), segmentation_maps=Image.fromarray(mask))
    assert made["labels"].shape == (1, 64, 64)
    assert made["labels"].dtype == torch.int64
    assert set(made["labels"].unique().tolist()) <= {0, max(1, labels - 1)}
    back = processor.post_process_semantic_segmentation(outputs(made["labels"], labels), [(height, width)])[0]
    assert back.shape == (height, width)
    expected = mask.copy()
    if fit == "crop":
        side = min(height, width)
        outside = np.ones_like(mask, bool)
        y, x = (height - side + 1) // 2, (width - side + 1) // 2
        outside[y : y + side, x : x + side] = False
        expected[outside] = 0
        # which of two middle pixels counts as the border is left to the library
    wrong = (back.numpy() != expected).sum()
    outline = 2 * (height + width)
    assert wrong <= 2 * outline * max(1, max(height, width) / 64)


@pytest.mark.parametrize("fit", FITS)
def test_image_and_mask_meet_the_same_pixels(fit: str):
    """A bright object and its mask stay on top of each other."""
    array = np.zeros((60, 100), np.uint8)
    array[20:45, 35:60] = 255
    mask = (array > 0).astype(np.uint8)
    processor = MLVICXImageProcessor(48, image_mean=0, image_std=1, fit=fit)
    made = processor(array, segmentation_maps=mask)
    bright = made["pixel_values"][0, 0] > 0.5
    differing = (bright != made["labels"][0].bool()).sum()
    assert differing <= 0.1 * made["labels"].sum()


def test_a_batch_and_the_default_size():
    processor = MLVICXImageProcessor(32)
    images = [np.zeros((40, 30), np.uint8), np.zeros((20, 50), np.uint8)]
    made = processor(images, segmentation_maps=[np.ones((40, 30), np.uint8), np.ones((20, 50), np.int64)])
    assert made["labels"].shape == (2, 32, 32)
    assert made["labels"][0, :, :4].sum() == 0  # the border of "pad" is background
    maps = processor.post_process_semantic_segmentation(outputs(made["labels"], 1))
    assert [tuple(m.shape) for m in maps] == [(32, 32), (32, 32)]
    assert torch.equal(maps[0], made["labels"][0])
    assert "labels" not in processor(images)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((30, 40), np.uint8), r"mask of \(30, 40\) pixels found; expected the size of its image, \(40, 30\)"),
        ([np.zeros((40, 30), np.uint8)] * 2, r"2 masks found; expected 1, one an image"),
        (np.zeros((40, 30), np.float32), r"mask of shape \(40, 30\) and type float32 found"),
        (np.zeros((40, 30, 3, 1), np.uint8), r"mask of shape \(40, 30, 3, 1\)"),
    ],
)
def test_masks_that_do_not_fit(masks: Any, message: str):
    with pytest.raises(ValueError, match=message):
        MLVICXImageProcessor(32)(np.zeros((40, 30), np.uint8), segmentation_maps=masks)


def test_another_number_of_sizes():
    with pytest.raises(ValueError, match="2 target_sizes found; expected 1, one an image"):
        MLVICXImageProcessor(32).post_process_semantic_segmentation(
            outputs(torch.zeros(1, 32, 32, dtype=torch.long), 1), [(1, 1), (2, 2)]
        )
