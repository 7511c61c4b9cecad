import pytest
import torch

from mlvicx_hf.monitors import rankme


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
