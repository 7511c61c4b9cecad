import gzip
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from miniatures import disc_box, released_tables, write_nih14
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections.base import Box, Listing
from mlvicx_hf.data.collections.nih14 import NIH_FINDINGS, NIH14Collection

TABLE, BOXES = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_nih14(tmp_path / "nih")
    return tmp_path / "nih"


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# The released tables


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released tables; NIH's lists are not public with them, so every fifth patient makes up the test list."""
    root = tmp_path_factory.mktemp("nih")
    for name in (TABLE, BOXES):
        (root / name).write_bytes(gzip.decompress((released_tables() / f"{name}.gz").read_bytes()))
    images = pd.read_csv(root / TABLE)["Image Index"]
    test = images.str[:8].astype(int) % 5 == 0
    for name, chosen in (("test_list.txt", test), ("train_val_list.txt", ~test)):
        (root / name).write_text("\n".join(images[chosen]))
    return root


@pytest.fixture(scope="module")
def listing(release: Path) -> Listing:
    return NIH14Collection(release).list_all()


def test_released_table_is_counted_as_published(release: Path, listing: Listing):
    assert len(listing.records) == 112_120
    assert len({record.patient_id for record in listing.records}) == 30_805
    positives = dict(zip(NIH_FINDINGS, np.array([r.labels for r in listing.records]).sum(axis=0).tolist(), strict=True))
    counted = pd.read_csv(release / TABLE)["Finding Labels"].str.split("|").explode().value_counts()
    assert positives == {name: counted[name] for name in NIH_FINDINGS}
    assert (positives["Infiltration"], positives["Hernia"]) == (19_894, 227)
    assert sum(not any(record.labels) for record in listing.records) == counted["No Finding"] == 60_361
    assert all(record.path is None for record in listing.records)
    assert (listing.policy, listing.patients_known, listing.patient_source) == ({}, True, None)


def test_released_persons_and_views(release: Path, listing: Listing):
    table = pd.read_csv(release / TABLE)
    assert [record.sex for record in listing.records] == table["Patient Gender"].tolist()
    assert [record.age for record in listing.records] == table["Patient Age"].tolist()
    assert [record.view for record in listing.records] == table["View Position"].tolist()
    assert not any("age(s)" in note for note in listing.notes)


def test_released_boxes(listing: Listing):
    boxed = {record.name: record for record in listing.records if record.boxes is not None}
    assert len(boxed) == 880
    assert sum(len(record.boxes) for record in boxed.values()) == 984
    for record in boxed.values():
        assert record.frame == (1024, 1024)
        positive = {name for name, value in zip(NIH_FINDINGS, record.labels, strict=True) if value}
        assert {box.label for box in record.boxes} <= positive
    assert sum(box.label == "Infiltration" for record in boxed.values() for box in record.boxes) == 123
    box = boxed["00013118_008.png"].boxes[0]
    assert box.label == "Atelectasis"
    assert box[1:] == pytest.approx((225.084746, 547.019217, 311.864407, 626.205657))


def test_released_splits_follow_the_lists_and_patients(listing: Listing):
    patients = {
        name: {r.patient_id for r in listing.records if r.split == name} for name in ("train", "validation", "test")
    }
    assert all(int(patient) % 5 == 0 for patient in patients["test"])
    assert len(patients["test"]) == 6_161
    assert len(patients["validation"]) == pytest.approx(2_464, abs=1)  # a tenth of the other 24,644
    assert sum(map(len, patients.values())) == 30_805


# A small copy


def test_miniature_release_is_read_from_the_disk(root: Path):
    listing = NIH14Collection(root).read()
    assert len(listing.records) == 24
    assert listing.missing == ()
    record = next(record for record in listing.records if record.name == "00000002_000.png")
    assert (record.sex, record.age, record.view, record.patient_id) == ("M", 42.0, "PA", "00000002")
    x, y, width, height = disc_box(2)
    assert record.boxes == (Box("Infiltration", x, y, x + width, y + height),)
    assert {record.split for record in listing.records} == {"train", "validation", "test"}
    assert next(record for record in listing.records if record.name == "00000002_001.png").boxes is None
    assert {Image.open(record.path).mode for record in listing.records} == {"L", "RGBA"}


def test_lists_in_another_encoding_and_one_file_twice_are_refused(root: Path):
    path = root / "test_list.txt"
    text = path.read_text()
    path.write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"test_list\.txt: not text in UTF-8"):
        NIH14Collection(root).read()
    path.write_text(text)
    (root / "images_099" / "images").mkdir(parents=True)
    shutil.copy(next(root.rglob("00000002_000.png")), root / "images_099" / "images")
    with pytest.raises(UserError, match=r"00000002_000\.png and .*00000002_000\.png found; expected one file an image"):
        NIH14Collection(root).read()


def test_absent_boxes_are_unknown(root: Path):
    (root / BOXES).unlink()
    assert all(record.boxes is None for record in NIH14Collection(root).read().records)


def test_boxes_with_empty_columns_and_of_images_that_are_not_listed(root: Path):
    with (root / BOXES).open("a") as file:
        file.write("00000002_000.png,Effusion,1,2,3,4,,,\n00000002_000.png,Infiltrate,1,2,3,4\n")
        file.write("00000099_000.png,Mass,1,2,3,4\n00000099_000.png,Mass,5,2,3,4\n")
    listing = NIH14Collection(root).read()
    record = next(record for record in listing.records if record.name == "00000002_000.png")
    assert record.boxes[1:] == (Box("Effusion", 1, 2, 4, 6), Box("Infiltration", 1, 2, 4, 6))
    assert f"{BOXES} lists 1 image(s) that {TABLE} does not: their boxes are left out" in listing.notes


@pytest.mark.parametrize(
    ("age", "years"),
    [("058Y", 58), ("013M", 13 / 12), ("011D", 11 / 365.25), ("0", 0), ("120", 120), ("411", None), ("", None)],
)
def test_ages_of_old_releases(root: Path, age: str, years: float | None):
    replace(root / TABLE, ",41,F,", f",{age},F,")
    listing = NIH14Collection(root).read()
    found = listing.records[0].age
    assert math.isnan(found) if years is None else found == pytest.approx(years)
    assert ("1 age(s) above 120 years are counted as unknown" in listing.notes) == (age == "411")


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (TABLE, ",41,F,", ",old,F,", rf"{TABLE}: row 2, column Patient Age: 'old' found; expected an age such as 57"),
        (TABLE, ",41,F,", ",41,X,", rf"{TABLE}: row 2, column Patient Gender: 'X' found; expected F, M or nothing"),
        (
            BOXES,
            "Finding Label",
            "Finding",
            rf"{BOXES}: columns Image Index, Finding, .* found; expected Finding Label as well",
        ),
        (
            BOXES,
            "Infiltrate",
            "Infiltrates",
            r"row 2, column Finding Label: 'Infiltrates' found; expected .*Infiltrate",
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(root: Path, file: str, old: str, new: str, message: str):
    replace(root / file, old, new)
    with pytest.raises(ValueError, match=message):
        NIH14Collection(root).list_all()


@pytest.mark.parametrize(
    ("corner", "message"),
    [
        ("1,2,3", r"row 14 has 5 fields; expected 6"),
        ("1,2,3,4,5", r"row 14 has 7 fields; expected 6"),
        ("x,2,3,4", r"row 14, column Bbox \[x: 'x' found; expected pixels from 0 to 1024"),
        ("1,nan,3,4", r"row 14, column y: '' found"),
        ("1,2,-3,4", r"row 14, column w: '-3' found"),
        ("1,2,0,4", r"row 14: a box of 0 x 4 pixels at \(1, 2\) found; expected one inside 1024 x 1024, not empty"),
        ("1,1000,3,25", r"row 14: a box of 3 x 25 pixels at \(1, 1000\) found"),
        (",".join(map(str, disc_box(12))), r"row 14: a box of Infiltration found for the second time"),
    ],
)
def test_bad_boxes_are_refused(root: Path, corner: str, message: str):
    with (root / BOXES).open("a") as file:
        file.write(f"00000012_000.png,Infiltrate,{corner}\n")
    with pytest.raises(ValueError, match=rf"{BOXES}: {message}"):
        NIH14Collection(root).list_all()
