"""Preparing where real disks, names and files are not as they should be."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.base import Collection, Record, keep_present
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.collections.hf import HFCollection


def make(collection: Collection, output: Path) -> dict:
    return prepare(collection, output, size=8, num_workers=0, progress=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of six images."""
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "c.png", "sub/d.png", "sub/e.png", "sub/f.png"):
        Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).save(folder / name)
    return folder


def test_names_that_are_no_utf8_are_spelled_out_everywhere(tmp_path: Path):
    for kind in (b"train/\xc9panchement", b"test/\xc9panchement", b"train/normal", b"test/normal"):
        folder = Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/" + kind))
        folder.mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.full((8, 8), 40 * number, np.uint8)).save(folder / f"{number}.png")
    manifest = make(FolderCollection(tmp_path / "images"), tmp_path / "cache")
    assert sorted(manifest["label_names"]) == ["\\udcc9panchement", "normal"]
    table = tmp_path / "images" / "metadata.csv"
    table.write_text("file_name,patient_id\ntrain/normal/0.png,p\ntrain/normal/1.png,q")
    manifest = make(FolderCollection(tmp_path / "images"), tmp_path / "noted")
    assert any("does not list" in note for note in manifest["notes"])


def test_an_error_of_the_program_keeps_what_was_made(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object) -> None:
        raise ValueError("a mistake")

    with monkeypatch.context() as patched:
        patched.setattr("mlvicx_hf.data.cache.prepare.assemble", fail)
        with pytest.raises(ValueError, match="a mistake"):
            make(FolderCollection(root), tmp_path / "cache")
    assert any(
        "shards were finished before" in note for note in make(FolderCollection(root), tmp_path / "cache")["notes"]
    )


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_was_saved_anew_is_read_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    def save(shade: int) -> None:
        pictures = [Image.fromarray(np.full((8, 8), shade + number, np.uint8)) for number in range(4)]
        datasets.Dataset.from_dict({"image": pictures}, datasets.Features({"image": datasets.Image()})).save_to_disk(
            tmp_path / "saved"
        )

    def stop(*_: object) -> None:
        raise RuntimeError("killed")

    save(10)
    with monkeypatch.context() as patched:
        patched.setattr("mlvicx_hf.data.cache.prepare.assemble", stop)
        with pytest.raises(RuntimeError, match="killed"):
            make(HFCollection(tmp_path / "saved", streaming=streaming), tmp_path / "cache")
    shutil.rmtree(tmp_path / "saved")
    save(200)
    make(HFCollection(tmp_path / "saved", streaming=streaming), tmp_path / "cache")
    assert min(np.asarray(image).max() for image in load_cache(tmp_path / "cache").datasets["train"]["image"]) >= 200


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda cache: (cache / "cache.json").write_text(""), r"cache\.json: .*expected JSON"),
        (lambda cache: (cache / "cache.json").write_text('{"format": 2}'), "cache.json: no field 'label_names'"),
        (lambda cache: truncate(next(cache.glob("*/*.arrow"))), "expected whole files .*mlvicx prepare"),
        (lambda cache: (cache / "dataset_dict.json").write_text("{"), "expected whole files .*mlvicx prepare"),
    ],
)
def test_a_damaged_cache_is_named(damage: Callable[[Path], object], message: str, root: Path, tmp_path: Path):
    make(FolderCollection(root), tmp_path / "cache")
    damage(tmp_path / "cache")
    with pytest.raises(UserError, match=message):
        load_cache(tmp_path / "cache")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:700])


def test_one_bad_link_does_not_hide_a_folder(root: Path, tmp_path: Path):
    files = list(root.rglob("*.png"))
    for folder in {path.parent for path in files}:
        (folder / "loop").symlink_to("loop")
    records = [Record(path.name, "p", path=path) for path in files]
    assert keep_present(records) == (records, ())


def test_backslashes_of_windows_are_slashes(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    for number in range(2):
        Image.fromarray(np.full((8, 8), 90 * number, np.uint8)).save(tmp_path / "sub" / f"{number}.png")
    table = tmp_path / "metadata.csv"
    table.write_text("file_name,patient_id\nsub\\0.png,p\nsub\\1.png,q")
    listing = FolderCollection(tmp_path).read()
    assert [record.name for record in listing.records] == ["sub/0.png", "sub/1.png"]
    assert not any("does not list" in note for note in listing.notes)
    table.write_text("file_name,patient_id\nsub\\0.png,p\nsub/0.png,q")
    with pytest.raises(UserError, match=r"sub/0\.png"):
        FolderCollection(tmp_path).read()
