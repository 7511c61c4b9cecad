"""Published hashes of weights."""

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from mlvicx_hf import MLVICXModel
from mlvicx_hf.common.files import sha256
from mlvicx_hf.models.integrity_mlvicx import SUMS, check_weights, read_sums


def test_the_hash_is_sha256(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"radiograph" * 100_000)
    assert sha256(tmp_path / "file") == hashlib.sha256(b"radiograph" * 100_000).hexdigest()


def test_a_folder_without_hashes_is_not_checked(tmp_path: Path):
    assert check_weights(tmp_path) is False


@pytest.mark.parametrize("line", ["abc  model.safetensors", "0" * 64, "0" * 64 + " model.safetensors"])
def test_a_listing_that_is_none(tmp_path: Path, line: str):
    (tmp_path / SUMS).write_text(line)
    with pytest.raises(ValueError, match=rf"{SUMS}: line '{line[:20]}.*expected a SHA-256 hash"):
        read_sums(tmp_path / SUMS)


def test_weights_that_were_changed_or_cut_are_refused(tmp_path: Path):
    torch.manual_seed(0)
    MLVICXModel(tiny_config()).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    (tmp_path / SUMS).write_text(f"{sha256(weights)}  model.safetensors\n")
    assert check_weights(tmp_path)
    MLVICXModel.from_pretrained(tmp_path)
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(OSError, match=r"model\.safetensors is damaged.*SHA256SUMS says"):
        MLVICXModel.from_pretrained(tmp_path)
    assert weights.is_file()  # a user's own file is left alone
    weights.write_bytes(content[: len(content) // 2])
    (tmp_path / SUMS).unlink()
    with pytest.raises(OSError, match=r"damaged weights.*expected a whole safetensors file"):
        MLVICXModel.from_pretrained(tmp_path)


def test_hashes_of_weights_that_are_replaced_do_not_stay(tmp_path: Path):
    MLVICXModel(tiny_config()).save_pretrained(tmp_path)
    (tmp_path / SUMS).write_text(f"{sha256(tmp_path / 'model.safetensors')}  model.safetensors\n")
    MLVICXModel(tiny_config()).save_pretrained(tmp_path)
    MLVICXModel.from_pretrained(tmp_path)
