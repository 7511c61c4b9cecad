"""Read pretraining images in order from start to end, for data that is larger than disk or memory.

A cache gives two things for nothing that a stream must provide itself.

**Sample numbers.** The views of an image depend on its number (`pretraining.views`). `datasets` counts anew in every
worker, and a row may have no name. So the number is the place of the row: the number of its shard times 2^32, plus the
number of the row in the shard. It does not depend on processes, workers, order or views that are left out. If a row is
read again in an epoch, because the first reading was too short, add the number of the reading times 2^56.

**Resume, with any number of processes.** `datasets` does not restore a shuffle buffer, and divides a stream by
processes and workers. So the order is that of `lanes`. Each reader runs through the lanes that it needs, and decodes
its own images alone: on resuming, it reads the rows before the checkpoint and throws them away. For a checkpoint in the
middle of an epoch of 100 GB, 50 GB are read before the first step.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.machine import begin_worker
from mlvicx_hf.common.text import some

from ..cache.cache import MANIFEST, load_cache
from ..collections.base import normalize_view
from ..collections.metadata import find_view
from ..collections.opening import (
    IMAGE_ROWS,
    TABLE_ROWS,
    as_stream,
    count_in_pieces,
    find_image_column,
    folder_of,
    open_dataset,
    read_cell,
)
from ..images.errors import UnreadableImageError
from ..images.pixels import decode_gray, fit_square_gray
from ..options import check_choice, check_least
from .lanes import PLACE_BITS, ROW_BITS, Shards, StreamRow
from .sampling import LATERAL, VIEW_CHOICES, GlobalBatches, choose_views

logger = logging.getLogger(__name__)

MAX_UNREADABLE = 0.01  # largest share of unreadable images
FEW_UNREADABLE = 3  # up to this number they are never too many
_IN_A_ROW = 32  # unreadable images that may follow one another in a lane, or as many as the lane's buffer holds


@dataclass(frozen=True)
class Stream:
    """The data of a pretraining run."""

    shards: Shards  # its rows
    num_images: int  # number of images in an epoch
    left_out: int | None  # number of lateral images that are left out; None if they were not counted
    size: int  # side of the squares in pixels
    fit: str  # what happens to an image that is not square
    manifest: dict[str, Any]  # content of `cache.json`, or the same facts of other data
    folder: str | None = None  # folder of files that rows name by their path


def open_stream(
    path: str,
    split: str = "train",
    *,
    views: str = "frontal",
    num_images: int | None = None,
    size: int = 256,
    image_column: str | None = None,
) -> Stream:
    """Open a cache, parquet or Arrow files, or a dataset on the Hub as a stream of images, without labels.

    Args:
        path: folder of a cache, or any path that `open_dataset` takes.
        split: name of the split in the dataset.
        views: "frontal" leaves out rows whose column `view`, or `View Position`, or `Projection`, says lateral; "all"
            ignores this column.
        num_images: number of images in an epoch, if the data does not tell it or fewer are wanted.
        size: side of the squares in pixels. A cache has its own size.
        image_column: by default the only Image column.

    Raises:
        OSError: there is no such data.
        UserError: an option does not fit the data, or the number of images is not known.
    """
    check_choice("views", views, VIEW_CHOICES)
    check_least(1, num_images=num_images, cache_size=size)
    if (Path(path) / MANIFEST).is_file():
        if image_column not in (None, "image"):
            raise UserError(f"image_column={image_column!r} found with a cache; expected none, or image")
        return _open_cache(path, split, views, num_images)
    opened = open_dataset(path, streaming=True)
    check_choice("split", split, opened.splits)
    features = opened.splits[split].features
    image = find_image_column(path, features, image_column)
    view = find_view(features) if views == "frontal" else None
    counted, lengths, left_out = opened.counts[split], opened.lengths.get(split), None if view else 0
    if view is not None and counted is not None and opened.local:
        lengths = _count_frontal(
            open_dataset(path, streaming=True, columns=[view], rows=TABLE_ROWS), split, features, view
        )
        counted, left_out = sum(lengths), counted - sum(lengths)
    elif view is not None and counted is not None and num_images is None:
        raise UserError(
            f"{path}: {counted} images in the files found, lateral ones among them; expected --num_images to say "
            "how many are frontal, or --views all"
        )
    if num_images is None and counted is None:
        raise UserError(f"{path}: number of images of {split} not known without reading it; expected --num_images")
    stream = open_dataset(path, streaming=True, columns=[image, *filter(None, [view])], rows=IMAGE_ROWS).splits[split]
    stream = stream.cast_column(image, datasets.Image(decode=False))
    manifest: dict[str, Any] = {
        "fit": "pad",
        "collection": "hf",
        "synthetic": False,
        "splits": {split: {"images": opened.counts[split]}},
        "split_hash": "",
        "data_hash": _identity(opened.files[split]),
    }
    read = partial(_read_shard, stream, image, view, _class_names(features, view), None)
    shards = Shards(read, stream.num_shards, lengths)
    return Stream(shards, num_images or counted or 0, left_out, size, manifest["fit"], manifest, folder_of(path))


def _open_cache(path: str, split: str, views: str, num_images: int | None) -> Stream:
    """Open a cache, whose squares need no change."""
    cache = load_cache(path)
    check_choice("split", split, cache.datasets)
    images = cache.datasets[split].select_columns(["image", "view", "source"])
    chosen, left_out = choose_views(images, views)
    view = "view" if views == "frontal" else None
    lengths = count_in_pieces([view is None or is_frontal(value) for value in images["view"][:]])
    stream = as_stream(images.cast_column("image", datasets.Image(decode=False)))
    read = partial(_read_shard, stream, "image", view, None, "source")
    shards, manifest = Shards(read, stream.num_shards, lengths), cache.manifest
    return Stream(shards, num_images or len(chosen), left_out, manifest["size"], manifest["fit"], manifest)


def _class_names(features: Any, column: str | None) -> list[str] | None:
    return features[column].names if column and isinstance(features[column], datasets.ClassLabel) else None


def _count_frontal(opened: Any, split: str, features: Any, view: str) -> list[int]:
    """Count the frontal rows of each shard by a column of views."""
    names, stream = _class_names(features, view), opened.splits[split]
    shards = (stream.shard(num_shards=stream.num_shards, index=shard) for shard in range(stream.num_shards))
    batches = (shard.iter(batch_size=TABLE_ROWS) for shard in shards)
    return [sum(is_frontal(value, names) for batch in shard for value in batch[view]) for shard in batches]


def is_frontal(view: Any, names: list[str] | None = None) -> bool:
    """Check whether a cell of a column of views is not lateral. Unknown views count as frontal."""
    text = names[view] if names and isinstance(view, int) and view >= 0 else str(view or "")
    return normalize_view(text) != LATERAL


def _identity(files: Iterable[str]) -> str:
    """Hash what a resumed run must find again: addresses with their commit, or names and sizes of files."""
    lines = [f"{os.path.basename(f)}\t{os.path.getsize(f)}" if os.path.exists(f) else f for f in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_shard(
    stream: Any, image: str, view: str | None, names: list[str] | None, name: str | None, shard: int
) -> Iterator[StreamRow]:
    """Read the undecoded images of a shard of a `datasets.IterableDataset`, without the lateral ones.

    `image`, `view` and `name` are columns; without `view` nothing is left out. `names` are those of views that are
    classes.
    """
    part = stream.shard(num_shards=stream.num_shards, index=shard)
    # Iterate by batches: row by row, `datasets` would divide the rows among the workers.
    batches = part.iter(batch_size=IMAGE_ROWS)
    for place, (batch, row) in enumerate((b, i) for b in batches for i in range(len(b[image]))):
        if view is None or is_frontal(batch[view][row], names):
            called = batch[name][row] if name else f"row {place + 1} of shard {shard + 1}"
            yield StreamRow(shard << ROW_BITS | place, called, batch[image][row])


class _Lane:
    """A lane from which a reader takes some images."""

    def __init__(self, rows: Iterator[StreamRow]) -> None:
        self.rows, self.done = rows, 0
        self.ahead: deque[StreamRow] = deque()  # rows that were looked at before their turn

    def take(self, place: int) -> StreamRow | None:
        """Run on to the image at this place in the lane. Return None if the lane has no more."""
        row = None
        while self.done <= place:
            row = self.ahead.popleft() if self.ahead else next(self.rows, None)
            self.done += 1
        return row

    def following(self, most: int) -> Iterator[StreamRow]:
        """Look at the next images without taking them."""
        for place in range(most):
            if place == len(self.ahead):
                self.ahead.extend(islice(self.rows, 1))
            if place < len(self.ahead):
                yield self.ahead[place]


class Samples(NamedTuple):
    """The N images of a batch that one worker decodes."""

    squares: Tensor  # uint8 [N, 1, S, S]
    numbers: Tensor  # numbers of the samples, int64 [N]
    unreadable: list[tuple[int, str]]  # numbers of unreadable samples, and the reasons


class _Reader(IterableDataset[Samples | UserError]):
    """Gives the images of every step that a worker decodes, and last of all an error, if there is one.

    With W processes of K workers, worker k of process r decodes the images at the positions r + W·k + W·K·i.
    """

    def __init__(self, batches: StreamBatches) -> None:
        self.batches = batches
        self.lanes: dict[int, _Lane] = {}

    def __iter__(self) -> Iterator[Samples | UserError]:
        info = get_worker_info()
        try:
            for step in range(self.batches.first_step, len(self.batches)):
                yield self._read(step, 0 if info is None else info.id)
        except UserError as error:
            yield error  # the main process raises it: DataLoader would add a traceback to the message

    def _read(self, step: int, worker: int) -> Samples:
        batches, size = self.batches, self.batches.stream.size
        squares, numbers = [torch.empty(0, 1, size, size, dtype=torch.uint8)], []
        unreadable: list[tuple[int, str]] = []
        for place in range(batches.share)[batches.places(step, worker)]:
            position = step * batches.batch_size + batches.rank + batches.num_processes * place
            place_in_lane, number = divmod(position, batches.stream.shards.lanes)
            if number not in self.lanes:
                rows = batches.stream.shards.lane(number, batches.seed, batches.epoch, batches.lane_buffer)
                self.lanes[number] = _Lane(rows)
            row = self.lanes[number].take(place_in_lane)
            if row is None:
                raise UserError(f"num_images={batches.num_images} found; the stream holds far fewer, or none")
            squares.append(self._decode(row, self.lanes[number], unreadable)[None])
            numbers.append(row.number)
        return Samples(torch.cat(squares), torch.tensor(numbers, dtype=torch.int64), unreadable)

    def _decode(self, row: StreamRow, lane: _Lane, unreadable: list[tuple[int, str]]) -> Tensor:
        """Decode a row. If it is unreadable, decode the next readable one of the lane in its place.

        The number of the unreadable one stays, so the image comes in other views. Thus no position depends on what
        other readers decode.
        """
        failures: list[str] = []
        for each in chain([row], lane.following(max(_IN_A_ROW, self.batches.lane_buffer))):
            try:
                return decode_square(each, self.batches.stream)
            except (UnreadableImageError, OSError) as error:
                failures.append(f"{each.name}: {getattr(error, 'reason', error)}")
                unreadable.append((each.number, failures[-1]))
        raise UserError(f"{len(failures)} images in a row cannot be read, such as {some(failures, 3)}")


def decode_square(row: StreamRow, stream: Stream) -> Tensor:
    """Decode a row to a square, uint8 [1, S, S].

    Raises:
        UnreadableImageError: the image cannot be decoded.
        OSError: the file that the row names cannot be read.
    """
    content = read_cell(row.cell, stream.folder)
    gray = decode_gray(content, row.name, padded_to=stream.size if stream.fit == "pad" else None)
    square = gray if gray.size == (stream.size, stream.size) else fit_square_gray(gray, stream.size, stream.fit)
    return torch.from_numpy(np.array(square, dtype=np.uint8))[None]


class StreamBatches(GlobalBatches):
    """Gives images and numbers of this process's share of every batch of an epoch of a stream.

    The batch of step t holds the positions t·B to t·B + B - 1 of the stream's order (see `lanes`); process r of W takes
    every W-th of them, beginning with number r. An epoch has `num_images // batch_size` steps. If a lane ends earlier,
    it goes on with other rows. Rows that are left at the end wait for another epoch.

    If the number of processes times that of workers divides the lanes, each row is read once. Otherwise several readers
    read the same lanes, and each decodes its own images.

    Args:
        stream: the data.
        batch_size, seed, rank, num_processes: see `GlobalBatches`.
        num_workers: number of processes that read and decode. Fewer are started if they would share too few lanes.
        shuffle_buffer: number of undecoded rows that a process holds at most. All lanes share it.

    Raises:
        UserError: the batch is larger than the data, or the processes cannot share it evenly. In an epoch: too many
            images are unreadable, or there are none.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        num_workers: int = 0,
        shuffle_buffer: int = 4096,
    ) -> None:
        super().__init__(stream.num_images, batch_size, seed, rank, num_processes)
        check_least(1, shuffle_buffer=shuffle_buffer)
        self.stream, lanes = stream, stream.shards.lanes
        # A worker reads one of so many lanes as W·K and the lanes have for their greatest common divisor. All workers
        # of a process together hold no more than the buffer if that is K or more.
        self.num_workers = max(k for k in range(min(num_workers, lanes) + 1) if gcd(lanes, num_processes * k) >= k)
        self.lane_buffer = max(1, shuffle_buffer // lanes)
        self.unreadable: set[int] = set()  # places of samples
        # Unreadable images that a process leaves out before it gives up
        self.most_unreadable = max(FEW_UNREADABLE, int(MAX_UNREADABLE * (stream.num_images // num_processes)))

    def places(self, step: int, worker: int) -> slice:
        """The places in this process's share of a batch that a worker fills."""
        workers = max(1, self.num_workers)
        return slice((worker - step * self.share) % workers, None, workers)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, uint8 [B, 1, S, S], and the numbers of the samples, int64 [B]."""
        parts = iter(  # of the workers in turns
            DataLoader(
                _Reader(self),
                batch_size=None,
                num_workers=self.num_workers,
                worker_init_fn=begin_worker,
            )
        )
        for step in range(self.first_step, len(self)):
            squares = torch.empty(self.share, 1, self.stream.size, self.stream.size, dtype=torch.uint8)
            numbers = torch.empty(self.share, dtype=torch.int64)
            for worker in range(max(1, self.num_workers)):
                part = next(parts)
                if isinstance(part, UserError):
                    raise part
                self._check(part.unreadable)
                places = self.places(step, worker)
                squares[places], numbers[places] = part.squares, part.numbers
            yield squares, numbers

    def _check(self, unreadable: list[tuple[int, str]]) -> None:
        """Warn once of each unreadable sample. Raise an error for too many."""
        for number, reason in unreadable:
            place = number % (1 << PLACE_BITS)
            if place not in self.unreadable:
                self.unreadable.add(place)
                logger.warning("left out %s", reason)
        if len(self.unreadable) > self.most_unreadable:
            raise UserError(
                f"{len(self.unreadable)} images of {self.num_images // self.num_processes} cannot be read, such as "
                f"{some((reason for _, reason in unreadable), 3)}; expected at most {self.most_unreadable}"
            )
