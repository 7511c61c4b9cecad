import gzip
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import replace
from miniatures import NIH_HEADER, disc_box, released_tables, write_nih14
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections.base import Box, Listing
from mlvicx_hf.data.collections.nih14 import NIH_FINDINGS, NIH14Collection

TABLE, BOXES = "Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_nih14(tmp_path / "nih")
    return tmp_path / "nih"


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


# A copy in either version and layout

NIH_ROWS = [
    ("00000001_000.png", "Cardiomegaly|Effusion", 1, "PA", "train"),
    ("00000001_001.png", "No Finding", 1, "AP", "train"),
    *(
        (f"{patient:08d}_000.png", "Edema" if patient % 2 else "Hernia", patient, "PA", "train")
        for patient in range(2, 42)
    ),
    ("00000050_000.png", "Pleural_Thickening", 50, "PA", "test"),
]


def write_nih(root: Path, year: str = "v2020", flat: bool = True, present: int | None = None) -> Path:
    """A small release in the layout of the real one."""
    name, comma = ("Data_Entry_2017_v2020.csv", "") if year == "v2020" else ("Data_Entry_2017.csv", ",")
    patient = "{}" if year == "v2020" else "{:05d}"
    lines = [NIH_HEADER + comma] + [
        f"{image},{findings},0,{patient.format(number)},57,M,{view},2682,2749,0.143,0.143{comma}"
        for image, findings, number, view, _ in NIH_ROWS
    ]
    root.mkdir()
    (root / name).write_text("\n".join(lines) + "\n")
    for split, file in (("train", "train_val_list.txt"), ("test", "test_list.txt")):
        (root / file).write_text("\n".join(row[0] for row in NIH_ROWS if row[4] == split))
    for index, row in enumerate(NIH_ROWS[:present]):
        folder = root / ("images" if flat else f"images_{index % 12 + 1:03d}/images")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100).save(folder / row[0])
    return root


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("year", ["2017", "v2020"])
def test_nih_release_in_both_versions_and_layouts(tmp_path: Path, year: str, flat: bool):
    listing = NIH14Collection(write_nih(tmp_path / "nih", year, flat)).read()
    assert listing.label_names == NIH_FINDINGS
    assert len(NIH_FINDINGS) == 14
    assert listing.missing == ()
    assert [record.name for record in listing.records] == [row[0] for row in NIH_ROWS]
    first, second = listing.records[:2]
    assert {name for name, value in zip(NIH_FINDINGS, first.labels, strict=True) if value} == {
        "Cardiomegaly",
        "Effusion",
    }
    assert set(second.labels) == {0.0}
    assert (first.patient_id, first.view, second.view) == ("00000001", "PA", "AP")
    assert all(record.path.is_file() and record.path.name == record.name for record in listing.records)


def test_nih_validation_is_carved_by_patient_from_the_official_list(tmp_path: Path):
    root = write_nih(tmp_path / "nih")
    records = NIH14Collection(root).read().records
    assert {record.name for record in records if record.split == "test"} == {"00000050_000.png"}
    validation = {record.patient_id for record in records if record.split == "validation"}
    assert len(validation) == 4  # a tenth of 41
    assert not validation & {record.patient_id for record in records if record.split == "train"}
    other = {
        record.patient_id for record in NIH14Collection(root, seed=1).read().records if record.split == "validation"
    }
    assert other != validation


def test_nih_split_does_not_depend_on_what_is_on_disk(tmp_path: Path):
    full = {record.name: record.split for record in NIH14Collection(write_nih(tmp_path / "full")).read().records}
    part = NIH14Collection(write_nih(tmp_path / "part", present=10)).read()
    assert len(part.records) == 10
    assert len(part.missing) == len(NIH_ROWS) - 10
    assert all(full[record.name] == record.split for record in part.records)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "View Position",
            "View",
            r"v2020\.csv: columns .*, View, .* found; expected View Position as well",
        ),
        ("No Finding", "Infiltrate", r"row 3, column Finding Labels: 'Infiltrate' found; expected No Finding or"),
        ("No Finding", "No Finding|Mass", r"row 3, column Finding Labels: 'No Finding\|Mass' found"),
        ("No Finding,0,1,", "No Finding,0,7,", r"row 3: Patient ID '7' found for '00000001_001\.png'"),
        (",57,M,", ",57,", r"row 2 has 10 fields; expected 11"),
        ("00000001_001.png", "00000001_000.png", r"1 found in more than one row: 00000001_000\.png"),
    ],
)
def test_nih_table_that_does_not_fit_is_refused(tmp_path: Path, old: str, new: str, message: str):
    root = write_nih(tmp_path / "nih")
    replace(root / "Data_Entry_2017_v2020.csv", old, new)
    with pytest.raises(ValueError, match=message):
        NIH14Collection(root).read()


def test_nih_lists_that_do_not_fit_are_refused(tmp_path: Path):
    root = write_nih(tmp_path / "nih")
    replace(root / "train_val_list.txt", "00000001_001.png", "")
    with pytest.raises(ValueError, match=r"1 image\(s\) of the table in neither or both .*00000001_001\.png"):
        NIH14Collection(root).read()
    (root / "test_list.txt").write_text("00000050_000.png\n00000001_001.png")
    with pytest.raises(ValueError, match=r"1 patient\(s\) in both train_val_list\.txt and test_list\.txt: 00000001"):
        NIH14Collection(root).read()
    (root / "test_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_list\.txt: no such file; expected NIH's official list"):
        NIH14Collection(root).read()


def test_nih_folder_without_table_or_images_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"expected NIH's table"):
        NIH14Collection(tmp_path).read()
    root = write_nih(tmp_path / "nih", present=0)
    with pytest.raises(FileNotFoundError, match="none of the 43 images found; expected images/ or images_001/images/"):
        NIH14Collection(root).read()


@pytest.mark.real_data
def test_real_nih_table(real_data: Path):
    listing = NIH14Collection(real_data / "nih14").read()
    assert len(listing.records) + len(listing.missing) == 112_120
    assert len(listing.records) == len(os.listdir(real_data / "nih14" / "images"))
    assert {record.split for record in listing.records} == {"train", "validation", "test"}
    assert {record.view for record in listing.records} == {"PA", "AP"}
