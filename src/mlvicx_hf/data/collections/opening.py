"""Open `datasets` datasets on the Hub, in a folder, in parquet or Arrow files, whole or as a stream."""

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import fsspec
import huggingface_hub
import numpy as np
import pyarrow.parquet
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.arrow.arrow import ArrowConfig
from datasets.packaged_modules.parquet.parquet import ParquetConfig

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.progress import no_datasets_bars
from mlvicx_hf.common.text import some

from ..images.errors import UnreadableImageError
from .base import SPLIT_NAMES

SAVED = ("dataset_dict.json", "state.json")  # files of `save_to_disk` in a folder
IMAGE_ROWS = 16  # images to read at a time; a parquet file may hold a thousand in one piece
TABLE_ROWS = 1000  # rows to read at a time without pixels
SHARDS = 240  # pieces of a dataset on the disk, a number that many numbers of processes divide evenly


@dataclass(frozen=True)
class Opened:
    """A dataset whose pixels are not read yet."""

    splits: dict[str, Any]  # split → `datasets.Dataset`, or `IterableDataset` of a stream
    files: dict[str, list[str]]  # split → paths, or addresses with the commit
    # Split → number of rows; None if only reading everything would tell
    counts: dict[str, int | None] = field(default_factory=dict)
    local: bool = True  # whether all files are on this machine
    # Split → number of rows of each shard of a stream; without splits for which only reading would tell
    lengths: dict[str, list[int]] = field(default_factory=dict)


def open_dataset(
    path: str | Path,
    name: str | None = None,
    revision: str | None = None,
    *,
    streaming: bool = False,
    columns: Sequence[str] | None = None,
    rows: int = IMAGE_ROWS,
) -> Opened:
    """Open a dataset without running any code of it.

    Args:
        path: name on the Hub, folder, parquet or Arrow file, pattern of such files, or a folder of `save_to_disk`.
        name: name of the configuration, if there are several.
        revision: branch, tag or commit on the Hub.
        streaming: do not download or convert anything.
        columns: open these columns alone; nothing else is read of a parquet file.
        rows: number of rows that a stream of parquet files reads at a time.

    Raises:
        OSError: there is no such dataset, or the Hub cannot be reached.
        UserError: `datasets` cannot read the files.
    """
    saved = _saved_files(Path(path))
    if saved is not None:
        return _open_mapped(saved, streaming, columns)
    try:
        with no_datasets_bars():
            return _build(_location(path, name, revision), streaming, columns, rows)
    except (RuntimeError, DatasetGenerationError, pyarrow.ArrowException) as error:
        cause = error.__cause__ or error
        raise UserError(f"{path}: `datasets` cannot read it: {cause}") from error


def folder_of(path: str | Path) -> str | None:
    """Find the folder of files that the rows of a dataset name by their path. A dataset on the Hub has none."""
    path = Path(path)
    return str(path if path.is_dir() else path.parent) if path.exists() else None


def as_stream(dataset: Any) -> Any:
    """Turn a dataset on the disk into a stream of pieces, which are always the same."""
    return dataset.to_iterable_dataset(num_shards=min(SHARDS, len(dataset)))


def count_in_pieces(chosen: Sequence[bool] | np.ndarray) -> list[int]:
    """Count the chosen rows in each piece that `as_stream` makes of a dataset."""
    return [int(np.sum(piece)) for piece in np.array_split(np.asarray(chosen), max(1, min(SHARDS, len(chosen))))]


def _saved_files(path: Path) -> dict[str, list[str]] | None:
    """Find the Arrow files of each split in a folder of `save_to_disk`. Return None for any other path."""
    if not any((path / name).is_file() for name in SAVED):
        return None
    with no_datasets_bars():
        saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}
    return {split: [row["filename"] for row in dataset.cache_files] for split, dataset in splits.items()}


def _open_mapped(files: dict[str, list[str]], streaming: bool, columns: Sequence[str] | None) -> Opened:
    """Map Arrow files on the disk into memory, so that only what is needed is read."""
    loaded = {split: _map_files(found) for split, found in files.items()}
    counts: dict[str, int | None] = {split: len(dataset) for split, dataset in loaded.items()}
    if columns is not None:
        loaded = {split: dataset.select_columns(list(columns)) for split, dataset in loaded.items()}
    if not streaming:
        return Opened(loaded, files, counts)
    lengths = {split: count_in_pieces(np.ones(len(dataset), bool)) for split, dataset in loaded.items()}
    return Opened({split: as_stream(dataset) for split, dataset in loaded.items()}, files, counts, lengths=lengths)


def _matching(path: Path) -> list[str]:
    found = [str(path)] if path.is_file() else sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise FileNotFoundError(f"{path}: no such file; expected a file or a pattern of files")
    return found


def _map_files(files: Sequence[str]) -> Any:
    try:
        return datasets.concatenate_datasets([datasets.Dataset.from_file(file) for file in files])
    except pyarrow.ArrowException as error:
        raise UserError(f"{some(files, 3)}: not readable as Arrow files of one kind: {error}") from error


def _location(path: str | Path, name: str | None, revision: str | None) -> dict[str, Any]:
    """Make the arguments of `load_dataset`."""
    text = str(path)
    kind_of_file = Path(text).suffix.removeprefix(".")
    if kind_of_file in ("parquet", "arrow"):
        return {"path": kind_of_file, "data_files": _by_split(text, _matching(Path(text)))}
    if not Path(text).exists() and (text.startswith(("/", ".", "~")) or text.count("/") > 1 or not text):
        raise FileNotFoundError(
            f"{text!r} found; expected a folder or file that exists, or the name of a dataset on the Hub"
        )
    return {"path": text, "name": name, "revision": revision}


def _by_split(where: str, files: Sequence[str]) -> dict[str, list[str]]:
    """Group files by the splits that their names begin with, such as `test-00000-of-00001.parquet`.

    If all begin with the same one, or none does, all are train.

    Raises:
        UserError: some names begin with a split, and others do not.
    """
    named = [(SPLIT_NAMES.get(re.split(r"[\W_]", Path(file).name.lower())[0]), file) for file in files]
    groups = {split: [file for name, file in named if name == split] for split, _ in named}
    if len(groups) == 1:
        return {"train": list(files)}
    if None in groups:
        listed = some((found[0] for found in groups.values()), 3)
        raise UserError(f"{where}: files {listed} found; expected all or none with train, validation or test in front")
    return {str(split): found for split, found in groups.items()}


def _build(location: dict[str, Any], streaming: bool, columns: Sequence[str] | None, rows: int) -> Opened:
    builder = datasets.load_dataset_builder(**location)
    parquet = isinstance(builder.config, ParquetConfig)
    files = {str(split): [str(file) for file in found] for split, found in (builder.config.data_files or {}).items()}
    local = all(os.path.exists(file) for found in files.values() for file in found) and bool(files)
    if local and isinstance(builder.config, ArrowConfig):
        return _open_mapped(files, streaming, columns)
    if not streaming:
        loaded = dict(datasets.load_dataset(**location, keep_in_memory=False))
    elif parquet:  # read the wanted columns alone, and few images at a time
        wanted = {} if columns is None else {"columns": list(columns)}
        loaded = dict(datasets.load_dataset_builder(**location, **wanted, batch_size=rows).as_streaming_dataset())
    else:
        loaded = dict(builder.as_streaming_dataset())
    loaded = {str(split): dataset for split, dataset in loaded.items()}
    if columns is not None:
        loaded = {split: dataset.select_columns(list(columns)) for split, dataset in loaded.items()}
    counts: dict[str, int | None] = {}
    lengths: dict[str, list[int]] = {}
    for split, dataset in loaded.items():
        if not streaming:
            counts[split] = len(dataset)
        elif parquet and local:
            lengths[split] = [pyarrow.parquet.read_metadata(file).num_rows for file in files[split]]
            counts[split] = sum(lengths[split])
        else:
            known = (builder.info.splits or {}).get(split)
            counts[split] = known.num_examples if known else None
    return Opened(loaded, files, counts, local, lengths)


def find_image_column(
    where: str | Path, features: Any, wanted: str | None = None, mask_column: str | None = None
) -> str:
    """Find the column of the pixels: the wanted one, or else the only Image column, or a binary column named `image`.

    Images in `mask_column` do not count.

    Raises:
        UserError: there is no such column, or there are several. The message begins with `where`.
    """
    if features is None:
        raise UserError(f"{where}: columns of unknown types found; expected a dataset that declares an Image column")
    images = [name for name, feature in features.items() if _holds_images(feature) and name != mask_column]
    listed = some((f"{name}: {kind(feature)}" for name, feature in features.items()), 30)
    raw = wanted or "image"
    if (
        not (wanted is None and images)
        and raw in features
        and kind(features[raw]) in ("Image", "binary", "large_binary", "dict")
    ):
        return raw
    if wanted is not None or not images:
        raise UserError(f"{where}: columns {listed} found; expected the pixels in {wanted or 'an Image column'}")
    if len(images) > 1:
        raise UserError(f"{where}: Image columns {some(images)} found; expected one, or --image_column to name it")
    return images[0]


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images: declared so, or objects of `bytes` and `path`, as `datasets` stores images."""
    return isinstance(feature, datasets.Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def kind(feature: Any) -> str:
    """Name the type of a column in a word."""
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__


def read_cell(cell: Mapping[str, Any] | None, folder: str | None = None) -> bytes:
    """Read the file of an undecoded Image cell: its bytes, or a path on the Hub, in the caches, or in `folder`.

    Raises:
        UnreadableImageError: the cell is empty, or its path leads elsewhere.
        OSError: the file cannot be read.
    """
    if cell is not None and cell["bytes"] is not None:
        return bytes(cell["bytes"])
    path = (cell or {}).get("path")
    if not path:
        raise UnreadableImageError("image", "empty cell")
    source = path.rpartition("::")[2]  # of zip://inside.png::archive.zip
    homes = [datasets.config.HF_DATASETS_CACHE, huggingface_hub.constants.HF_HUB_CACHE, folder]
    inside = any(Path(os.path.realpath(source)).is_relative_to(os.path.realpath(home)) for home in homes if home)
    if not (inside or source.startswith("hf://")):
        raise UnreadableImageError(path, "lies outside the dataset")
    with fsspec.open(path, "rb") as file:
        return bytes(file.read())
