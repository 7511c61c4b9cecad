import gc
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import replace
from miniatures_more import released, write_chexpert

from mlvicx_hf.data.collections.base import Listing, Record
from mlvicx_hf.data.collections.cells import label_cells
from mlvicx_hf.data.collections.chexpert import CHEXPERT_FINDINGS, CheXpertCollection
from mlvicx_hf.data.collections.labels import binary_labels
from mlvicx_hf.data.collections.tables import read_columns


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_chexpert(tmp_path / "CheXpert-v1.0-small")


def by_split(records: list[Record]) -> dict[str | None, set[str]]:
    """Folders of the files by split."""
    found: dict[str | None, set[str]] = {}
    for record in records:
        found.setdefault(record.split, set()).add(record.name.split("/")[0])
    return found


# The released table

VALID = "CheXpert-v1.0-small/valid/patient64541/study1/view1_frontal.jpg,Male,73,Frontal,AP" + ",0.0" * 14


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chexpert") / "train.csv"
    path.write_bytes(released("chexpert_train.csv.gz"))
    with path.open() as file:
        (path.parent / "valid.csv").write_text(f"{file.readline()}{VALID}\n")
    return path


@pytest.fixture(scope="module")
def listing(table: Path) -> Iterator[Listing]:
    gc.disable()  # halves the time: so many records are many objects to look through
    try:
        yield CheXpertCollection(table.parent).list_all()
    finally:
        gc.enable()


def test_released_table_by_number(listing: Listing):
    train = [record for record in listing.records if record.split != "test"]
    assert len(train) == 223_414
    assert len({record.patient_id for record in train}) == 64_540
    views = Counter(record.view for record in train)
    assert views == {"AP": 161_590, "PA": 29_420, "UNKNOWN": 17, "LATERAL": 32_387}
    assert len(train) - views["LATERAL"] == 191_027
    assert any(note.startswith("17 views unknown") for note in listing.notes)
    assert Counter(record.sex for record in train) == {"M": 132_636, "F": 90_777, "": 1}
    ages = np.array([record.age for record in train])
    assert np.isnan(ages).sum() == 3
    assert (np.nanmin(ages), np.nanmax(ages)) == (18, 90)
    patients = {
        split: {record.patient_id for record in train if record.split == split} for split in ("train", "validation")
    }
    assert len(patients["validation"]) == 6_454
    assert not patients["train"] & patients["validation"]


def test_released_table_label_by_label(listing: Listing, table: Path):
    frame = pd.read_csv(table)
    assert list(frame.columns[6:]) == list(listing.label_names) == list(CHEXPERT_FINDINGS)
    labels = np.array([record.labels for record in listing.records[: len(frame)]])
    for column, name in enumerate(CHEXPERT_FINDINGS):
        assert (labels[:, column] == 1).sum() == (frame[name] == 1).sum()
        assert (labels[:, column] == 0).sum() == (frame[name] == 0).sum()
        unknown = frame[name].isna().sum() + (frame[name] == -1).sum()
        assert np.isnan(labels[:, column]).sum() == unknown
    assert listing.records[2].name == frame.Path[2].removeprefix("CheXpert-v1.0-small/")


def test_uncertain_labels_of_the_released_table(table: Path):
    frame = pd.read_csv(table)
    labels = np.array(binary_labels(table, read_columns(table), CHEXPERT_FINDINGS, label_cells("ones")))
    found = {name: int((labels[:, column] == 1).sum()) for column, name in enumerate(CHEXPERT_FINDINGS)}
    assert found == {name: int(((frame[name] == 1) | (frame[name] == -1)).sum()) for name in CHEXPERT_FINDINGS}
    assert (found["Edema"], found["Pneumothorax"]) == (52_246 + 12_984, 19_448 + 3_145)


# A small copy


def test_without_test_csv_valid_is_the_test_part_and_validation_is_carved_by_patient(root: Path):
    listing = CheXpertCollection(root).read()
    assert by_split(listing.records) == {"train": {"train"}, "validation": {"train"}, "test": {"valid"}}
    assert listing.missing == ()
    assert any("no test.csv: valid.csv is the test part" in note for note in listing.notes)
    validation = {record.patient_id for record in listing.records if record.split == "validation"}
    assert len(validation) == 1  # a tenth of 12
    other = CheXpertCollection(root, seed=1).read().records
    assert {record.patient_id for record in other if record.split == "validation"} != validation
    for uncertain in ("ones", "zeros"):
        records = CheXpertCollection(root, uncertain=uncertain).read().records
        assert [record.split for record in records] == [record.split for record in listing.records]


def test_with_test_csv_the_parts_are_the_releases_own(tmp_path: Path):
    listing = CheXpertCollection(write_chexpert(tmp_path / "chexpert", test=True)).read()
    assert by_split(listing.records) == {"train": {"train"}, "validation": {"valid"}, "test": {"test"}}
    assert any("train.csv, valid.csv and test.csv are training, validation and test" in note for note in listing.notes)
    test = [record for record in listing.records if record.split == "test"]
    assert Counter(record.view for record in test) == {"UNKNOWN": 6, "LATERAL": 3}
    assert all(record.sex == "" and math.isnan(record.age) for record in test)


@pytest.mark.parametrize("test", [False, True])
def test_every_split_has_both_values_of_a_label(tmp_path: Path, test: bool):
    column = CHEXPERT_FINDINGS.index("Pleural Effusion")
    records = CheXpertCollection(write_chexpert(tmp_path / "chexpert", test)).read().records
    for split in ("train", "validation", "test"):
        assert {record.labels[column] for record in records if record.split == split} == {0, 1}


def test_files_patients_views_and_persons(root: Path):
    frontal, lateral = CheXpertCollection(root).read().records[:2]
    assert frontal.name == "train/patient00001/study1/view1_frontal.jpg"
    assert frontal.path == root / frontal.name
    assert (frontal.patient_id, frontal.view, frontal.sex, frontal.age) == ("patient00001", "AP", "F", 41)
    assert (lateral.patient_id, lateral.view) == ("patient00001", "LATERAL")


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0/", ""])
def test_the_folder_in_front_of_the_paths_is_dropped_whatever_it_is_called(root: Path, prefix: str):
    for name in ("train.csv", "valid.csv"):
        path = root / name
        path.write_text(path.read_text().replace("CheXpert-v1.0-small/", prefix))
    assert CheXpertCollection(root).read().missing == ()


@pytest.mark.parametrize(("uncertain", "value"), [("ignore", math.nan), ("ones", 1.0), ("zeros", 0.0)])
def test_uncertain_labels_follow_the_policy_and_blanks_stay_unknown(root: Path, uncertain: str, value: float):
    listing = CheXpertCollection(root, uncertain=uncertain).read()
    assert listing.policy == {"uncertain": uncertain}
    record = next(record for record in listing.records if record.patient_id == "patient00003")
    labels = dict(zip(CHEXPERT_FINDINGS, record.labels, strict=True))
    assert np.array_equal(labels["Edema"], value, equal_nan=True)
    assert labels["Pleural Effusion"] == 1
    assert math.isnan(labels["Fracture"])
    normal = next(record for record in listing.records if "study2" in record.name)  # its No Finding is 1
    assert math.isnan(normal.labels[CHEXPERT_FINDINGS.index("Fracture")])


def test_a_frontal_image_whose_view_is_lateral_has_no_view_and_age_0_is_unknown(root: Path):
    replace(root / "train.csv", ",Female,41,Frontal,AP,", ",Unknown,0,Frontal,LL,")
    listing = CheXpertCollection(root).read()
    first = listing.records[0]
    assert (first.view, first.sex) == ("UNKNOWN", "")
    assert math.isnan(first.age)
    assert any(note.startswith("1 views unknown") for note in listing.notes)


def test_missing_images_are_counted_and_leave_the_splits_alone(root: Path):
    full = {record.name: record.split for record in CheXpertCollection(root).read().records}
    (root / "train/patient00002/study1/view1_frontal.jpg").unlink()
    part = CheXpertCollection(root).read()
    assert part.missing == ("train/patient00002/study1/view1_frontal.jpg",)
    assert all(full[record.name] == record.split for record in part.records)


# What does not fit

FIRST = "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg,Female,41,Frontal,AP,"


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("Lung Lesion", "Lesion", ["columns Path, Sex", "expected Lung Lesion as well"]),
        ("AP/PA", "View", ["expected AP/PA as well"]),
        (FIRST, FIRST.replace("train/", "../"), ["row 2, column Path: 'CheXpert-v1.0-small/../patient", "such as Che"]),
        (FIRST, FIRST.replace("patient", "p"), ["row 2, column Path: 'CheXpert-v1.0-small/train/p00001"]),
        (FIRST, FIRST.replace("CheXpert-v1.0-small", "/tmp"), ["row 2, column Path: '/tmp/train"]),
        (FIRST, FIRST.replace("Female", "Woman?"), ["row 2, column Sex: 'Woman?' found; expected F, M or nothing"]),
        (FIRST, FIRST.replace("41", "old"), ["row 2, column Age: 'old' found; expected years"]),
        (
            FIRST,
            FIRST.replace("Frontal", "Lateral"),
            ["row 2, column Frontal/Lateral: 'Lateral' found"],
        ),
        (
            f"{FIRST},",
            f"{FIRST},2",
            ["row 2, column Enlarged Cardiomediastinum: '2' found; expected 0, 1, -1, or empty"],
        ),
        (
            "patient00001/study2",
            "patient00001/study1",
            ["1 found in more than one row: train/patient00001/study1/view1"],
        ),
    ],
)
def test_tables_that_do_not_fit_are_refused(root: Path, old: str, new: str, parts: list[str]):
    replace(root / "train.csv", old, new)
    with pytest.raises(ValueError, match=r"train\.csv: ") as caught:
        CheXpertCollection(root).read()
    for part in parts:
        assert part in str(caught.value)


def test_a_patient_in_two_tables_is_refused(root: Path):
    replace(root / "valid.csv", "patient00021", "patient00001")
    with pytest.raises(ValueError, match=r"1 patient\(s\) in both train\.csv and valid\.csv: patient00001"):
        CheXpertCollection(root).read()


@pytest.mark.parametrize("name", ["train.csv", "valid.csv"])
def test_absent_tables_are_named(root: Path, name: str):
    (root / name).unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"{name}: no such file; expected --root to hold CheXpert's train\.csv"
    ):
        CheXpertCollection(root).read()


def test_other_policies_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="uncertain='half' found; expected one of ignore, ones, zeros"):
        CheXpertCollection(tmp_path, uncertain="half")
