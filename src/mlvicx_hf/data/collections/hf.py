"""Any `datasets` dataset: a name on the Hub, a folder, parquet or Arrow files, a folder of `save_to_disk`."""

import hashlib
import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.errors import UnreadableImageError
from ..masks import decode_mask
from .base import SPLIT_NAMES, Collection, Listing
from .cells import BINARY, NO_FINDING, plain_cell, same_name
from .labels import LONE_COLUMNS, RESERVED_COLUMNS, LabelTable, note_ignored, read_labels
from .metadata import TableOptions, plain_name, read_records, usual_names
from .opening import IMAGE_ROWS, TABLE_ROWS, Opened, find_image_column, folder_of, kind, open_dataset, read_cell
from .tables import Columns, as_text, read_columns


@cache
def _open_column(file: str, column: str, changed: int) -> Any:
    """Open a column of images of an Arrow file, once per process and time of its last change in nanoseconds."""
    del changed  # a key of the memory
    return _undecoded(datasets.Dataset.from_file(file), column)


def load_row(file: str, changed: int, row: int, column: str, folder: str | None = None) -> bytes:
    """Read the image of one row of an Arrow file, for `Record.load`. The arguments are small to send to a worker."""
    return read_cell(_open_column(file, column, changed)[row][column], folder)


def load_mask(file: str, changed: int, row: int, column: str, folder: str | None = None) -> np.ndarray:
    """Read the values [H, W] of the mask in one row of an Arrow file, for `Record.draw_mask`."""
    return decode_mask(load_row(file, changed, row, column, folder), f"{column} of row {row + 1}")


@dataclass
class HFCollection(TableOptions, Collection):
    """A dataset that `datasets` reads.

    Keep the splits train, validation (val, valid, dev) and test. A dataset with train alone has no splits. Read the
    image files as those of a folder, because `datasets` would saturate 16-bit images. Columns `patient_id`, `view`,
    `sex`, `age` and labels are those of a folder's metadata. Labels may also be a column of class labels (one class
    each), or of lists of class labels (several findings). Masks are an Image column. Other options are `TableOptions`.

    Args:
        root: name on the Hub, folder, parquet or Arrow files, or a folder of `save_to_disk`.
        config_name: name of the configuration, if there are several.
        revision: branch, tag or commit on the Hub.
        streaming: read the dataset in order, without downloading it first and without masks.
        image_column: by default the only Image column.
        split_names: the splits to read → our names of them, such as {"images_2020": "train"}.
    """

    name = "hf"

    root: str | Path
    _: KW_ONLY
    config_name: str | None = None
    revision: str | None = None
    streaming: bool = False
    image_column: str | None = None
    split_names: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        self.path = str(self.root)
        self.open = partial(open_dataset, self.root, self.config_name, self.revision, streaming=self.streaming)

    def read(self) -> Listing:
        """List the rows of all splits, without their pixels."""
        if self.mask_names is not None and self.mask_column is None:
            raise UserError(f"mask_names={','.join(self.mask_names)} found; expected --mask_column to name the masks")
        if self.mask_column is not None and self.streaming:
            raise UserError(f"mask_column={self.mask_column} found with streaming; a stream has no masks")
        opened = self.open()
        splits = self._choose_splits(opened)
        features = next(iter(opened.splits.values())).features
        self._check_mask_column(features)
        image = find_image_column(self.path, features, self.image_column, self.mask_column)
        table = [name for name, feature in features.items() if _is_text(name, feature)]
        columns, counts = self._read_table(opened, splits, table, image)
        names = [f"{split}/{row}" for split, count in counts.items() for row in range(count)]
        others = {name: feature for name, feature in features.items() if name not in (*table, image, self.mask_column)}
        notes = [*note_ignored(f"{name} ({kind(feature)})" for name, feature in others.items())]
        text = {column: _as_text(features[column], values) for column, values in columns.items()}
        given = (self.patient_column, image, self.mask_column, *(self.label_columns or ()))
        text, renamed = usual_names(Path(self.path), text, given, self.meant)
        notes += renamed
        if any(splits.values()):
            if "split" in text:
                notes.append("a column of splits is not used: the dataset has splits of its own")
            text["split"] = [splits[split] or "" for split, count in counts.items() for _ in range(count)]
        self._check_patients(opened, features)
        rows, known = read_records(Path(self.path), text, names, self.patient_column, notes, self.patient_ids)
        labels = self._labels(features, columns, text, len(names))
        folder = folder_of(self.path)
        places = [] if self.streaming else self._rows(opened, counts)
        loaders: list[Any] = [partial(load_row, *place, image, folder) for place in places] or [None] * len(names)
        masks = self._masks(opened, counts, self.mask_column) if self.mask_column else [None] * len(names)
        records = [
            replace(row, labels=label, load=load, draw_mask=draw)
            for row, label, load, draw in zip(rows, labels.rows, loaders, masks, strict=True)
        ]
        return Listing(
            records,
            labels.names,
            labels.exclusive,
            notes=[*notes, *labels.notes],
            mask_names=tuple(self.mask_names or ("mask",)) if self.mask_column else (),
            policy=self.policy,
            patients_known=known,
            contents=partial(self._contents, counts, image) if self.streaming else None,
            origin=_origin(opened) if self.streaming else "",
        )

    def _choose_splits(self, opened: Opened) -> dict[str, str | None]:
        """Choose the splits to read, and map each to our name. Map train to None if it is the only split."""
        found = list(opened.splits)
        if self.split_names is not None:
            strange = [split for split in self.split_names if split not in found]
            if strange or not set(self.split_names.values()) <= set(SPLIT_NAMES):
                given = ", ".join(f"{theirs}={ours}" for theirs, ours in self.split_names.items())
                raise UserError(
                    f"{self.path}: splits {given} found; expected some of {some(found, 30)}, each as train, "
                    "validation or test"
                )
            return {theirs: SPLIT_NAMES[ours] for theirs, ours in self.split_names.items()}
        if found == ["train"]:
            return {"train": None}
        strange = [split for split in found if split not in SPLIT_NAMES]
        if strange:
            raise UserError(
                f"{self.path}: splits {some(strange)} found; expected train, validation (val, valid, dev) and test, or "
                "--split_names to say which is which"
            )
        return {split: SPLIT_NAMES[split] for split in found}

    def _check_mask_column(self, features: Any) -> None:
        if self.mask_column is not None and not isinstance(features.get(self.mask_column), datasets.Image):
            images = some((n for n, feature in features.items() if isinstance(feature, datasets.Image)), 30)
            raise UserError(f"{self.path}: Image columns {images} found; expected the masks in {self.mask_column}")

    def _check_patients(self, opened: Opened, features: Any) -> None:
        """Refuse patients of a CSV file that `datasets` has read as numbers if 001 and 1 are then the same."""
        patients = plain_name(self.patient_column or "patient_id")
        numeric = [name for name, feature in features.items() if plain_name(name) == patients and _is_number(feature)]
        tables = {file for files in opened.files.values() for file in files if file.lower().endswith(".csv")}
        for table in sorted(filter(os.path.isfile, tables)) if numeric else []:
            cells = read_columns(Path(table)).get(numeric[0], [])
            short = [cell for cell in cells if re.fullmatch(r"0\d+", cell)]
            if short:
                raise UserError(
                    f"{table}: column {numeric[0]} with {short[0]} found, which `datasets` reads as {int(short[0])}; "
                    "expected --collection folder, which reads patients as text"
                )

    def _read_table(
        self, opened: Opened, splits: Mapping[str, str | None], table: list[str], image: str
    ) -> tuple[dict[str, list[Any]], dict[str, int]]:
        """Read all columns but the pixels, of one split after another, and count the rows of each split."""
        columns: dict[str, list[Any]] = {name: [] for name in table}
        counts: dict[str, int] = {}
        if self.streaming and table:
            opened = self.open(columns=table, rows=TABLE_ROWS)
        for split in splits:
            dataset, count = opened.splits[split], opened.counts[split]
            if table or count is None:  # without other columns, read the pixels to count the rows
                count = 0
                dataset = dataset.select_columns(table) if table else _undecoded(dataset, image)
                for batch in dataset.iter(batch_size=TABLE_ROWS if table else IMAGE_ROWS):
                    count += len(next(iter(batch.values())))
                    for name in table:
                        columns[name] += batch[name]
            counts[split] = count
        if not sum(counts.values()):
            raise UserError(f"{self.path}: no rows found; expected one row an image")
        return columns, counts

    def _labels(self, features: Any, columns: Mapping[str, list[Any]], text: Columns, count: int) -> LabelTable:
        """Read columns of class labels, or else labels as in a folder's table.

        Classes such as yes and no are the two values of a finding, unless the column is called `label`.
        """
        skip = (self.patient_column, "patient_id")
        lone = [name for name in columns if plain_name(name) in LONE_COLUMNS]
        # What is not in `text` tells something else, such as Sex, which is taken for sex.
        others = [name for name in columns if name in text and name not in (*RESERVED_COLUMNS, *skip, *lone)]
        typed = [name for name in lone if _class_names(features[name])]
        typed += [name for name in others if _class_names(features[name]) and not _is_yes_no(features[name])]
        notes: tuple[str, ...] = ()
        if self.label_columns is None:
            classes = [name for name in typed if name in lone] or typed
            if len(classes) > 1:
                raise UserError(
                    f"{self.path}: columns of classes {some(classes)} found; expected --label_columns to choose"
                )
            rest = {name: cells for name, cells in text.items() if name not in classes}
            unsure = rest and classes and classes[0] not in lone  # whether they are the labels
            if unsure and (findings := read_labels(Path(self.path), rest, skip=skip).names):
                raise UserError(
                    f"{self.path}: column {classes[0]} of classes found beside labels {some(findings)}; expected "
                    "--label_columns to choose"
                )
            notes = note_ignored(name for name in others if name not in classes)
        else:
            classes = [name for name in typed if [name] == list(self.label_columns)]
        if classes:
            if self.uncertain is not None:
                raise UserError(f"{self.path}: column {classes[0]} holds classes; --uncertain does not fit")
            return _typed_labels(self.path, features[classes[0]], columns[classes[0]], notes)
        if not text:
            return LabelTable([()] * count)
        return read_labels(Path(self.path), text, self.label_columns, skip, self.uncertain, self.label_names)

    def _rows(self, opened: Opened, counts: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
        """Yield the Arrow file, the time of its last change, and the row in it, of every record."""
        for split in counts:
            for file in (entry["filename"] for entry in opened.splits[split].cache_files):
                changed = os.stat(file).st_mtime_ns
                yield from ((file, changed, row) for row in range(len(datasets.Dataset.from_file(file))))

    def _masks(self, opened: Opened, counts: Mapping[str, int], column: str) -> list[Any]:
        """What reads each mask; None where there is none."""
        folder, known = folder_of(self.path), []
        for split in counts:
            cells = opened.splits[split].data.column(column)
            content, path = (pyarrow.compute.struct_field(cells, name) for name in ("bytes", "path"))
            known += pyarrow.compute.or_(content.is_valid(), path.is_valid()).to_pylist()
        rows = zip(self._rows(opened, counts), known, strict=True)
        return [partial(load_mask, *place, column, folder) if there else None for place, there in rows]

    def _contents(self, counts: Mapping[str, int], image: str, start: int) -> Iterator[bytes | Exception]:
        """Files of the rows from one on, in order. What comes before it in its split is read as well, and dropped."""
        opened, folder = self.open(columns=[image]), folder_of(self.path)
        for split, count in counts.items():
            if start < count:
                for batch in _undecoded(opened.splits[split], image).skip(start).iter(batch_size=IMAGE_ROWS):
                    for cell in batch[image]:
                        yield _content_or_error(cell, folder)
            start = max(0, start - count)


def _origin(opened: Opened) -> str:
    """Hash the files of a dataset: address, and size and time of those on this machine. An address has the commit."""
    digest = hashlib.sha256()
    for file in itertools.chain(*opened.files.values()):
        found = os.stat(file) if os.path.exists(file) else None
        digest.update(repr((file, found and (found.st_size, found.st_mtime_ns))).encode())
    return digest.hexdigest()


def _undecoded(dataset: Any, column: str) -> Any:
    """A column of images alone, as files."""
    return dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _content_or_error(cell: Mapping[str, Any] | None, folder: str | None) -> bytes | Exception:
    """Read a cell, or return the error: raised here, it would end the stream."""
    try:
        return read_cell(cell, folder)
    except (UnreadableImageError, OSError) as error:
        return error


def _class_names(feature: Any) -> list[str]:
    """Find the names of a class label or of a list of class labels. Other types have none."""
    inner = feature.feature if isinstance(feature, (datasets.List, datasets.LargeList)) else feature
    return list(inner.names) if isinstance(inner, datasets.ClassLabel) else []


def _is_yes_no(feature: Any) -> bool:
    """Whether a class label has the two values of a finding, such as yes and no."""
    names = [plain_cell(name) for name in _class_names(feature)]
    return isinstance(feature, datasets.ClassLabel) and set(names) <= set(BINARY)


def _is_number(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(("int", "uint", "float"))


def _is_text(name: str, feature: Any) -> bool:
    """Check whether a column belongs to the table: numbers, text, classes, lists of text or classes, no vectors.

    A column of labels may also hold lists of numbers, or objects.
    """
    if name.lower() in LONE_COLUMNS and isinstance(feature, (dict, datasets.List, datasets.LargeList)):
        return True
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        inner = feature.feature
        return isinstance(inner, datasets.ClassLabel) or (isinstance(inner, datasets.Value) and inner.dtype == "string")
    return isinstance(feature, datasets.ClassLabel) or (
        isinstance(feature, datasets.Value) and "binary" not in feature.dtype
    )


def _as_text(feature: Any, values: list[Any]) -> list[str]:
    """Write a column as in a CSV file, with the names of classes."""
    names = _class_names(feature)
    if not names:
        return [as_text(value) for value in values]

    def name(value: Any) -> str:
        return "" if value is None or value < 0 else names[value]

    return [as_text([*map(name, value)]) if isinstance(value, list) else name(value) for value in values]


def _typed_labels(where: str, feature: Any, values: list[Any], notes: tuple[str, ...]) -> LabelTable:
    """Read the labels of a column of classes, or of lists of classes. -1 and empty cells are unknown."""
    names = _class_names(feature)
    if isinstance(feature, datasets.ClassLabel):
        unknown = (math.nan,) * len(names)
        rows = [
            unknown if value is None or value < 0 else tuple(float(value == i) for i in range(len(names)))
            for value in values
        ]
        return LabelTable(rows, tuple(names), exclusive=True, notes=notes)
    strange = [row for row, value in enumerate(values, start=1) if value and min(value) < 0]
    if strange:
        raise UserError(f"{where}: row {strange[0]}: class -1 in a list found; expected the number of a class")
    kept = [i for i, name in enumerate(names) if same_name(name) != NO_FINDING]
    for row, value in enumerate(values, start=1):
        if value and len(set(value)) > 1 and not set(value) <= set(kept):
            raise UserError(f"{where}: row {row}: {some(names[i] for i in value)} found; expected {NO_FINDING!r} alone")
    rows = [tuple(math.nan if value is None else float(i in value) for i in kept) for value in values]
    return LabelTable(rows, tuple(names[i] for i in kept), notes=notes)
