"""Convolutions in full float32 for inference, in a program that sets cuDNN's precision itself."""

from __future__ import annotations

import pytest
import torch

from mlvicx_hf.encoders.inference import exact_convolutions

CUDNN = torch.backends.cudnn
needs_precision = pytest.mark.skipif(not hasattr(CUDNN, "conv"), reason="torch before 2.9 has no cudnn.conv")


@needs_precision
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_flags_are_set_and_put_back(precision: str) -> None:
    def flags() -> tuple[bool, bool, str]:
        return CUDNN.deterministic, CUDNN.benchmark, CUDNN.conv.fp32_precision

    usual = CUDNN.conv.fp32_precision
    CUDNN.conv.fp32_precision = precision  # after which torch.backends.cudnn.flags() fails
    try:
        before = flags()
        with exact_convolutions():
            assert flags() == (True, False, "ieee")
        assert flags() == before
    finally:
        CUDNN.conv.fp32_precision = usual


def test_older_versions_of_torch_take_the_older_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        flags = staticmethod(CUDNN.flags)

    monkeypatch.setattr(torch.backends, "cudnn", Old)
    with exact_convolutions():
        assert CUDNN.deterministic
