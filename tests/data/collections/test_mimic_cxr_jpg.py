import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import replace
from miniatures_more import write_mimic_cxr_jpg

from mlvicx_hf.data.collections.chexpert import CHEXPERT_FINDINGS
from mlvicx_hf.data.collections.mimic_cxr_jpg import MIMICCXRJPGCollection


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_mimic_cxr_jpg(tmp_path / "mimic")


@pytest.mark.parametrize("end", [".csv.gz", ".csv"])
def test_images_are_joined_with_labels_and_splits(tmp_path: Path, end: str):
    listing = MIMICCXRJPGCollection(write_mimic_cxr_jpg(tmp_path / "mimic", end)).read()
    assert listing.label_names == CHEXPERT_FINDINGS
    assert listing.missing == ()
    assert listing.policy == {"uncertain": "ignore"}
    assert listing.patients_known
    assert Counter(record.split for record in listing.records) == {"train": 18, "validation": 6, "test": 6}
    first, lateral, later = listing.records[:3]
    image = "00000000-bde0afdd-112c0b34-7bc16630-4e384014"
    assert first.name == f"files/p10/p10000032/s50414267/{image}.jpg"
    assert (first.patient_id, first.view, lateral.view) == ("10000032", "AP", "LATERAL")
    assert listing.records[3].name.startswith("files/p11/p11000033/s50414269/00000003-")
    assert (
        first.labels[CHEXPERT_FINDINGS.index("Pleural Effusion")]
        == lateral.labels[CHEXPERT_FINDINGS.index("Pleural Effusion")]
        == 1
    )
    assert np.isnan(later.labels).all()
    assert any(note.startswith("1 images are of studies without labels") for note in listing.notes)


def test_views(root: Path):
    records = MIMICCXRJPGCollection(root).read().records
    assert Counter(record.view for record in records) == {"AP": 9, "PA": 5, "LATERAL": 10, "UNKNOWN": 6}
    replace(root / "mimic-cxr-2.0.0-metadata.csv.gz", ",LATERAL,", ",SWIMMERS,")
    listing = MIMICCXRJPGCollection(root).read()
    assert listing.records[1].view == "UNKNOWN"
    assert "views not understood, kept as unknown: 1, such as 'SWIMMERS' (1)" in listing.notes


@pytest.mark.parametrize(("uncertain", "value"), [("ignore", math.nan), ("ones", 1.0), ("zeros", 0.0)])
def test_uncertain_labels_follow_the_policy_and_blanks_stay_unknown(root: Path, uncertain: str, value: float):
    listing = MIMICCXRJPGCollection(root, uncertain=uncertain).read()
    assert listing.policy == {"uncertain": uncertain}
    labels = dict(zip(CHEXPERT_FINDINGS, listing.records[0].labels, strict=True))
    assert np.array_equal(labels["Edema"], value, equal_nan=True)
    assert math.isnan(labels["Fracture"])
    assert np.isnan(listing.records[2].labels).all()  # no row at all is unknown under every policy


def test_every_split_has_both_values_of_a_label(root: Path):
    column = CHEXPERT_FINDINGS.index("Pleural Effusion")
    records = MIMICCXRJPGCollection(root).read().records
    for split in ("train", "validation", "test"):
        assert {0, 1} <= {record.labels[column] for record in records if record.split == split}


def test_other_versions_of_the_tables_are_found_and_two_are_refused(root: Path):
    old, new = root / "mimic-cxr-2.0.0-split.csv.gz", root / "mimic-cxr-2.1.0-split.csv.gz"
    content = old.read_bytes()
    old.rename(new)
    assert len(MIMICCXRJPGCollection(root).read().records) == 30
    old.write_bytes(content)
    with pytest.raises(ValueError, match=r"2\.0\.0-split\.csv\.gz, .*2\.1\.0-split\.csv\.gz found; expected one"):
        MIMICCXRJPGCollection(root).read()


@pytest.mark.parametrize("kind", ["metadata", "chexpert", "split"])
def test_absent_tables_are_named(root: Path, kind: str):
    (root / f"mimic-cxr-2.0.0-{kind}.csv.gz").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"no table mimic-cxr-\*-{kind}\.csv.* such as mimic-cxr-2\.0\.0-{kind}"
    ):
        MIMICCXRJPGCollection(root).read()


def test_missing_images_are_counted(root: Path):
    (root / "files/p10/p10000032/s50414267/00000000-bde0afdd-112c0b34-7bc16630-4e384014.jpg").unlink()
    listing = MIMICCXRJPGCollection(root).read()
    assert len(listing.missing) == 1
    assert len(listing.records) == 29


ZERO, ONE = (f"0000000{number}-bde0afdd-112c0b34-7bc16630-4e384014" for number in (0, 1))


@pytest.mark.parametrize(
    ("kind", "old", "new", "parts"),
    [
        ("metadata", "ViewPosition", "View", ["expected ViewPosition as well"]),
        (
            "metadata",
            "10000032",
            "10000032.0",
            ["row 2, column subject_id: '10000032.0' found; expected a whole number"],
        ),
        ("metadata", "50414267", "../s", ["row 2, column study_id: '../s' found"]),
        ("metadata", ZERO, "../x", ["row 2, column dicom_id: '../x' found; expected a file's name"]),
        ("metadata", ZERO, ONE, [f"1 found in more than one row: {ONE}"]),
        ("metadata", ZERO, "f" * 8, ["row 2: image ffffffff found; expected it in the split's table as well"]),
        ("split", ZERO, ONE, [f"1 found in more than one row: {ONE}"]),
        ("split", ",train", ",val", ["row 2, column split: 'val' found; expected one of train, validate, test"]),
        ("split", "split", "part", ["expected split as well"]),
        ("chexpert", "Edema", "Oedema", ["expected Edema as well"]),
        ("chexpert", "-1.0", "-2", ["row 2, column Edema: '-2' found; expected 0, 1, -1, or empty for unknown"]),
        ("chexpert", "11000033,50414270", "11000033,50414269", ["1 found in more than one row: 11000033 50414269"]),
    ],
)
def test_tables_that_do_not_fit_are_refused(root: Path, kind: str, old: str, new: str, parts: list[str]):
    replace(root / f"mimic-cxr-2.0.0-{kind}.csv.gz", old, new)
    with pytest.raises(ValueError, match=rf"mimic-cxr-2\.0\.0-{kind}\.csv\.gz: ") as caught:
        MIMICCXRJPGCollection(root).read()
    for part in parts:
        assert part in str(caught.value)


def test_other_policies_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="uncertain='2' found; expected one of ignore, ones, zeros"):
        MIMICCXRJPGCollection(tmp_path, uncertain="2")
