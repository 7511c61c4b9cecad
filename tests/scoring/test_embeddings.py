"""Effective rank, deviation and correlation of embeddings, against numpy, and at the edges."""

import math

import numpy as np
import pytest
import torch

from mlvicx_hf.models.loss_mlvicx import variance_loss
from mlvicx_hf.scoring.embeddings import describe_embeddings, mean_correlation, mean_standard_deviation, rankme


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_a_line_has_rank_one():
    line = torch.randn(64, 1) @ torch.randn(1, 32)
    assert rankme(line) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.ones(64, 32)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("count", [2, 16, 40])
def test_orthonormal_rows_have_full_rank(count: int):
    rows = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q[:count]
    assert rankme(rows) == pytest.approx(count, rel=1e-3)


def test_between_and_independent_of_scale():
    embeddings = torch.randn(100, 8) @ torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 0]))
    rank = rankme(embeddings)
    assert 3.5 < rank < 4.01
    assert rankme(1e3 * embeddings) == pytest.approx(rank, rel=1e-6)
    assert rankme(embeddings.bfloat16()) == pytest.approx(rank, rel=1e-2)


def test_is_the_exponential_of_the_entropy():
    values = torch.tensor([3.0, 2.0, 1.0])
    shares = values / 6
    expected = torch.exp(-(shares * shares.log()).sum()).item()
    assert rankme(torch.diag(values)) == pytest.approx(expected, rel=1e-5)


def test_collapsed_to_a_point_at_zero_is_finite():
    assert 0 <= rankme(torch.zeros(8, 4)) <= 4  # not NaN: it would end in metrics.jsonl


def test_rankme_is_that_of_the_singular_values():
    for shape in [(64, 2048), (200, 32)]:
        embeddings = torch.randn(shape) @ torch.diag(torch.logspace(0, -9, shape[1]))  # some below every precision
        singular = torch.linalg.svdvals(embeddings.double())
        shares = singular / singular.sum() + 1e-7
        expected = torch.exp(-(shares * shares.log()).sum()).item()
        assert rankme(embeddings) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_rankme_of_any_magnitude(scale: float):
    embeddings = torch.randn(16, 8, dtype=torch.float64)
    assert rankme(scale * embeddings) == pytest.approx(rankme(embeddings))


def test_deviation_is_that_of_the_variance_loss():
    embeddings = torch.randn(50, 6) * torch.arange(6) + 3
    assert mean_standard_deviation(embeddings) == pytest.approx(embeddings.std(0).mean().item())
    assert mean_standard_deviation(torch.full((8, 4), 0.1)) == pytest.approx(0, abs=1e-12)
    assert variance_loss(embeddings, target=100, epsilon=0).item() == pytest.approx(
        100 - mean_standard_deviation(embeddings)
    )


def test_correlation_is_that_of_numpy():
    embeddings = torch.randn(40, 20) @ torch.randn(20, 20)
    matrix = np.abs(np.corrcoef(embeddings.numpy().T))
    assert mean_correlation(embeddings) == pytest.approx((matrix.sum() - 20) / (20 * 19), rel=1e-5)
    assert mean_correlation(1e-6 * embeddings + 5e-6) == pytest.approx(mean_correlation(embeddings), rel=1e-4)


def test_correlation_of_many_dimensions_stands_for_all_of_them():
    embeddings = torch.randn(64, 30) @ torch.randn(30, 2048)
    matrix = np.abs(np.corrcoef(embeddings.numpy().T))
    assert mean_correlation(embeddings) == pytest.approx((matrix.sum() - 2048) / (2048 * 2047), rel=0.02)


def test_correlation_leaves_out_what_never_varies():
    varying = torch.randn(30, 2)
    expected = abs(np.corrcoef(varying.numpy().T)[0, 1])
    constants = torch.tensor([0.0, 0.1, -1e3]).expand(30, 3)
    assert mean_correlation(torch.cat([varying, constants], 1)) == pytest.approx(expected, rel=1e-5)
    assert mean_correlation(constants) == 0
    assert mean_correlation(torch.cat([varying[:, :1], constants], 1)) == 0


def test_independent_and_equal_dimensions():
    assert mean_correlation(torch.randn(64, 256)) == pytest.approx(0.8 / 8, rel=0.1)
    assert mean_correlation(torch.randn(64, 1) * torch.tensor([1.0, -2, 3])) == pytest.approx(1)


def test_a_description_names_its_figures():
    embeddings = torch.randn(16, 8) + 100
    found = describe_embeddings("level_0", embeddings)
    assert found == {
        "level_0_rankme": pytest.approx(rankme(embeddings)),
        "level_0_deviation": pytest.approx(mean_standard_deviation(embeddings)),
        "level_0_correlation": pytest.approx(mean_correlation(embeddings)),
    }
    centred = describe_embeddings("level_0", embeddings, centre=True)
    assert found["level_0_rankme"] < 2 < 5 < centred.pop("level_0_rankme")
    assert centred.items() <= found.items()
    assert describe_embeddings("level_0", embeddings[:1]) == {}  # not NaN
    assert all(math.isfinite(value) for value in describe_embeddings("level_0", torch.zeros(8, 4)).values())
