"""A prepared cache: its columns, and how to open it."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import json_field, read_json, sha256
from mlvicx_hf.common.progress import no_datasets_bars

from ..images.pixels import CACHE_MARK
from ..splits import check_no_patient_overlap

FORMAT = 2  # version of the layout; other versions are refused
MANIFEST = CACHE_MARK
DUPLICATES = "duplicates.csv"
_HINT = "make one with `mlvicx prepare`"


def cache_features(masks: bool = False, boxes: bool = False) -> datasets.Features:
    """Describe the columns of a cache."""
    text, real = datasets.Value("string"), datasets.Value("float32")
    box = {"label": text} | dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), real)
    return datasets.Features(
        {
            "image": datasets.Image(mode="L"),
            **({"mask": datasets.Image(mode="L")} if masks else {}),
            "patient_id": text,
            "view": text,
            "sex": text,
            "age": real,
            "labels": datasets.List(real),
            **({"boxes": datasets.List(box)} if boxes else {}),
            "source": text,
            "sha256": text,
            "phash": text,
            "width": datasets.Value("int32"),
            "height": datasets.Value("int32"),
        }
    )


@dataclass(frozen=True)
class Cache:
    """A prepared cache.

    Attributes:
        datasets: split → dataset with the columns of `cache_features`. `image` is 8-bit grey and square. `mask` holds
            class indices, or None if they are unknown. `boxes` are in pixels of the square. `sha256` is the hash of
            the original file, `phash` the perceptual hash of the square; `width` and `height` are the original's.
        label_names: names of the labels.
        manifest: content of `cache.json`.
        path: folder of the cache.
    """

    datasets: Mapping[str, datasets.Dataset]
    label_names: tuple[str, ...]
    manifest: dict[str, Any]
    path: Path

    @property
    def exclusive(self) -> bool:
        """Whether every image has exactly one of the labels."""
        return bool(self.manifest["exclusive"])

    @property
    def digest(self) -> str:
        """SHA-256 of `cache.json`, which depends on the original files, the splits and all processing of the images."""
        return sha256(self.path / MANIFEST)

    @property
    def square(self) -> tuple[int, str]:
        """Side of the images in pixels, and what happened to originals that were not square."""
        return self.manifest["size"], self.manifest["fit"]

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Names of what the masks show: none, one structure (pixels 0 and 1), or the classes by pixel value from 0."""
        return tuple(self.manifest.get("mask_names", ()))

    def require_labels(self) -> None:
        """Refuse a cache without labels.

        Raises:
            UserError: there are none.
        """
        if not self.label_names:
            raise UserError(
                f"{self.path} has no labels; expected some: prepare it with --metadata that has label columns"
            )

    def labelled(self, split: str) -> list[int]:
        """Rows of a split of whose labels at least one is known."""
        rows = self.datasets[split]["labels"]
        return [number for number, labels in enumerate(rows) if not all(map(math.isnan, labels))]

    def duplicates(self) -> list[dict[str, str]]:
        """Read the rows of `duplicates.csv`: identical and nearly identical images, found when the cache was made."""
        with (self.path / DUPLICATES).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def load_cache(path: str | Path, splits: Sequence[str] | None = None, check: bool = True) -> Cache:
    """Open a prepared cache and check that no patient is in two of its splits.

    Args:
        path: folder that `prepare` wrote.
        splits: open these alone; by default all.
        check: set to false to open a cache with patients in several splits, as an audit must.

    Raises:
        FileNotFoundError: the folder is no cache.
        UserError: the format is another one, a split is absent, images are missing, or a patient is in two splits.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a prepared cache ({_HINT})")
    for name in (MANIFEST, "dataset_dict.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: holds no {name}, so it is no prepared cache ({_HINT})")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: format {manifest.get('format')} found; expected {FORMAT} ({_HINT} anew)")
    with no_datasets_bars():
        try:
            loaded = datasets.DatasetDict.load_from_disk(str(folder))
        except (pyarrow.ArrowException, json.JSONDecodeError) as error:
            raise UserError(f"{folder}: {error}; expected whole files ({_HINT} anew)") from error
    expected = "the manifest of a cache"
    for name, kind in (("label_names", list), ("exclusive", bool)):
        json_field(manifest, name, kind, folder / MANIFEST, expected)
    for split, counts in json_field(manifest, "splits", dict, folder / MANIFEST, expected).items():
        if split not in loaded or len(loaded[split]) != counts["images"]:
            found = len(loaded[split]) if split in loaded else 0
            raise UserError(f"{folder}: {found} images of {split} found; expected {counts['images']} ({_HINT} anew)")
    if check:
        check_no_patient_overlap(
            {split: dataset.data.column("patient_id").to_pylist() for split, dataset in loaded.items()}
        )
    absent = [split for split in splits or () if split not in loaded]
    if absent:
        raise UserError(f"{folder}: splits {', '.join(loaded)} found; expected {', '.join(absent)} as well")
    wanted = datasets.DatasetDict({split: loaded[split] for split in (splits or loaded)})
    return Cache(wanted, tuple(manifest["label_names"]), manifest, folder)
