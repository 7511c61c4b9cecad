"""Splits and classes that folders tell, and views as tables spell them."""

from pathlib import Path

import numpy as np
import pytest
from helpers import mlvicx
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.collections.base import normalize_view
from mlvicx_hf.data.collections.folder import FolderCollection


def write(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8), np.uint8)).save(file)
    return root


def kermany(root: Path, *, above: str = "", val: str = "val") -> Path:
    splits = ("train", val, "test")
    return write(root, *(f"{above}{split}/{kind}/a.png" for split in splits for kind in ("NORMAL", "PNEUMONIA")))


@pytest.mark.parametrize(("above", "val"), [("", "val"), ("chest_xray/", "Validation"), ("a/b/", "dev")])
def test_split_and_class_folders_are_splits_and_classes(tmp_path: Path, above: str, val: str):
    listing = FolderCollection(kermany(tmp_path / "x", above=above, val=val)).read()
    assert (listing.label_names, listing.exclusive) == (("NORMAL", "PNEUMONIA"), True)
    assert {record.split for record in listing.records} == {"train", "validation", "test"}
    for record in listing.records:
        assert record.labels == (("NORMAL" in record.name), ("PNEUMONIA" in record.name))
        assert (record.split == "test") == ("test/" in record.name)
    assert any("folders are classes: NORMAL 3, PNEUMONIA 3" in note for note in listing.notes)
    without = FolderCollection(tmp_path / "x", folders="ignore").read()
    assert without.label_names == ()
    assert {record.split for record in without.records} == {None}


def test_classes_above_the_splits(tmp_path: Path):
    names = (f"{kind}/{split}/a.png" for split in ("train", "test") for kind in ("NORMAL", "PNEUMONIA"))
    listing = FolderCollection(write(tmp_path, *names)).read()
    assert listing.label_names == ("NORMAL", "PNEUMONIA")


def test_patients_below_splits_are_no_classes(tmp_path: Path):
    listing = FolderCollection(write(tmp_path, "train/p1/a.png", "train/p2/a.png", "test/p3/a.png")).read()
    assert listing.label_names == ()
    assert [record.split for record in listing.records] == ["test", "train", "train"]


@pytest.mark.parametrize(
    "names",
    [("train/a.png", "test/a.png", "a.png"), ("train/a.png", "x/test/a.png"), ("train/test/a.png", "val/b.png")],
)
def test_a_division_that_is_unclear_is_refused_and_the_option_named(tmp_path: Path, names: tuple[str, ...]):
    with pytest.raises(UserError, match=r"expected every image in one of train, .* or --folders ignore"):
        FolderCollection(write(tmp_path, *names)).read()
    assert len(FolderCollection(tmp_path, folders="ignore").read().records) == len(names)


@pytest.mark.parametrize("folder", ["test", "Testing", "val", "validation", "test_images"])
def test_a_test_folder_beside_other_images_is_refused(tmp_path: Path, folder: str):
    with pytest.raises(UserError, match=rf"folder {folder} found beside images that lie in no split, such as a/a\.png"):
        FolderCollection(write(tmp_path, "a/a.png", f"{folder}/a.png")).read()


def test_folders_without_splits_are_classes_only_if_the_user_says_so(tmp_path: Path):
    root = write(tmp_path, "NORMAL/a.png", "NORMAL/b.png", "SICK/a.png", "SICK/b.png")
    assert FolderCollection(root).read().label_names == ()
    listing = FolderCollection(root, folders="classes").read()
    assert (listing.label_names, listing.exclusive) == (("NORMAL", "SICK"), True)
    assert {record.split for record in listing.records} == {None}
    with pytest.raises(UserError, match="folders='maybe' found"):
        FolderCollection(root, folders="maybe")


def test_folders_of_patients_below_classes_are_no_classes(tmp_path: Path):
    root = write(tmp_path / "a", "NORMAL/p1/a.png", "NORMAL/p2/a.png", "SICK/p3/a.png")
    with pytest.raises(UserError, match="folders NORMAL, SICK found above folders p1, p2, p3 for --folders classes"):
        FolderCollection(root, folders="classes").read()
    root = write(
        tmp_path / "b", *(f"{site}/{kind}/a.png" for site in ("north", "south") for kind in ("NORMAL", "SICK"))
    )
    assert FolderCollection(root, folders="classes").read().label_names == ("NORMAL", "SICK")


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (("NORMAL/a.png", "SICK/a.png"), "NORMAL, SICK"),
        (("train/NORMAL/a.png", "train/SICK/a.png"), "NORMAL, SICK"),
        (("train/NORMAL/a.png", "train/SICK/a.png", "test/a.png"), "NORMAL, SICK"),
        (("train/NORMAL/a.png", "train/SICK/a.png", "train/a.png", "test/SICK/a.png"), "NORMAL, SICK"),
    ],
)
def test_folders_that_may_be_classes_and_are_not_taken_for_such_are_named(
    tmp_path: Path, names: tuple[str, ...], named: str
):
    listing = FolderCollection(write(tmp_path, *names)).read()
    assert listing.label_names == ()
    assert any(f"folders {named} are not taken for classes" in note for note in listing.notes)


def test_classes_in_upper_and_lower_case_are_the_same(tmp_path: Path):
    root = write(tmp_path, "train/NORMAL/a.png", "train/SICK/a.png", "test/normal/a.png", "test/Sick/a.png")
    listing = FolderCollection(root).read()
    assert [name.lower() for name in listing.label_names] == ["normal", "sick"]
    for record in listing.records:
        normal = "normal" in record.name.lower()
        assert record.labels == (normal, not normal)


def test_a_split_without_the_classes_of_the_others_is_refused(tmp_path: Path):
    names = [f"{split}/{kind}/a.png" for split in ("train", "val") for kind in ("NORMAL", "SICK")]
    root = write(tmp_path, *names, "test/img/a.png")
    with pytest.raises(UserError, match=r"folders img found in test, and classes NORMAL, SICK in the other splits"):
        FolderCollection(root).read()


@pytest.mark.parametrize("name", ["train/metadata.csv", "Metadata.csv", "deep/metadata.jsonl", "metadata.tsv"])
def test_a_table_that_would_not_be_read_is_refused(tmp_path: Path, name: str):
    root = write(tmp_path, "train/a.png", "deep/b.png")
    (root / name).write_text("file_name,patient_id\n")
    with pytest.raises(UserError, match=rf"{name} found; expected metadata.csv with all images"):
        FolderCollection(root).read()
    assert len(FolderCollection(root, folders="ignore").read().records) == 2


def test_a_table_of_files_beside_the_images_is_not_passed_over_whatever_its_name(tmp_path: Path):
    root = write(tmp_path, "a.png", "b.png")
    (root / "notes.csv").write_text("day,text\n1,none\n")
    assert len(FolderCollection(root).read().records) == 2
    (root / "labels.csv").write_text("Image,Edema\na.png,1\nb.png,0\n")
    with pytest.raises(UserError, match=r"labels\.csv found; expected metadata\.csv .*or --metadata TABLE"):
        FolderCollection(root).read()
    assert FolderCollection(root, "labels.csv").read().label_names == ("Edema",)


def test_hidden_tables_and_those_of_other_names_do_not_stop_it(tmp_path: Path):
    root = write(tmp_path, "train/a.png", ".tool/b.png")
    for name in (".tool/metadata.csv", "train/notes.csv"):
        (root / name).write_text("a\n")
    assert len(FolderCollection(root).read().records) == 1


def test_thumbnails_of_a_file_server_are_no_radiographs(tmp_path: Path):
    listing = FolderCollection(write(tmp_path, "a.png", "@eaDir/a.png/thumb.jpg")).read()
    assert [record.name for record in listing.records] == ["a.png"]
    assert any("hidden" in note for note in listing.notes)


@pytest.mark.parametrize("absolute", [False, True])
def test_letters_of_one_or_two_characters_and_a_root_behind_a_link_are_found(tmp_path: Path, absolute: bool):
    root = write(tmp_path / "there", "Mu\u0308ller.png")
    (tmp_path / "link").symlink_to(root)
    name = f"{root}/Mu\u0308ller.png" if absolute else "M\u00fcller.png"
    (root / "metadata.csv").write_text(f"file_name,patient_id\n{name},1\n")
    listing = FolderCollection(tmp_path / "link").read()
    assert (len(listing.records), listing.missing) == (1, ())
    assert not any("does not list" in note for note in listing.notes)


@pytest.mark.parametrize("name", ["View Position", "ViewPosition", "Projection", "VIEW", "Frontal/Lateral"])
def test_views_under_a_usual_name_are_read(tmp_path: Path, name: str):
    root = write(tmp_path, "a.png", "b.png")
    (root / "metadata.csv").write_text(f"file_name,patient_id,{name}\na.png,1,PA\nb.png,2,LATERAL\n")
    listing = FolderCollection(root).read()
    assert [record.view for record in listing.records] == ["PA", "LATERAL"]
    assert f"column {name!r} is taken for view" in listing.notes


def test_a_projection_that_tells_no_view_is_not_read(tmp_path: Path):
    root = write(tmp_path, "a.png", "b.png")
    (root / "metadata.csv").write_text("file_name,patient_id,projection\na.png,1,parallel\nb.png,2,cone\n")
    listing = FolderCollection(root).read()
    assert [record.view for record in listing.records] == ["UNKNOWN"] * 2


@pytest.mark.parametrize("names", [("train_images", "test_images"), ("images-train", "images-test")])
def test_folders_of_images_of_a_split(tmp_path: Path, names: tuple[str, str]):
    listing = FolderCollection(write(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)))).read()
    assert {record.name: record.split for record in listing.records} == {
        f"{name}/{i}.png": split for name, split in zip(names, ("train", "test"), strict=True) for i in range(2)
    }


@pytest.mark.parametrize(
    "names",
    [
        ("images/a.png", "masks/a.png"),
        ("train/images/a.png", "train/Mask/a.png", "test/images/a.png"),
        ("images/a.png", "ManualMask/leftMask/a.png"),
        ("images/a.png", "infection masks/a.png"),
        ("images/a.png", "images/a_mask.png"),
    ],
)
def test_masks_are_no_radiographs(tmp_path: Path, names: tuple[str, ...]):
    root = write(tmp_path, *names)
    with pytest.raises(
        UserError, match=r"\w*([Mm]asks?) found beside images such as .*images/a\.png; .*mask_file_name"
    ):
        FolderCollection(root).read()
    assert len(FolderCollection(root, folders="ignore").read().records) == len(names)
    assert len(FolderCollection(write(tmp_path / "only", "masks/a.png")).read().records) == 1


def test_a_lone_train_folder_divides_nothing(tmp_path: Path):
    assert {record.split for record in FolderCollection(write(tmp_path, "train/a.png")).read().records} == {None}


def test_folders_divide_where_the_table_does_not(tmp_path: Path):
    root = write(tmp_path, "train/a.png", "test/b.png")
    (root / "metadata.csv").write_text("file_name,patient_id\ntrain/a.png,1\ntest/b.png,2\n")
    assert [record.split for record in FolderCollection(root).read().records] == ["train", "test"]


def test_test_images_are_not_in_train(tmp_path: Path):
    words = ("--root", kermany(tmp_path / "x"), "--output", tmp_path / "cache", "--size", 8, "--num_workers", 0)
    done = mlvicx("prepare", "--collection", "folder", *words, "--quiet")
    assert done.returncode == 0, done.stderr
    cache = load_cache(tmp_path / "cache")
    assert all("test/" not in source for source in cache.datasets["train"]["source"])
    assert len(cache.datasets["test"]) == 2


LATERAL = ("LAT", "lat.", "Left lateral", "XTABLE LATERAL", "LATERAL VIEW", "L_LAT", "chest-lateral", "LLAT", "L", "RL")
AP = ("AP_horizontal", "AP supine", "AP-erect", "Chest AP portable", "A.P.", "Antero-posterior", "anteroposterior")
PA = ("PA", "pa_erect", "Chest PA", "P.A.", "postero anterior", "PA LLD")


@pytest.mark.parametrize(
    ("views", "expected"),
    [
        (LATERAL, "LATERAL"),
        (AP, "AP"),
        (PA, "PA"),
        (("Frontal", "frontal view"), "FRONTAL"),
        (("nan", "NA"), "UNKNOWN"),
    ],
)
def test_views_of_other_tables(views: tuple[str, ...], expected: str):
    assert {view: normalize_view(view) for view in views} == dict.fromkeys(views, expected)


@pytest.mark.parametrize("view", ["Coronal", "oblique", "EXCLUDE", "_", "plate", "bilateral"])
def test_other_views_are_not_understood(view: str):
    assert normalize_view(view) is None
