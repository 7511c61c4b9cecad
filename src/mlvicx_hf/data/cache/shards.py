"""Write the Arrow files of a cache in worker processes, each complete or absent, so that a killed run can resume.

A shard is a fixed piece of a split, whatever the number of workers. Its note (`.json`) is written last. If the note
exists and still describes the records, the shard is finished.
"""

import errno
import hashlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from mlvicx_hf import __version__
from mlvicx_hf.common.files import read_json, sync, write_json

from ..collections.base import Record
from ..images.encoding import Picture, make_picture
from ..images.errors import UnreadableImageError

ROWS_PER_BATCH = 100  # images that a worker holds in memory before it writes them
IMAGES_PER_SHARD = 128  # at least
SHARDS_PER_SPLIT = 256  # at most: a reader of the cache keeps every shard open
LAYOUT = 4  # of the notes, and how originals become grey; another version makes its shards anew
DIED = (
    "a worker process died. Out of memory? Fewer --num_workers may help. A Python script that calls prepare needs a "
    "file of its own, with the call below `if __name__ == '__main__':`; or use num_workers=0"
)
# Signals of a decoder that crashed on a damaged file. SIGKILL comes from a system short of memory, or from a user.
CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}


@dataclass(frozen=True)
class Making:
    """How the images of a cache are made."""

    schema: pa.Schema  # columns of the Arrow files, with or without `mask` and `boxes`
    source: str  # prefix of the column `source`
    size: int  # side of the squares in pixels
    fit: str  # "pad", "squash" or "crop"
    mask_names: tuple[str, ...] = ()  # see `Listing`
    origin: str = ""  # see `Listing`
    allow_missing: bool = False  # leave out images that the disk does not give


@dataclass(frozen=True)
class Shard:
    """Consecutive records of a split, and the Arrow file for them."""

    path: Path
    records: Sequence[Record]

    @property
    def note(self) -> Path:
        """JSON file beside the shard: identity, rejections, masks, notes on single images, flat images."""
        return self.path.with_suffix(".json")

    @property
    def position(self) -> Path:
        """File with the number of the record that is being read, to find the record after a crash."""
        return self.path.with_suffix(".at")


def plan_shards(folder: Path, records: Sequence[Record], splits: Sequence[str]) -> list[Shard]:
    """Divide the records of each split, in order, into shards below `folder`."""
    shards = []
    for split in splits:
        chosen = [record for record in records if record.split == split]
        length = max(IMAGES_PER_SHARD, -(-len(chosen) // SHARDS_PER_SPLIT))
        pieces = [chosen[start : start + length] for start in range(0, len(chosen), length)]
        names = (f"{split}/data-{number:05d}-of-{len(pieces):05d}.arrow" for number in range(len(pieces)))
        shards += [Shard(folder / name, piece) for name, piece in zip(names, pieces, strict=True)]
    return shards


def identity(shard: Shard, making: Making) -> str:
    """Hash what a shard depends on: records, sizes and times of their files, options, version."""
    digest = hashlib.sha256(
        repr((__version__, LAYOUT, making.source, making.size, making.fit, making.mask_names, making.origin)).encode()
    )
    for record in shard.records:
        files = (record.path, record.mask_path)
        plain = (record.name, record.patient_id, record.view, record.labels, record.sex, record.age)
        digest.update(repr((*plain, record.boxes, record.frame, *map(_stamp, files))).encode())
        for maker in (record.draw, record.load, record.draw_mask):
            digest.update(b"" if maker is None else pickle.dumps(maker))
    return digest.hexdigest()


def _stamp(path: Path | None) -> tuple[str, int, int] | None:
    if path is None or not os.path.exists(path):
        return None
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


def read_note(shard: Shard) -> dict[str, Any]:
    """Read the note of a finished shard."""
    return read_json(shard.note)


def is_made(shard: Shard, making: Making) -> bool:
    """Check whether the shard exists and was made of the same records in the same way."""
    if not (shard.path.is_file() and shard.note.is_file()):
        return False
    return read_note(shard)["identity"] == identity(shard, making)


class ShardWriter:
    """Writes one shard, row by row. The note appears after the last record."""

    def __init__(self, shard: Shard, making: Making) -> None:
        self.shard, self.making = shard, making
        self.identity = identity(shard, making)  # compute it before reading the files, to notice a later change
        self.rows: list[dict[str, Any]] = []
        self.rejected: list[tuple[str, str]] = []
        self.masks: list[dict[str, Any] | None] = []
        self.noted: list[tuple[str, str]] = []
        self.flat: list[str] = []
        shard.path.parent.mkdir(parents=True, exist_ok=True)
        shard.note.unlink(missing_ok=True)  # of an earlier file
        self.file = shard.path.open("wb")
        self.stream = pa.ipc.new_stream(self.file, making.schema)

    def add(self, record: Record, picture: Picture) -> None:
        """Write a row, or note why the record has none."""
        if picture.reason:
            self.rejected.append((record.name, picture.reason))
            return
        if picture.note:
            self.noted.append((record.name, picture.note))
        if picture.flat:
            self.flat.append(record.name)
        mask = picture.mask
        row = {
            "image": {"bytes": picture.png, "path": None},
            "mask": mask and {"bytes": mask.png, "path": None},
            "patient_id": record.patient_id,
            "view": record.view,
            "sex": record.sex,
            "age": record.age,
            "labels": list(record.labels),
            "boxes": None if picture.boxes is None else [box._asdict() for box in picture.boxes],
            "source": f"{self.making.source}:{record.name}",
            "sha256": picture.sha256,
            "phash": picture.phash,
            "width": picture.width,
            "height": picture.height,
        }
        self.rows.append({name: row[name] for name in self.making.schema.names})
        self.masks.append(None if mask is None else {"sha256": mask.sha256, "values": list(mask.values)})
        if len(self.rows) == ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        self.stream.write_batch(pa.RecordBatch.from_pylist(self.rows, schema=self.making.schema))
        self.rows.clear()

    def finish(self) -> None:
        """End the file, wait until it is on the disk, and write the note."""
        if self.rows:
            self._flush()
        self.stream.close()
        self.file.close()
        sync(self.shard.path)
        note = {"identity": self.identity, "rejected": self.rejected, "masks": self.masks}
        note |= {"noted": self.noted, "flat": self.flat}
        write_json(self.shard.note, note)


def make_shard(shard: Shard, making: Making, refused: Mapping[int, str] | None = None) -> None:
    """Read the records of a shard and write it. Reject those in `refused`, number → reason, without reading them."""
    refused = refused or {}
    writer = ShardWriter(shard, making)
    with closing(writer.file), shard.position.open("w") as position:
        for number, record in enumerate(shard.records):
            os.pwrite(position.fileno(), b"%08d" % number, 0)
            writer.add(record, Picture(reason=refused[number]) if number in refused else _picture(record, making))
        writer.finish()
    shard.position.unlink()


def _picture(record: Record, making: Making, content: bytes | Exception | None = None) -> Picture:
    """Make a picture. A file whose content is damaged gives none.

    Raises:
        OSError: the disk, the network or the memory fails, perhaps for a moment, and `allow_missing` is off. The
            message names the file.
    """
    try:
        if isinstance(content, Exception):
            raise content
        return make_picture(record, making.size, making.fit, making.mask_names, content)
    except UnreadableImageError as error:
        return Picture(reason=error.reason)
    except (OSError, MemoryError) as error:
        reason = "needs more memory than there is"
        if isinstance(error, OSError):
            reason = f"cannot be read: {error.strerror or error}"
        if making.allow_missing or (isinstance(error, OSError) and _is_broken_link(error)):
            return Picture(reason=reason)
        name = getattr(error, "filename", None) or record.name
        raise OSError(
            f"{name}: {reason}; the same command goes on from here once it can be read, and with --allow_missing "
            "without such files"
        ) from error


def _is_broken_link(error: OSError) -> bool:
    """Whether a file was not read because it is a link that leads nowhere, which stays so."""
    broken = isinstance(error, FileNotFoundError) and os.path.islink(error.filename or "")
    return broken or error.errno == errno.ELOOP


def write_shards(shards: Sequence[Shard], making: Making, num_workers: int) -> Iterator[Shard]:
    """Make shards. Yield each when it is finished, in any order.

    With `num_workers` of 0 use this process, which ends if a decoder crashes.

    Raises:
        ChildProcessError: a worker was killed.
    """
    if num_workers == 0:
        for shard in shards:
            make_shard(shard, making)
            yield shard
        return
    context = _context()
    missing = list(shards)
    while missing:
        before = len(missing)
        try:
            yield from _make_in_pool(missing, making, num_workers, context)
            return
        except BrokenProcessPool:
            missing = [shard for shard in missing if not is_made(shard, making)]
        begun = [shard for shard in missing if shard.position.is_file()]
        if not begun and len(missing) == before:  # without this check it would try for ever
            raise ChildProcessError(DIED)
        for shard in begun:  # one of them crashed its worker; the pool then ended the other workers
            _make_alone(shard, making, context)
            yield shard
        missing = [shard for shard in missing if shard not in begun]


def _context() -> Any:
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["__main__", __name__])  # import these once, not once per worker
    return context


def _make_in_pool(shards: Sequence[Shard], making: Making, num_workers: int, context: Any) -> Iterator[Shard]:
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=start_worker) as pool:
        try:
            shard_of = {pool.submit(make_shard, shard, making): shard for shard in shards}
            for future in as_completed(shard_of):
                future.result()
                yield shard_of[future]
        finally:
            pool.shutdown(cancel_futures=True)


def _make_alone(shard: Shard, making: Making, context: Any) -> None:
    """Make a shard in a process of its own. Leave out each record that crashes it, one after another."""
    refused: dict[int, str] = {}
    while True:
        process = context.Process(target=_alone, args=(shard, making, refused))
        process.start()
        process.join()
        code = process.exitcode or 0
        if code == 0:
            return
        if -code not in CRASHES:
            raise ChildProcessError(DIED)
        refused[int(shard.position.read_text())] = f"crashes its decoder ({signal.Signals(-code).name})"


def _alone(shard: Shard, making: Making, refused: Mapping[int, str]) -> None:
    start_worker()
    make_shard(shard, making, refused)


def start_worker() -> None:
    """Leave Ctrl-C to the parent process, and end with it. Workers of a killed run would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_in_order(
    shards: Sequence[Shard],
    records: Sequence[Record],
    making: Making,
    contents: Callable[[int], Iterator[bytes | Exception]],
) -> Iterator[Shard]:
    """Do what `write_shards` does, for a collection that can only be read in order. Use this process alone.

    `contents` gives the content of every record from a given number on, or the error of reading it.
    """
    if not shards:
        return
    shard_of = {record.name: shard for shard in shards for record in shard.records}
    start = next(number for number, record in enumerate(records) if record.name in shard_of)
    writers: dict[Path, ShardWriter] = {}
    left = {shard.path: len(shard.records) for shard in shards}
    try:
        for record, content in zip(records[start:], contents(start), strict=True):
            if record.name not in shard_of:
                continue
            shard = shard_of[record.name]
            if shard.path not in writers:
                writers[shard.path] = ShardWriter(shard, making)
            writers[shard.path].add(record, _picture(record, making, content))
            left[shard.path] -= 1
            if not left[shard.path]:
                writers.pop(shard.path).finish()
                yield shard
    finally:
        for writer in writers.values():
            writer.file.close()
