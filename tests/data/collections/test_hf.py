"""The `hf` collection: what `datasets` writes and reads, whole and streamed."""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.base import Listing
from mlvicx_hf.data.collections.hf import HFCollection
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import decode_gray
from mlvicx_hf.data.reading.streaming import open_stream

FINDINGS = ["No Finding", "Edema", "Mass"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def png(number: int, dtype: Any = np.uint8, side: int = 12) -> bytes:
    """A ramp that begins at a number of its own, in the upper part of the range for 16 bits."""
    pixels = np.arange(side * side).reshape(side, side) + number
    if dtype is np.uint16:
        pixels = 200 * pixels + 20_000
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(dtype)).save(buffer, "PNG")
    return buffer.getvalue()


def make(count: int, columns: dict[str, tuple[Any, list[Any]]], dtype: Any = np.uint8, first: int = 0) -> Dataset:
    """A dataset of that many images, with further columns given as feature and values."""
    features = Features({"image": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()})
    pixels = [{"bytes": png(first + number, dtype), "path": None} for number in range(count)]
    values = {name: list(cells) for name, (_, cells) in columns.items()}
    return Dataset.from_dict({"image": pixels} | values, features=features)


def write_parquet(folder: Path, splits: dict[str, Dataset], shards: int = 1) -> Path:
    folder.mkdir()
    for split, dataset in splits.items():
        for index in range(shards):
            part = dataset.shard(shards, index, contiguous=True)
            part.to_parquet(folder / f"{split}-{index:05d}-of-{shards:05d}.parquet")
    return folder


def test_a_pattern_of_files_keeps_the_splits_that_their_names_tell(tmp_path: Path):
    folder = write_parquet(tmp_path / "data", {"train": make(3, {}), "test": make(2, {})})
    opened = HFCollection(f"{folder}/*.parquet").read()
    assert [record.split for record in opened.records] == ["test"] * 2 + ["train"] * 3
    with pytest.raises(UserError, match=r"split='validation' found; expected one of test, train"):
        open_stream(f"{folder}/*.parquet", "validation")
    make(2, {}).to_parquet(folder / "more.parquet")
    with pytest.raises(UserError, match=r"more\.parquet.* found; expected all or none with train, validation or test"):
        HFCollection(f"{folder}/*.parquet").read()
    assert {record.split for record in HFCollection(f"{folder}/t*-00000-of-00001.parquet").read().records} > {"test"}
    assert [record.split for record in HFCollection(f"{folder}/test*.parquet").read().records] == [None] * 2


def patients(count: int, first: int = 0) -> tuple[Any, list[str]]:
    return Value("string"), [f"p{first + number // 2}" for number in range(count)]


def contents(listing: Listing, streaming: bool) -> list[bytes]:
    if streaming:
        assert listing.contents is not None
        assert all(record.load is None for record in listing.records)
        return list(listing.contents(0))
    assert listing.contents is None
    return [record.load() for record in listing.records if record.load]


def same(found: tuple[float, ...], *expected: float) -> bool:
    return np.array_equal(found, expected, equal_nan=True)


# -- where a dataset lies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["parquet", "saved", "arrow"])
def test_splits_patients_and_people_in_every_form(tmp_path: Path, form: str, streaming: bool):
    label = (ClassLabel(names=["normal", "sick"]), [0, 1, 1, -1, 0, 1])
    people = {
        "view": (Value("string"), ["PA", "ap", "lateral", "", "odd", "LL"]),
        "sex": (ClassLabel(names=["female", "male"]), [0, 1, 1, 0, 0, 1]),
        "age": (Value("int32"), [40, 51, None, 3, 130, 9]),
    }
    train = make(6, {"patient_id": patients(6), "label": label} | people)
    valid = make(6, {"patient_id": patients(6, 3), "label": label} | people, first=50)
    splits = {"train": train, "valid": valid}
    if form == "parquet":
        path = write_parquet(tmp_path / "data", splits, shards=2)
    elif form == "saved":
        DatasetDict(splits).save_to_disk(path := tmp_path / "data", num_shards={"train": 2, "valid": 3})
    else:
        path, valid = tmp_path / "data-*.arrow", None
        train.save_to_disk(tmp_path / "saved", num_shards=2)
        for file in (tmp_path / "saved").glob("data-*.arrow"):
            file.rename(tmp_path / file.name)
    listing = HFCollection(path, streaming=streaming).read()
    expected = 6 if valid is None else 12
    assert len(listing.records) == expected
    first = listing.records[:6]
    assert [record.name for record in first] == [f"train/{row}" for row in range(6)]
    assert [record.patient_id for record in first] == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert [record.view for record in first] == ["PA", "AP", "LATERAL", "UNKNOWN", "UNKNOWN", "LATERAL"]
    assert [record.sex for record in first] == ["F", "M", "M", "F", "F", "M"]
    assert np.array_equal([record.age for record in first], [40, 51, math.nan, 3, math.nan, 9], equal_nan=True)
    assert (listing.label_names, listing.exclusive, listing.patients_known) == (("normal", "sick"), True, True)
    assert same(first[0].labels, 1, 0)
    assert same(first[1].labels, 0, 1)
    assert same(first[3].labels, math.nan, math.nan)
    assert {record.split for record in listing.records} == ({None} if valid is None else {"train", "validation"})
    found = contents(listing, streaming)
    assert found == [png(number) for number in range(6)] + [png(50 + number) for number in range(expected - 6)]
    if streaming:
        for start in (1, 5, 6, 7, expected):
            assert list(listing.contents(start)) == found[start:], start


@pytest.mark.parametrize("streaming", [False, True])
def test_an_imagefolder_of_16_bit_files(tmp_path: Path, streaming: bool):
    for split in ("train", "test"):
        for number, name in enumerate(("normal", "sick")):
            file = tmp_path / "images" / split / name / "0.png"
            file.parent.mkdir(parents=True)
            file.write_bytes(png(number, np.uint16))
    listing = HFCollection(tmp_path / "images", streaming=streaming).read()
    assert [(record.split, record.labels) for record in listing.records] == [
        ("train", (1, 0)),
        ("train", (0, 1)),
        ("test", (1, 0)),
        ("test", (0, 1)),
    ]
    assert not listing.patients_known
    assert any("no column patient_id" in note for note in listing.notes)
    for content in contents(listing, streaming):
        gray = np.asarray(decode_gray(content, "file"))
        assert len(np.unique(gray)) > 60  # of the 113 levels that the ramp takes; saturated there would be one


@pytest.mark.parametrize("streaming", [False, True])
def test_prepared_through_workers_or_in_order(tmp_path: Path, streaming: bool):
    findings = (Value("int8"), [row % 2 for row in range(40)])
    path = write_parquet(tmp_path / "data", {"train": make(40, {"patient_id": patients(40), "Edema": findings})}, 2)
    cache = tmp_path / "cache"
    prepare(HFCollection(path, streaming=streaming), cache, size=12, num_workers=0, progress=False)
    splits = load_cache(cache).datasets
    assert set(splits) == {"train", "validation", "test"}
    rows = {row["source"]: row for split in splits.values() for row in split}
    assert len(rows) == 40
    for number in (0, 17, 39):
        row = rows[f"hf:train/{number}"]
        assert np.array_equal(np.asarray(row["image"]), np.asarray(Image.open(io.BytesIO(png(number)))))
        assert row["labels"] == [number % 2]


def test_records_are_small_and_read_in_another_process(tmp_path: Path):
    make(50, {"patient_id": patients(50)}).save_to_disk(tmp_path / "data", num_shards=3)
    records = HFCollection(tmp_path / "data").read().records
    assert len(pickle.dumps(records[-1])) < 1000
    assert pickle.loads(pickle.dumps(records[30])).load() == png(30)


# -- pixels are left alone ---------------------------------------------------------------------------------------------


def test_the_table_of_a_parquet_stream_is_read_without_the_pixels(tmp_path: Path):
    path = write_parquet(tmp_path / "data", {"train": make(30, {"patient_id": patients(30)})})
    (file,) = path.glob("*.parquet")
    group = pyarrow.parquet.read_metadata(file).row_group(0)
    columns = [group.column(number) for number in range(group.num_columns)]
    (pixels,) = [column for column in columns if column.path_in_schema == "image.bytes"]
    content = bytearray(file.read_bytes())
    begin = pixels.dictionary_page_offset or pixels.data_page_offset
    content[begin : begin + pixels.total_compressed_size] = bytes(pixels.total_compressed_size)
    file.write_bytes(content)
    listing = HFCollection(path, streaming=True).read()
    assert [record.patient_id for record in listing.records] == patients(30)[1]
    with pytest.raises(OSError, match=r"."):  # so the pixels are indeed gone
        next(listing.contents(0))


# -- labels ------------------------------------------------------------------------------------------------------------


def test_lists_of_classes_are_findings(tmp_path: Path):
    labels = (List(ClassLabel(names=FINDINGS)), [[1, 2], [0], [], None])
    path = write_parquet(tmp_path / "data", {"train": make(4, {"labels": labels})})
    listing = HFCollection(path).read()
    assert (listing.label_names, listing.exclusive) == (("Edema", "Mass"), False)
    assert [record.labels for record in listing.records[:3]] == [(1, 1), (0, 0), (0, 0)]
    assert same(listing.records[3].labels, math.nan, math.nan)
    classes = List(ClassLabel(names=["No_Finding", *FINDINGS[1:]]))
    path = write_parquet(tmp_path / "spelled", {"train": make(2, {"labels": (classes, [[0], [1]])})})
    assert [record.labels for record in HFCollection(path).read().records] == [(0, 0), (1, 0)]
    path = write_parquet(tmp_path / "both", {"train": make(2, {"labels": (classes, [[0], [0, 1]])})})
    with pytest.raises(UserError, match="row 2: No_Finding, Edema found; expected 'no finding' alone"):
        HFCollection(path).read()


def test_columns_of_0_1_and_minus_1_as_in_a_folder(tmp_path: Path):
    columns = {
        "Edema": (Value("float32"), [1, 0, -1, None]),
        "Mass": (ClassLabel(names=["no", "yes"]), [0, 1, 1, 0]),
        "vector": (List(Value("float32")), [[1.0], [2.0], [3.0], [4.0]]),
        "comment": (Value("string"), ["a", "b", "c", "d"]),
    }
    path = write_parquet(tmp_path / "data", {"train": make(4, columns)})
    options: dict[str, Any] = {"label_columns": ["Edema", "Mass"]}
    with pytest.raises(ValueError, match=r"row 3, column Edema: '-1' found; expected 0, 1"):
        HFCollection(path, **options).read()
    listing = HFCollection(path, uncertain="ones", **options).read()
    assert listing.label_names == ("Edema", "Mass")
    assert [record.labels for record in listing.records[:3]] == [(1, 0), (0, 1), (1, 1)]
    assert same(listing.records[3].labels, math.nan, 0)
    assert listing.policy == {"uncertain": "ones"}
    assert any("vector (List)" in note for note in listing.notes)
    assert HFCollection(path, uncertain="ones").read().label_names == ("Edema", "Mass")
    shape = (ClassLabel(names=["round", "long"]), [0, 1, 1, 0])
    path = write_parquet(tmp_path / "shapes", {"train": make(4, {"shape": shape})})
    with pytest.raises(ValueError, match="column shape holds classes; --uncertain does not fit"):
        HFCollection(path, uncertain="ones").read()


def test_classes_that_describe_the_patient_are_no_labels(tmp_path: Path):
    sexes = (ClassLabel(names=["F", "M"]), [0, 1, 0, 1])
    edema = (Value("int64"), [1, 0, 0, 1])
    for number, (name, feature) in enumerate(
        [
            ("Sex", sexes),
            ("View Position", (ClassLabel(names=["PA", "Lateral"]), [0, 1, 0, 1])),
            ("Subset", (ClassLabel(names=["train", "test"]), [0, 1, 0, 1])),
        ]
    ):
        path = write_parquet(tmp_path / str(number), {"train": make(4, {name: feature, "Edema": edema})})
        listing = HFCollection(path).read()
        assert (listing.label_names, listing.exclusive) == (("Edema",), False)
        assert [record.labels for record in listing.records] == [(1,), (0,), (0,), (1,)]
        assert not any("ignored" in note for note in listing.notes)
    assert [record.split for record in listing.records] == ["train", "test", "train", "test"]
    path = write_parquet(tmp_path / "other", {"train": make(4, {"hand": sexes, "Edema": edema})})
    with pytest.raises(UserError, match="column hand of classes found beside labels Edema; expected --label_columns"):
        HFCollection(path).read()


def test_classes_of_yes_and_no_mean_what_they_say(tmp_path: Path):
    columns = {
        "Edema": (ClassLabel(names=["yes", "no"]), [0, 1, 0, -1]),
        "Mass": (Value("int64"), [1, 0, 0, 1]),
        "Nodule": (ClassLabel(names=["negative", "positive"]), [0, 1, 1, 1]),
    }
    path = write_parquet(tmp_path / "data", {"train": make(4, columns)})
    for chosen in (None, list(columns)):
        listing = HFCollection(path, label_columns=chosen).read()
        assert listing.label_names == ("Edema", "Mass", "Nodule")
        assert [record.labels for record in listing.records[:3]] == [(1, 1, 0), (0, 0, 1), (1, 0, 1)]
        assert same(listing.records[3].labels, math.nan, 1, 1)
    columns["Edema"] = (ClassLabel(names=["sick", "healthy"]), [0, 1, 0, 1])
    path = write_parquet(tmp_path / "words", {"train": make(4, columns)})
    with pytest.raises(UserError, match="row 1, column Edema: 'sick' found; expected 0, 1"):
        HFCollection(path, label_columns=["Edema", "Mass"]).read()


def test_several_columns_of_classes_must_be_chosen_from(tmp_path: Path):
    one = (ClassLabel(names=["a", "b", "c"]), [0, 1, 2])
    path = write_parquet(tmp_path / "data", {"train": make(3, {"kind": one, "scanner": one})})
    with pytest.raises(ValueError, match="columns of classes kind, scanner found; expected --label_columns"):
        HFCollection(path).read()
    listing = HFCollection(path, label_columns=["scanner"]).read()
    assert (listing.label_names, listing.exclusive) == (("a", "b", "c"), True)


def test_classes_under_any_name_are_the_labels_if_there_are_no_others(tmp_path: Path):
    column = {"diagnosis": (ClassLabel(names=["normal", "sick"]), [0, 1, 1])}
    for number, more in enumerate(({}, {"patient_id": patients(3)})):
        path = write_parquet(tmp_path / str(number), {"train": make(3, column | more)})
        listing = HFCollection(path).read()
        assert (listing.label_names, listing.exclusive) == (("normal", "sick"), True)
        assert [record.labels for record in listing.records] == [(1, 0), (0, 1), (0, 1)]
    more = {"label": (Value("string"), ["a", "b", "a"])}
    path = write_parquet(tmp_path / "beside", {"train": make(3, column | more)})
    with pytest.raises(UserError, match="diagnosis of classes found beside labels a, b; expected --label_columns"):
        HFCollection(path).read()


def test_nothing_but_pixels(tmp_path: Path):
    path = write_parquet(tmp_path / "data", {"train": make(3, {})})
    for streaming in (False, True):
        listing = HFCollection(path, streaming=streaming).read()
        assert [(record.name, record.labels) for record in listing.records] == [(f"train/{i}", ()) for i in range(3)]


# -- masks -------------------------------------------------------------------------------------------------------------


def test_masks_of_a_column(tmp_path: Path):
    mask = np.zeros((12, 12), np.uint8)
    mask[3:7, 2:5] = 255
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, "PNG")
    cells = [{"bytes": buffer.getvalue(), "path": None}, None, {"bytes": buffer.getvalue(), "path": None}]
    path = write_parquet(tmp_path / "data", {"train": make(3, {"lungs": (datasets.Image(), cells)})})
    with pytest.raises(ValueError, match="Image columns image, lungs found; expected one, or --image_column"):
        HFCollection(path).read()
    listing = HFCollection(path, mask_column="lungs", mask_names=["lungs"]).read()
    assert listing.mask_names == ("lungs",)
    draw, nothing, _ = (pickle.loads(pickle.dumps(record)).draw_mask for record in listing.records)
    assert nothing is None
    assert np.array_equal(draw(), mask)
    assert HFCollection(path, mask_column="lungs").read().mask_names == ("mask",)
    with pytest.raises(ValueError, match="mask_column=lungs found with streaming"):
        HFCollection(path, mask_column="lungs", streaming=True).read()
    with pytest.raises(ValueError, match=r"Image columns image, lungs found; expected the masks in label"):
        HFCollection(path, mask_column="label").read()
    with pytest.raises(ValueError, match=r"mask_names=heart found; expected --mask_column"):
        HFCollection(path, mask_names=["heart"]).read()


# -- splits ------------------------------------------------------------------------------------------------------------


def test_other_splits_are_named_and_can_be_mapped(tmp_path: Path):
    splits = {name: make(2, {}, first=first) for name, first in (("train", 0), ("extra", 10))}
    DatasetDict(splits).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="splits extra found; expected train, validation"):
        HFCollection(tmp_path / "data").read()
    listing = HFCollection(tmp_path / "data", split_names={"extra": "test"}).read()
    assert [(record.name, record.split) for record in listing.records] == [("extra/0", "test"), ("extra/1", "test")]
    assert contents(listing, False) == [png(10), png(11)]
    with pytest.raises(ValueError, match=r"splits more=test found; expected some of train, extra"):
        HFCollection(tmp_path / "data", split_names={"more": "test"}).read()


def test_a_column_of_splits_in_a_dataset_without_any(tmp_path: Path):
    path = write_parquet(tmp_path / "data", {"train": make(3, {"split": (Value("string"), ["train", "val", "test"])})})
    assert [record.split for record in HFCollection(path).read().records] == ["train", "validation", "test"]


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_no_image_column_lists_those_there_are(tmp_path: Path):
    Dataset.from_dict({"text": ["a"], "score": [1.5]}).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=r"columns text: string, score: float64 found; expected .* an Image column"):
        HFCollection(tmp_path / "data").read()
    with pytest.raises(ValueError, match=r"expected the pixels in scan"):
        HFCollection(tmp_path / "data", image_column="scan").read()


def test_an_image_column_by_name(tmp_path: Path):
    dataset = make(2, {"other": (datasets.Image(), [{"bytes": png(7), "path": None}] * 2)})
    dataset.save_to_disk(tmp_path / "data")
    assert contents(HFCollection(tmp_path / "data", image_column="other").read(), False) == [png(7)] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_plain_bytes_that_another_program_wrote(tmp_path: Path, streaming: bool):
    table = pyarrow.table({"image": [png(1), png(2)], "patient_id": [7, 8]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    listing = HFCollection(tmp_path / "a.parquet", streaming=streaming).read()
    assert contents(listing, streaming) == [png(1), png(2)]
    assert [record.patient_id for record in listing.records] == ["7", "8"]


def test_a_path_out_of_the_dataset_is_not_followed(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(png(0))
    struct = pyarrow.array([{"bytes": None, "path": str(tmp_path / "secret.png")}, {"bytes": png(3), "path": "x"}])
    (tmp_path / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"image": struct}), tmp_path / "data" / "a.parquet")
    features = Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": b"", "path": None}}] * 2
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "typed.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "typed.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"image": struct}, schema=schema), tmp_path / "data" / "a.parquet")
    bad, good = HFCollection(tmp_path / "data").read().records
    with pytest.raises(UnreadableImageError, match="lies outside the dataset"):
        bad.load()
    assert good.load() == png(3)
    bad, good = HFCollection(tmp_path / "data", streaming=True).read().contents(0)
    assert (bad.reason, good) == ("lies outside the dataset", png(3))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./nowhere", r"'./nowhere' found; expected a folder or file that exists"),
        ("nowhere/*.parquet", "no such file; expected a file or a pattern"),
        ("nobody/nothing", r"nobody/nothing.* on the Hub"),
    ],
)
def test_nothing_there(path: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=message):
        HFCollection(path).read()


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.parquet").write_bytes(b"PAR1 and nothing else")
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"data: `datasets` cannot read it"):
            HFCollection(tmp_path / "data", streaming=streaming).read()


def test_an_empty_patient_is_refused(tmp_path: Path):
    path = write_parquet(tmp_path / "data", {"train": make(2, {"patient_id": (Value("string"), ["a", None])})})
    with pytest.raises(ValueError, match=r"row 2 \(train/1\): empty patient_id found"):
        HFCollection(path).read()
    with pytest.raises(ValueError, match=r"columns patient_id found; expected the patient in person"):
        HFCollection(path, patient_column="person").read()
