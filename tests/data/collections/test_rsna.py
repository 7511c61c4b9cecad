import json
import math
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from helpers import replace
from miniatures import disc_box, draw_image, released_tables, rsna_id, write_rsna

from mlvicx_hf.data.collections.base import Box, Listing
from mlvicx_hf.data.collections.rsna import CLASS_NAMES, RSNACollection

LABELS, CLASSES = "stage_2_train_labels.csv", "stage_2_detailed_class_info.csv"
HEADERS = "kaggle_stage_2_train_images_dicom_headers.csv.gz"
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_rsna(tmp_path / "rsna")
    return tmp_path / "rsna"


# The released tables


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rsna")
    with zipfile.ZipFile(released_tables() / f"kaggle_{LABELS}.zip") as archive:
        archive.extract(LABELS, root)
    shutil.copy(released_tables() / HEADERS, root)
    return root


@pytest.fixture(scope="module")
def listing(release: Path) -> Listing:
    return RSNACollection(release, headers=HEADERS).list_all()


def test_released_table_is_counted_as_published(release: Path, listing: Listing):
    table = pd.read_csv(release / LABELS)
    assert len(table) == 30_227
    assert [record.name for record in listing.records] == table.patientId.unique().tolist()
    assert len(listing.records) == 26_684
    assert sum(record.labels == (1.0,) for record in listing.records) == 6_012
    assert sum(record.boxes == () for record in listing.records) == 26_684 - 6_012
    boxes = [box for record in listing.records for box in record.boxes]
    rows = table[table.Target == 1]
    assert len(boxes) == len(rows) == 9_555
    expected = np.stack([rows.x, rows.y, rows.x + rows.width, rows.y + rows.height], axis=1)
    assert sorted(box[1:] for box in boxes) == sorted(map(tuple, expected.tolist()))
    assert {box.label for box in boxes} == {"Lung Opacity"}
    assert {(record.split, record.frame, record.path) for record in listing.records} == {(None, (1024, 1024), None)}


def test_released_headers(release: Path, listing: Listing):
    table = pd.read_csv(release / HEADERS).set_index("PatientID").loc[[record.name for record in listing.records]]
    assert [record.sex for record in listing.records] == table.PatientSex.tolist()
    assert [record.view for record in listing.records] == table.ViewPosition.tolist()
    ages = table.PatientAge.where(table.PatientAge <= 120).to_numpy()
    np.testing.assert_array_equal([record.age for record in listing.records], ages)
    assert np.isnan(ages).sum() == 5
    assert "5 age(s) above 120 years are counted as unknown" in listing.notes


# A small copy


def test_miniature_release_is_read_from_the_disk(root: Path):
    listing = RSNACollection(root).read()
    assert listing.label_names == ("Lung Opacity",)
    assert (listing.exclusive, listing.policy, len(listing.records)) == (False, {"classes": "target"}, 12)
    assert listing.missing == ()
    record = listing.records[2]
    assert record.patient_id == record.name == rsna_id(2)
    assert record.boxes == tuple(
        Box("Lung Opacity", x, y, x + width, y + height)
        for x, y, width, height in (disc_box(2, side) for side in range(2))
    )
    assert (record.view, record.sex, math.isnan(record.age)) == ("UNKNOWN", "", True)
    assert (listing.records[1].labels, listing.records[1].boxes) == ((0.0,), ())


def test_miniature_images_are_what_was_drawn(root: Path):
    record = RSNACollection(root).read().records[2]
    pixels = pydicom.dcmread(record.path).pixel_array.astype(int)
    drawn = np.asarray(draw_image(2, [disc_box(2, side) for side in range(2)]))
    assert np.abs(pixels - drawn).mean() < 3  # of the JPEG inside


def test_without_a_mapping_patients_are_unknown_and_with_it_nihs(root: Path):
    listing = RSNACollection(root).read()
    assert (listing.patients_known, listing.patient_source) == (False, None)
    assert any("subset of NIH ChestX-ray14" in note for note in listing.notes)
    assert any("patientId names an image" in note for note in listing.notes)
    mapped = RSNACollection(root, mapping=MAPPING).read()
    assert [record.patient_id for record in mapped.records] == [f"{number // 2 + 1:08d}" for number in range(12)]
    assert (mapped.patients_known, mapped.patient_source) == (True, "nih14")
    assert any("subset of NIH ChestX-ray14" in note for note in mapped.notes)
    assert not any("patientId names an image" in note for note in mapped.notes)


def test_mapping_as_a_table_of_more_images_outside_the_root(root: Path, tmp_path: Path):
    mapping = pd.read_json(root / MAPPING).rename(columns={"subset_img_id": "patientId"})
    mapping.loc[len(mapping)] = ["a-test-image", "", ""]
    mapping.to_csv(tmp_path / "mapping.csv", index=False)
    listing = RSNACollection(root, mapping=tmp_path / "mapping.csv").read()
    assert [record.patient_id for record in listing.records][:3] == ["00000001", "00000001", "00000002"]


def test_three_exclusive_classes(root: Path):
    listing = RSNACollection(root, classes="detailed").read()
    assert listing.label_names == CLASS_NAMES
    assert (listing.exclusive, listing.policy) == (True, {"classes": "detailed"})
    assert [record.labels.index(1.0) for record in listing.records[:4]] == [2, 0, 2, 1]
    assert all(sum(record.labels) == 1 for record in listing.records)


def test_headers_that_lack_images_leave_them_unknown(root: Path):
    headers = pd.read_csv(root / HEADERS)
    headers[1:].to_csv(root / "headers.csv", index=False)
    listing = RSNACollection(root, headers="headers.csv").read()
    assert (listing.records[0].view, listing.records[0].sex) == ("UNKNOWN", "")
    assert (listing.records[1].view, listing.records[1].sex, listing.records[1].age) == ("AP", "M", 31.0)
    assert "headers.csv lacks 1 image(s): view, sex, age unknown" in listing.notes


@pytest.mark.parametrize("folder", ["train_images", "images"])
def test_converted_images_in_other_folders(root: Path, folder: str):
    (root / "stage_2_train_images").rename(root / folder)
    for file in list((root / folder).iterdir())[1:]:
        draw_image(0, []).save(file.with_suffix(".png"))
        file.unlink()
    listing = RSNACollection(root).read()
    assert len(listing.records) == 12
    assert {record.path.parent.name for record in listing.records} == {folder}


def test_absent_images_are_missing(root: Path):
    (root / "stage_2_train_images" / f"{rsna_id(3)}.dcm").unlink()
    listing = RSNACollection(root).read()
    assert (len(listing.records), listing.missing) == (11, (rsna_id(3),))
    shutil.rmtree(root / "stage_2_train_images")
    with pytest.raises(FileNotFoundError, match=r"none of the 12 images found; expected .* in stage_2_train_images/, "):
        RSNACollection(root).read()


# What does not fit


def test_options_that_are_not_known_are_refused(root: Path):
    with pytest.raises(ValueError, match="classes='both' found; expected one of target, detailed"):
        RSNACollection(root, classes="both")


def test_absent_tables_are_named(root: Path, tmp_path: Path):
    for name, options in ((CLASSES, {"classes": "detailed"}), (LABELS, {})):
        (root / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}: no such file; expected RSNA's table"):
            RSNACollection(root, **options).list_all()
    write_rsna(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match=r"map\.csv or .*map\.csv: no such file; expected a mapping"):
        RSNACollection(tmp_path / "other", mapping="map.csv").list_all()


def test_an_image_in_two_files_is_refused(root: Path):
    draw_image(0, []).save(root / "stage_2_train_images" / f"{rsna_id(0)}.png")
    with pytest.raises(ValueError, match=rf"{rsna_id(0)}\.dcm and .*{rsna_id(0)}\.png found; expected one file an"):
        RSNACollection(root).read()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{0},,,,,1", r"Target 1 and x, y, width, height \[None, None, None, None\] found for .* expected a box"),
        ("new,1,2,3,4,0", r"Target 0 and x, y, width, height \[1.0, 2.0, 3.0, 4.0\] found for new .* expected no box"),
        ("new,1,2,3,4,2", r"column Target: '2' found; expected 0 or 1"),
        (",,,,,0", r"column patientId: '' found; expected a text that is not empty"),
        (
            "{0},,,,,0",
            r"Target 0 .* found for 00000000-.*, listed before; expected one row of Target 0",
        ),
        ("{1},,,,,0", r"Target 0 .* found for 00000001-.*, listed before"),
        ("{1},1,2,3,4,1", r"Target 1 .* found for 00000001-.*, listed before"),
        ("{0},1,2,wide,4,1", r"column width: 'wide' found; expected pixels from 0 to 1024"),
        ("{0},-1,2,3,4,1", r"column x: '-1' found"),
        ("{0},1,,3,4,1", r"Target 1 and x, y, width, height \[1.0, None, 3.0, 4.0\] found .* expected a box"),
        ("{0},1000,2,30,4,1", r"a box of 30 x 4 pixels at \(1000, 2\) found; expected one inside 1024 x 1024"),
        ("{box}", r"a box of Lung Opacity found for the second time"),
    ],
)
def test_bad_rows_of_labels_are_refused(root: Path, row: str, message: str):
    table = root / LABELS
    count = len(table.read_text().splitlines())
    first = table.read_text().splitlines()[1]
    with table.open("a") as file:
        file.write(row.format(rsna_id(0), rsna_id(1), box=first) + "\n")
    with pytest.raises(ValueError, match=rf"{LABELS}: row {count + 1}(: |, ){message}"):
        RSNACollection(root).list_all()


def test_other_columns_are_refused(root: Path):
    replace(root / LABELS, "Target", "Label")
    with pytest.raises(ValueError, match=rf"{LABELS}: columns patientId, x, .* Label found; expected Target as well"):
        RSNACollection(root).list_all()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            f"{rsna_id(0)},Lung Opacity",
            f"{rsna_id(0)},Opacity",
            r"row 2, column class: 'Opacity' found; expected one of",
        ),
        (
            f"{rsna_id(0)},Lung Opacity",
            f"{rsna_id(0)},Normal",
            r"row 2, .*'Normal' .* whose Target in .* is 1; expected",
        ),
        (
            f"{rsna_id(1)},Normal",
            f"{rsna_id(1)},Lung Opacity",
            r"row 3, .*'Lung Opacity' .* is 0; expected Lung Opacity",
        ),
        (
            f"{rsna_id(3)},No Lung",
            f"{rsna_id(1)},No Lung",
            r"row 6, .*Not Normal' found for .*; expected 'Normal' as in",
        ),
        (f"{rsna_id(3)},", "another,", rf"1 image\(s\) of {LABELS} lacking: {rsna_id(3)}; expected all"),
    ],
)
def test_classes_that_do_not_fit_are_refused(root: Path, old: str, new: str, message: str):
    replace(root / CLASSES, old, new)
    with pytest.raises(ValueError, match=rf"{CLASSES}: {message}"):
        RSNACollection(root, classes="detailed").list_all()


def test_mappings_that_do_not_fit_are_refused(root: Path):
    rows = json.loads((root / MAPPING).read_text())

    def refused(content: object, message: str) -> None:
        (root / MAPPING).write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(ValueError, match=rf"{MAPPING}: {message}"):
            RSNACollection(root, mapping=MAPPING).list_all()

    refused(rows[:10], rf"2 image\(s\) of {LABELS} lacking: {rsna_id(10)}, {rsna_id(11)}; expected all of them")
    refused([*rows, rows[0]], rf"1 found in more than one row: {rsna_id(0)};")
    refused([rows[0] | {"img_id": "0001.png"}, *rows[1:]], r"row 1, column img_id: '0001\.png' found; expected an NIH")
    refused([{"subset_img_id": rsna_id(0)}], "columns subset_img_id found; expected img_id as well")
    refused({"rows": rows}, "no list of objects found")
    refused("[{", "not JSON in UTF-8")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("PatientAge", "young", r"row 4, column PatientAge: 'young' found; expected an age"),
        ("PatientSex", "X", r"row 4, column PatientSex: 'X' found; expected F, M or nothing"),
        ("PatientID", rsna_id(0), rf"1 found in more than one row: {rsna_id(0)};"),
    ],
)
def test_headers_that_do_not_fit_are_refused(root: Path, column: str, value: str, message: str):
    headers = pd.read_csv(root / HEADERS, dtype=str)
    headers.loc[2, column] = value
    headers.to_csv(root / "headers.csv", index=False)
    with pytest.raises(ValueError, match=rf"headers\.csv: {message}"):
        RSNACollection(root, headers="headers.csv").list_all()
