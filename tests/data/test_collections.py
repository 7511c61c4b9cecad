import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mlvicx_hf.data.collections.base import Listing, normalize_view
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.collections.people import parse_age, parse_sex
from mlvicx_hf.data.collections.phantom import PhantomCollection
from mlvicx_hf.data.synthetic.phantom import draw_phantom

NAMES = ("a.png", "b.png", "sub/c.png", "sub/d.png")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Four images, two of them in a sub-folder."""
    for name in NAMES:
        write_image(tmp_path / "images" / name)
    return tmp_path / "images"


def write_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), 100).save(path)


def read_table(root: Path, lines: str, **options: object) -> Listing:
    """Listing with a metadata.csv of these lines."""
    (root / "metadata.csv").write_text(lines)
    return FolderCollection(root, **options).read()


def table(columns: str, *cells: str) -> str:
    """Table of `NAMES` with other columns; a row's cells are joined by commas."""
    return (
        "\n".join([f"file_name,{columns}", *(f"{name},{row}" for name, row in zip(NAMES, cells, strict=True))]) + "\n"
    )


def same(found: tuple[float, ...], *expected: float) -> bool:
    return np.array_equal(found, expected, equal_nan=True)


# Folders without metadata


def test_scan_finds_images_of_any_case_in_order_and_warns_that_patients_are_unknown(root: Path):
    write_image(root / "0.PNG")
    (root / "notes.txt").write_text("none")
    write_image(root / ".hidden" / "e.png")
    (root / "._a.png").write_text("left by an archive")
    listing = FolderCollection(root).read()
    assert [record.name for record in listing.records] == ["0.PNG", "a.png", "b.png", "sub/c.png", "sub/d.png"]
    assert [record.patient_id for record in listing.records] == [record.name for record in listing.records]
    assert all(record.path.is_file() and record.view == "UNKNOWN" for record in listing.records)
    assert "each image is counted as a patient of its own" in listing.notes[0]
    assert listing.label_names == ()


def test_scan_names_tables_that_it_does_not_read(root: Path):
    (root / "Labels export.csv").write_text("Image File;Finding\n0.png;1\n")
    assert any(
        note == f"tables in {root} that were not read: Labels export.csv; --metadata takes one"
        for note in FolderCollection(root).read().notes
    )


def test_scan_does_not_follow_links_out_of_the_root(root: Path, tmp_path: Path):
    write_image(tmp_path / "outside" / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "inside.png").symlink_to(root / "a.png")
    listing = FolderCollection(root).read()
    assert [record.name for record in listing.records] == ["a.png", "b.png", "inside.png", "sub/c.png", "sub/d.png"]
    assert any("1 links that lead out" in note for note in listing.notes)


def test_root_may_be_a_link_itself(root: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(root)
    assert len(FolderCollection(tmp_path / "link").read().records) == 4
    assert len(read_table(tmp_path / "link", table("patient_id", *"1234")).records) == 4


def test_empty_and_absent_folders_are_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"no images found; expected PNG, JPEG"):
        FolderCollection(tmp_path).read()
    with pytest.raises(FileNotFoundError, match="no such folder"):
        FolderCollection(tmp_path / "none").read()


# Metadata: files, patients, views, splits


def test_metadata_gives_patients_views_and_splits(root: Path):
    listing = read_table(
        root, table("patient_id,view,split", "01,PA,train", "01,AP Supine,train", "2,LL,val", "3,,test")
    )
    assert [record.patient_id for record in listing.records] == ["01", "01", "2", "3"]
    assert [record.view for record in listing.records] == ["PA", "AP", "LATERAL", "UNKNOWN"]
    assert [record.split for record in listing.records] == ["train", "train", "validation", "test"]
    assert listing.records[2].path == root / "sub/c.png"
    assert listing.notes == []


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        *[("pa", "PA"), ("AP", "AP"), ("AP Erect", "AP"), ("L", "LATERAL"), ("RL", "LATERAL"), ("LL", "LATERAL")],
        *[("Lateral", "LATERAL"), ("", "UNKNOWN"), (" unknown ", "UNKNOWN"), ("oblique", None)],
        *[
            (view, "LATERAL")
            for view in ("seitlich", "PA und seitlich", "latéral", "Latero-lateral", "Profil", "Perfil")
        ],
        *[("bilateral", None), ("BILATERALLY", None)],
    ],
)
def test_views_are_normalised(view: str, expected: str | None):
    assert normalize_view(view) == expected


def test_views_not_understood_are_unknown_and_noted(root: Path):
    listing = read_table(root, table("patient_id,view", "1,odd", "2,odd", "3,PA", "4,AP"))
    assert listing.records[0].view == "UNKNOWN"
    assert listing.notes == ["views not understood, kept as unknown: 2, such as 'odd' (2)"]


def test_usual_columns_are_known_however_they_are_written(root: Path):
    """A patient column that is not recognised would put one patient into two splits."""
    listing = read_table(root, table("Patient ID,SPLIT,Patient-Age,Sex,Edema", *(f"{i},train,4,F,1" for i in "1122")))
    assert [record.patient_id for record in listing.records] == ["1", "1", "2", "2"]
    assert listing.patients_known
    assert {(record.split, record.sex) for record in listing.records} == {("train", "F")}
    assert listing.label_names == ("Edema",)
    assert "column 'Patient ID' is taken for patient_id" in listing.notes
    with pytest.raises(ValueError, match=r"columns patient_id, PatientID found; expected one of them as patient_id"):
        read_table(root, table("patient_id,PatientID", *("1,1",) * 4))
    listing = read_table(root, table("Patient ID,Sex", *(f"{i},1" for i in "1122")), label_columns=["Sex"])
    assert listing.label_names == ("Sex",)  # what the user names stays as it is


def test_prepared_caches_in_the_folder_are_no_radiographs(root: Path):
    cache = root / "prepared"
    (cache / "train").mkdir(parents=True)
    (cache / "cache.json").write_text("{}")
    for name in ("contact_sheet.png", "train/x.png"):
        Image.new("L", (9, 9)).save(cache / name)
    assert [record.name for record in FolderCollection(root).read().records] == list(NAMES)


def test_metadata_without_patients_warns(root: Path):
    listing = read_table(root, table("view", "PA", "PA", "AP", "AP"))
    assert [record.patient_id for record in listing.records] == list(NAMES)
    assert "no column patient_id" in listing.notes[0]
    assert "one patient's images may fall into two splits" in listing.notes[0]


@pytest.mark.parametrize("column", ["file_name", "file", "image", "path", "picture"])
def test_file_and_patient_columns_can_be_named(root: Path, column: str):
    text = table("subject", *"1122").replace("file_name", column)
    options = {"file_column": column} if column == "picture" else {}
    listing = read_table(root, text, patient_column="subject", **options)
    assert [(record.name, record.patient_id) for record in listing.records] == list(zip(NAMES, "1122", strict=True))
    assert listing.label_names == ()


def write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
    path.write_text("\n".join([",".join(rows[0]), *lines]))


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("\n\n".join(json.dumps(row) for row in rows))


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_three_kinds_of_tables_mean_the_same(root: Path, write: Callable[[Path, list[dict[str, object]]], None]):
    rows = [
        {"file_name": name, "patient_id": number, "Edema": edema, "Mass": mass}
        for number, (name, edema, mass) in enumerate(zip(NAMES, (1, 0, None, 1), (0.0, 1.0, 0.0, None), strict=True))
    ]
    write(root / f"metadata.{write.__name__.removeprefix('write_')}", rows)
    listing = FolderCollection(root).read()
    assert [record.patient_id for record in listing.records] == ["0", "1", "2", "3"]
    assert listing.label_names == ("Edema", "Mass")
    expected = [(1, 0), (0, 1), (math.nan, 0), (1, math.nan)]
    assert all(same(record.labels, *labels) for record, labels in zip(listing.records, expected, strict=True))


def test_metadata_is_found_from_here_or_from_the_root(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (root / "mine.csv").write_text(table("patient_id", *"1234"))
    monkeypatch.chdir(tmp_path)
    assert len(FolderCollection(root, "mine.csv").read().records) == 4
    (tmp_path / "mine.csv").write_text("file_name,patient_id\na.png,7\n")
    assert FolderCollection(root, "mine.csv").read().records[0].patient_id == "7"
    with pytest.raises(FileNotFoundError, match=r"none\.csv or .*none\.csv: no such file"):
        FolderCollection(root, "none.csv").read()


def test_two_metadata_tables_are_refused(root: Path):
    (root / "metadata.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"metadata\.csv, .*metadata\.jsonl found; say which one"):
        read_table(root, table("view", *"1234"))


def test_missing_files_are_listed_and_the_others_kept(root: Path):
    (root / "sub/c.png").unlink()
    listing = read_table(root, table("patient_id", *"1234"))
    assert listing.missing == ("sub/c.png",)
    assert [record.name for record in listing.records] == ["a.png", "b.png", "sub/d.png"]
    assert [record.patient_id for record in listing.records] == ["1", "2", "4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"metadata\.csv: empty file found; expected a header line"),
        ("file_name,patient_id\n", r"no rows found; expected one row an image"),
        ("name,patient_id\na.png,1\n", r"columns name, patient_id found; expected the file in file_name or file or"),
        ("name,View Position\na.png,AP\n", r"columns name, View Position found; expected the file in file_name or"),
        ("file_name,patient_id\na.png\n", r"row 2 has 1 fields; expected 2"),
        (
            'file_name,note\na.png,"portable\nb.png,\n',
            r"in line 2 is no CSV: unexpected end of data",
        ),
        (
            'file_name,note\na.png,"left\nb.png,"right\nc.png,\n',
            r"in line 2 is no CSV: .* expected after",
        ),
        ('sep=;\nfile_name;note\na.png;"portable\nb.png;\n', "in line 3 is no CSV: unexpected end of data"),
        ("file_name,a,a\na.png,1,1\n", r"column\(s\) 'a' found twice"),
        ("file_name,patient_id\na.png,1\nb.png,\n", r"row 3 \(b\.png\): empty patient_id found"),
        ("file_name,patient_id\n,1\n", r"row 2, column file_name: '' found"),
        ("file_name,patient_id\na.png,1\n./a.png,1\n", r"1 found in more than one row: a\.png"),
        (
            "file_name,patient_id\na.png,1\n../b.png,1\n",
            r"row 3: file '\.\./b\.png' found; expected a path below the root",
        ),
        ("file_name,patient_id\n/etc/a.png,1\n", r"row 2: file '/etc/a\.png' found; expected a path below the root"),
        ("file_name,split\na.png,train\nb.png,holdout\n", r"row 3, column split: 'holdout' found; expected train, val"),
        ("file_name,split\na.png,train\nb.png,\n", r"row 3, column split: '' found; expected train"),
    ],
)
def test_tables_that_do_not_fit_are_refused(root: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_table(root, text)


@pytest.mark.parametrize("ending", ["\r\n", "\n"])
def test_tables_as_spreadsheets_write_them_are_read(root: Path, ending: str):
    text = ending.join(["sep=;", '"file_name";"patient_id"', 'a.png;"p;1"', "b.png;p2", ";", ""])
    assert [record.patient_id for record in read_table(root, text).records] == ["p;1", "p2"]
    (root / "metadata.csv").rename(root / "m.tsv")
    (root / "m.tsv").write_text("file_name\tpatient_id\na.png\tp,1\n")
    assert FolderCollection(root, "m.tsv").read().records[0].patient_id == "p,1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name\na\nb\n", r"none of the 2 files of column file_name found, such as a; a\.png is there; expected"),
        ("file_name\nA.PNG\n", r"such as A\.PNG; a\.png is there; expected paths below .*, with their suffix"),
        ("image,path\n0001,a.png\n0002,b.png\n", r"column path has files that exist: --file_column path takes it"),
    ],
)
def test_files_that_are_probably_meant_are_named(root: Path, text: str, message: str):
    with pytest.raises(FileNotFoundError, match=message):
        read_table(root, text)


def test_named_columns_that_are_absent_are_refused(root: Path):
    text = table("view", *"1234")
    with pytest.raises(ValueError, match="columns file_name, view found; expected the patient in subject"):
        read_table(root, text, patient_column="subject")
    with pytest.raises(ValueError, match="columns file_name, view found; expected the file in picture"):
        read_table(root, text, file_column="picture")
    with pytest.raises(ValueError, match=r"expected Edema as well"):
        read_table(root, text, label_columns=["view", "Edema"])


def test_metadata_may_not_use_a_link_out_of_the_root(root: Path, tmp_path: Path):
    write_image(tmp_path / "outside" / "secret.png")
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(ValueError, match=r"file 'link/secret\.png' is a link that leads out of the root"):
        read_table(root, "file_name\nlink/secret.png\n")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.jsonl", b'{"file_name": "a.png"}\n{oops\n', "line 2 is not JSON"),
        ("m.jsonl", b'["a.png"]\n', "line 1 is a list; expected an object"),
        ("m.parquet", b"PAR1 not really", "not a readable parquet file"),
        ("m.csv", b"file_name\n\xff\xfe\n", "byte 0xff found in line 2; expected UTF-8"),
        ("m.csv.gz", b"file_name\n", "not a readable gzip file"),
        ("m.xlsx", b"", r"\.xlsx found; expected a \.csv, \.tsv, \.jsonl or \.parquet file"),
    ],
)
def test_damaged_tables_are_refused(root: Path, name: str, content: bytes, message: str):
    (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        FolderCollection(root, name).read()


# Metadata: labels


def test_columns_of_zeros_and_ones_are_labels_and_the_others_are_named(root: Path):
    write_image(root / "m.png")
    columns = "patient_id,sex,age,mask_file_name,Edema,score,empty,Mass"
    listing = read_table(
        root,
        table(columns, "1,F,1,m.png,1,0.5,,0", "2,M,1,m.png,0,0.25,,", "3,F,0,m.png,,0,,1.0", "4,F,0,m.png,0,1,,0"),
    )
    assert listing.label_names == ("Edema", "Mass")
    assert not listing.exclusive
    assert same(listing.records[1].labels, 0, math.nan)
    assert same(listing.records[2].labels, math.nan, 1)
    assert listing.notes == ["columns ignored: score (holds '0.5'), empty (empty)"]


def test_a_stray_value_among_labels_is_refused_rather_than_the_column_lost(root: Path):
    text = table("patient_id,Edema", "1,0", "2,1", "3,maybe", "4,0")
    with pytest.raises(ValueError, match=r"row 4, column Edema: 'maybe' found; expected 0, 1, or empty.*label_columns"):
        read_table(root, text)


def test_explicit_label_columns_keep_their_order(root: Path):
    text = table("patient_id,Edema,Mass,other", "1,1,0,1", "2,0,0,1", "3,0,1,1", "4,0,0,1")
    listing = read_table(root, text, label_columns=["Mass", "Edema"])
    assert listing.label_names == ("Mass", "Edema")
    assert same(listing.records[0].labels, 0, 1)


@pytest.mark.parametrize("value", ["maybe", "2", "0.5"])
def test_unknown_label_values_are_refused_with_their_place(root: Path, value: str):
    text = table("patient_id,Edema", "1,0", "2,1", f"3,{value}", "4,0")
    message = rf"metadata\.csv: row 4, column Edema: '{value}' found; expected 0, 1, or empty for unknown"
    with pytest.raises(ValueError, match=message):
        read_table(root, text, label_columns=["Edema"])


@pytest.mark.parametrize("options", [{}, {"label_columns": ["Edema"]}])
def test_uncertain_labels_need_a_policy(root: Path, options: dict[str, list[str]]):
    text = table("patient_id,Edema", "1,0", "2,-1", "3,1", "4,")
    with pytest.raises(ValueError, match=r"row 3, column Edema: '-1' found; .* \(--uncertain ignore\|ones\|zeros says"):
        read_table(root, text, **options)
    for uncertain, value in (("ignore", math.nan), ("ones", 1.0), ("zeros", 0.0)):
        listing = read_table(root, text, uncertain=uncertain, **options)
        assert listing.policy == {"uncertain": uncertain}
        labels = [record.labels[0] for record in listing.records]
        assert np.array_equal(labels, [0, value, 1, math.nan], equal_nan=True)
    assert read_table(root, text.replace("-1", "1"), **options).policy == {}


def test_a_policy_for_uncertain_labels_does_not_accept_other_values(root: Path):
    text = table("patient_id,Edema", "1,0", "2,-1.0", "3,-2", "4,1")
    with pytest.raises(ValueError, match=r"row 4, column Edema: '-2' found; expected 0, 1, -1, or empty for unknown$"):
        read_table(root, text, label_columns=["Edema"], uncertain="ones")


def test_a_policy_for_uncertain_labels_is_refused_where_there_can_be_none(root: Path):
    with pytest.raises(ValueError, match="uncertain='maybe' found; expected one of ignore, ones, zeros"):
        FolderCollection(root, uncertain="maybe")
    with pytest.raises(ValueError, match=r"metadata\.csv: column label holds names, .*--uncertain does not fit"):
        read_table(root, table("patient_id,label", "1,a", "2,b", "3,a", "4,b"), uncertain="ones")
    (root / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"none of metadata\.csv, .*; expected a table with labels, for --unc"):
        FolderCollection(root, uncertain="ones").read()


# Metadata: persons


def test_sex_and_age(root: Path):
    listing = read_table(root, table("patient_id,sex,age", "1,F,45", "2, Male ,045Y", "3,woman,018M", "4,,"))
    assert [record.sex for record in listing.records] == ["F", "M", "F", ""]
    assert np.array_equal([record.age for record in listing.records], [45, 45, 1.5, math.nan], equal_nan=True)
    assert listing.notes == []
    assert listing.label_names == ()


def test_persons_not_understood_are_unknown_and_counted(root: Path):
    listing = read_table(root, table("patient_id,sex,age", "1,2,121", "2,x,old", "3,2,-3", "4,man,120"))
    assert [record.sex for record in listing.records] == ["", "", "", "M"]
    ages = [record.age for record in listing.records]
    assert np.array_equal(ages, [math.nan, math.nan, math.nan, 120], equal_nan=True)
    assert listing.notes == [
        "sexes not understood, kept as unknown: 3, such as '2' (2), 'x' (1)",
        "ages not understood, kept as unknown: 3, such as '121' (1), 'old' (1), '-3' (1)",
    ]


@pytest.mark.parametrize(
    ("text", "sex"),
    [
        *[("f", "F"), ("FEMALE", "F"), ("Woman", "F"), ("m", "M"), ("male", "M"), ("man", "M"), ("", ""), ("0", None)],
        *[("W", "F"), ("Männlich", "M"), ("H", None)],
    ],
)
def test_sexes_are_normalised(text: str, sex: str | None):
    assert parse_sex(text) == sex


@pytest.mark.parametrize(
    ("text", "age"),
    [
        *[("45", 45), ("45.5", 45.5), ("045Y", 45), ("006m", 0.5), ("0", 0), ("120", 120), ("1440M", 120)],
        *[
            ("121", None),
            ("45 years", 45),
            ("34 J", 34),
            ("45 weeks", None),
            ("-1", None),
            ("nan", None),
            ("Y", None),
            ("9e9", None),
            ("57M", None),
        ],
    ],
)
def test_ages_are_years(text: str, age: float | None):
    assert parse_age(text) == age


def test_ages_may_be_unknown_or_in_weeks_and_days():
    assert all(math.isnan(parse_age(text)) for text in ("", " ", "Unknown"))
    assert parse_age("052W") == pytest.approx(1, abs=0.01)
    assert parse_age("365D") == pytest.approx(1, abs=0.01)


def test_patients_are_known_where_a_column_names_them(root: Path):
    assert not FolderCollection(root).read().patients_known
    assert read_table(root, table("patient_id", *"1234")).patients_known
    assert read_table(root, table("subject", *"1234"), patient_column="subject").patients_known
    assert not read_table(root, table("view", *"1234")).patients_known


def test_class_names_become_one_column_each(root: Path):
    listing = read_table(root, table("patient_id,label,flag", "1,viral,0", "2,normal,0", "3,,1", "4,viral,1"))
    assert listing.label_names == ("normal", "viral")
    assert listing.exclusive
    labels = [record.labels for record in listing.records]
    assert labels[0] == (0, 1)
    assert labels[1] == (1, 0)
    assert same(labels[2], math.nan, math.nan)
    assert listing.notes == ["columns ignored: flag"]


def test_whole_numbers_are_classes_in_the_order_of_numbers(root: Path):
    listing = read_table(root, table("patient_id,label", "1,10", "2,9", "3,0", "4,9"))
    assert listing.label_names == ("0", "9", "10")
    assert listing.records[1].labels == (0, 1, 0)


def test_a_label_of_other_numbers_is_no_class(root: Path):
    with pytest.raises(ValueError, match=r"row 3, column label: '0\.37' found; expected a class name or whole number"):
        read_table(root, table("patient_id,label", "1,1", "2,0.37", "3,0", "4,1"))


def test_joined_labels(root: Path):
    listing = read_table(root, table("patient_id,labels", "1,Mass|Edema", "2,No Finding", "3,", "4,Mass"))
    assert listing.label_names == ("Edema", "Mass")
    assert not listing.exclusive
    expected = [(1, 1), (0, 0), (math.nan, math.nan), (0, 1)]
    assert all(same(record.labels, *row) for record, row in zip(listing.records, expected, strict=True))


def test_lists_of_labels_in_jsonl(root: Path):
    write_jsonl(root / "metadata.jsonl", [{"file_name": "a.png", "labels": ["Mass", "Edema"]}, {"file_name": "b.png"}])
    records = FolderCollection(root).read().records
    assert same(records[0].labels, 1, 1)
    assert same(records[1].labels, math.nan, math.nan)


@pytest.mark.parametrize("value", ["No Finding|Mass", "Mass|", "Mass||Edema"])
def test_joined_labels_that_contradict_themselves_are_refused(root: Path, value: str):
    with pytest.raises(ValueError, match=r"row 2, column labels: .* expected names joined by \|, or No Finding alone"):
        read_table(root, table("patient_id,labels", f"1,{value}", "2,Mass", "3,Mass", "4,Mass"))


def test_label_and_labels_together_are_refused(root: Path):
    with pytest.raises(ValueError, match="columns label and labels found; expected one of them"):
        read_table(root, table("label,labels", "a,b", "a,b", "a,b", "a,b"))


# Metadata: masks


def test_masks_are_listed_and_are_no_labels(root: Path):
    for name in ("ma", "mb", "md"):
        write_image(root / "masks" / f"{name}.png")
    text = table("patient_id,mask_file_name,Edema", "1,masks/ma.png,1", "2,masks/mb.png,0", "3,,1", "4,masks/md.png,0")
    listing = read_table(root, text)
    assert listing.mask_names == ("mask",)
    assert listing.label_names == ("Edema",)
    found = [record.mask_path for record in listing.records]
    assert found == [root / "masks/ma.png", root / "masks/mb.png", None, root / "masks/md.png"]
    assert read_table(root, text, mask_names=["lungs"]).mask_names == ("lungs",)
    assert read_table(root, text, mask_names=["background", "lung"]).mask_names == ("background", "lung")


def test_the_mask_column_can_be_named_and_is_no_label_then(root: Path):
    (root / "1").write_bytes((root / "a.png").read_bytes())
    listing = read_table(root, table("patient_id,lungs", "1,1", "2,1", "3,1", "4,"), mask_column="lungs")
    assert listing.label_names == ()
    assert [record.mask_path for record in listing.records] == [root / "1", root / "1", root / "1", None]


def test_collections_without_a_mask_column_have_no_masks(root: Path):
    listing = read_table(root, table("patient_id", *"1234"))
    assert listing.mask_names == ()
    assert all(record.mask_path is None for record in listing.records)


def test_missing_masks_count_like_missing_images(root: Path):
    (root / "b.png").unlink()
    listing = read_table(root, table("patient_id,mask_file_name", "1,m.png", "2,m.png", "3,", "4,a.png"))
    assert listing.missing == (f"{root / 'm.png'} (mask of a.png)", "b.png")
    assert [record.name for record in listing.records] == ["sub/c.png", "sub/d.png"]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"mask_names": ["lungs"]}, "mask_file_name"), ({"mask_column": "contour"}, "contour")],
)
def test_masks_that_are_asked_for_and_not_listed_are_refused(root: Path, options: dict[str, object], expected: str):
    with pytest.raises(FileNotFoundError, match=rf"none of metadata\.csv, .* found; .*masks in column {expected}"):
        FolderCollection(root, **options).read()
    with pytest.raises(
        ValueError, match=rf"metadata\.csv: columns file_name, view found; expected the mask in {expected}"
    ):
        read_table(root, table("view", *"1234"), **options)


def test_masks_stay_below_the_root_and_have_names(root: Path):
    text = table("patient_id,mask_file_name", "1,", "2,../m.png", "3,", "4,")
    with pytest.raises(ValueError, match=r"row 3: file '\.\./m\.png' found; expected a path below the root"):
        read_table(root, text)
    with pytest.raises(ValueError, match="mask_names='lung,lung' found; expected one structure, or up to 256 classes"):
        read_table(root, text.replace("../m.png", ""), mask_names=["lung", "lung"])


# Phantoms


def test_phantoms_are_listed_with_the_labels_of_their_drawings():
    listing = PhantomCollection(3, 2, size=48, seed=5).read()
    assert len(listing.records) == 6
    for index, record in enumerate(listing.records):
        phantom = draw_phantom(index // 2, index % 2, size=48, seed=5)
        assert (record.name, record.patient_id, record.labels) == (phantom.image_id, phantom.patient_id, phantom.labels)
        assert record.draw is not None
        assert np.array_equal(record.draw().pixels, phantom.image)
        assert record.draw().mask is None
    assert listing.mask_names == ()


@pytest.mark.parametrize("mask", ["lungs", "heart", "Nodule"])
def test_phantoms_draw_the_mask_that_is_asked_for(mask: str):
    listing = PhantomCollection(2, 1, size=48, mask_names=mask).read()
    assert listing.mask_names == (mask,)
    for patient, record in enumerate(listing.records):
        assert np.array_equal(record.draw().mask, draw_phantom(patient, size=48).masks[mask])


def test_unknown_masks_of_phantoms_are_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"mask_names='Lungs' found; expected one of lungs, heart, Cardiomegaly, .*Nodule"
    ):
        PhantomCollection(mask_names="Lungs")


def test_no_phantoms_are_refused():
    with pytest.raises(ValueError, match="num_patients=0 found; expected 1 or more"):
        PhantomCollection(0)


def test_names_that_python_takes_for_numbers_stay_names(root: Path):
    listing = read_table(root, table("patient_id,label", "1,1_000", "2,2_0", "3,20", "4,20"))
    assert listing.label_names == ("1_000", "20", "2_0")


def test_cells_of_r_without_a_value_are_empty_in_every_column(root: Path):
    rows = ("1,NA,NA,NA,NA,NA,NA", "2,PA,F,50,nan,NULL,1", *["3,PA,F,50,NA,NA,0"] * 2)
    listing = read_table(root, table("patient_id,view,sex,age,split,mask_file_name,Edema", *rows), mask_names=("lung",))
    first, second = listing.records[:2]
    assert (first.view, first.split, first.mask_path) == ("UNKNOWN", None, None)
    assert (second.view, second.split, second.mask_path) == ("PA", None, None)
    assert (first.sex, second.sex, second.age) == ("", "F", 50)
    assert math.isnan(first.age)
    assert not any("understood" in note for note in listing.notes)


def test_an_empty_column_view_does_not_hide_another(root: Path):
    listing = read_table(root, table("patient_id,view,View Position", "1,,AP", "2,,PA", "3,,", "4,,LL"))
    assert [record.view for record in listing.records] == ["AP", "PA", "UNKNOWN", "LATERAL"]
    assert "column 'View Position' is taken for view" in listing.notes
