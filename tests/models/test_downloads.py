"""Weights in the Hub's cache, whose blobs have their SHA-256 hashes as names, and weights in folders."""

import hashlib
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from mlvicx_hf import MLVICXForImageClassification, MLVICXModel


@pytest.fixture(scope="module")
def model() -> MLVICXModel:
    torch.manual_seed(0)
    return MLVICXModel(tiny_config())


def cached(model: MLVICXModel, root: Path, shared: bool = False, **options: str) -> Path:
    """A snapshot as the Hub client lays it out: links to blobs, with `shared` through a store of all models."""
    repository = root / "models--org--model"
    snapshot, blobs, store = repository / "snapshots" / "0123abc", repository / "blobs", root / "store"
    model.save_pretrained(snapshot, **options)
    blobs.mkdir()
    store.mkdir()
    for file in list(snapshot.iterdir()):
        content = file.read_bytes()
        large = file.suffix == ".safetensors"
        name = hashlib.sha256(content).hexdigest() if large else hashlib.sha1(content).hexdigest()
        if large and shared:  # named by a hash of another kind
            file.rename(store / name[::-1])
            (blobs / name).symlink_to(store / name[::-1])
        else:
            file.rename(blobs / name)
        file.symlink_to(Path("..") / ".." / "blobs" / name)
    return snapshot


def damage(file: Path) -> None:
    """Change a bit of a weight; the file's length and header stay."""
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.resolve().write_bytes(content)


@pytest.mark.parametrize("shared", [False, True])
def test_damaged_weights_are_named_and_removed_from_the_cache(model: MLVICXModel, tmp_path: Path, shared: bool):
    snapshot = cached(model, tmp_path, shared)
    MLVICXModel.from_pretrained(snapshot)
    damage(snapshot / "model.safetensors")
    with pytest.raises(OSError, match=r"org/model: model\.safetensors is damaged.*removed from the cache"):
        MLVICXModel.from_pretrained(snapshot)
    left = [path.name for path in tmp_path.rglob("*") if not path.is_dir()]
    assert sorted(path.name for path in snapshot.iterdir()) == ["config.json"]
    assert len(left) == 2  # the configuration and its blob


def test_a_damaged_shard_is_named_and_removed(model: MLVICXModel, tmp_path: Path):
    snapshot = cached(model, tmp_path, max_shard_size="500KB")
    shards = sorted(snapshot.glob("model-*.safetensors"))
    assert len(shards) > 1
    MLVICXForImageClassification.from_pretrained(snapshot)
    damage(shards[1])
    with pytest.raises(OSError, match=f"{shards[1].name} is damaged"):
        MLVICXForImageClassification.from_pretrained(snapshot)
    assert sorted(snapshot.glob("model-*.safetensors")) == [shards[0], *shards[2:]]


def test_a_cache_without_links_has_no_hashes_to_compare(model: MLVICXModel, tmp_path: Path):
    """As on Windows, where a snapshot holds the files themselves."""
    snapshot = tmp_path / "models--org--model" / "snapshots" / "0123abc"
    model.save_pretrained(snapshot)
    damage(snapshot / "model.safetensors")
    MLVICXModel.from_pretrained(snapshot)


def test_a_users_own_files_and_links_are_left_alone(model: MLVICXModel, tmp_path: Path):
    model.save_pretrained(tmp_path / "own")
    weights = tmp_path / "own" / "model.safetensors"
    (tmp_path / "linked").mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "own" / name)
    damage(weights)
    MLVICXModel.from_pretrained(tmp_path / "linked")
    weights.write_bytes(weights.read_bytes()[:-1000])
    for name in ("own", "linked"):
        with pytest.raises(OSError, match=rf"{name}: damaged weights.*expected a whole safetensors file"):
            MLVICXModel.from_pretrained(tmp_path / name)
    assert weights.is_file()


def test_hashes_of_older_versions_are_ignored(model: MLVICXModel, tmp_path: Path):
    model.save_pretrained(tmp_path)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    MLVICXModel.from_pretrained(tmp_path)
