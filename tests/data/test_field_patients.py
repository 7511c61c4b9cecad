"""Patients that a table writes in two ways: refused, unless the user says what is meant; the audit sees them too."""

from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import mlvicx
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.collections.hf import HFCollection
from mlvicx_hf.data.collections.people import plain_patient

SIDE = 16


def write(root: Path, patients: list[str], splits: list[str] | None = None) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file_name,patient_id" + (",split" if splits else "")]
    for number, patient in enumerate(patients):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE), np.uint8)).save(root / f"a{number}.png")
        lines.append(",".join([f"a{number}.png", f'"{patient}"', *(splits[number : number + 1] if splits else [])]))
    (root / "metadata.csv").write_text("\n".join(lines))
    return root


PAIRS = [
    ("1", "1.0"),
    ("1", "001"),
    ("P6", "p6"),
    ("P 6", "P6"),
    ("1.0", "01"),
    ("P006", "p6"),
    ("7.00", "7"),
    ("7,0", "7"),
    ("'012", "12"),
    ("M\u00fcller", "Mu\u0308ller"),
    ("P1", "P1\u200b"),
    ("P1", "P\u00ad1"),
    ("P-1", "P\u20111"),
]


@pytest.mark.parametrize(
    "column",
    [
        "subject_id",
        "PatientNumber",
        "pid",
        "MRN",
        "Subject",
        "person_id",
        "pat_id",
        "PTID",
        "Patienten-ID",
        "Patient Identifier",
        "NHS Number",
        "ID_paciente",
        "study_id",
        "StudyInstanceUID",
        "record_id",
        "Accession Number",
    ],
)
def test_a_column_that_seems_to_tell_the_patient_is_not_passed_over(tmp_path: Path, column: str):
    root = write(tmp_path / "a", ["1", "1", "2"])
    table = root / "metadata.csv"
    table.write_text(table.read_text().replace("patient_id", column))
    with pytest.raises(UserError, match=rf"column {column} found, .*expected --patient_column {column}"):
        FolderCollection(root).read()
    records = FolderCollection(root, patient_column=column).read().records
    assert [record.patient_id for record in records] == ["1", "1", "2"]


def test_ids_that_a_spreadsheet_shortened_are_refused(tmp_path: Path):
    """Several patients would become one."""
    root = write(tmp_path / "a", ["123", "1.2346E+11", "1.2346E+11"])
    with pytest.raises(
        UserError, match=r"row 3 \(a1\.png\): patient_id 1\.2346E\+11 found, .*export the column as text"
    ):
        FolderCollection(root).read()


def test_sex_and_age_as_dicom_headers_call_them_are_read(tmp_path: Path):
    root = write(tmp_path / "a", ["1", "2"])
    (root / "metadata.csv").write_text("file_name,patient_id,PatientSex,PatientAge\na0.png,1,F,045Y\na1.png,2,M,9\n")
    listing = FolderCollection(root).read()
    assert [(record.sex, record.age) for record in listing.records] == [("F", 45), ("M", 9)]
    assert "column 'PatientSex' is taken for sex" in listing.notes


def test_view_sex_and_age_under_any_name(tmp_path: Path):
    root = write(tmp_path / "a", ["1", "2"])
    words = "file_name,patient_id,Aufnahme,Geschlecht,Alter\na0.png,1,seitlich,w,34 J\na1.png,2,AP,m,61\n"
    (root / "metadata.csv").write_text(words)
    options = {"view_column": "Aufnahme", "sex_column": "Geschlecht", "age_column": "Alter"}
    listing = FolderCollection(root, **options).read()
    expected = [("LATERAL", "F", 34), ("AP", "M", 61)]
    assert [(record.view, record.sex, record.age) for record in listing.records] == expected
    assert "column 'Aufnahme' is taken for view" in listing.notes
    assert listing.label_names == ()
    pixels = [(root / f"a{number}.png").read_bytes() for number in range(2)]
    table = {"image": pixels, "patient_id": ["1", "2"], "Aufnahme": ["seitlich", "AP"], "Geschlecht": ["w", "m"]}
    pyarrow.parquet.write_table(pyarrow.table(table | {"Alter": [34, 61]}), tmp_path / "x.parquet")
    records = HFCollection(tmp_path / "x.parquet", **options).read().records
    assert [(record.view, record.sex, record.age) for record in records] == expected
    with pytest.raises(UserError, match=r"columns file_name, .* found; expected the age in Jahre"):
        FolderCollection(root, age_column="Jahre").read()
    (root / "metadata.csv").write_text(words.replace("Alter", "view"))
    with pytest.raises(UserError, match="columns Aufnahme, view found; expected one of them as view"):
        FolderCollection(root, view_column="Aufnahme").read()
    for options in ({"sex_column": "Geschlecht", "view_column": "Geschlecht"}, {"age_column": "patient_id"}):
        with pytest.raises(UserError, match=r"column \w+ named as \w+ and as something else; expected one of them"):
            FolderCollection(root, patient_column="patient_id", **options).read()
    (root / "metadata.csv").write_text("file_name,patient_id,view,Aufnahme\na0.png,1,,AP\na1.png,2,,PA\n")
    assert [row.view for row in FolderCollection(root, view_column="Aufnahme").read().records] == ["AP", "PA"]
    (root / "metadata.csv").write_text("file_name,patient_id,Aufnahme,Projection\na0.png,1,,AP\na1.png,2,,PA\n")
    assert [row.view for row in FolderCollection(root, view_column="Aufnahme").read().records] == ["UNKNOWN"] * 2


def test_a_letter_that_means_a_man_or_a_woman_is_refused(tmp_path: Path):
    root = write(tmp_path / "a", ["1", "2"])
    for letter in "HV":
        (root / "metadata.csv").write_text(f"file_name,patient_id,sex\na0.png,1,{letter}\na1.png,2,M\n")
        with pytest.raises(UserError, match="found; expected F and M, since M may mean a woman here"):
            FolderCollection(root).read()


def test_names_of_columns_as_r_writes_them_are_understood(tmp_path: Path):
    root = write(tmp_path / "a", ["1", "1", "2"])
    table = root / "metadata.csv"
    table.write_text(table.read_text().replace("patient_id", "Patient.ID"))
    assert [record.patient_id for record in FolderCollection(root).read().records] == ["1", "1", "2"]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_ids_that_differ_in_spelling_alone_stop_the_run(tmp_path: Path, one: str, other: str):
    root = write(tmp_path / "a", [one, "9", other])
    message = r"1 patient\(s\) found in several spellings, such as .*--patient_ids normalised"
    with pytest.raises(UserError, match=message):
        FolderCollection(root).read()
    exact = FolderCollection(root, patient_ids="exact").read()
    assert [record.patient_id for record in exact.records] == [one, "9", other]
    same = FolderCollection(root, patient_ids="normalised").read()
    assert same.records[0].patient_id == same.records[2].patient_id
    assert (exact.policy, same.policy) == ({"patient_ids": "exact"}, {"patient_ids": "normalised"})


@pytest.mark.parametrize(("one", "other"), [("1", "10"), ("1.5", "15"), ("P60", "P6"), ("100", "1"), ("1.01", "1.1")])
def test_other_patients_stay_others(one: str, other: str):
    assert plain_patient(one) != plain_patient(other)


def test_zero_is_a_patient():
    assert (plain_patient("0"), plain_patient("000"), plain_patient("0.0")) == ("0", "0", "0")


@pytest.mark.parametrize("unknown", ["nan", "NaN", "None", "NA", "null", "<NA>"])
def test_an_unknown_patient_is_no_patient(tmp_path: Path, unknown: str):
    root = write(tmp_path / "a", ["1", unknown])
    for patient_ids in (None, "exact", "normalised"):
        with pytest.raises(UserError, match=r"row 3 \(a1\.png\): empty patient_id found; expected a patient"):
            FolderCollection(root, patient_ids=patient_ids).read()


def test_datasets_follow_the_same_rule(tmp_path: Path):
    root = write(tmp_path / "a", ["1", "1"])
    pixels = [(root / f"a{number}.png").read_bytes() for number in range(2)]
    pyarrow.parquet.write_table(pyarrow.table({"image": pixels, "patient_id": ["P6", "p6"]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="such as P6 = p6"):
        HFCollection(tmp_path / "x.parquet").read()
    listing = HFCollection(tmp_path / "x.parquet", patient_ids="normalised").read()
    assert {record.patient_id for record in listing.records} == {"p6"}


def prepare(root: Path, cache: Path, *words: object) -> None:
    options = ("--size", SIDE, "--num_workers", 0, "--quiet")
    done = mlvicx("prepare", "--collection", "folder", "--root", root, "--output", cache, *options, *words)
    assert done.returncode == 0, done.stderr


def test_the_audit_finds_them_in_a_cache_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write(tmp_path / "a", ["1", "2", "001", "3"], ["train", "train", "test", "test"])
    with monkeypatch.context() as old:  # as before the rule
        old.setattr("mlvicx_hf.data.collections.people.spelled_alike", lambda patients: [])
        prepare(root, tmp_path / "old")
    audit = mlvicx("audit", tmp_path / "old", "--quiet")
    assert audit.returncode == 1
    assert "1 patient(s) whose ids differ in zeros, .0, case or blanks alone in" in audit.stdout
    assert "such as 1 = 001" in audit.stdout
    prepare(root, tmp_path / "exact", "--patient_ids", "exact")
    assert mlvicx("audit", tmp_path / "exact", "--quiet").returncode == 0


def test_patients_whose_zeros_datasets_would_drop_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf-cache")
    root = write(tmp_path / "a", ["001", "1", "2"])
    message = (
        r"metadata.csv: column patient_id with 001 found, which `datasets` reads as 1; expected --collection folder"
    )
    with pytest.raises(UserError, match=message):
        HFCollection(root).read()
    table = root / "metadata.csv"
    table.write_text(table.read_text().replace("001", "4"))
    assert [record.patient_id for record in HFCollection(root).read().records] == ["4", "1", "2"]
