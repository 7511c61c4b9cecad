import csv
import fcntl
import hashlib
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from helpers import segmentation_cache
from PIL import Image

from mlvicx_hf.common.errors import MissingExtraError
from mlvicx_hf.data.cache.cache import FORMAT, cache_features, load_cache
from mlvicx_hf.data.cache.prepare import partial_folder, prepare
from mlvicx_hf.data.cache.summary import CONTACT_SHEET, HISTOGRAM, write_pictures
from mlvicx_hf.data.collections.base import Collection, Drawing, Listing, Record
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.collections.phantom import PhantomCollection
from mlvicx_hf.data.images.pixels import fit_square_gray, read_gray
from mlvicx_hf.data.synthetic.phantom import draw_phantom

NUM_PATIENTS = 20


class Listed(Collection):
    """A collection of whatever records a test wants."""

    name = "listed"
    source = "listed"

    def __init__(self, *records: Record, label_names: tuple[str, ...] = (), mask_names: tuple[str, ...] = ()) -> None:
        self.records = list(records)
        self.label_names = label_names
        self.mask_names = mask_names

    def read(self) -> Listing:
        return Listing(self.records, self.label_names, mask_names=self.mask_names)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Twenty patients with two images of different shape, patient ids and one label, unknown of some images."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file_name,patient_id,view,Edema"]
    for patient in range(NUM_PATIENTS):
        for image in range(2):
            pixels = rng.integers(0, 256, (30 + patient, 50), np.uint8)
            Image.fromarray(pixels).save(folder / f"{patient}_{image}.png")
            edema = ("1", "0", "" if image else "0")[patient % 3]
            lines.append(f"{patient}_{image}.png,p{patient},PA,{edema}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def make(root: Path, output: Path, **options: object) -> dict:
    return prepare(FolderCollection(root), output, size=32, num_workers=0, progress=False, **options)


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.lowest
def test_cache_holds_the_images_with_what_is_known_of_them(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    cache = load_cache(tmp_path / "cache")
    assert list(cache.datasets) == ["train", "validation", "test"]
    assert cache.label_names == ("Edema",)
    assert cache.datasets["train"].info.description == "labels: Edema"
    seen = 0
    for dataset in cache.datasets.values():
        assert dataset.column_names == list(cache_features())
        assert dataset.features["labels"] == datasets.List(datasets.Value("float32"))
        for row in dataset:
            seen += 1
            file = root / row["source"].removeprefix("folder:")
            assert row["image"].mode == "L"
            assert row["patient_id"] == f"p{file.stem.split('_')[0]}"
            assert row["view"] == "PA"
            assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
            expected = np.asarray(fit_square_gray(read_gray(file), 32, "pad"))
            assert np.array_equal(np.asarray(row["image"]), expected)
            patient, image = map(int, file.stem.split("_"))
            label = (1.0, 0.0, np.nan if image else 0.0)[patient % 3]
            assert np.array_equal(row["labels"], [label], equal_nan=True)
    assert seen == 2 * NUM_PATIENTS


def test_splits_without_an_image_are_named(tmp_path: Path):
    files = {f"{patient}.png": 40 * patient + 50 for patient in range(2)}
    for name, level in files.items():
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(tmp_path / name)
    rows = "".join(f"{name},{name[0]},{name[0]}\n" for name in files)
    (tmp_path / "metadata.csv").write_text(f"file_name,patient_id,Edema\n{rows}")
    notes = make(tmp_path, tmp_path / "cache")["notes"]
    assert "no image in the split validation, of 2 patients" in notes
    assert not any("split train" in note or "split test" in note for note in notes)


def test_manifest_counts_what_is_in_the_cache(root: Path, tmp_path: Path):
    (root / "3_0.png").write_bytes(b"")
    summary = make(root, tmp_path / "cache", seed=3)
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    assert summary.pop("first_rejected") == ("3_0.png", "empty file")
    assert manifest == {key: value for key, value in summary.items() if key != "notes"}
    assert manifest == load_cache(tmp_path / "cache").manifest
    fixed = {"format": FORMAT, "collection": "folder", "synthetic": False, "label_names": ["Edema"], "exclusive": False}
    assert fixed.items() <= manifest.items()
    assert {"size": 32, "fit": "pad", "seed": 3, "rejected": 1, "missing": 0}.items() <= manifest.items()
    for split, dataset in load_cache(tmp_path / "cache").datasets.items():
        labels = np.array(dataset["labels"][:])[:, 0]
        assert manifest["splits"][split] == {
            "images": len(dataset),
            "patients": len(set(dataset["patient_id"])),
            "views": {"PA": len(dataset)},
            "sexes": {"unknown": len(dataset)},
            "positives": {"Edema": (labels == 1).sum()},
            "unknown": {"Edema": np.isnan(labels).sum()},
        }
    patients = [manifest["splits"][split]["patients"] for split in ("train", "validation", "test")]
    assert patients == [14, 2, 4]


def test_pictures_show_the_images_and_their_grey_levels(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlvicx_hf.data.cache.assembly.write_pictures", write_pictures)
    make(root, tmp_path / "cache")
    with (
        Image.open(tmp_path / "cache" / CONTACT_SHEET) as sheet,
        Image.open(tmp_path / "cache" / HISTOGRAM) as histogram,
    ):
        assert sheet.mode == "L"
        assert sheet.width > 300
        assert histogram.size == (800, 300)


@pytest.mark.parametrize("masks", [False, True])
def test_two_workers_make_the_same_cache_as_none(root: Path, tmp_path: Path, masks: bool):
    if masks:
        add_masks(root, unknown=("7_1",))
        (root / "masks" / "5_0.png").write_text("text")
    (root / "3_0.png").write_bytes(b"")
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(root / "4_0.png")  # needs torch
    one = make(root, tmp_path / "one")
    two = prepare(FolderCollection(root), tmp_path / "two", size=32, num_workers=2, progress=False)
    assert one == two
    assert one["rejected"] == (3 if masks else 1)  # 4_0.png no longer has the size of its mask
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    first, second = load_cache(tmp_path / "one"), load_cache(tmp_path / "two")
    for split in first.datasets:
        assert first.datasets[split]._fingerprint == second.datasets[split]._fingerprint


WORKER = """
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mlvicx_hf.data.cache import shards
from mlvicx_hf.data.collections.base import Record

if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=shards._context(), initializer=shards.start_worker) as pool:
        picture = pool.submit(shards.make_picture, Record("a.png", "p", path=Path(sys.argv[1])), 32, "pad").result()
        print(picture.width, *pool.submit(eval, "sorted(__import__('sys').modules)").result())
"""


def test_workers_import_no_large_library(root: Path, tmp_path: Path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    words = [sys.executable, str(script), str(root / "0_0.png")]
    width, *modules = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert width == "50"
    assert {"mlvicx_hf.data.images.encoding", "PIL.Image"} <= set(modules)
    assert not {"torch", "transformers", "datasets", "pandas", "scipy", "sklearn", "matplotlib"} & set(modules)


def test_seeds_change_the_division_and_its_hash_but_not_the_images(root: Path, tmp_path: Path):
    zero, one = make(root, tmp_path / "0", seed=0), make(root, tmp_path / "1", seed=1)
    assert zero["split_hash"] != one["split_hash"]
    assert zero["data_hash"] == one["data_hash"]
    Image.new("L", (9, 9)).save(root / "0_0.png")
    assert make(root, tmp_path / "2", seed=0)["data_hash"] != zero["data_hash"]


@pytest.mark.parametrize("options", [{"splits": "none"}, {"unlabelled": True}])
def test_unlabelled_or_undivided_collections_are_all_train(root: Path, tmp_path: Path, options: dict[str, object]):
    if options.pop("unlabelled", False):
        rows = (root / "metadata.csv").read_text().splitlines()
        (root / "metadata.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows))
    summary = make(root, tmp_path / "cache", **options)
    assert list(summary["splits"]) == ["train"]
    assert summary["splits"]["train"]["images"] == 2 * NUM_PATIENTS


def test_unlabelled_images_have_empty_labels(tmp_path: Path):
    prepare(Listed(Record("a", "p", draw=draw_gray)), tmp_path / "cache", size=8, progress=False)
    assert load_cache(tmp_path / "cache").datasets["train"][0]["labels"] == []
    assert load_cache(tmp_path / "cache").datasets["train"].info.description == "labels: none"


def draw_gray() -> Drawing:
    return Drawing(np.full((8, 8), 99, np.uint8))


def test_splits_of_the_collection_are_kept_in_the_usual_order(tmp_path: Path):
    records = [Record(split, split, split=split, draw=draw_gray) for split in ("test", "train")]
    summary = prepare(Listed(*records), tmp_path / "cache", size=8, progress=False)
    assert list(summary["splits"]) == ["train", "test"]
    assert load_cache(tmp_path / "cache").datasets["test"]["patient_id"][:] == ["test"]


def test_a_patient_in_two_splits_is_refused(tmp_path: Path):
    records = [Record(f"{split}.png", "p7", split=split, draw=draw_gray) for split in ("train", "test")]
    with pytest.raises(ValueError, match=r"1 patient\(s\) in both train and test: p7"):
        prepare(Listed(*records), tmp_path / "cache", size=8, progress=False)
    summary = prepare(Listed(*records), tmp_path / "cache", size=8, splits="none", progress=False)
    assert summary["splits"]["train"]["images"] == 2


def test_splits_for_some_images_only_are_refused(tmp_path: Path):
    records = [Record("a", "a", split="train", draw=draw_gray), Record("b", "b", draw=draw_gray)]
    with pytest.raises(ValueError, match="1 of 2 images without a split; expected all or none"):
        prepare(Listed(*records), tmp_path / "cache", progress=False)


def test_unreadable_files_are_listed_and_the_rest_goes_on(root: Path, tmp_path: Path):
    (root / "0_0.png").write_text("text")
    (root / "1_1.png").write_bytes((root / "1_1.png").read_bytes()[:500])
    summary = make(root, tmp_path / "cache")
    with (tmp_path / "cache" / "rejected.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "reason"]
    assert [row[0] for row in rows] == ["0_0.png", "1_1.png"]
    assert "content is none of" in rows[0][1]
    assert "truncated" in rows[1][1]
    assert summary["rejected"] == 2
    assert sum(counts["images"] for counts in summary["splits"].values()) == 2 * NUM_PATIENTS - 2


def test_rejections_have_a_header_when_there_are_none(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    assert (tmp_path / "cache" / "rejected.csv").read_text().split() == ["file,reason"]


def test_nothing_is_written_when_every_file_is_unreadable(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.png").write_text("text")
    with pytest.raises(
        ValueError, match=r"all 2 images were rejected: a\.png \(content is none of .*nothing is written"
    ):
        make(tmp_path / "images", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_missing_files_stop_unless_allowed(root: Path, tmp_path: Path):
    for image in range(2):
        (root / f"5_{image}.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"2 of 40 listed images are missing: 5_0\.png, 5_1\.png; --allow_missing"
    ):
        make(root, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    summary = make(root, tmp_path / "cache", allow_missing=True)
    assert summary["missing"] == 2
    assert sum(counts["images"] for counts in summary["splits"].values()) == 38


def test_all_files_missing_is_an_error_even_when_allowed(root: Path, tmp_path: Path):
    for path in root.glob("*.png"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="none of the 40 files of column file_name found"):
        make(root, tmp_path / "cache", allow_missing=True)


class Vanishing(FolderCollection):
    """A folder of which a file goes away after it was listed, as on a disk of the network."""

    def read(self) -> Listing:
        listing = super().read()
        listing.records[30].path.rename(Path(self.root) / "gone")
        return listing


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_file_that_the_disk_does_not_give_stops_the_run_which_goes_on_later(
    root: Path, tmp_path: Path, num_workers: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlvicx_hf.data.cache.shards.IMAGES_PER_SHARD", 8)
    options = {"size": 32, "splits": "none", "num_workers": num_workers, "progress": False}
    name = FolderCollection(root).read().records[30].name
    with pytest.raises(OSError, match=rf"{name}: cannot be read: No such file .*goes on from here.*--allow_missing"):
        prepare(Vanishing(root), tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()
    (root / "gone").rename(root / name)
    summary = prepare(FolderCollection(root), tmp_path / "cache", **options)
    assert (summary["rejected"], summary["splits"]["train"]["images"]) == (0, 40)
    assert any(note.startswith("resumed: ") for note in summary["notes"])
    summary = prepare(Vanishing(root), tmp_path / "other", allow_missing=True, **options)
    assert (summary["rejected"], summary["splits"]["train"]["images"]) == (1, 39)
    assert summary["first_rejected"] == (name, "cannot be read: No such file or directory")


def test_max_images_keeps_patients_together_and_the_division(root: Path, tmp_path: Path):
    make(root, tmp_path / "full")
    full = {row["source"]: split for split, rows in load_cache(tmp_path / "full").datasets.items() for row in rows}
    summary = make(root, tmp_path / "part", max_images=9)
    part = {row["source"]: split for split, rows in load_cache(tmp_path / "part").datasets.items() for row in rows}
    assert len(part) == 9
    assert part.items() <= full.items()
    assert sum(counts["patients"] for counts in summary["splits"].values()) == 5


# Masks


def add_masks(root: Path, unknown: tuple[str, ...] = (), classes: int = 2, labels: bool = True) -> None:
    """A mask for every image: the image's dark pixels, or so many bands of grey, as classes."""
    (root / "masks").mkdir()
    header, *rows = (root / "metadata.csv").read_text().splitlines()
    lines = [f"{header},mask_file_name"]
    for row in rows:
        name = row.partition(".")[0]
        with Image.open(root / f"{name}.png") as image:
            Image.fromarray(mask_of(np.asarray(image), classes)).save(root / "masks" / f"{name}.png")
        lines.append(f"{row},{'' if name in unknown else f'masks/{name}.png'}")
    if not labels:
        lines = [",".join(cells[:3] + cells[4:]) for cells in (line.split(",") for line in lines)]
    (root / "metadata.csv").write_text("\n".join(lines))


def mask_of(pixels: np.ndarray, classes: int = 2) -> np.ndarray:
    return (pixels.astype(int) * classes // 256).astype(np.uint8)


@pytest.mark.lowest
def test_cache_holds_masks_that_lie_on_their_images(root: Path, tmp_path: Path):
    add_masks(root, unknown=("2_0", "2_1", "9_0"), classes=3)
    names = ("background", "middle", "bright")
    summary = prepare(FolderCollection(root, mask_names=names), tmp_path / "cache", size=32, progress=False)
    cache = load_cache(tmp_path / "cache")
    assert cache.mask_names == names
    assert summary["mask_names"] == list(names)
    assert cache.manifest["format"] == FORMAT
    for split, dataset in cache.datasets.items():
        assert dataset.column_names == list(cache_features(masks=True))
        assert dataset.features["mask"] == datasets.Image(mode="L")
        masks = {row["source"].removeprefix("folder:"): row["mask"] for row in dataset}
        for name, mask in masks.items():
            if name in ("2_0.png", "2_1.png", "9_0.png"):
                assert mask is None
                continue
            with Image.open(root / "masks" / name) as file:
                expected = fit_square_gray(file, 32, "pad", Image.Resampling.NEAREST)
            assert mask.mode == "L"
            assert np.array_equal(np.asarray(mask), np.asarray(expected))
        known = [np.asarray(mask) for mask in masks.values() if mask is not None]
        assert summary["splits"][split]["masks"] == {
            "known": len(known),
            "images_with": {
                name: sum((mask == value).any() for mask in known) for value, name in enumerate(names[1:], start=1)
            },
        }
    assert sum(counts["masks"]["known"] for counts in summary["splits"].values()) == 2 * NUM_PATIENTS - 3


def test_images_with_a_structure_are_counted(tmp_path: Path):
    summary = load_cache(segmentation_cache(tmp_path, 20)).manifest
    counts = {split: counts["masks"] for split, counts in summary["splits"].items()}
    assert counts == {
        "train": {"known": 12, "images_with": {"disc": 6}},
        "validation": {"known": 4, "images_with": {"disc": 2}},
        "test": {"known": 4, "images_with": {"disc": 2}},
    }


def test_a_drawn_disc_is_bright_where_its_mask_is(tmp_path: Path):
    path = segmentation_cache(tmp_path, 10, ("background", "disc", "stripes"), size=40)
    for row in load_cache(path).datasets["train"]:
        image, mask = np.asarray(row["image"]), np.asarray(row["mask"])
        assert np.array_equal(image == 210, mask == 1)
        assert np.array_equal(image == 20, mask == 2)


def test_a_cache_without_masks_knows_of_none(root: Path, tmp_path: Path):
    summary = make(root, tmp_path / "cache")
    assert "mask_names" not in summary
    assert all("masks" not in counts for counts in summary["splits"].values())
    assert load_cache(tmp_path / "cache").mask_names == ()


def test_masks_are_part_of_what_identifies_a_cache(root: Path, tmp_path: Path):
    without = make(root, tmp_path / "without")
    add_masks(root)
    known = make(root, tmp_path / "known")
    name = "4_0.png"
    Image.fromarray(1 - mask_of(np.asarray(Image.open(root / name)))).save(root / "masks" / name)
    other = make(root, tmp_path / "other")
    (root / "metadata.csv").write_text((root / "metadata.csv").read_text().replace(f"masks/{name}", ""))
    fewer = make(root, tmp_path / "fewer")
    assert len({summary["data_hash"] for summary in (without, known, other, fewer)}) == 4
    assert len({summary["split_hash"] for summary in (without, known, other, fewer)}) == 1
    first, second = (load_cache(tmp_path / path).datasets["train"]._fingerprint for path in ("known", "other"))
    assert first != second


def test_the_same_masks_with_other_meanings_have_another_fingerprint(root: Path, tmp_path: Path):
    add_masks(root)
    found = []
    for number, names in enumerate((("dark",), ("bright", "dark"))):
        collection = FolderCollection(root, mask_names=names)
        summary = prepare(collection, tmp_path / str(number), size=32, progress=False)
        fingerprint = load_cache(tmp_path / str(number)).datasets["train"]._fingerprint
        found.append((summary["data_hash"], fingerprint))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_masks_alone_divide_a_collection_and_every_split_gets_known_ones(root: Path, tmp_path: Path):
    known = {f"{patient}_{image}" for patient in range(10) for image in range(2)}
    unknown = tuple(f"{patient}_{image}" for patient in range(10, NUM_PATIENTS) for image in range(2))
    add_masks(root, unknown, labels=False)
    summary = make(root, tmp_path / "cache")
    assert summary["label_names"] == []
    assert [counts["patients"] for counts in summary["splits"].values()] == [7 + 10, 1, 2]
    masks = [counts["masks"]["known"] for counts in summary["splits"].values()]
    assert sum(masks) == len(known)
    assert masks == [14, 2, 4]
    assert list(make(root, tmp_path / "none", splits="none")["splits"]) == ["train"]


def test_patients_without_a_known_label_are_in_train(root: Path, tmp_path: Path):
    """They can only be pretrained on, and those with labels are divided as if they were alone."""
    table = (root / "metadata.csv").read_text()
    labelled = [line for line in table.splitlines() if not line.endswith(",")]
    (root / "metadata.csv").write_text("\n".join(labelled))
    alone = tmp_path / "alone"
    make(root, alone)
    for number in range(30):
        Image.fromarray(np.full((40, 40), 8 * number, np.uint8)).save(root / f"unlabelled_{number}.png")
    unlabelled = [f"unlabelled_{number}.png,u{number},PA," for number in range(30)]
    (root / "metadata.csv").write_text("\n".join([*labelled, *unlabelled]))
    summary = make(root, tmp_path / "both")
    assert any("in train alone: 30 patients of whom no label or mask is known" in note for note in summary["notes"])
    before, after = (load_cache(path).datasets for path in (alone, tmp_path / "both"))
    for split in ("validation", "test"):
        assert after[split]["source"][:] == before[split]["source"][:]
    assert len(after["train"]) == len(before["train"]) + 30
    assert load_cache(tmp_path / "both").labelled("train") == [
        row for row, source in enumerate(after["train"]["source"]) if "unlabelled" not in source
    ]


def test_masks_do_not_change_the_division_by_labels(root: Path, tmp_path: Path):
    before = make(root, tmp_path / "before")
    add_masks(root, unknown=("0_0", "1_0"))
    assert make(root, tmp_path / "after")["split_hash"] == before["split_hash"]


def test_masks_that_do_not_fit_leave_their_images_out(root: Path, tmp_path: Path):
    add_masks(root)
    Image.new("L", (50, 31)).save(root / "masks" / "0_0.png")
    Image.fromarray(np.full((30, 50), 7, np.uint8)).save(root / "masks" / "0_1.png")
    (root / "masks" / "1_0.png").write_text("text")
    summary = make(root, tmp_path / "cache")
    with (tmp_path / "cache" / "rejected.csv").open(newline="") as file:
        _, *rows = csv.reader(file)
    assert rows == [
        ["0_0.png", "mask 0_0.png: 50 x 31 pixels found; expected 50 x 30 as its image"],
        ["0_1.png", "mask 0_1.png: value(s) 7 found; expected 0 and 1, or 0 and 255 (mask)"],
        ["1_0.png", "mask 1_0.png: content is none of PNG"],
    ]
    assert summary["rejected"] == 3
    assert sum(counts["images"] for counts in summary["splits"].values()) == 2 * NUM_PATIENTS - 3


def test_missing_masks_stop_unless_allowed(root: Path, tmp_path: Path):
    add_masks(root)
    (root / "masks" / "5_0.png").unlink()
    (root / "masks" / "6_0.png").unlink()
    (root / "6_0.png").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"2 of 40 listed images are missing or lack their mask: .*5_0\.png \(mask of 5_0\.png\), 6_0\.png; ",
    ):
        make(root, tmp_path / "cache")
    summary = make(root, tmp_path / "cache", allow_missing=True)
    assert summary["missing"] == 2
    assert sum(counts["images"] for counts in summary["splits"].values()) == 38


def test_many_unknown_masks_before_the_first_known_one(tmp_path: Path):
    """The Arrow file is written in batches, of which the first then holds no mask at all."""
    records = [Record(str(number), "p", draw=draw_gray) for number in range(120)]
    last = Record("last", "p", draw=draw_masked)
    prepare(Listed(*records, last, mask_names=("disc",)), tmp_path / "cache", size=8, progress=False)
    dataset = load_cache(tmp_path / "cache").datasets["train"]
    assert dataset[0]["mask"] is None
    assert np.array_equal(np.asarray(dataset[120]["mask"]), np.eye(8))


def draw_masked() -> Drawing:
    return Drawing(np.full((8, 8), 99, np.uint8), np.eye(8, dtype=np.uint8) * 255)


# Writing as a whole or not at all


def test_a_cache_is_replaced_only_on_demand(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    with pytest.raises(FileExistsError, match="exists and is not empty; --overwrite replaces a cache"):
        make(root, tmp_path / "cache", seed=1)
    assert contents(tmp_path / "cache") == before
    make(root, tmp_path / "cache", seed=1, overwrite=True)
    assert load_cache(tmp_path / "cache").manifest["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_a_failed_run_leaves_the_old_cache(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    before = contents(tmp_path / "cache")
    for path in root.glob("*.png"):
        path.write_text("text")
    with pytest.raises(ValueError, match="all 40 images were rejected"):
        make(root, tmp_path / "cache", overwrite=True)
    assert contents(tmp_path / "cache") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_a_folder_that_is_no_cache_is_never_overwritten(root: Path, tmp_path: Path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"holds no cache\.json, so it is no cache and is not overwritten"):
        make(root, tmp_path / "letters", overwrite=True)
    assert (tmp_path / "letters" / "letter.txt").read_text() == "dear"


def test_an_empty_folder_is_used_and_a_file_is_not(root: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    make(root, tmp_path / "empty")
    assert load_cache(tmp_path / "empty").label_names == ("Edema",)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="no folder found; expected a folder"):
        make(root, tmp_path / "file", overwrite=True)


def test_two_runs_into_one_output_are_refused(root: Path, tmp_path: Path):
    partial = partial_folder(tmp_path / "cache")
    partial.mkdir()
    with (partial / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match=r"another run is writing .*cache; expected one at a time"):
            make(root, tmp_path / "cache")
    make(root, tmp_path / "cache")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_a_cache_that_another_run_makes_meanwhile_is_not_replaced(root: Path, tmp_path: Path):
    class Slow(FolderCollection):
        def read(self) -> Listing:
            make(root, tmp_path / "cache", seed=1)
            return super().read()

    with pytest.raises(FileExistsError, match="exists and is not empty; --overwrite replaces a cache"):
        prepare(Slow(root), tmp_path / "cache", size=32, num_workers=0, progress=False)
    assert load_cache(tmp_path / "cache").manifest["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "images"]


def test_a_full_disk_names_the_folder_and_keeps_what_is_done(root: Path, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        with pytest.raises(OSError, match=r"File too large: .*\.cache\.partial"):
            make(root, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    make(root, tmp_path / "cache")
    assert not partial_folder(tmp_path / "cache").exists()


def test_a_library_that_is_missing_leaves_the_finished_shards(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def miss(*_: object, **__: object) -> None:
        raise MissingExtraError("expected a library")

    monkeypatch.setattr("mlvicx_hf.data.cache.prepare.assemble", miss)
    with pytest.raises(MissingExtraError):
        make(root, tmp_path / "cache")
    monkeypatch.undo()
    assert any(note.startswith("resumed: ") for note in make(root, tmp_path / "cache")["notes"])


@pytest.mark.parametrize(
    "options",
    [{"size": 0}, {"fit": "stretch"}, {"drop_duplicates": "all"}, {"max_images": 0}, {"num_workers": -1}],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, options: dict[str, object]):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=rf"{name}={value!r}.* found; expected"):
        prepare(Listed(Record("a", "p", draw=draw_gray)), tmp_path / "cache", **options)


@pytest.mark.parametrize("fit", ["squash", "crop"])
def test_fit_is_honoured(root: Path, tmp_path: Path, fit: str):
    make(root, tmp_path / "cache", fit=fit, splits="none")
    row = load_cache(tmp_path / "cache").datasets["train"][0]
    file = root / row["source"].removeprefix("folder:")
    assert np.array_equal(np.asarray(row["image"]), np.asarray(fit_square_gray(read_gray(file), 32, fit)))


# Phantoms


def test_phantoms_say_that_they_are_synthetic(tmp_path: Path):
    summary = prepare(PhantomCollection(10, 2, size=32), tmp_path / "cache", size=32, progress=False)
    assert summary["synthetic"]
    assert {split: counts["patients"] for split, counts in summary["splits"].items()} == {
        "train": 7,
        "validation": 1,
        "test": 2,
    }
    row = load_cache(tmp_path / "cache").datasets["train"][1]
    assert row["source"] == "phantom (synthetic):phantom-" + row["source"][-8:]
    patient, image = int(row["patient_id"][-6:]), int(row["source"][-1])
    phantom = draw_phantom(patient, image, size=32)
    assert np.array_equal(np.asarray(row["image"]), phantom.image)
    assert row["labels"] == list(phantom.labels)
    assert row["sha256"] == hashlib.sha256(phantom.image.tobytes()).hexdigest()


def test_phantoms_bring_one_of_their_masks(tmp_path: Path):
    collection = PhantomCollection(10, 2, size=32, mask_names="Pneumothorax")
    summary = prepare(collection, tmp_path / "cache", size=32, progress=False)
    cache = load_cache(tmp_path / "cache")
    assert cache.mask_names == ("Pneumothorax",)
    for split, dataset in cache.datasets.items():
        assert summary["splits"][split]["masks"] == {
            "known": len(dataset),
            "images_with": {"Pneumothorax": summary["splits"][split]["positives"]["Pneumothorax"]},
        }
        for row in dataset:
            phantom = draw_phantom(int(row["patient_id"][-6:]), int(row["source"][-1]), size=32)
            assert np.array_equal(np.asarray(row["image"]), phantom.image)
            assert np.array_equal(np.asarray(row["mask"]) * 255, phantom.masks["Pneumothorax"])


# Opening a cache


def test_only_the_wanted_splits_are_opened(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    assert list(load_cache(tmp_path / "cache", ["test"]).datasets) == ["test"]
    with pytest.raises(ValueError, match="splits train, validation, test found; expected holdout as well"):
        load_cache(tmp_path / "cache", ["train", "holdout"])


def test_folders_that_are_no_caches_are_refused(root: Path, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no such folder; expected a prepared cache .*mlvicx prepare"):
        load_cache(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds no cache\.json, so it is no prepared cache .*mlvicx prepare"):
        load_cache(root)


def test_damaged_caches_are_refused(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    manifest = tmp_path / "cache" / "cache.json"
    good = manifest.read_text()
    manifest.write_text(good.replace(f'"format": {FORMAT}', '"format": 99'))
    with pytest.raises(ValueError, match=f"format 99 found; expected {FORMAT}"):
        load_cache(tmp_path / "cache")
    manifest.write_text(good.replace('"images": 28', '"images": 29'))
    with pytest.raises(ValueError, match="28 images of train found; expected 29"):
        load_cache(tmp_path / "cache")
    manifest.write_text(good)
    (tmp_path / "cache" / "dataset_dict.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no dataset_dict\.json"):
        load_cache(tmp_path / "cache")


def test_a_cache_whose_patients_cross_is_refused(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / "cache.json").read_text())
    shutil.rmtree(tmp_path / "cache" / "test")
    shutil.copytree(tmp_path / "cache" / "train", tmp_path / "cache" / "test")
    manifest["splits"]["test"] = manifest["splits"]["train"]
    (tmp_path / "cache" / "cache.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"14 patient\(s\) in both train and test"):
        load_cache(tmp_path / "cache", ["train"])


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("table", "images", "labels", "exclusive"),
    [
        ("A_nih14", 1001, 7, False),
        ("B_kermany", 5824, 3, True),
        ("C_lungs", 417, 0, False),
        ("pretraining_pool", 4990, 0, False),
    ],
)
def test_real_tables_are_understood(
    real_data: Path, tmp_path: Path, table: str, images: int, labels: int, exclusive: bool
):
    collection = FolderCollection(real_data, real_data / "tasks" / f"{table}.csv")
    assert len(collection.read().records) == images
    summary = prepare(collection, tmp_path / "cache", size=64, max_images=100, progress=False)
    assert summary["rejected"] == summary["missing"] == 0
    assert len(summary["label_names"]) == labels
    assert summary["exclusive"] == exclusive
    cache = load_cache(tmp_path / "cache")
    assert cache.mask_names == (("mask",) if table == "C_lungs" else ())
    for dataset in cache.datasets.values():
        assert all(np.asarray(row["image"]).std() > 5 for row in dataset)
        assert all(0.05 < np.asarray(row["mask"]).mean() < 0.7 for row in dataset if cache.mask_names)


def test_a_cache_with_other_files_in_it_is_not_replaced(root: Path, tmp_path: Path):
    """Above all not one with the images to read."""
    make(root, tmp_path / "cache")
    inside = Path(shutil.copytree(root, tmp_path / "cache" / "images"))
    with pytest.raises(FileExistsError, match=r"cache: 41 files found that are not of the cache: images/.*move them"):
        make(inside, tmp_path / "cache", overwrite=True)
    assert len([*inside.glob("*.png")]) == 40
    shutil.rmtree(inside)
    (tmp_path / "cache" / ".DS_Store").write_text("of a file manager")
    make(root, tmp_path / "cache", overwrite=True)


def test_the_working_folder_is_no_output(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="is the working folder; expected another one"):
        make(root, Path())


def test_patients_who_move_when_a_cache_is_replaced_are_noted(root: Path, tmp_path: Path):
    make(root, tmp_path / "cache")
    before = load_cache(tmp_path / "cache")
    same = make(root, tmp_path / "cache", overwrite=True)
    assert not [note for note in same["notes"] if "replaced cache" in note]
    split_of = {s: name for name, part in before.datasets.items() for s in part["source"]}
    notes = make(root, tmp_path / "cache", seed=1, overwrite=True)["notes"]
    after = load_cache(tmp_path / "cache").datasets
    rows = [
        (s, p)
        for name, part in after.items()
        for s, p in zip(part["source"], part["patient_id"], strict=True)
        if split_of[s] != name
    ]
    (note,) = [note for note in notes if "replaced cache" in note]
    assert note.startswith(f"{len(rows)} images of {len({p for _, p in rows})} patients were in another split")
