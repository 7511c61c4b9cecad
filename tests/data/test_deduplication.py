"""Copies of one image in a cache: found, listed, dropped on request, and refused by fine-tuning across splits."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.copies.deduplication import Duplicate, choose_dropped
from mlvicx_hf.data.synthetic.phantom import draw_phantom
from mlvicx_hf.finetuning.data import check_splits

SPLITS = ("train", "train", "train", "validation", "test")


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw_phantom(number, 0, size=96).image).save(buffer, "PNG")
    return buffer.getvalue()


def jpeg(content: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).save(buffer, "JPEG", quality=70)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten patients of one image, and copies of some: in the same split, in another one, and in both."""
    folder = tmp_path / "images"
    folder.mkdir()
    contents = {f"{number}.png": (f"p{number}", SPLITS[number % 5], png(number)) for number in range(10)}
    contents["0-again.png"] = ("p0", "train", png(0))
    contents["1-again.jpg"] = ("p1", "train", jpeg(png(1)))
    contents["2-leak.png"] = ("q2", "test", png(2))
    contents["3-leak.jpg"] = ("q3", "train", jpeg(png(3)))
    lines = ["file_name,patient_id,split,Edema"]
    for name, (patient, split, content) in contents.items():
        (folder / name).write_bytes(content)
        lines.append(f"{name},{patient},{split},{len(lines) % 2}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def make(root: Path, output: Path, **options: object) -> dict:
    return prepare(FolderCollection(root), output, size=64, num_workers=0, progress=False, **options)


def names(path: Path) -> set[str]:
    return {source.partition(":")[2] for part in load_cache(path).datasets.values() for source in part["source"]}


def test_copies_are_listed_and_kept(root: Path, tmp_path: Path):
    summary = make(root, tmp_path / "cache")
    assert summary["duplicates"] == {"identical": 2, "near": 2, "across_splits": 2, "dropped": 0}
    assert len(names(tmp_path / "cache")) == 14
    rows = load_cache(tmp_path / "cache").duplicates()
    assert [(row["kind"], row["source"], row["other_source"]) for row in rows] == [
        ("identical", "folder:0.png", "folder:0-again.png"),
        ("identical", "folder:2-leak.png", "folder:2.png"),  # the one of the test split would be kept
        ("near", "folder:1.png", "folder:1-again.jpg"),
        ("near", "folder:3.png", "folder:3-leak.jpg"),
    ]
    assert [(row["split"], row["other_split"]) for row in rows] == [
        ("train", "train"),
        ("test", "train"),
        ("train", "train"),
        ("validation", "train"),
    ]
    assert (rows[1]["patient_id"], rows[1]["other_patient_id"], rows[1]["distance"]) == ("q2", "p2", "0")
    assert int(rows[2]["distance"]) > 0


@pytest.mark.parametrize("drop", ["none", "near"])
def test_copies_that_contradict_each_other_are_named(root: Path, tmp_path: Path, drop: str):
    """Copies with other labels, and of two patients, would otherwise be gone without a trace."""
    summary = make(root, tmp_path / "cache", drop_duplicates=drop)
    people = "copies of two patients, who may be one person: 2, such as q2 and p2"
    assert [note for note in summary["notes"] if note.startswith("copies")] == [people]
    table = (root / "metadata.csv").read_text()
    (root / "metadata.csv").write_text(table.replace("1-again.jpg,p1,train,0", "1-again.jpg,p1,train,1"))
    summary = make(root, tmp_path / "2", drop_duplicates=drop)
    labels = "copies with other labels: 1, such as folder:1.png and folder:1-again.jpg"
    assert [note for note in summary["notes"] if note.startswith("copies")] == [labels, people]


@pytest.mark.parametrize(
    ("drop", "gone", "across"),
    [
        ("identical", {"0-again.png": "identical to folder:0.png", "2.png": "identical to folder:2-leak.png"}, 1),
        (
            "near",
            {
                "0-again.png": "identical to folder:0.png",
                "2.png": "identical to folder:2-leak.png",
                "1-again.jpg": "nearly identical to folder:1.png",
                "3-leak.jpg": "nearly identical to folder:3.png",
            },
            0,
        ),
    ],
)
def test_copies_are_dropped_on_request_and_say_why(
    root: Path, tmp_path: Path, drop: str, gone: dict[str, str], across: int
):
    everything = names_after(root, tmp_path / "all")
    summary = make(root, tmp_path / "cache", drop_duplicates=drop)
    assert everything - names(tmp_path / "cache") == gone.keys()
    with (tmp_path / "cache" / "rejected.csv").open(newline="") as file:
        assert {row["file"]: row["reason"] for row in csv.DictReader(file)} == gone
    assert (summary["duplicates"]["dropped"], summary["duplicates"]["across_splits"]) == (len(gone), across)
    assert (summary["rejected"], summary["duplicates"]["identical"]) == (len(gone), 2)
    assert sum(counts["images"] for counts in summary["splits"].values()) == 14 - len(gone)
    for part in load_cache(tmp_path / "cache").datasets.values():
        assert all(np.asarray(row["image"]).std() > 5 for row in part)


def names_after(root: Path, output: Path) -> set[str]:
    make(root, output)
    return names(output)


def test_finetuning_refuses_copies_in_two_splits(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    make(root, tmp_path / "leaks")
    cache = load_cache(tmp_path / "leaks")
    expected = re.escape(
        "2 pair(s) of copies of an image in two splits, such as folder:2-leak.png (test) = folder:2.png (train)"
    )
    with pytest.raises(ValueError, match=f"{expected}.*--drop_duplicates near"):
        check_splits(cache)
    check_splits(cache, allow_leak=True)
    assert "2 pair(s) of copies" in caplog.text
    make(root, tmp_path / "fewer", drop_duplicates="identical")
    with pytest.raises(ValueError, match=r"1 pair\(s\) of copies .* such as folder:3\.png \(validation\) = folder:3-l"):
        check_splits(load_cache(tmp_path / "fewer"))
    make(root, tmp_path / "none", drop_duplicates="near")
    check_splits(load_cache(tmp_path / "none"))


def test_dropping_is_part_of_what_identifies_a_cache(root: Path, tmp_path: Path):
    hashes = [make(root, tmp_path / drop, drop_duplicates=drop)["split_hash"] for drop in ("none", "identical", "near")]
    assert len(set(hashes)) == 3


class Part(dict):
    """Columns of a split as `datasets` gives them."""

    def __len__(self) -> int:
        return len(self["source"])


@settings(deadline=None)
@given(
    st.lists(st.sampled_from(("train", "validation", "test")), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11), st.sampled_from(("identical", "near"))), max_size=12),
    st.sampled_from(("none", "identical", "near")),
)
def test_of_every_group_of_copies_one_stays_and_tests_come_first(splits, edges, drop):
    parts: dict[str, Part] = {}
    for number, split in enumerate(splits):
        part = parts.setdefault(split, Part(source=[], patient_id=[]))
        part["source"].append(f"s{number}")
        part["patient_id"].append("p")
    pairs = [
        Duplicate(kind, splits[i], f"s{i}", "p", splits[j], f"s{j}", "p", 0)
        for i, j, kind in edges
        if i < len(splits) and j < len(splits) and i != j
    ]
    dropped = choose_dropped(parts, pairs, drop)
    gone = {parts[split]["source"][row] for split, row in dropped}
    counted = [pair for pair in pairs if drop == "near" or (drop == "identical" and pair.kind == "identical")]
    group = {f"s{number}": {f"s{number}"} for number in range(len(splits))}
    for pair in counted:
        together = group[pair.source] | group[pair.other_source]
        for source in together:
            group[source] = together
    for together in group.values():
        left = together - gone
        assert len(left) == 1
        (kept,) = left
        order = {"test": 0, "validation": 1, "train": 2}
        assert order[splits[int(kept[1:])]] == min(order[splits[int(source[1:])]] for source in together)
