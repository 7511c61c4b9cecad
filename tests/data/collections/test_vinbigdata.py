import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import replace
from miniatures_more import draw, released, vin_id, write_vinbigdata
from PIL import Image

from mlvicx_hf.data.collections.base import Box, Listing
from mlvicx_hf.data.collections.vinbigdata import _FINDINGS, VinBigDataCollection
from mlvicx_hf.data.splits import split_by_patient


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_vinbigdata(tmp_path / "vinbigdata")


def totals(listing: Listing) -> dict[str, int]:
    counts = np.array([record.labels for record in listing.records]).sum(axis=0)
    return {name: int(count) for name, count in zip(listing.label_names, counts, strict=True) if count}


# The released table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vinbigdata") / "train.csv"
    path.write_bytes(released("vinbigdata-train.csv.gz"))
    return path


def test_released_table_with_any_reader(table: Path):
    listing = VinBigDataCollection(table.parent).list_all()
    frame = pd.read_csv(table)
    assert len(frame) == 67_914
    assert len(listing.records) == 15_000
    assert listing.label_names == _FINDINGS
    assert list(_FINDINGS) == frame[frame.class_id < 14].groupby("class_id").class_name.first().tolist()
    found = frame[frame.class_id < 14].groupby("class_name").image_id.nunique()
    assert totals(listing) == found.to_dict()
    assert (totals(listing)["Pneumothorax"], totals(listing)["ILD"]) == (96, 386)
    assert sum(len(record.boxes) for record in listing.records) == frame.x_min.notna().sum() == 36_096
    assert sum(record.boxes == () for record in listing.records) == 10_606
    # One image in full, against the rows.
    record = next(record for record in listing.records if record.patient_id == "9a5094b2563a1ef3ff50dc5c7ff71345")
    rows = frame[frame.image_id == record.patient_id]
    expected = {Box(row.class_name, row.x_min, row.y_min, row.x_max, row.y_max) for row in rows.itertuples()}
    assert set(record.boxes) == expected
    assert not listing.patients_known
    assert listing.policy == {"readers": "any"}


def test_released_table_with_a_majority(table: Path):
    listing = VinBigDataCollection(table.parent, readers="majority").list_all()
    frame = pd.read_csv(table)
    frame = frame[frame.class_id < 14]
    votes = frame.groupby(["class_name", "image_id"]).rad_id.nunique()
    assert totals(listing) == votes[votes >= 2].groupby("class_name").size().to_dict()
    assert (totals(listing)["Pneumothorax"], totals(listing)["ILD"]) == (58, 152)
    counted = frame.join(votes.rename("votes"), on=["class_name", "image_id"])
    boxes = sum(len(record.boxes) for record in listing.records)
    assert boxes == (counted.votes >= 2).sum()
    assert f"{36_096 - boxes} boxes left out, of findings that too few readers saw" in listing.notes
    assert listing.policy == {"readers": "majority"}


# A small copy


def test_images_labels_and_boxes(root: Path):
    listing = VinBigDataCollection(root).read()
    assert listing.missing == ()
    assert [record.name for record in listing.records] == [f"train/{vin_id(number)}.dicom" for number in range(20)]
    assert totals(listing) == {"Cardiomegaly": 10, "Pneumothorax": 5}
    first, second = listing.records[:2]
    assert first.boxes == (
        Box("Cardiomegaly", 10, 24, 44, 56.5),
        Box("Pneumothorax", 2, 4, 20, 30),
        Box("Cardiomegaly", 10, 24, 44, 58),
    )
    assert second.boxes == ()
    assert {record.view for record in listing.records} == {"PA"}
    assert {record.split for record in listing.records} == {None}
    assert all(record.frame is None and record.path.is_file() for record in listing.records)
    assert any("3,000 test images have no labels" in note for note in listing.notes)


def test_a_majority_loses_the_findings_and_boxes_of_a_single_reader(root: Path):
    listing = VinBigDataCollection(root, readers="majority").read()
    assert totals(listing) == {"Cardiomegaly": 10}
    assert {box.label for record in listing.records for box in record.boxes} == {"Cardiomegaly"}
    assert "5 boxes left out, of findings that too few readers saw" in listing.notes


@pytest.mark.parametrize("readers", ["any", "majority"])
def test_usual_shares_give_every_split_both_values_of_a_label(root: Path, readers: str):
    records = VinBigDataCollection(root, readers=readers).read().records
    labels = [record.labels for record in records]
    shares = {"train": 0.7, "validation": 0.1, "test": 0.2}
    splits = split_by_patient([record.patient_id for record in records], labels, shares, 0)
    column = _FINDINGS.index("Cardiomegaly")
    for split in shares:
        assert {row[column] for row, name in zip(labels, splits, strict=True) if name == split} == {0, 1}


def test_missing_images_are_counted(root: Path):
    (root / "train" / f"{vin_id(3)}.dicom").unlink()
    listing = VinBigDataCollection(root).read()
    assert listing.missing == (f"train/{vin_id(3)}.dicom",)
    assert len(listing.records) == 19


def convert(root: Path, folder: str) -> None:
    """Turn the images into PNG files of another size."""
    (root / folder).mkdir(exist_ok=True)
    for number, path in enumerate(sorted((root / "train").glob("*.dicom"))):
        Image.fromarray(draw(number)).resize((32, 32)).save(root / folder / f"{path.stem}.png")
        path.unlink()


def test_boxes_of_converted_images_need_the_size_of_the_originals(root: Path):
    convert(root, "train")
    listing = VinBigDataCollection(root).read()
    assert [record.boxes for record in listing.records] == [None] * 20
    assert any(note.startswith("boxes of 20 images left out") and "train_meta.csv" in note for note in listing.notes)
    lines = [f"{vin_id(number)},64,56" for number in range(19)]
    (root / "train_meta.csv").write_text("\n".join(["image_id,dim0,dim1", *lines]))
    listing = VinBigDataCollection(root).read()
    assert [record.frame for record in listing.records] == [(56, 64)] * 19 + [None]
    assert [record.boxes is None for record in listing.records] == [False] * 19 + [True]
    assert any(note.startswith("boxes of 1 images left out") for note in listing.notes)


def test_sizes_may_be_columns_of_the_table_itself(root: Path):
    convert(root, "train")
    frame = pd.read_csv(root / "train.csv")
    frame["width"], frame["height"] = 56, 64
    frame.to_csv(root / "train.csv", index=False)
    assert {record.frame for record in VinBigDataCollection(root).read().records} == {(56, 64)}


@pytest.mark.parametrize("folder", ["images", "."])
def test_images_may_lie_elsewhere(root: Path, folder: str):
    convert(root, folder)
    listing = VinBigDataCollection(root).read()
    assert listing.missing == ()
    assert listing.records[0].path == root / folder / f"{vin_id(0)}.png"


# What does not fit

FIRST = f"{vin_id(0)},Cardiomegaly,3,R8,10.0,24.0,44.0,56.5"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("class_id", "class", ["train.csv: columns image_id, class_name, class,", "expected class_id as well"]),
        (FIRST, FIRST.replace(",3,", ",4,"), ["row 2, columns class_id, class_name: '4', 'Cardiomegaly' found"]),
        (FIRST, FIRST.replace("Card", "card"), ["row 2", "'cardiomegaly' found", "3 Cardiomegaly", "14 No finding"]),
        (FIRST, FIRST.replace("44.0", ""), ["row 2, columns x_min", "24.0, None, 56.5 found for Cardiomegaly"]),
        (FIRST, FIRST.replace("44.0", "9"), ["row 2, columns x_min", "10.0, 24.0, 9.0, 56.5 found", "min below"]),
        (FIRST, FIRST.replace("44.0", "nan"), ["row 2, columns x_min", "24.0, None, 56.5 found for Cardiomegaly"]),
        (FIRST, FIRST.replace("44.0", "inf"), ["row 2, column x_max: 'inf' found; expected pixels"]),
        (FIRST, FIRST.replace("56.5", "wide"), ["row 2, column y_max: 'wide' found; expected pixels"]),
        (FIRST, FIRST.replace("R8", ""), ["row 2, column rad_id: '' found; expected a text that is not empty"]),
        (FIRST, FIRST.replace(vin_id(0), "../a"), ["row 2, column image_id: '../a' found; expected a file's name"]),
        ("No finding,14,R8,,,,", "No finding,14,R8,1,2,3,4", ["a box found for No finding"]),
        (
            "No finding,14,R8,",
            "No finding,14,R9,",
            ["1 image(s) with more or fewer readers", f"{vin_id(1)} (2)", "3 di"],
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(root: Path, old: str, new: str, parts: list[str]):
    replace(root / "train.csv", old, new)
    with pytest.raises(ValueError, match=r"train\.csv: ") as caught:
        VinBigDataCollection(root).read()
    for part in parts:
        assert part in str(caught.value)


def test_sizes_that_do_not_fit_are_refused(root: Path):
    (root / "train_meta.csv").write_text(f"image_id,dim0,dim1\n{vin_id(0)},64,0\n")
    with pytest.raises(ValueError, match=r"train_meta\.csv: row 2, column dim1: '0' found; expected pixels"):
        VinBigDataCollection(root).read()
    (root / "train_meta.csv").write_text(f"image_id,rows,dim1\n{vin_id(0)},64,56\n")
    with pytest.raises(ValueError, match=r"train_meta\.csv: columns image_id, rows, dim1 found; expected dim0"):
        VinBigDataCollection(root).read()


def test_folders_without_the_table_and_other_policies_are_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"train\.csv: no such file; expected the release's table train\.csv"):
        VinBigDataCollection(tmp_path).read()
    with pytest.raises(ValueError, match="readers='all' found; expected one of any, majority"):
        VinBigDataCollection(tmp_path, readers="all")


def test_the_small_copy_holds_real_dicom_files(root: Path):
    import pydicom

    dicom = pydicom.dcmread(io.BytesIO((root / "train" / f"{vin_id(1)}.dicom").read_bytes()))
    np.testing.assert_array_equal(dicom.pixel_array, draw(1).astype(int) * 16)
