"""The segmentation loss against naive loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlvicx_hf.models.loss_mlvicx import segmentation_loss


def naive(logits: Tensor, labels: Tensor, ignore: int) -> float:
    """Cross-entropy and Dice, pixel by pixel."""
    batch, channels, height, width = logits.shape
    classes = max(2, channels)
    entropy, count = 0.0, 0
    overlap, total = [0.0] * classes, [0.0] * classes
    for b in range(batch):
        for y in range(height):
            for x in range(width):
                truth = int(labels[b, y, x])
                if truth == ignore:
                    continue
                values = [float(logits[b, k, y, x]) for k in range(channels)]
                if channels == 1:
                    values = [0.0, *values]  # the sigmoid is the softmax against 0
                top = sum(math.exp(v) for v in values)
                probability = [math.exp(v) / top for v in values]
                entropy -= math.log(probability[truth])
                count += 1
                for k in range(1, classes):
                    overlap[k] += probability[k] * (truth == k)
                    total[k] += probability[k] + (truth == k)
    dice = [(2 * overlap[k] + 1) / (total[k] + 1) for k in range(1, classes)]
    return entropy / max(count, 1) + 1 - sum(dice) / len(dice)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 2**31), st.floats(0, 1))
def test_equals_the_loops(channels: int, seed: int, ignored: float):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(2, channels, 3, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, max(2, channels), (2, 3, 5), generator=generator)
    labels[torch.rand(2, 3, 5, generator=generator) < ignored] = 7
    assert float(segmentation_loss(logits, labels, 7)) == pytest.approx(naive(logits, labels, 7), rel=1e-10)


def test_two_logits_and_one_are_the_same_loss():
    logits = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    labels = torch.randint(0, 2, (2, 6, 6))
    one = segmentation_loss(logits[:, 1:] - logits[:, :1], labels)
    assert float(segmentation_loss(logits, labels)) == pytest.approx(float(one), rel=1e-12)


def test_gradients_and_the_best_there_is():
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (1, 4, 4))
    assert torch.autograd.gradcheck(lambda x: segmentation_loss(x, labels), (logits,))
    perfect = 50 * torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    assert float(segmentation_loss(perfect, labels)) == pytest.approx(0, abs=1e-10)


def test_nothing_to_learn_from():
    logits = torch.randn(1, 1, 4, 4, requires_grad=True)
    loss = segmentation_loss(logits, torch.full((1, 4, 4), 255))
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()
    empty = segmentation_loss(torch.full((1, 1, 4, 4), -30.0), torch.zeros(1, 4, 4, dtype=torch.long))
    assert empty.item() == pytest.approx(0, abs=1e-6)  # a batch without the structure, rightly found


def test_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(2, 1, 16, 16).bfloat16(), torch.randint(0, 2, (2, 16, 16))
    assert segmentation_loss(logits, labels).dtype == torch.float32
