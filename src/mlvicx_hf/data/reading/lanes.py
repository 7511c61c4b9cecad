"""The order of a stream. It depends on (seed, epoch, buffer) and the data, not on processes and workers.

Divide the rows of all shards into lanes, whose number depends on the shards alone. Each lane has its own shuffle buffer
and its own random numbers. The order of an epoch takes one image of every lane in turn: the image at position p is
number p // lanes of lane p % lanes. So whoever needs the images at some positions reads some lanes, and no others.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

LANES = 16  # most lanes, and most shards that are open at a time
STREAM_ORDER = f"{LANES} lanes"  # names the order in checkpoints; change it whenever the order changes
ROW_BITS = 32  # bits of a sample's number for the row within its shard
PLACE_BITS = 56  # bits for the row and the shard
MAX_READINGS = 100  # of a lane in one epoch
_MAX_IDLE = 10  # readings without any image, one after another


class StreamRow(NamedTuple):
    """An image before it is decoded: the number of the sample, its name in messages, the undecoded cell."""

    number: int
    name: str
    cell: dict[str, Any] | None


@dataclass(frozen=True)
class Shards:
    """The shards of a stream, which stay the same in every run."""

    read: Callable[[int], Iterator[StreamRow]]  # the wanted rows of a shard
    count: int  # number of shards
    lengths: list[int] | None  # number of wanted rows of each shard; None if only reading would tell

    @property
    def lanes(self) -> int:
        """Number of lanes: with known lengths a power of two, which many numbers of processes divide."""
        most = min(LANES, self.count)
        return most if self.lengths is None else 1 << most.bit_length() - 1

    def lane(self, lane: int, seed: int, epoch: int, buffer: int) -> Iterator[StreamRow]:
        """Read a lane again and again, each time other rows in another order, up to `MAX_READINGS` times.

        Args:
            lane: number of the lane.
            seed: seed of the run.
            epoch: number of the epoch.
            buffer: number of rows from which the next is drawn.
        """
        idle = 0
        for reading in range(MAX_READINGS):
            idle += 1
            pieces = self._pieces(lane, np.random.default_rng([seed, epoch, reading]))
            rows = chain.from_iterable(islice(self.read(shard), start, stop) for shard, start, stop in pieces)
            for row in _shuffled(rows, buffer, np.random.default_rng([seed, epoch, reading, lane + 1])):
                idle = 0
                yield row._replace(number=row.number + (reading << PLACE_BITS))
            if idle == _MAX_IDLE:
                return

    def _pieces(self, lane: int, rng: np.random.Generator) -> list[tuple[int, int, int | None]]:
        """Shuffle the shards and choose those of a lane: the shard, its first row, and the row behind its last one.

        Cut the rows into lanes of equal length, the first ones longer by one row. Without lengths, deal whole shards.
        """
        order = rng.permutation(self.count)
        if self.lengths is None:
            return [(int(shard), 0, None) for shard in order[lane :: self.lanes]]
        ends = np.cumsum(np.array(self.lengths)[order])
        length, longer = divmod(int(ends[-1]), self.lanes)
        first = lane * length + min(lane, longer)
        behind = first + length + (lane < longer)
        pieces = []
        for shard, end in zip(order.tolist(), ends.tolist(), strict=True):
            begin = end - self.lengths[shard]
            start, stop = max(first, begin), min(behind, end)
            if start < stop:
                pieces.append((shard, start - begin, stop - begin))
        return pieces


def _shuffled(rows: Iterable[StreamRow], size: int, rng: np.random.Generator) -> Iterator[StreamRow]:
    """Draw the next row from a buffer of this size. What is drawn gives its place to a new row."""
    buffer: list[StreamRow] = []
    for row in rows:
        if len(buffer) < size:
            buffer.append(row)
        else:
            place = int(rng.integers(size))
            drawn, buffer[place] = buffer[place], row
            yield drawn
    for place in rng.permutation(len(buffer)):
        yield buffer[place]
