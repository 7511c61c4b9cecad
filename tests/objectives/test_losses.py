"""Losses of the general methods: loops in float64 written from the equations, and lightly's classes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import tiny_config
from torch import Tensor

from mlvicx_hf import MLVICXModel
from mlvicx_hf.models.loss_mlvicx import variance_covariance_loss
from mlvicx_hf.objectives import make_objective
from mlvicx_hf.objectives.barlow_twins import correlation_terms
from mlvicx_hf.objectives.base import LossOutput
from mlvicx_hf.objectives.momentum_contrast import info_nce
from mlvicx_hf.objectives.simclr import nt_xent

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def units(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(vectors(*shape, seed=seed), dim=1)


def dot(one: Tensor, other: Tensor) -> float:
    return sum(a * b for a, b in zip(one.tolist(), other.tolist(), strict=True))


def cosine(one: Tensor, other: Tensor) -> float:
    return dot(one, other) / math.sqrt(dot(one, one) * dot(other, other))


def loss_of(name: str, one: dict[str, Tensor], two: dict[str, Tensor], **options: object) -> LossOutput:
    """The method's own `loss`, with the smallest networks."""
    return make_objective(name, MLVICXModel(tiny_config(use_context=False)), options).loss(one, two)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_loop(temperature: float):
    one, two = units(4, 5), units(4, 5, seed=1)
    everything = [*one, *two]
    total = 0.0
    for i, each in enumerate(everything):
        partner = everything[(i + 4) % 8]
        below = sum(math.exp(dot(each, other) / temperature) for k, other in enumerate(everything) if k != i)
        total -= math.log(math.exp(dot(each, partner) / temperature) / below)
    torch.testing.assert_close(nt_xent(one, two, temperature).item(), total / 8, **EXACT)


def test_simclr_normalises_what_its_head_gives():
    one, two = vectors(4, 128), vectors(4, 128, seed=1)
    found = loss_of("simclr", {"embeddings": one}, {"embeddings": two}, temperature=0.3).loss
    normal = torch.nn.functional.normalize
    torch.testing.assert_close(found, nt_xent(normal(one, dim=1), normal(two, dim=1), 0.3), **EXACT)


def test_the_correlation_terms_are_the_loop():
    one, two = vectors(4, 3) * 2 + 1, vectors(4, 3, seed=1)

    def standard(z: Tensor, column: int) -> list[float]:
        values = [float(row[column]) for row in z]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        return [(value - mean) / math.sqrt(variance + 1e-5) for value in values]

    on = off = 0.0
    for i in range(3):
        for j in range(3):
            entry = sum(a * b for a, b in zip(standard(one, i), standard(two, j), strict=True)) / 4
            on += (1 - entry) ** 2 if i == j else 0.0
            off += entry**2 if i != j else 0.0
    torch.testing.assert_close([each.item() for each in correlation_terms(one, two)], [on, off], **EXACT)
    found = loss_of("barlow_twins", {"embeddings": one}, {"embeddings": two}, projector_dims=[3]).loss
    torch.testing.assert_close(found.item(), on + 0.0051 * off, **EXACT)


def test_simsiam_is_the_loop():
    p_1, p_2, z_1, z_2 = (vectors(4, 6, seed=seed) for seed in range(4))
    expected = [-(cosine(p_1[i], z_2[i]) + cosine(p_2[i], z_1[i])) / 2 for i in range(4)]
    one, two = ({"predictions": p, "projections": z} for p, z in ((p_1, z_1), (p_2, z_2)))
    torch.testing.assert_close(loss_of("simsiam", one, two).loss.item(), sum(expected) / 4, **EXACT)


def test_byol_is_the_loop():
    p_1, p_2, t_1, t_2 = (vectors(4, 6, seed=seed) for seed in range(4))
    total = 0.0
    for prediction, target in ((p_1, t_2), (p_2, t_1)):
        for i in range(4):
            lengths = math.sqrt(dot(prediction[i], prediction[i])), math.sqrt(dot(target[i], target[i]))
            difference = prediction[i] / lengths[0] - target[i] / lengths[1]
            total += dot(difference, difference) / 4
    one, two = ({"predictions": p, "targets": t} for p, t in ((p_1, t_1), (p_2, t_2)))
    torch.testing.assert_close(loss_of("byol", one, two, hidden_size=8).loss.item(), total, **EXACT)


def test_info_nce_is_the_loop():
    queries, keys, queue = units(3, 5), units(3, 5, seed=1), units(7, 5, seed=2)
    expected = []
    for query, key in zip(queries, keys, strict=True):
        negatives = sum(math.exp(dot(query, other) / 0.2) for other in queue)
        positive = math.exp(dot(query, key) / 0.2)
        expected.append(-math.log(positive / (positive + negatives)))
    torch.testing.assert_close(info_nce(queries, keys, queue, 0.2).tolist(), expected, **EXACT)


def test_lightly_agrees():
    """Values and gradients, of all six general losses."""
    loss = pytest.importorskip("lightly.loss", reason="needs lightly, of the extra baselines")
    one, two, queue = vectors(6, 16), vectors(6, 16, seed=1), units(12, 16, seed=2)
    both = torch.nn.functional.normalize(one, dim=1), torch.nn.functional.normalize(two, dim=1)
    torch.testing.assert_close(nt_xent(*both, 0.5), loss.NTXentLoss(0.5)(one, two), **EXACT)
    on, off = correlation_terms(one, two)
    torch.testing.assert_close(on + 5e-3 * off, loss.BarlowTwinsLoss(5e-3)(one, two), **EXACT)
    negative = loss.NegativeCosineSimilarity()
    p_1, p_2 = vectors(6, 16, seed=3), vectors(6, 16, seed=4)
    found = loss_of("simsiam", {"predictions": p_1, "projections": one}, {"predictions": p_2, "projections": two}).loss
    torch.testing.assert_close(found, (negative(p_1, two) + negative(p_2, one)) / 2, **EXACT)
    sides = {"predictions": p_1, "targets": one}, {"predictions": p_2, "targets": two}
    found = loss_of("byol", *sides, hidden_size=8).loss
    torch.testing.assert_close(found, 4 + 2 * (negative(p_1, two) + negative(p_2, one)), **EXACT)
    bank = loss.NTXentLoss(0.2, memory_bank_size=(12, 16)).double()
    bank.memory_bank.bank = queue.clone()  # lightly keeps [K, D]
    bank.memory_bank.bank_ptr = torch.zeros(1, dtype=torch.long)
    torch.testing.assert_close(info_nce(*both, queue, 0.2).mean(), bank(one, two), **EXACT)
    found = variance_covariance_loss(one, two).loss
    torch.testing.assert_close(found, loss.VICRegLoss(25, 25, 1)(one, two), **EXACT)
