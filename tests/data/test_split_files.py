import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.split_files import read_split_file, split_file


def test_what_is_written_is_read(tmp_path: Path):
    rows = [("folder:a.png", "p1", "train"), ("folder:sub/b, c.png", "p2", "validation"), ("hf:train/7", "p3", "test")]
    (tmp_path / "splits.csv").write_text(split_file(rows))
    assert read_split_file(tmp_path / "splits.csv") == {
        "a.png": "train",
        "sub/b, c.png": "validation",
        "train/7": "test",
    }


def test_a_table_of_files_is_a_split_file(tmp_path: Path):
    (tmp_path / "s.csv").write_text("file_name,split,more\na.png,Train,1\nb:c.png,val,2\n")
    assert read_split_file(tmp_path / "s.csv") == {"a.png": "train", "b:c.png": "validation"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,split\na,train\n", r"columns name, split found; expected source \(or file_name\) as well"),
        ("file_name,part\na,train\n", "columns file_name, part found"),
        ("file_name,split\na,train\nb,holdout\n", "row 3, column split: 'holdout' found; expected train, validation"),
        ("file_name,split\n,train\n", "row 2, column file_name: '' found"),
        ("file_name,split\na,train\na,test\n", "1 found in more than one row: a; expected one row each"),
        (
            "file_name,patient_id,split\na,P1,train\nb,P1,test\nc,,test\nd,,train\n",
            r"1 patient\(s\) in both train and test: P1",
        ),
    ],
)
def test_split_files_that_do_not_fit_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises(ValueError, match=rf"s\.csv: {message}"):
        read_split_file(tmp_path / "s.csv")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    lines = ["file_name,patient_id,Edema"]
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(f"{number}.png,p{number // 2},{number // 2 % 2}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def make(root: Path, output: Path, **options: object) -> dict:
    return prepare(FolderCollection(root), output, size=16, num_workers=0, progress=False, **options)


def splits_of(cache: Path) -> dict[str, str]:
    return {source: split for split, part in load_cache(cache).datasets.items() for source in part["source"]}


def test_the_split_file_of_a_cache_has_the_hash_that_results_name(root: Path, tmp_path: Path):
    summary = make(root, tmp_path / "cache")
    content = (tmp_path / "cache" / "splits.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == summary["split_hash"]
    assert len(content.splitlines()) == 31


def test_another_caches_split_is_taken_over(root: Path, tmp_path: Path):
    first = make(root, tmp_path / "first", seed=3)
    again = make(root, tmp_path / "again", splits=tmp_path / "first" / "splits.csv")
    assert splits_of(tmp_path / "again") == splits_of(tmp_path / "first")
    assert again["split_hash"] == first["split_hash"]
    assert f"split as splits.csv says, SHA-256 {first['split_hash']}" in again["notes"]
    assert make(root, tmp_path / "other", seed=4)["split_hash"] != first["split_hash"]


def test_a_part_of_the_images_may_be_listed(root: Path, tmp_path: Path):
    lines = ["file_name,split", *(f".\\{number}.png,{('train', 'test')[number // 20]}" for number in range(10, 29))]
    (tmp_path / "s.csv").write_text("\n".join([*lines, "none.png,test"]))
    summary = make(root, tmp_path / "cache", splits=tmp_path / "s.csv")
    assert {split: counts["images"] for split, counts in summary["splits"].items()} == {"train": 10, "test": 9}
    assert any(
        note.startswith("11 images that s.csv does not list were left out: 0.png, ") for note in summary["notes"]
    )
    assert "1 images that s.csv lists are not there: none.png" in summary["notes"]


def test_one_image_in_two_spellings_is_refused(tmp_path: Path):
    (tmp_path / "s.csv").write_text("file_name,split\na.png,train\n./a.png,test\n")
    with pytest.raises(ValueError, match="1 found in more than one row: a\\.png"):
        read_split_file(tmp_path / "s.csv")


def test_split_files_cannot_divide_a_patient_or_name_nothing(root: Path, tmp_path: Path):
    (tmp_path / "s.csv").write_text("file_name,split\n0.png,train\n1.png,test\n")
    with pytest.raises(ValueError, match=r"1 patient\(s\) in both train and test: p0"):
        make(root, tmp_path / "cache", splits=tmp_path / "s.csv")
    (tmp_path / "s.csv").write_text("file_name,split\nx.png,train\n")
    with pytest.raises(ValueError, match=r"x\.png found; expected images of this collection, such as 0\.png"):
        make(root, tmp_path / "cache", splits=tmp_path / "s.csv")
    with pytest.raises(
        FileNotFoundError, match=r"none\.csv: no such file; expected --splits to be auto, none or a CSV"
    ):
        make(root, tmp_path / "cache", splits=tmp_path / "none.csv")
    assert not (tmp_path / "cache").exists()
