"""Loss terms against naive loops written from Eqs. 3-8, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mlvicx_hf.models.loss_mlvicx import (
    covariance_loss,
    gather_batch,
    invariance_loss,
    variance_covariance_loss,
    variance_loss,
)

SHAPES = [(2, 1), (2, 5), (3, 3), (4, 9), (9, 4), (16, 2), (2, 33), (33, 2)]


def embeddings(batch: int, dimension: int, seed: int = 0, scale: float = 0.7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return scale * torch.randn(batch, dimension, generator=generator, dtype=torch.float64) @ mixing / dimension**0.5 + 3


def naive_invariance(z_1: Tensor, z_2: Tensor, over_dimensions: bool) -> float:
    rows_1, rows_2 = z_1.tolist(), z_2.tolist()
    total = 0.0
    for row_1, row_2 in zip(rows_1, rows_2, strict=True):
        for a, b in zip(row_1, row_2, strict=True):
            total += (a - b) ** 2
    return total / len(rows_1) / (len(rows_1[0]) if over_dimensions else 1)


def naive_covariance_matrix(z: Tensor) -> list[list[float]]:
    rows = z.tolist()
    b, r = len(rows), len(rows[0])
    means = [sum(row[j] for row in rows) / b for j in range(r)]
    return [
        [sum((row[i] - means[i]) * (row[j] - means[j]) for row in rows) / (b - 1) for j in range(r)] for i in range(r)
    ]


def naive_variance(z: Tensor, target: float, epsilon: float) -> float:
    matrix = naive_covariance_matrix(z)
    hinges = [max(0.0, target - math.sqrt(matrix[j][j] + epsilon)) for j in range(len(matrix))]
    return sum(hinges) / len(hinges)


def naive_covariance(z: Tensor) -> float:
    matrix = naive_covariance_matrix(z)
    r = len(matrix)
    return sum(matrix[i][j] ** 2 for i in range(r) for j in range(r) if i != j) / r


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_terms_equal_naive_loops(shape: tuple[int, int], seed: int):
    z_1, z_2 = embeddings(*shape, seed=seed), embeddings(*shape, seed=seed + 100)
    close = {"rel": 1e-6, "abs": 1e-14}
    assert invariance_loss(z_1, z_2).item() == pytest.approx(naive_invariance(z_1, z_2, True), **close)
    assert invariance_loss(z_1, z_2, "sum").item() == pytest.approx(naive_invariance(z_1, z_2, False), **close)
    assert variance_loss(z_1).item() == pytest.approx(naive_variance(z_1, 1.0, 1e-4), **close)
    assert variance_loss(z_1, 2.0, 0.1).item() == pytest.approx(naive_variance(z_1, 2.0, 0.1), **close)
    assert covariance_loss(z_1).item() == pytest.approx(naive_covariance(z_1), **close)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_weighted_sum_and_its_terms(shape: tuple[int, int], reduction: str):
    z_1, z_2 = embeddings(*shape), embeddings(*shape, seed=7, scale=0.3)
    terms = variance_covariance_loss(z_1, z_2, invariance_reduction=reduction)
    invariance = naive_invariance(z_1, z_2, reduction == "mean")
    variance = (naive_variance(z_1, 1.0, 1e-4) + naive_variance(z_2, 1.0, 1e-4)) / 2
    covariance = naive_covariance(z_1) + naive_covariance(z_2)
    assert variance > 0.01
    assert terms.invariance.item() == pytest.approx(invariance, rel=1e-6)
    assert terms.variance.item() == pytest.approx(variance, rel=1e-6)
    assert terms.covariance.item() == pytest.approx(covariance, rel=1e-6)
    assert terms.loss.item() == pytest.approx(25 * invariance + 25 * variance + covariance, rel=1e-6)
    other = variance_covariance_loss(
        z_1, z_2, invariance_weight=2, variance_weight=3, covariance_weight=5, variance_target=2, variance_epsilon=0.01
    )
    wide = (naive_variance(z_1, 2.0, 0.01) + naive_variance(z_2, 2.0, 0.01)) / 2
    expected = 2 * naive_invariance(z_1, z_2, True) + 3 * wide + 5 * covariance
    assert other.loss.item() == pytest.approx(expected, rel=1e-6)


def test_a_spread_out_dimension_is_not_penalised():
    z = torch.tensor([[-3.0, 0.0], [3.0, 0.0]], dtype=torch.float64)
    assert variance_loss(z).item() == pytest.approx((0 + 1 - math.sqrt(1e-4)) / 2, rel=1e-12)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (3, 3)])
def test_gradients(shape: tuple[int, int]):
    z_1 = embeddings(*shape, scale=0.4).requires_grad_()
    z_2 = embeddings(*shape, seed=5, scale=0.4).requires_grad_()
    assert variance_loss(z_1).item() > 0.01  # the hinge is active, so its gradient is looked at
    assert torch.autograd.gradcheck(invariance_loss, (z_1, z_2))
    assert torch.autograd.gradcheck(lambda a, b: invariance_loss(a, b, "sum"), (z_1, z_2))
    assert torch.autograd.gradcheck(variance_loss, (z_1,))
    assert torch.autograd.gradcheck(covariance_loss, (z_1,))
    assert torch.autograd.gradcheck(lambda a, b: variance_covariance_loss(a, b).loss, (z_1, z_2))


def test_gradients_are_finite_where_a_batch_has_collapsed():
    z = torch.ones(4, 6, requires_grad=True)
    terms = variance_covariance_loss(z, z)
    terms.loss.backward()
    assert terms.variance.item() == pytest.approx(1 - math.sqrt(1e-4), rel=1e-6)
    assert z.grad is not None
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_in_the_views(shape: tuple[int, int]):
    z_1, z_2 = embeddings(*shape), embeddings(*shape, seed=3)
    for one, other in zip(variance_covariance_loss(z_1, z_2), variance_covariance_loss(z_2, z_1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(2, 3), (5, 5), (5, 6), (6, 5), (64, 128), (128, 64)])
def test_gram_side_equals_the_covariance_side(shape: tuple[int, int]):
    z = embeddings(*shape)
    covariance = torch.cov(z.T)
    expected = (covariance - covariance.diagonal().diag()).square().sum() / shape[1]
    torch.testing.assert_close(covariance_loss(z), expected, rtol=1e-9, atol=0)
    single = covariance_loss(z.float())
    assert single.item() == pytest.approx(expected.item(), rel=1e-4)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 2**31), st.floats(-20, 20))
def test_properties(batch: int, dimension: int, seed: int, shift: float):
    z_1, z_2 = embeddings(batch, dimension, seed), embeddings(batch, dimension, seed + 1)
    terms = variance_covariance_loss(z_1, z_2)
    assert all(term >= 0 for term in (terms.invariance, terms.variance))
    assert terms.covariance > -1e-9  # a difference of squares on the Gram side
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    axes = torch.randperm(dimension, generator=torch.Generator().manual_seed(seed))
    for changed in (
        variance_covariance_loss(z_1[order], z_2[order]),  # of the samples
        variance_covariance_loss(z_1[:, axes], z_2[:, axes]),  # of the dimensions
        variance_covariance_loss(z_1 + shift, z_2 + shift),
    ):
        for one, other in zip(terms, changed, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(variance_loss(z_1 + shift), variance_loss(z_1), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(covariance_loss(z_1 + shift), covariance_loss(z_1), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(covariance_loss(2 * z_1), 16 * covariance_loss(z_1), rtol=1e-7, atol=1e-9)
    assert invariance_loss(z_1, z_1) == 0


@pytest.mark.parametrize("function", [variance_loss, covariance_loss, lambda z: variance_covariance_loss(z, z)])
def test_a_batch_of_one_is_refused(function):
    with pytest.raises(ValueError, match=r"a batch of 1 found; .* at least 2"):
        function(torch.zeros(1, 8))


@pytest.mark.parametrize("function", [variance_loss, covariance_loss])
def test_other_than_two_dimensions_are_refused(function):
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) found; expected \[batch, dimension\]"):
        function(torch.zeros(2, 3, 4))


@pytest.mark.parametrize(("one", "other"), [((4, 8), (5, 8)), ((4, 8), (4, 7)), ((4, 8), (1, 8))])
def test_views_of_different_shapes_are_refused(one: tuple[int, int], other: tuple[int, int]):
    for function in (invariance_loss, variance_covariance_loss):
        with pytest.raises(ValueError, match="expected equal shapes") as caught:
            function(torch.zeros(one), torch.zeros(other))
        assert str(one) in str(caught.value)
        assert str(other) in str(caught.value)


def test_an_unknown_reduction_is_refused():
    with pytest.raises(ValueError, match="'median' found; expected 'mean' or 'sum'"):
        invariance_loss(torch.zeros(2, 2), torch.zeros(2, 2), "median")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, shape: tuple[int, int]):
    z_1, z_2 = (embeddings(*shape, seed=s, scale=30).to(dtype) for s in (0, 1))  # covariances overflow float16
    terms = variance_covariance_loss(z_1, z_2)
    for term, expected in zip(terms, variance_covariance_loss(z_1.float(), z_2.float()), strict=True):
        assert term.dtype == torch.float32
        assert term.isfinite()
        assert torch.equal(term, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8)])
def test_autocast_changes_nothing(dtype: torch.dtype, shape: tuple[int, int]):
    z_1, z_2 = embeddings(*shape).float(), embeddings(*shape, seed=1).float()
    expected = variance_covariance_loss(z_1, z_2)
    with torch.autocast("cpu", dtype=dtype):
        terms = variance_covariance_loss(z_1, z_2)
        separate = (invariance_loss(z_1, z_2), variance_loss(z_1), covariance_loss(z_1))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(terms, expected, strict=True))
    alone = (invariance_loss(z_1, z_2), variance_loss(z_1), covariance_loss(z_1))
    assert all(torch.equal(a, b) for a, b in zip(separate, alone, strict=True))


def test_float64_stays():
    assert all(term.dtype == torch.float64 for term in variance_covariance_loss(embeddings(4, 8), embeddings(4, 8, 1)))


def test_one_process_gathers_nothing():
    z = embeddings(4, 8)
    assert gather_batch(z) is z


@pytest.mark.parametrize("shape", [(4, 8), (8, 4)])
def test_second_derivatives_of_the_covariance_term(shape: tuple[int, int]):
    z = torch.randn(shape, dtype=torch.float64, requires_grad=True, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradgradcheck(covariance_loss, (z,))
