from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import replace
from miniatures_more import vin_id, write_vindr

from mlvicx_hf.data.collections.base import Box, Listing
from mlvicx_hf.data.collections.vindr import VINDR_FINDINGS, VinDrCollection


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_vindr(tmp_path / "vindr")


def totals(listing: Listing, *splits: str) -> dict[str, int]:
    counts = np.array([record.labels for record in listing.records if record.split in splits]).sum(axis=0)
    return {name: int(count) for name, count in zip(listing.label_names, counts, strict=True) if count}


def test_any_reader_counts_in_training_and_the_consensus_in_test(root: Path):
    listing = VinDrCollection(root).read()
    assert listing.label_names == VINDR_FINDINGS
    assert len(VINDR_FINDINGS) == 27
    assert "No finding" not in VINDR_FINDINGS
    single = {"Pneumothorax": 5, "Tuberculosis": 5, "Other diseases": 5}
    assert totals(listing, "train", "validation") == {"Cardiomegaly": 10, **single}
    assert totals(listing, "test") == {"Cardiomegaly": 3, **dict.fromkeys(single, 2)}
    assert listing.policy == {"readers": "any"}
    assert not listing.patients_known
    assert listing.missing == ()
    assert [record.name for record in listing.records if record.split == "test"] == [
        f"test/{vin_id(number)}.dicom" for number in range(20, 26)
    ]
    first = listing.records[0]
    assert (first.name, first.view, first.frame) == (f"train/{vin_id(0)}.dicom", "PA", None)
    assert Counter(box.label for box in first.boxes) == {"Cardiomegaly": 2, "Pneumothorax": 1}
    assert listing.records[1].boxes == ()
    assert listing.records[20].boxes == (
        Box("Cardiomegaly", 10, 24, 44, 56.5),
        Box("Pneumothorax", 2, 4, 20, 30),
    )


def test_a_majority_counts_in_training_alone(root: Path):
    listing = VinDrCollection(root, readers="majority").read()
    assert totals(listing, "train", "validation") == {"Cardiomegaly": 10}
    assert totals(listing, "test")["Tuberculosis"] == 2
    assert {box.label for record in listing.records[:20] for box in record.boxes} == {"Cardiomegaly"}
    assert "5 boxes left out, of findings that too few readers saw" in listing.notes
    assert listing.policy == {"readers": "majority"}


def test_validation_is_carved_from_train_alike_for_both_policies(root: Path):
    splits = {record.name: record.split for record in VinDrCollection(root).read().records}
    assert Counter(splits.values()) == {"train": 18, "validation": 2, "test": 6}
    assert {name.split("/")[0] for name, split in splits.items() if split == "test"} == {"test"}
    majority = VinDrCollection(root, readers="majority").read().records
    assert {record.name: record.split for record in majority} == splits
    (root / "train" / f"{vin_id(0)}.dicom").unlink()
    part = VinDrCollection(root).read()
    assert part.missing == (f"train/{vin_id(0)}.dicom",)
    assert all(splits[record.name] == record.split for record in part.records)
    other = {record.name: record.split for record in VinDrCollection(root, seed=3).list_all().records}
    assert other != splits


def test_every_split_has_both_values_of_a_label(root: Path):
    column = VINDR_FINDINGS.index("Cardiomegaly")
    records = VinDrCollection(root).read().records
    for split in ("train", "validation", "test"):
        assert {record.labels[column] for record in records if record.split == split} == {0, 1}


TRAIN, TEST = "annotations/image_labels_train.csv", "annotations/image_labels_test.csv"
BOXES = "annotations/annotations_train.csv"
FIRST = f"{vin_id(0)},R8,"


@pytest.mark.parametrize(
    ("file", "old", "new", "parts"),
    [
        (TRAIN, "rad_id", "reader", ["columns image_id, reader, Aortic enlargement", "expected rad_id as well"]),
        (TRAIN, "ILD", "Interstitial", ["Interstitial", "expected ILD as well"]),
        (TEST, "Other disease", "Others", ["Others", "expected Other diseases as well"]),
        (TRAIN, f"{FIRST}0", f"{FIRST}2", ["row 2, column Aortic enlargement: '2' found; expected 0 or 1"]),
        (TRAIN, f"{FIRST}0", f"{FIRST}", ["row 2, column Aortic enlargement: '' found; expected 0 or 1"]),
        (TRAIN, f"{vin_id(0)},R9,", FIRST, [f"1 found in more than one row: {vin_id(0)} R8"]),
        (TRAIN, f"{vin_id(0)},R9,", f"{vin_id(19)},R9,", [f"1 found in more than one row: {vin_id(19)} R9"]),
        (TRAIN, FIRST, "a/b,R8,", ["row 2, column image_id: 'a/b' found; expected a file's name"]),
        (TEST, vin_id(21), vin_id(20), [f"1 found in more than one row: {vin_id(20)};"]),
        (BOXES, f"{vin_id(0)},R8,Card", f"{vin_id(0)},R8,Xard", ["row 2, column class_name: 'Xardiomegaly' found"]),
        (BOXES, vin_id(0), vin_id(77), [f"row 2: image_id '{vin_id(77)}' found; expected one of the image labels"]),
        (BOXES, "56.5", "", ["row 2, columns x_min, y_min, x_max, y_max", "24.0, 44.0, None found for Cardiomegaly"]),
        (BOXES, "No finding,,", "No finding,1,", ["a box found for No finding; expected none"]),
    ],
)
def test_tables_that_do_not_fit_are_refused(root: Path, file: str, old: str, new: str, parts: list[str]):
    replace(root / file, old, new)
    with pytest.raises(ValueError, match=file) as caught:
        VinDrCollection(root).read()
    for part in parts:
        assert part in str(caught.value)


def test_images_lacking_a_reader_are_refused(root: Path):
    path = root / TRAIN
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    with pytest.raises(ValueError, match=rf"1 image\(s\) with more or fewer readers found: {vin_id(19)} \(2\)"):
        VinDrCollection(root).read()


def test_an_image_in_both_parts_is_refused(root: Path):
    replace(root / TEST, vin_id(20), vin_id(0))
    replace(root / "annotations/annotations_test.csv", f"{vin_id(20)},Card", f"{vin_id(0)},Card")
    replace(root / "annotations/annotations_test.csv", f"{vin_id(20)},Pneu", f"{vin_id(0)},Pneu")
    with pytest.raises(ValueError, match=rf"1 image\(s\) in both train and test: {vin_id(0)}"):
        VinDrCollection(root).read()


@pytest.mark.parametrize("file", [TRAIN, TEST, BOXES, "annotations/annotations_test.csv"])
def test_absent_tables_are_named(root: Path, file: str):
    (root / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file}: no such file; expected the release's table"):
        VinDrCollection(root).read()


def test_other_policies_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="readers='2' found; expected one of any, majority"):
        VinDrCollection(tmp_path, readers="2")
