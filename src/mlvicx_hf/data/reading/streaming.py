# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Read pretraining images in order from start to end, for data that is larger than disk or memory.

A cache gives two things for nothing that a stream must provide itself.

**Sample numbers.** The views of an image depend on its number (`pretraining.views`). `datasets` counts anew in every
worker, and a row may have no name. So the number is the place of the row: the number of its shard times 2^32, plus the
number of the row in the shard. It does not depend on processes, workers, order or views that are left out. If a row is
read again in an epoch, because the first reading was too short, add the number of the reading times 2^56.

**Resume.** `datasets` does not restore a shuffle buffer. The order of an epoch is a function of (seed, epoch, number of
processes and workers, buffer). So run through it again up to the step of the checkpoint: read rows and throw them away
without decoding. For a checkpoint in the middle of an epoch of 100 GB, 50 GB are read before the first step.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.signals import leave_signals_to_the_main_process
from mlvicx_hf.common.text import some

from ..cache.cache import MANIFEST, load_cache
from ..collections.base import normalize_view
from ..collections.opening import (
    IMAGE_ROWS,
    TABLE_ROWS,
    as_stream,
    find_image_column,
    folder_of,
    open_dataset,
    read_cell,
)
from ..images.errors import UnreadableImageError
from ..images.pixels import decode_gray, fit_square_gray
from ..options import check_choice, check_least
from .sampling import LATERAL, VIEW_CHOICES, GlobalBatches, choose_views

logger = logging.getLogger(__name__)

_CHUNK = 32  # number of images that a worker decodes and sends at a time
MAX_UNREADABLE = 0.01  # largest share of unreadable images
FEW_UNREADABLE = 3  # so many are never too many
ROW_BITS = 32  # bits of a sample's number for the row within its shard
PLACE_BITS = 56  # bits for the row and the shard
MAX_READINGS = 100  # of a stream in one epoch


class StreamRow(NamedTuple):
    """An image before it is decoded: the number of the sample, its name in messages, the undecoded cell."""

    number: int
    name: str
    cell: dict[str, Any] | None


class Chunk(NamedTuple):
    """N samples from a worker."""

    numbers: Tensor  # numbers of the samples, int64 [N]
    squares: Tensor | None  # uint8 [N, 1, S, S]; None for samples that a resumed run has seen before
    unreadable: list[tuple[int, str]]  # numbers of unreadable samples, and the reasons


@dataclass(frozen=True)
class Stream:
    """The data of a pretraining run."""

    rows: Any  # `datasets.IterableDataset` of `StreamRow` fields
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
        views: "frontal" leaves out rows whose column `view` says lateral; "all" ignores this column.
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
        return _open_cache(path, split, views, num_images)
    opened = open_dataset(path, streaming=True)
    if split not in opened.splits:
        raise UserError(f"split={split!r} found; {path} has {', '.join(opened.splits)}")
    features = opened.splits[split].features
    image = find_image_column(path, features, image_column)
    view = "view" if views == "frontal" and "view" in features else None
    counted, left_out = opened.counts[split], None if view else 0
    if num_images is None and view is not None and counted is not None:
        if not opened.local:
            raise UserError(
                f"{path}: {counted} images in the files found, lateral ones among them; expected --num_images to say "
                "how many are frontal, or --views all"
            )
        left_out = _count_lateral(open_dataset(path, streaming=True, columns=[view], rows=TABLE_ROWS), split, features)
        counted -= left_out
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
    rows = number_rows(stream, image, view, _class_names(features, view))
    return Stream(rows, num_images or counted or 0, left_out, size, manifest["fit"], manifest, folder_of(path))


def _open_cache(path: str, split: str, views: str, num_images: int | None) -> Stream:
    """Open a cache, whose squares need no change."""
    cache = load_cache(path)
    if split not in cache.datasets:
        raise UserError(f"split={split!r} found; {path} has {', '.join(cache.datasets)}")
    images = cache.datasets[split].select_columns(["image", "view", "source"])
    chosen, left_out = choose_views(images, views)
    stream = as_stream(images.cast_column("image", datasets.Image(decode=False)))
    rows = number_rows(stream, "image", "view" if views == "frontal" else None, name="source")
    return Stream(
        rows, num_images or len(chosen), left_out, cache.manifest["size"], cache.manifest["fit"], cache.manifest
    )


def _class_names(features: Any, column: str | None) -> list[str] | None:
    return features[column].names if column and isinstance(features[column], datasets.ClassLabel) else None


def _count_lateral(opened: Any, split: str, features: Any) -> int:
    names = _class_names(features, "view")
    batches = opened.splits[split].iter(batch_size=TABLE_ROWS)
    return sum(not is_frontal(value, names) for batch in batches for value in batch["view"])


def is_frontal(view: Any, names: list[str] | None = None) -> bool:
    """Check whether a cell of the column `view` is not lateral. Unknown views count as frontal."""
    text = names[view] if names and isinstance(view, int) and view >= 0 else str(view or "")
    return normalize_view(text) != LATERAL


def _identity(files: Iterable[str]) -> str:
    """Hash what a resumed run must find again: addresses with their commit, or names and sizes of files."""
    lines = [f"{os.path.basename(f)}\t{os.path.getsize(f)}" if os.path.exists(f) else f for f in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def number_rows(
    stream: Any, image: str, view: str | None = None, names: list[str] | None = None, name: str | None = None
) -> Any:
    """Add the numbers of the samples to the rows of a stream. The number of shards stays the same.

    Args:
        stream: `datasets.IterableDataset` with an undecoded image.
        image: column of images.
        view: column of views, to leave out the lateral ones. None leaves out nothing.
        names: names of the views, if the column holds classes.
        name: column with the names of the images.
    """
    arguments = {"shards": list(range(stream.num_shards)), "stream": stream}
    columns = {"image": image, "view": view, "names": names, "name": name}
    return datasets.IterableDataset.from_generator(_numbered, gen_kwargs=arguments | {"columns": columns})


def _numbered(shards: list[int], stream: Any, columns: dict[str, Any]) -> Iterator[dict[str, Any]]:
    image, view, names, name = (columns[key] for key in ("image", "view", "names", "name"))
    for shard in shards:
        part = stream.shard(num_shards=stream.num_shards, index=shard)
        # Iterate by batches: row by row, `datasets` would divide the rows among the workers a second time.
        batches = part.iter(batch_size=IMAGE_ROWS)
        for place, (batch, row) in enumerate((b, i) for b in batches for i in range(len(b[image]))):
            if view is None or is_frontal(batch[view][row], names):
                called = batch[name][row] if name else f"row {place + 1} of shard {shard + 1}"
                number = shard << ROW_BITS | place
                yield StreamRow(number, called, batch[image][row])._asdict()


def decode_chunk(rows: list[StreamRow], size: int, fit: str, folder: str | None = None) -> Chunk:
    """Decode N rows to squares of `size` pixels.

    Replace an unreadable image by the next readable one, under the number of the unreadable one and so in other views.
    Thus the number of samples, on which the place to resume depends, is known without decoding.
    """
    squares: list[Tensor | None] = []
    unreadable = []
    for row in rows:
        try:
            gray = decode_gray(read_cell(row.cell, folder), row.name)
        except (UnreadableImageError, OSError) as error:
            unreadable.append((row.number, f"{row.name}: {getattr(error, 'reason', error)}"))
            squares.append(None)
            continue
        square = gray if gray.size == (size, size) else fit_square_gray(gray, size, fit)
        squares.append(torch.from_numpy(np.array(square, dtype=np.uint8))[None])
    numbers = torch.tensor([row.number for row in rows])
    readable = [place for place, square in enumerate(squares) if square is not None]
    if not readable:
        return Chunk(numbers, torch.zeros(len(rows), 1, size, size, dtype=torch.uint8), unreadable)
    # For every place take the first readable place behind it, or else the very first.
    chosen = [readable[i % len(readable)] for i in np.searchsorted(readable, range(len(rows)))]
    return Chunk(numbers, torch.stack([square for i in chosen if (square := squares[i]) is not None]), unreadable)


class _Chunks(IterableDataset[Chunk]):
    """Gives the chunks of a worker's share of the rows. The first chunks stay undecoded."""

    def __init__(self, rows: Any, stream: Stream, undecoded: int) -> None:
        self.rows, self.size, self.fit, self.folder = rows, stream.size, stream.fit, stream.folder
        self.undecoded = undecoded

    def __iter__(self) -> Iterator[Chunk]:
        rows = (StreamRow(**row) for row in self.rows)  # `datasets` gives every worker its own shards
        for place, chunk in enumerate(_pieces(rows)):
            if place < self.undecoded:
                yield Chunk(torch.tensor([row.number for row in chunk]), None, [])
            else:
                yield decode_chunk(chunk, self.size, self.fit, self.folder)


def _pieces(rows: Iterable[StreamRow]) -> Iterator[list[StreamRow]]:
    """Cut rows into pieces of `_CHUNK`. The last piece is longer, not shorter: it should hold a readable image."""
    piece: list[StreamRow] = []
    for row in rows:
        piece.append(row)
        if len(piece) == 2 * _CHUNK:
            yield piece[:_CHUNK]
            piece = piece[_CHUNK:]
    if piece:
        yield piece


class StreamBatches(GlobalBatches):
    """Gives images and numbers of every batch of an epoch of a stream.

    Shuffle the shards by (seed, epoch), divide them among processes and workers, and read ten at a time into a buffer
    from which rows are drawn. If the shards cannot be divided evenly, each process reads all and takes every n-th row.
    An epoch has `num_images // batch_size` steps in every process, so no process waits for another in vain. If its rows
    end earlier, a process reads them once more in another order. Rows that are left at the end are dropped.

    Args:
        stream: the data.
        batch_size, seed, rank, num_processes: see `GlobalBatches`.
        num_workers: number of processes that read and decode. The order depends on it.
        shuffle_buffer: number of undecoded rows from which the next is drawn; the workers of a process share it.

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
        self.stream = stream
        shards = split_dataset_by_node(stream.rows, rank, num_processes).num_shards
        self.num_workers = min(num_workers, shards)
        self.shuffle_buffer = max(1, shuffle_buffer // max(1, self.num_workers))
        self.unreadable: set[int] = set()  # numbers of samples
        # Unreadable images that a process leaves out before it gives up
        self.most_unreadable = max(FEW_UNREADABLE, int(MAX_UNREADABLE * (stream.num_images // num_processes)))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield images, uint8 [B, 1, S, S], and the numbers of the samples, int64 [B]."""
        steps = len(self) - self.first_step
        size = self.stream.size
        squares, numbers = torch.empty(0, 1, size, size, dtype=torch.uint8), torch.empty(0, dtype=torch.int64)
        for more_squares, more_numbers in self._samples_behind(self.first_step * self.share) if steps else ():
            squares, numbers = torch.cat([squares, more_squares]), torch.cat([numbers, more_numbers])
            while len(numbers) >= self.share:
                yield squares[: self.share], numbers[: self.share]
                squares, numbers = squares[self.share :], numbers[self.share :]
                steps -= 1
                if not steps:
                    return

    def _samples_behind(self, seen: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield squares and numbers, more than enough, beginning after the first `seen` samples of the epoch."""
        for turn in range(MAX_READINGS):
            found = 0
            for numbers, squares, unreadable in self._read(turn, seen):
                found += len(numbers)
                self._check(len(numbers), unreadable)
                skip = min(seen, len(numbers))
                seen -= skip
                if skip < len(numbers):
                    assert squares is not None
                    yield squares[skip:], numbers[skip:] + (turn << PLACE_BITS)
            if not found:
                break
        raise UserError(f"num_images={self.num_images} found; process {self.rank} reads far fewer, or none")

    def _read(self, turn: int, seen: int) -> Iterable[Chunk]:
        """Read the rows of this process once, in an order that depends on how often it read them before (`turn`).

        The first `seen` samples are not needed.
        """
        words = np.random.SeedSequence([self.seed, self.epoch, turn]).generate_state(2, np.uint32)
        rows = self.stream.rows.shuffle(seed=int(words[0]) << 32 | int(words[1]), buffer_size=self.shuffle_buffer)
        rows = split_dataset_by_node(rows, self.rank, self.num_processes)
        # The chunks of the workers come in turns. The last ones may be longer, hence one less.
        undecoded = max(0, seen // (_CHUNK * max(1, self.num_workers)) - 1)
        chunks = _Chunks(rows, self.stream, undecoded)
        options = {"num_workers": self.num_workers, "worker_init_fn": leave_signals_to_the_main_process}
        return DataLoader(chunks, batch_size=None, **options)

    def _check(self, count: int, unreadable: list[tuple[int, str]]) -> None:
        """Warn once of each unreadable sample. Raise an error for too many, or for a chunk with no other."""
        for number, reason in unreadable:
            if number not in self.unreadable:
                self.unreadable.add(number)
                logger.warning("left out %s", reason)
        images = self.num_images // self.num_processes
        if len(self.unreadable) > self.most_unreadable or 0 < len(unreadable) == count:
            raise UserError(
                f"{len(self.unreadable)} images of {images} cannot be read, such as "
                f"{some((reason for _, reason in unreadable), 3)}; expected at most {self.most_unreadable}"
            )
