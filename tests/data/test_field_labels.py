"""Label cells as real tables hold them: read as they are meant, or refused with file, row and value."""

import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers import mlvicx
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections.base import Listing
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.collections.hf import HFCollection
from mlvicx_hf.data.collections.labels import read_labels

NAN = math.nan
Cells = list[Any]


def read_csv(cells: Cells, column: str = "labels", **options: Any) -> tuple[tuple[str, ...], list[tuple[float, ...]]]:
    """Names and rows of a column, whose cells are the text of a CSV file."""
    found = read_labels(Path("m.csv"), {"file_name": [""] * len(cells), column: cells}, **options)
    return found.names, found.rows


def write_images(root: Path, count: int) -> list[str]:
    names = [f"a{number}.png" for number in range(count)]
    for number, name in enumerate(names):
        Image.fromarray(np.full((4, 4), number, np.uint8)).save(root / name)
    return names


def read_typed(tmp_path: Path, kind: str, cells: Cells, column: str = "labels", **options: Any) -> Listing:
    names = write_images(tmp_path, len(cells))
    rows = [{"file_name": name, column: cell} for name, cell in zip(names, cells, strict=True)]
    if kind == "jsonl":
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return FolderCollection(tmp_path, **options).read()
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "metadata.parquet")
        return FolderCollection(tmp_path, **options).read()
    content = [{"image": (tmp_path / name).read_bytes(), column: cell} for name, cell in zip(names, cells, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "x.parquet")
    return HFCollection(tmp_path / "x.parquet", **options).read()


def assert_rows(found: list[tuple[float, ...]], expected: list[tuple[float, ...]]) -> None:
    assert np.array_equal(np.array(found, float), np.array(expected, float), equal_nan=True), found


FORMS = {
    "python": ["['Pleural effusion', 'Mass']", "['Mass']", "[]", ""],
    "json": ['["Pleural effusion", "Mass"]', '["Mass"]', "[]", "null"],
    "tuple and set": ["('Pleural effusion', 'Mass')", "{'Mass'}", "()", "None"],
    "bars": ["Pleural effusion|Mass", "Mass", "No Finding", "NaN"],
    "commas": ["Pleural effusion, Mass", "Mass", "no finding", "NA"],
    "semicolons": ["Pleural effusion;Mass", " Mass ", "No_Finding", "n/a"],
    "spellings": ["Pleural effusion|MASS", "Mass", "NO FINDING", ""],
    "objects": [
        *('{"Pleural effusion": 1, "Mass": true}', "{'Mass': 1, 'Pleural effusion': 0}"),
        *('{"Mass": 0, "Pleural effusion": "no"}', '{"Mass": null}'),
    ],
}


@pytest.mark.parametrize("form", FORMS)
def test_findings_in_every_spelling_mean_the_same(form: str):
    names, rows = read_csv(FORMS[form])
    assert tuple(sorted(name.lower() for name in names)) == ("mass", "pleural effusion")
    assert_rows(
        [row if names[0].lower() == "mass" else row[::-1] for row in rows], [(1, 1), (1, 0), (0, 0), (NAN, NAN)]
    )


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_an_empty_list_is_negative_and_null_is_unknown(tmp_path: Path, kind: str):
    listing = read_typed(tmp_path, kind, [["Edema"], [], ["Mass", "Edema"], None])
    assert listing.label_names == ("Edema", "Mass")
    assert_rows([record.labels for record in listing.records], [(1, 0), (0, 0), (1, 1), (NAN, NAN)])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_lists_of_zeros_and_ones_need_the_names(tmp_path: Path, kind: str):
    cells = [[0, 1], [1, 1], [0, 0], None]
    with pytest.raises(UserError, match=r"row 1, column labels: '\[0, 1\]' found; .*--label_names"):
        read_typed(tmp_path, kind, cells)
    listing = read_typed(tmp_path, kind, cells, label_names=["Mass", "Edema"])
    assert listing.label_names == ("Mass", "Edema")
    assert_rows([record.labels for record in listing.records], [(0, 1), (1, 1), (0, 0), (NAN, NAN)])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf"])
def test_objects_and_names_with_bars_of_typed_tables(tmp_path: Path, kind: str):
    listing = read_typed(tmp_path, kind, [{"Edema": 1, "Mass": 0}, {"Edema": 0, "Mass": None}])
    assert listing.label_names == ("Edema", "Mass")
    assert_rows([record.labels for record in listing.records], [(1, 0), (0, NAN)])


@pytest.mark.parametrize(
    "cell",
    [
        *("[0, 1]", "0|1|0", "0 1 0", "[0 1 0]", "['a' 'b']", "['a', 1]", "[['a']]", "['a', None]", "['']", "['a'"),
        *("a|", "1", '{"a": 2}', '{"a": "maybe"}', "['No Finding', 'a']", "array(['a'])", "['1']", "[-1]"),
    ],
)
def test_cells_that_could_be_misread_are_refused_with_their_place(cell: str):
    with pytest.raises(UserError, match=r"m\.csv: row 3, column labels: .* found; expected names"):
        read_csv(["['Edema']", cell])


def test_more_numbers_than_names_and_names_of_no_finding_are_refused():
    with pytest.raises(UserError, match="row 2, column labels"):
        read_csv(["[0, 1, 1]"], label_names=["a", "b"])
    with pytest.raises(UserError, match="row 3, column labels: 'c' found"):
        read_csv(["a", "c"], label_names=["a", "b"])
    names, rows = read_csv(["[0, -1]", "[1, 0]", "B"], label_names=["a", "b"], uncertain="ones")
    assert (names, rows) == (("a", "b"), [(0, 1), (1, 0), (0, 1)])
    with pytest.raises(UserError, match="expected labels in label or labels, for --label_names"):
        read_csv(["1"], column="Edema", label_names=["a"])


def test_two_separators_are_refused():
    with pytest.raises(UserError, match=r"column labels with '\|' and ',' between names"):
        read_csv(["Edema|Mass", "Edema, Mass"])


def test_classes_with_unknowns_spellings_and_floats():
    names, rows = read_csv(["Edema", "None", "Mass", "edema", "NA", " Edema "], column="label")
    assert names == ("Edema", "Mass")
    assert_rows(rows, [(1, 0), (NAN, NAN), (0, 1), (1, 0), (NAN, NAN), (1, 0)])
    assert read_csv(["1.0", "0", "", "10"], column="label")[0] == ("0", "1", "10")
    assert read_csv(["True", "false", "nan"], column="label")[0] == ("0", "1")


def test_a_label_with_several_findings_is_read_as_such():
    names, rows = read_csv(["Edema|Mass", "Mass", "No Finding"], column="label")
    assert (names, rows) == (("Edema", "Mass"), [(1, 1), (0, 1), (0, 0)])
    with pytest.raises(UserError, match=r"row 3, column label: 'Edema, Mass' found, and a part of it alone"):
        read_csv(["Edema", "Edema, Mass"], column="label")
    assert read_csv(["pneumonia, viral", "normal"], column="label")[0] == ("normal", "pneumonia, viral")


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["True", "False", "true", ""], [1, 0, 1, NAN]),
        (["1", "NA", "NA", "NA"], [1, NAN, NAN, NAN]),
        (["nan", "None", "null", "0"], [NAN, NAN, NAN, 0]),
        (["yes", "no", "1", "0.0"], [1, 0, 1, 0]),
        (["Positive", "negative", "absent", "N/A"], [1, 0, 0, NAN]),
    ],
)
def test_columns_of_a_finding(cells: Cells, expected: list[float]):
    names, rows = read_csv(cells, column="Edema")
    assert names == ("Edema",)
    assert_rows(rows, [(value,) for value in expected])


@pytest.mark.parametrize("cells", [["1", "maybe", "perhaps", "?"], ["0", "1", "2", "1"], ["unclear", "0", "mild", "x"]])
def test_a_column_with_labels_and_other_cells_is_an_error_not_lost(cells: Cells):
    with pytest.raises(UserError, match=r"m\.csv: row \d, column Edema: .* found; expected 0, 1, or empty"):
        read_csv(cells, column="Edema")


def test_columns_of_one_finding_twice_are_refused():
    with pytest.raises(UserError, match="columns Edema, edema found for one finding"):
        read_labels(Path("m.csv"), {"Edema": ["1"], "edema": ["0"]})


def test_columns_of_0_and_1_that_are_no_findings_are_told_apart_and_named():
    columns = {"": ["0", "1"], "PatientSex_M": ["0", "1"], "portable": ["1", "0"], "study_number": ["1", "1"]}
    columns |= {"fold": ["0", "1"], "is_frontal": ["1", "1"], "Edema": ["1", "0"], "Support Devices": ["0", "1"]}
    found = read_labels(Path("m.csv"), columns)
    assert found.names == ("Edema", "Support Devices")
    (note,) = found.notes
    assert all(name in note for name in ("PatientSex_M", "portable", "study_number", "fold", "is_frontal"))
    assert read_labels(Path("m.csv"), columns, ["portable"]).names == ("portable",)


@pytest.mark.parametrize("column", ["subset", "Set", "fold", "data_split", "Partition", "Split"])
def test_an_official_division_under_another_name_counts(tmp_path: Path, column: str):
    names = write_images(tmp_path, 3)
    rows = [f"{name},{split}" for name, split in zip(names, ("Train", "val", "TEST"), strict=True)]
    (tmp_path / "metadata.csv").write_text("\n".join([f"file_name,{column}", *rows]))
    listing = FolderCollection(tmp_path).read()
    assert [record.split for record in listing.records] == ["train", "validation", "test"]
    assert f"column {column!r} is taken for split" in listing.notes


def test_a_division_that_is_not_understood_is_named(tmp_path: Path):
    names = write_images(tmp_path, 2)
    (tmp_path / "metadata.csv").write_text(f"file_name,fold,Edema\n{names[0]},0,1\n{names[1]},1,0\n")
    listing = FolderCollection(tmp_path).read()
    assert listing.label_names == ("Edema",)
    assert any("fold looks like an official division (0, 1) and is not used" in note for note in listing.notes)


def test_the_dataset_path_names_them_too(tmp_path: Path):
    names = write_images(tmp_path, 2)
    rows = {
        "image": [(tmp_path / name).read_bytes() for name in names],
        "PatientID": [7, 8],
        "subset": ["train", "test"],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "x.parquet")
    listing = HFCollection(tmp_path / "x.parquet").read()
    assert [(record.patient_id, record.split) for record in listing.records] == [("7", "train"), ("8", "test")]


def test_a_class_of_minus_one_in_a_list_is_refused(tmp_path: Path):
    feature = datasets.List(datasets.ClassLabel(names=["Edema", "Mass"]))
    write_images(tmp_path, 2)
    pixels = [{"bytes": (tmp_path / f"a{number}.png").read_bytes(), "path": None} for number in range(2)]
    features = datasets.Features({"image": datasets.Image(), "labels": feature})
    made = datasets.Dataset.from_dict({"image": pixels, "labels": [[0], [-1, 1]]}, features=features)
    made.to_parquet(tmp_path / "x.parquet")
    with pytest.raises(UserError, match="row 2: class -1 in a list"):
        HFCollection(tmp_path / "x.parquet").read()


def test_the_command_says_positives_negatives_and_unknown(tmp_path: Path):
    root = tmp_path / "films"
    root.mkdir()
    names = write_images(root, 4)
    cells = ('"[1, 0]"', '"[0, 0]"', "", '"[1, 1]"')
    rows = [f"{name},p{name},{cell}" for name, cell in zip(names, cells, strict=True)]
    (root / "metadata.csv").write_text("\n".join(["file_name,patient_id,labels", *rows]))
    words = ("--root", root, "--output", tmp_path / "cache", "--size", 8, "--splits", "none", "--num_workers", 0)
    done = mlvicx("prepare", "--collection", "folder", *words, "--label_names", "Mass, Edema", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "Mass: 2 positive (66.7%), 1 negative, 1 unknown" in done.stdout
    assert "Edema: 1 positive (33.3%), 2 negative, 1 unknown" in done.stdout


@pytest.mark.parametrize("cells", [["-1", "0", "1"], ["-1.00", "0.00", "1.00"], ["-1", "1", "1"]])
def test_minus_one_is_no_class(cells: Cells):
    with pytest.raises(UserError, match=r"row 2, column label: '-1(\.00)?' found; expected .*--uncertain ignore|ones"):
        read_csv(cells, "label")
    for uncertain, first in (("ignore", (NAN, NAN)), ("ones", (0, 1)), ("zeros", (1, 0))):
        names, rows = read_csv([cells[0], "0", "1"], "label", uncertain=uncertain)
        assert names == ("0", "1")
        assert_rows(rows, [first, (1, 0), (0, 1)])


def test_minus_one_beside_three_classes_can_only_be_unknown():
    names, rows = read_csv(["-1", "0", "2"], "label", uncertain="ignore")
    assert names == ("0", "2")
    assert_rows(rows, [(NAN, NAN), (1, 0), (0, 1)])
    with pytest.raises(UserError, match="row 4, column label: '2' found; expected 0, 1 or -1 with --uncertain ones"):
        read_csv(["-1", "0", "2"], "label", uncertain="ones")


def test_numbers_of_two_signs_are_two_classes():
    names, _ = read_csv(["-2", "2", "7"], "label")
    assert names == ("-2", "2", "7")


def test_a_sign_behind_a_name_counts():
    names, _ = read_csv(["TB", "TB-", "COVID+", "COVID-", "Grade 1", "Grade -1"], "label")
    assert set(names) == {"TB", "TB-", "COVID+", "COVID-", "Grade 1", "Grade -1"}
    names, _ = read_csv(["COVID-19", "covid_19", "COVID 19", "Viral - Pneumonia", "viral pneumonia"], "label")
    assert len(names) == 2


@pytest.mark.parametrize("column", ["label", None])
@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_column_of_numbers_with_minus_one_stops_typed_tables(tmp_path: Path, kind: str, column: str | None):
    with pytest.raises(UserError, match=r"'-1' found; expected .*--uncertain"):
        read_typed(tmp_path, kind, [-1, 0, 1], "label", label_columns=None if column is None else [column])


@pytest.mark.parametrize(
    ("yes", "no"), [("1.00", "0.00"), ("1,0", "0,0"), ("1,000", "0,000"), ("+1", "-0"), ("1.", "0")]
)
def test_labels_in_other_decimals_are_labels(yes: str, no: str):
    cells = {"file_name": [""] * 4, "Edema": [yes, no, "", no], "Mass": [no, no, yes, yes]}
    if yes == "1.":  # no number that a program writes
        with pytest.raises(UserError, match=r"column Edema: '1\.' found"):
            read_labels(Path("m.csv"), cells)
        return
    for explicit in (None, ("Edema", "Mass")):
        found = read_labels(Path("m.csv"), cells, explicit)
        assert (found.names, found.notes) == (("Edema", "Mass"), ())
        assert_rows(found.rows, [(1, 0), (0, 0), (NAN, 1), (0, 1)])


@pytest.mark.parametrize(("yes", "no"), [("Y", "N"), ("Pos", "neg")])
def test_labels_in_short_words_are_labels(yes: str, no: str):
    found = read_labels(Path("m.csv"), {"file_name": [""] * 3, "Edema": [yes, no, ""]})
    assert found.names == ("Edema",)
    assert_rows(found.rows, [(1,), (0,), (NAN,)])


def test_a_column_named_for_a_finding_is_not_lost_among_the_others():
    found = read_labels(Path("m.csv"), {"file_name": [""] * 3, "Edema": ["9", "9", "1"], "score": ["0.35"] * 3})
    assert found.names == ()
    assert found.notes[-1] == (
        "columns named for a finding that hold other values than 0 and 1, no labels: Edema (holds '9')"
    )


@pytest.mark.parametrize(
    ("cells", "names", "rows", "exclusive"),
    [
        (["Edema|Mass", "No Finding", "Mass"], ("Edema", "Mass"), [(1, 1), (0, 0), (0, 1)], False),
        (["mild", "severe", ""], ("mild", "severe"), [(1, 0), (0, 1), (NAN, NAN)], True),
    ],
)
def test_a_chosen_column_of_words_holds_all_labels(cells: Cells, names: Any, rows: Any, exclusive: bool):
    found = read_labels(Path("m.csv"), {"file_name": [""] * 3, "All findings": cells}, ["All findings"])
    assert (found.names, found.exclusive) == (names, exclusive)
    assert_rows(found.rows, rows)


@pytest.mark.parametrize("cells", [["Edema", "0", "1"], ["3.5", "2.1", "1"], ["yes", "no", "unclear"]])
def test_a_chosen_column_with_some_labels_is_not_read_as_words(cells: Cells):
    with pytest.raises(UserError, match=r"column Finding: '\S+' found; expected 0, 1, or empty") as caught:
        read_labels(Path("m.csv"), {"file_name": [""] * 3, "Finding": cells}, ["Finding"])
    assert "--label_columns" not in str(caught.value)  # which is what chose it


def test_columns_beside_one_of_all_labels_are_named_apart():
    columns = {"file_name": ["a", "b"], "labels": ["Mass", "Edema|Mass"], "Pneumonia": ["1", "0"], "score": ["1", "2"]}
    assert read_labels(Path("m.csv"), columns).notes == (
        "columns ignored: score",
        "columns named for a finding that are not read beside labels: Pneumonia (--label_columns takes them)",
    )


def test_measurements_that_begin_like_labels_stay_measurements():
    found = read_labels(Path("m.csv"), {"file_name": [""] * 3, "score": ["0.00", "0.35", "1.20"]})
    assert (found.names, found.notes) == ((), ("columns ignored: score (holds '0.35')",))


@pytest.mark.parametrize("option", [{"explicit": ("Edema", "Edema")}, {"label_names": ("A", "B", "A")}])
def test_a_label_that_is_given_twice_is_refused(option: dict[str, Any]):
    columns = {"file_name": ["a"], "Edema": ["1"], "labels": ["[1, 0, 1]"]}
    with pytest.raises(UserError, match=r"label_(columns|names) with (Edema|A) twice found; expected each once"):
        read_labels(Path("m.csv"), columns, **option)


@pytest.mark.parametrize("column", ["label", "labels"])
def test_an_empty_column_of_labels_does_not_hide_findings(column: str):
    table = read_labels(Path("t.csv"), {column: ["", "nan"], "Edema": ["1", "0"], "Mass": ["0", "0"]})
    assert (table.names, table.rows) == (("Edema", "Mass"), [(1, 0), (0, 0)])
    assert table.notes == (f"columns ignored: {column} (empty)",)


def test_a_class_is_one_however_its_number_is_written():
    table = read_labels(Path("t.csv"), {"label": ["01", "1", "+1", "2.0", "0"]})
    assert (table.names, table.exclusive) == (("0", "1", "2"), True)
    assert [row.index(1) for row in table.rows] == [1, 1, 1, 2, 0]


def test_the_two_forms_of_an_umlaut_are_one_finding():
    composed, decomposed = "\u00d6dem", "O\u0308dem"
    assert read_csv([composed, composed, decomposed, "normal"], "label")[0] == ("normal", composed)
    assert read_csv([f"{composed}|Mass", decomposed])[1] == [(1, 1), (0, 1)]
    columns = {composed: ["1", "0"], decomposed: ["0", "1"], "file_name": ["", ""]}
    with pytest.raises(UserError, match="found for one finding"):
        read_labels(Path("m.csv"), columns)


def test_codes_that_begin_with_e_are_names():
    assert read_csv(["E84|J18", "E84.0", "J18"])[0] == ("E84", "E84.0", "J18")
    assert read_csv(["E84", "J18"], "diag", explicit=["diag"])[0] == ("E84", "J18")


def test_several_words_for_yes_and_no_are_refused():
    with pytest.raises(UserError, match="column label: 0, 1, No, yes found, several words for yes and no"):
        read_csv(["yes", "1", "0", "No"], "label")
    assert read_csv(["yes", "no", ""], "label")[0] == ("no", "yes")


def test_texts_of_reports_are_no_classes():
    texts = [f"Report {number}: heart of normal size." for number in range(12)]
    with pytest.raises(
        UserError, match="12 classes found, 12 of them long and in one row alone, such as 'Report 0: heart"
    ):
        read_csv(texts, "label")
    assert len(read_csv(texts * 2, "label")[0]) == 12
    assert len(read_csv(texts[:9], "label")[0]) == 9
    assert len(read_csv([f"Finding {number}" for number in range(12)], "label")[0]) == 12
