"""Streams of pretraining images: numbers, order, processes and workers, resume, and what cannot be read."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from helpers import make_cache, unlabelled_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.collections.base import Record
from mlvicx_hf.data.images.encoding import make_picture
from mlvicx_hf.data.images.pixels import HALVED_REDUCTION
from mlvicx_hf.data.reading import streaming
from mlvicx_hf.data.reading.lanes import LANES, PLACE_BITS, ROW_BITS, StreamRow
from mlvicx_hf.data.reading.streaming import Stream, StreamBatches, decode_square, open_stream
from mlvicx_hf.data.synthetic.phantom import draw_phantom

SIDE = 8
SHARDS = (30, 9, 41, 20)  # images of each


def png(value: int, side: int = SIDE, dtype: Any = np.uint8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((side, side), value, dtype)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shards(folder: Path, shards: tuple[int, ...] = SHARDS, spoil: tuple[int, ...] = (), **columns: Any) -> Path:
    """Parquet shards whose image i is of grey value i; further columns are a feature and a function of i."""
    folder.mkdir()
    features = Features({"image": datasets.Image()} | {name: feature for name, (feature, _) in columns.items()})
    number = 0
    for index, count in enumerate(shards):
        rows = []
        for i in range(number, number + count):
            content = b"no image" if i in spoil else png(i)
            further = {name: value(i) for name, (_, value) in columns.items()}
            rows.append({"image": {"bytes": content, "path": None}} | further)
        Dataset.from_list(rows, features=features).to_parquet(
            folder / f"train-{index:05d}-of-{len(shards):05d}.parquet"
        )
        number += count
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("stream") / "data")


@pytest.fixture(scope="module")
def stream(shards: Path) -> Stream:
    return open_stream(str(shards), size=SIDE)


Batches = list[tuple[Tensor, Tensor]]


def run(batches: StreamBatches, epoch: int = 0, first_step: int = 0) -> Batches:
    batches.start_at(epoch, first_step)
    return list(batches)


def same(one: Batches, other: Batches) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b) for left, right in zip(one, other, strict=True) for a, b in zip(left, right, strict=True)
    )


def together(
    stream: Stream, words: tuple[int, int], ranks: int, epoch: int = 0, first: int = 0, **more: int
) -> Batches:
    """The global batches of several processes: rank r gives every image whose place in the batch is r modulo ranks."""
    parts = [run(StreamBatches(stream, *words, rank, ranks, **more), epoch, first) for rank in range(ranks)]
    batches = []
    for shares in zip(*parts, strict=True):
        squares, samples = (torch.stack(each, 1).flatten(0, 1) for each in zip(*shares, strict=True))
        batches.append((squares, samples))
    return batches


def numbers(batches: Batches) -> list[int]:
    return torch.cat([batch for _, batch in batches]).tolist()


def place(image: int) -> int:
    """The number of an image, from its shard and row."""
    for shard, count in enumerate(SHARDS):
        if image < count:
            return shard << ROW_BITS | image
        image -= count
    raise AssertionError


# -- numbers and order -------------------------------------------------------------------------------------------------


@pytest.mark.lowest
def test_an_epoch_is_every_image_once_under_its_own_number(stream: Stream):
    assert stream.num_images == 100
    found = run(StreamBatches(stream, 10, seed=3, shuffle_buffer=16))
    assert len(found) == 10
    for squares, samples in found:
        assert (squares.dtype, tuple(squares.shape)) == (torch.uint8, (10, 1, SIDE, SIDE))
        assert (samples.dtype, tuple(samples.shape)) == (torch.int64, (10,))
        for square, number in zip(squares, samples.tolist(), strict=True):
            value = int(square[0, 0, 0])
            assert (square == value).all()
            assert number == place(value)
    assert sorted(numbers(found)) == sorted(map(place, range(100)))


def test_order_depends_on_seed_and_epoch_alone(stream: Stream, shards: Path):
    batches = StreamBatches(stream, 10, seed=3, shuffle_buffer=16)
    first = run(batches)
    again = StreamBatches(open_stream(str(shards), size=SIDE), 10, seed=3, shuffle_buffer=16)
    run(again, 5)
    assert same(run(again), first)
    assert numbers(run(batches, 1)) != numbers(first)
    assert numbers(run(StreamBatches(stream, 10, seed=4, shuffle_buffer=16))) != numbers(first)
    # Shuffled over shards: the first thirty are of several, and not in the order of the files.
    head = numbers(first)[:30]
    assert len({number >> ROW_BITS for number in head}) > 1
    assert head != sorted(head)


def test_rows_of_a_resumed_epoch_are_not_decoded_again(stream: Stream, monkeypatch: pytest.MonkeyPatch):
    decoded: list[int] = []

    def count(row: StreamRow, stream: Stream) -> Tensor:
        decoded.append(row.number)
        return decode_square(row, stream)

    monkeypatch.setattr(streaming, "decode_square", count)
    batches = StreamBatches(stream, 10, seed=3)
    whole = run(batches)
    assert sorted(decoded) == sorted(numbers(whole))
    decoded.clear()
    assert same(run(batches, first_step=7), whole[7:])
    assert decoded == numbers(whole)[70:]


# -- processes and workers ---------------------------------------------------------------------------------------------

READERS = [(ranks, workers) for ranks in (1, 2, 3, 4) for workers in (0, 1, 2)]


@pytest.fixture(scope="module")
def difficult(tmp_path_factory: pytest.TempPathFactory) -> Stream:
    """Unequal shards with lateral views and unreadable images, two of them side by side; an epoch reads them twice."""
    view = (Value("string"), lambda i: "LATERAL" if i % 7 == 3 else "PA")
    folder = write_shards(tmp_path_factory.mktemp("difficult") / "data", spoil=(39, 40, 85), view=view)
    return open_stream(str(folder), num_images=120, size=SIDE)


@pytest.fixture(scope="module")
def expected(difficult: Stream) -> Batches:
    return run(StreamBatches(difficult, 12, 5, shuffle_buffer=20), 1)


@pytest.mark.parametrize(("ranks", "workers"), READERS)
def test_any_number_of_readers_gives_the_same_batches(difficult: Stream, expected: Batches, ranks: int, workers: int):
    assert len(expected) == 10
    assert len(set(numbers(expected))) == 120  # no sample has the views of another one
    places = [number % (1 << PLACE_BITS) for number in numbers(expected)]
    assert set(places) == {place(i) for i in range(100) if i % 7 != 3}  # each at least once, none of the lateral ones
    more = {"num_workers": workers, "shuffle_buffer": 20}
    first = 0 if workers else 4  # in the middle of the epoch
    assert same(together(difficult, (12, 5), ranks, 1, first, **more), expected[first:])


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3), st.integers(0, 4), st.integers(1, 6), st.sampled_from([1, 7, 64]))
def test_begun_anywhere_any_number_of_processes_goes_on_in_the_same_bits(
    difficult: Stream, epoch: int, first: int, ranks: int, buffer: int
):
    whole = run(StreamBatches(difficult, 30, 0, shuffle_buffer=buffer), epoch)
    assert len(whole) == 4
    ranks -= ranks == 4  # which does not divide the batch
    assert same(together(difficult, (30, 0), ranks, epoch, first, shuffle_buffer=buffer), whole[first:])


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_whose_lengths_are_not_known_give_the_same_batches(stream: Stream, workers: int):
    """As on the Hub: a lane takes whole shards, and one that ends earlier than others reads again."""
    unknown = replace(stream, shards=replace(stream.shards, lengths=None))
    for epoch in range(2):
        whole = run(StreamBatches(unknown, 12, 5, shuffle_buffer=20), epoch)
        assert len(set(numbers(whole))) == 96
        assert 50 < len({number % (1 << PLACE_BITS) for number in numbers(whole)}) <= 96
        for ranks in (2, 3):
            more = {"num_workers": workers, "shuffle_buffer": 20}
            assert same(together(unknown, (12, 5), ranks, epoch, **more), whole)


def test_lanes_follow_from_the_shards(stream: Stream):
    shards = stream.shards
    assert (shards.count, shards.lengths, shards.lanes) == (4, list(SHARDS), 4)
    assert [replace(shards, count=count).lanes for count in (1, 3, 7, 15, 16, 240)] == [1, 2, 4, 8, 16, LANES]
    assert [replace(shards, count=count, lengths=None).lanes for count in (1, 3, 7, 17)] == [1, 3, 7, LANES]
    for reading in range(5):
        covered = []
        for lane in range(4):
            pieces = shards._pieces(lane, np.random.default_rng([0, 0, reading]))
            assert sum(stop - start for _, start, stop in pieces) == 25
            covered += [place(sum(SHARDS[:shard])) + row for shard, start, stop in pieces for row in range(start, stop)]
        assert sorted(covered) == sorted(map(place, range(100)))


def test_one_row_of_the_buffer_is_enough_and_lanes_share_it(stream: Stream):
    assert sorted(numbers(run(StreamBatches(stream, 10, 0, shuffle_buffer=1)))) == sorted(map(place, range(100)))
    assert StreamBatches(stream, 10, 0, shuffle_buffer=100).lane_buffer == 25


@pytest.mark.parametrize(
    ("count", "ranks", "asked", "started"),
    [(240, 1, 0, 0), (240, 1, 2, 2), (240, 1, 3, 2), (240, 8, 4, 4), (240, 3, 4, 4), (4, 1, 9, 4), (1, 2, 4, 1)],
)
def test_workers_that_would_hold_more_than_the_buffer_are_not_started(
    stream: Stream, count: int, ranks: int, asked: int, started: int
):
    stream = replace(stream, shards=replace(stream.shards, count=count))
    assert StreamBatches(stream, 24, 0, 0, ranks, num_workers=asked).num_workers == started


# -- what is read ------------------------------------------------------------------------------------------------------


def test_16_bit_images_keep_their_levels(tmp_path: Path):
    ramp = (np.arange(64, dtype=np.uint16).reshape(8, 8) * 700 + 20_000).astype(np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    features = Features({"image": datasets.Image()})
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}}] * 4
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    ((squares, _),) = run(StreamBatches(open_stream(str(tmp_path / "a.parquet"), size=8), 4, 0))
    for square in squares:
        assert len(square.unique()) == 62  # the darkest and the brightest pixel do not count for the range


def test_other_sizes_are_made_square(tmp_path: Path):
    buffer = io.BytesIO()
    Image.new("L", (40, 20), 200).save(buffer, "PNG")
    rows = [{"image": {"bytes": buffer.getvalue(), "path": None}}] * 2
    Dataset.from_list(rows, features=Features({"image": datasets.Image()})).to_parquet(tmp_path / "a.parquet")
    ((squares, _),) = run(StreamBatches(open_stream(str(tmp_path / "a.parquet"), size=16), 2, 0))
    assert tuple(squares.shape) == (2, 1, 16, 16)
    assert squares[0, 0, :, 0].tolist() == [0] * 4 + [200] * 8 + [0] * 4


@pytest.mark.parametrize("kind", ["text", "classes"])
def test_lateral_views_are_left_out_and_counted(tmp_path: Path, kind: str):
    names = ["PA", "Lateral", "", "AP"]
    if kind == "text":
        view: Any = (Value("string"), lambda i: names[i % 4])
    else:
        view = (ClassLabel(names=["PA", "LL", "unknown", "AP"]), lambda i: i % 4)
    folder = write_shards(tmp_path / "data", view=view)
    stream = open_stream(str(folder), size=SIDE)
    assert (stream.num_images, stream.left_out) == (75, 25)
    found = run(StreamBatches(stream, 5, 0))
    values = [int(square[0, 0, 0]) for squares, _ in found for square in squares]
    assert sorted(values) == [i for i in range(100) if i % 4 != 1]
    assert numbers(found) == [place(value) for value in values]  # as they would be with all views
    everything = open_stream(str(folder), size=SIDE, views="all")
    assert (everything.num_images, everything.left_out) == (100, 0)


def test_views_under_another_name_leave_lateral_images_out_as_well(tmp_path: Path):
    columns = {"View Position": (Value("string"), lambda i: ("PA", "LL")[i % 2])}
    stream = open_stream(str(write_shards(tmp_path / "data", **columns)), size=SIDE)
    assert (stream.num_images, stream.left_out) == (50, 50)


def test_a_cache_is_streamed_as_it_is(tmp_path: Path):
    rows = [{"patient_id": f"p{i}", "view": "LATERAL" if i % 5 == 0 else "PA", "_draw": {}} for i in range(30)]
    folder = make_cache(tmp_path, rows, size=24)
    cache = load_cache(folder)
    stream = open_stream(str(folder), size=99)
    assert (stream.num_images, stream.left_out, stream.size) == (24, 6, 24)
    assert stream.manifest == cache.manifest
    found = run(StreamBatches(stream, 4, 0))
    images = {number: i for i, number in enumerate(sorted(numbers(found)))}  # in the order of the cache
    frontal = [row for row in cache.datasets["train"] if row["view"] != "LATERAL"]
    for squares, samples in found:
        for square, number in zip(squares, samples.tolist(), strict=True):
            assert np.array_equal(square[0].numpy(), np.asarray(frontal[images[number]]["image"]))
    assert len(images) == 24


@pytest.mark.parametrize("form", ["saved", "pattern", "arrow"])
def test_every_form_of_shards(tmp_path: Path, shards: Path, form: str):
    if form == "pattern":
        path = str(shards / "*.parquet")
    else:
        whole = datasets.concatenate_datasets([Dataset.from_parquet(str(f)) for f in sorted(shards.glob("*.parquet"))])
        whole.save_to_disk(tmp_path / "saved", num_shards=3)
        path = str(tmp_path / "saved")
        if form == "arrow":
            for name in ("state.json", "dataset_info.json"):
                (tmp_path / "saved" / name).unlink()
    found = run(StreamBatches(open_stream(path, size=SIDE), 10, 0))
    assert sorted(int(square[0, 0, 0]) for squares, _ in found for square in squares) == list(range(100))
    assert len(set(numbers(found))) == 100


# -- what cannot be read -----------------------------------------------------------------------------------------------


def test_an_image_that_cannot_be_read_is_named_once_and_another_takes_its_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = write_shards(tmp_path / "data", spoil=(17,))
    batches = StreamBatches(open_stream(str(folder), size=SIDE), 10, 0, num_workers=2)
    whole = run(batches)
    assert caplog.messages == ["left out row 18 of shard 1: content is none of PNG, JPEG, TIFF, WEBP, BMP, JPEG2000"]
    assert sorted(numbers(whole)) == sorted(map(place, range(100)))
    shown = {number: int(s[0, 0, 0]) for squares, ns in whole for s, number in zip(squares, ns.tolist(), strict=True)}
    assert shown[place(17)] != 17
    assert all(shown[place(i)] == i for i in range(100) if i != 17)
    assert same(run(batches, 0, 6), whole[6:])  # with the same one in its place
    assert len(caplog.messages) == 1


def test_too_many_that_cannot_be_read_are_an_error(tmp_path: Path):
    folder = write_shards(tmp_path / "data", spoil=(17, 40, 60, 80))
    with pytest.raises(ValueError, match=r"4 images of 100 cannot be read, such as row .*; expected at most 3"):
        run(StreamBatches(open_stream(str(folder), size=SIDE), 10, 0))
    nothing = write_shards(tmp_path / "nothing", (30,), tuple(range(30)))
    for workers in (0, 1):
        batches = StreamBatches(
            open_stream(str(nothing), num_images=5000, size=SIDE), 10, 0, num_workers=workers, shuffle_buffer=1
        )
        with pytest.raises(ValueError, match=r"^33 images in a row cannot be read, such as row .*$"):
            run(batches)


def test_what_takes_the_place_of_an_unreadable_one_is_the_next_of_its_lane(tmp_path: Path):
    """One shard is one lane; a buffer of one row leaves the rows in their order."""
    folder = write_shards(tmp_path / "data", (6,), spoil=(1, 2))
    stream = open_stream(str(folder), size=SIDE)
    assert stream.shards.lanes == 1
    for ranks in (1, 2, 3):
        ((squares, samples),) = together(stream, (6, 0), ranks, shuffle_buffer=1)
        assert samples.tolist() == list(range(6))
        assert squares[:, 0, 0, 0].tolist() == [0, 3, 3, 3, 4, 5]
    late = open_stream(str(write_shards(tmp_path / "late", (6,), spoil=(5,))), size=SIDE)
    ((squares, _),) = run(StreamBatches(late, 6, 0, shuffle_buffer=1))
    assert squares[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 0]  # the first one of the next reading


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
def test_a_large_jpeg_becomes_the_square_of_a_cache(stream: Stream, fit: str):
    buffer = io.BytesIO()
    drawn = Image.fromarray(draw_phantom(0, size=256).image)
    drawn.resize((2 * HALVED_REDUCTION * SIDE * 3, 200), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    content = buffer.getvalue()
    square = decode_square(StreamRow(0, "a", {"bytes": content, "path": None}), replace(stream, fit=fit))
    picture = make_picture(Record("a", "p", load=lambda: content), SIDE, fit)
    assert np.array_equal(square[0], np.asarray(Image.open(io.BytesIO(picture.png))))


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_options_that_do_not_fit_are_refused(shards: Path, stream: Stream, tmp_path: Path):
    for options, message in (
        ({"split": "test"}, "split='test' found; expected one of train"),
        ({"views": "side"}, "views='side' found"),
        ({"num_images": 0}, "num_images=0 found; expected 1 or more"),
        ({"size": 0}, "cache_size=0 found"),
        ({"image_column": "scan"}, "expected the pixels in scan"),
    ):
        with pytest.raises(ValueError, match=message):
            open_stream(str(shards), **options)
    for words, message in (
        ((200, 0), "batch_size=200 found; expected at most 100"),
        ((9, 0, 0, 2), "expected a multiple of the 2 processes"),
        ((10, 0, 0, 1, 0, 0), "shuffle_buffer=0 found"),
    ):
        with pytest.raises(ValueError, match=message):
            StreamBatches(stream, *words)
    with pytest.raises(FileNotFoundError, match=r"'\./nowhere' found"):
        open_stream("./nowhere")
    cache = unlabelled_cache(tmp_path, 6)
    with pytest.raises(UserError, match="image_column='scan' found with a cache; expected none"):
        open_stream(str(cache), image_column="scan")


def test_an_epoch_of_another_length(shards: Path, tmp_path: Path):
    short = StreamBatches(open_stream(str(shards), num_images=40, size=SIDE), 10, 0)
    assert len(run(short)) == 4
    long = StreamBatches(open_stream(str(shards), num_images=130, size=SIDE), 10, 0)
    assert len(set(numbers(run(long)))) == 130
    assert {number % (1 << PLACE_BITS) for number in numbers(run(long))} == set(map(place, range(100)))
    assert same(run(long, 0, 11), run(long)[11:])
    few = write_shards(tmp_path / "few", (5,))
    mistaken = StreamBatches(open_stream(str(few), num_images=600, size=SIDE), 300, 0)
    with pytest.raises(ValueError, match="num_images=600 found; the stream holds far fewer"):
        run(mistaken)
    nothing = write_shards(tmp_path / "lateral", (30,), view=(Value("string"), lambda i: "LL"))
    with pytest.raises(ValueError, match="num_images=10 found; the stream holds far fewer, or none"):
        run(StreamBatches(open_stream(str(nothing), num_images=10, size=SIDE), 5, 0))


def test_a_length_that_nobody_knows_must_be_given(tmp_path: Path):
    for i in range(3):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / f"{i}.png").write_bytes(png(i))
    with pytest.raises(ValueError, match=r"number of images of train not known .*; expected --num_images"):
        open_stream(str(tmp_path / "images"))
    stream = open_stream(str(tmp_path / "images"), num_images=3, size=SIDE)
    found = run(StreamBatches(stream, 3, 0))
    assert sorted(int(square[0, 0, 0]) for square in found[0][0]) == [0, 1, 2]
