import gzip
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from helpers import replace
from hypothesis import given, settings
from hypothesis import strategies as st
from miniatures import FRAME, disc_box, disc_mask, draw_image, encode_runs, released_tables, siim_id, write_siim
from PIL import Image

from mlvicx_hf.data.collections.base import Listing, Record
from mlvicx_hf.data.collections.siim import SIIMCollection, union_of_runs
from mlvicx_hf.data.images.encoding import make_picture
from mlvicx_hf.data.images.errors import UnreadableImageError

TABLE = "train-rle.csv"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_siim(tmp_path / "siim")
    return tmp_path / "siim"


def union_of_pixels(codes: list[str]) -> np.ndarray:
    """The mask of these codes, pixel by pixel."""
    mask = np.zeros((FRAME, FRAME), dtype=np.uint8)
    for code in codes:
        words, position = iter(code.split()), 0
        for start, length in zip(words, words, strict=True):
            position += int(start)
            for _ in range(int(length)):
                mask[position % FRAME, position // FRAME] = 1  # down the column, then the next one
                position += 1
    return mask


# The released table


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("siim")
    content = gzip.decompress((released_tables() / "siim-pneumothorax-train-rle.csv.gz").read_bytes())
    (root / TABLE).write_bytes(content)
    return root


@pytest.fixture(scope="module")
def table(release: Path) -> pd.DataFrame:
    return pd.read_csv(release / TABLE, skipinitialspace=True, dtype=str)


@pytest.fixture(scope="module")
def listing(release: Path) -> Listing:
    return SIIMCollection(release).list_all()


def test_released_table_is_counted_as_published(table: pd.DataFrame, listing: Listing):
    assert len(table) == 12_954
    assert [record.name for record in listing.records] == table.ImageId.unique().tolist()
    assert len(listing.records) == 12_047
    positive = table[table.EncodedPixels != "-1"]
    assert sum(record.labels == (1.0,) for record in listing.records) == positive.ImageId.nunique() == 2_669
    assert sum(record.labels == (0.0,) for record in listing.records) == 12_047 - 2_669
    rows = positive.ImageId.value_counts()
    counted = {record.name: len(record.draw_mask.args[0]) for record in listing.records if record.labels[0]}
    assert counted == rows.to_dict()
    assert sum(count > 1 for count in counted.values()) == 624


def test_released_masks_equal_those_of_a_slow_decoder(table: pd.DataFrame, listing: Listing):
    records = {record.name: record for record in listing.records}
    rows = table[table.EncodedPixels != "-1"].groupby("ImageId").EncodedPixels.agg(list)
    several = rows[rows.map(len) > 1]
    chosen = [*rows.index[::300], *several.index[::100], several.map(len).idxmax()]
    assert len(chosen) == 17
    for name in chosen:
        assert np.array_equal(records[name].draw_mask(), union_of_pixels(rows[name])), name
    negative = next(record for record in listing.records if not record.labels[0])
    assert not negative.draw_mask().any()


def test_released_masks_lie_in_two_lungs_side_by_side(listing: Listing):
    """Few pixels in the middle between left and right; no such gap from top to bottom, where most are at the top."""
    records = [record for record in listing.records if record.labels[0]][:150]
    total = np.sum([record.draw_mask() for record in records], axis=0, dtype=int)
    sides = total.sum(axis=0).reshape(4, 256).sum(axis=1)
    middle = total[:, 448:576].sum()
    assert middle < 0.5 * min(total[:, 192:320].sum(), total[:, 640:768].sum())
    assert sides.min() > 0.02 * sides.sum()
    assert total[: FRAME // 2].sum() > 1.5 * total[FRAME // 2 :].sum()


def test_what_a_worker_is_sent_is_small(listing: Listing):
    assert len(pickle.dumps(listing.records)) < 10e6  # masks as arrays would be 12 GB


# A small copy


def test_miniature_release_is_read_from_the_disk(root: Path):
    listing = SIIMCollection(root).read()
    assert (listing.label_names, listing.mask_names) == (("Pneumothorax",), ("Pneumothorax",))
    assert (listing.patients_known, listing.patient_source, listing.policy) == (False, None, {"masks": "table"})
    assert [record.labels for record in listing.records] == [(1.0,), (0.0,)] * 6
    assert listing.missing == ()
    assert any("ImageId names an image" in note for note in listing.notes)
    assert any("NIH ChestX-ray14" in note for note in listing.notes)
    record = listing.records[2]
    assert record.patient_id == record.name == siim_id(2)
    assert record.path.name == f"{siim_id(2)}.dcm"
    pixels = pydicom.dcmread(record.path).pixel_array.astype(int)
    assert np.abs(pixels - np.asarray(draw_image(2, [disc_box(2, 0), disc_box(2, 1)]))).mean() < 3


def test_rows_of_one_image_are_united(root: Path):
    records = [pickle.loads(pickle.dumps(record)) for record in SIIMCollection(root).read().records]
    both = records[2].draw_mask()
    assert (both.shape, both.dtype, np.unique(both).tolist()) == ((FRAME, FRAME), np.uint8, [0, 1])
    assert np.array_equal(both, disc_mask(disc_box(2, 0)) | disc_mask(disc_box(2, 1)))
    assert np.array_equal(records[0].draw_mask(), disc_mask(disc_box(0)))
    assert not records[1].draw_mask().any()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, FRAME - 1)] * 4), min_size=1, max_size=3))
def test_any_masks_come_back_as_their_union(boxes: list[tuple[int, int, int, int]]):
    masks = []
    for x, y, right, lower in boxes:
        mask = np.zeros((FRAME, FRAME), dtype=bool)
        mask[min(y, lower) : max(y, lower) + 1, min(x, right) : max(x, right) + 1] = True
        masks.append(mask)
    codes = tuple(enumerate(map(encode_runs, masks)))
    assert np.array_equal(union_of_runs(codes, TABLE), np.any(masks, axis=0))


def converted(root: Path) -> None:
    """PNG files in the place of the DICOM files, as mirrors have them, with masks in files."""
    (root / "masks").mkdir()
    (root / "images").mkdir()
    for record in SIIMCollection(root).read().records:
        Image.fromarray(pydicom.dcmread(record.path).pixel_array).save(root / "images" / f"{record.name}.png")
        mask = np.asarray(Image.fromarray(record.draw_mask() * 255).resize((64, 64), Image.Resampling.NEAREST))
        Image.fromarray(mask).save(root / "masks" / f"{record.name}.png")
    shutil.rmtree(root / "dicom-images-train")


def mask_sources(records: list[Record]) -> set[tuple[bool, bool]]:
    return {(record.mask_path is not None, record.draw_mask is not None) for record in records}


def test_converted_images_with_masks_of_the_table_or_in_files(root: Path):
    converted(root)
    of_table = SIIMCollection(root).read().records
    assert mask_sources(of_table) == {(False, True)}
    assert {record.path.parent for record in of_table} == {root / "images"}
    listing = SIIMCollection(root, masks="files").read()
    assert listing.policy == {"masks": "files"}
    assert mask_sources(listing.records) == {(True, False)}
    assert all(record.mask_path == root / "masks" / f"{record.name}.png" for record in listing.records)


def test_mask_files_may_lack_only_where_the_table_says_empty(root: Path):
    converted(root)
    for number in (0, 1):
        (root / "masks" / f"{siim_id(number)}.png").unlink()
    listing = SIIMCollection(root, masks="files").read()
    assert listing.missing == (f"{root / 'masks' / siim_id(0)}.png (mask of {siim_id(0)})",)
    assert listing.records[0].name == siim_id(1)
    assert not listing.records[0].draw_mask().any()


def test_absent_images_are_missing(root: Path):
    next(root.rglob(f"{siim_id(3)}.dcm")).unlink()
    listing = SIIMCollection(root).read()
    assert (len(listing.records), listing.missing) == (11, (siim_id(3),))
    shutil.rmtree(root / "dicom-images-train")
    with pytest.raises(FileNotFoundError, match=r"none of the 12 images found; expected <ImageId>\.dcm"):
        SIIMCollection(root).read()


def test_the_later_table_comes_first(root: Path):
    (root / "stage_2_train.csv").write_text(f"ImageId,EncodedPixels\n{siim_id(0)},-1\n")
    listing = SIIMCollection(root).read()
    assert [record.labels for record in listing.records] == [(0.0,)]
    assert "labels and masks of stage_2_train.csv" in listing.notes


def test_masks_lie_on_what_the_images_show(root: Path):
    for record in SIIMCollection(root).read().records[::2]:
        picture = make_picture(record, 64, "pad", ("Pneumothorax",))
        mask = np.asarray(Image.open(io.BytesIO(picture.mask.png))) > 0
        pixels = np.asarray(Image.open(io.BytesIO(picture.png)))
        assert pixels[mask].mean() > 180
        assert pixels[~mask].mean() < 110


def test_a_bad_code_rejects_its_image_alone(root: Path):
    first, second = (root / TABLE).read_text().splitlines()[1:3]
    (root / TABLE).write_text(f"ImageId, EncodedPixels\n{first} 1\n{second}\n")
    pictures = [make_picture(record, 64, "pad", ("Pneumothorax",)) for record in SIIMCollection(root).read().records]
    assert "row 2, column EncodedPixels: " in pictures[0].reason
    assert not pictures[1].reason


# What does not fit


def test_options_that_are_not_known_are_refused(root: Path):
    with pytest.raises(ValueError, match="masks='png' found; expected one of table, files"):
        SIIMCollection(root, masks="png")


def test_absent_table_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"stage_2_train\.csv or .*train-rle\.csv: no such file"):
        SIIMCollection(tmp_path).list_all()


def test_an_image_in_two_files_is_refused(root: Path):
    draw_image(0, []).save(root / f"{siim_id(0)}.png")
    draw_image(0, []).save(root / "unlisted.png")
    with pytest.raises(ValueError, match=rf"{siim_id(0)}\.png and .*{siim_id(0)}\.dcm found; expected one file an"):
        SIIMCollection(root).read()


def test_other_columns_are_refused(root: Path):
    replace(root / TABLE, " EncodedPixels", "rle")
    with pytest.raises(ValueError, match=rf"{TABLE}: columns ImageId, rle found; expected EncodedPixels as well"):
        SIIMCollection(root).list_all()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            f"{siim_id(0)}, -1",
            rf"EncodedPixels: '-1' found for {siim_id(0)}, which an earlier row lists; expected -1 in",
        ),
        (f"{siim_id(1)}, -1", rf"EncodedPixels: '-1' found for {siim_id(1)}, which"),
        (f"{siim_id(1)}, 5 5", rf"EncodedPixels: '5 5' found for {siim_id(1)}, which"),
        ("{first}", rf"EncodedPixels: '[ 0-9]+' found for {siim_id(0)}, which .*; expected .* codes that differ"),
        (f"{siim_id(1)},", r"EncodedPixels: '' found; expected a text that is not empty"),
        (", -1", r"ImageId: '' found"),
    ],
)
def test_bad_rows_are_refused(root: Path, row: str, message: str):
    lines = (root / TABLE).read_text().splitlines()
    (root / TABLE).write_text("\n".join([*lines, row.format(first=lines[1])]))
    with pytest.raises(ValueError, match=rf"{TABLE}: row {len(lines) + 1}, column {message}"):
        SIIMCollection(root).list_all()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("5 5 5", r"3 numbers from 5 that add up to 15 found; expected pairs of a gap and a run"),
        ("5", r"1 numbers from 5"),
        ("5 -5", r"2 numbers from -5 that add up to 0 found"),
        ("-1 5", r"2 numbers from -1"),
        ("5 0", r"2 numbers from 0 that add up to 5 found; expected .* a run, not empty"),
        ("1048575 2", r"2 numbers from 2 that add up to 1048577 found; expected .* 1048576 pixels at most"),
        (f"{10**30} 1", rf"2 numbers from 1 that add up to {10**30 + 1} found"),
        ("5 5.5", r"invalid literal for int\(\) .*'5\.5'; expected pairs of whole numbers"),
    ],
)
def test_bad_codes_are_refused_when_they_are_drawn(root: Path, code: str, message: str):
    with (root / TABLE).open("a") as file:
        file.write(f"bad, {code}\n")
    record = SIIMCollection(root).list_all().records[-1]
    row = len((root / TABLE).read_text().splitlines())
    with pytest.raises(UnreadableImageError, match=rf"{TABLE}: row {row}, column EncodedPixels: {message}"):
        record.draw_mask()


def test_a_code_may_reach_the_last_pixel():
    mask = union_of_runs(((1, f"{FRAME * FRAME - 1} 1"), (2, "0 1")), TABLE)
    assert np.argwhere(mask).tolist() == [[0, 0], [FRAME - 1, FRAME - 1]]
