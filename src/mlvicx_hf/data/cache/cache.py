# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""A prepared cache: its columns, and how training reads it."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import sha256
from mlvicx_hf.common.progress import no_datasets_bars

from ..images.pixels import CACHE_MARK
from ..splits import check_no_patient_overlap

FORMAT = 2  # of the cache; another one is refused
MANIFEST = CACHE_MARK
DUPLICATES = "duplicates.csv"
HINT = "make one with scripts/prepare_data.py"


def cache_features(masks: bool = False, boxes: bool = False) -> datasets.Features:
    """Columns of a cache."""
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
        datasets: splits with the columns of `cache_features`. `image` is 8-bit grey, square; `mask` the class indices,
            None where they are unknown; `boxes` are in pixels of the square; `sha256` is the original file's, `phash`
            a perceptual hash of the square, `width` and `height` the original's.
        label_names: names of the labels.
        manifest: content of `cache.json`.
        path: its folder.
    """

    datasets: datasets.DatasetDict
    label_names: tuple[str, ...]
    manifest: dict[str, Any]
    path: Path

    @property
    def exclusive(self) -> bool:
        """Whether every image has exactly one of the labels."""
        return bool(self.manifest["exclusive"])

    @property
    def digest(self) -> str:
        """SHA-256 of `cache.json`: of original files, splits and everything that was done to the images."""
        return sha256(self.path / MANIFEST)

    @property
    def mask_names(self) -> tuple[str, ...]:
        """Empty without masks; one structure (pixels 0 and 1), or the classes by pixel value, the background first."""
        return tuple(self.manifest.get("mask_names", ()))

    def duplicates(self) -> list[dict[str, str]]:
        """Identical and nearly identical images that were found when the cache was made: rows of `duplicates.csv`."""
        with (self.path / DUPLICATES).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def load_cache(path: str | Path, splits: Sequence[str] | None = None, check: bool = True) -> Cache:
    """Open a prepared cache and check that no patient is in two of its splits.

    Args:
        path: folder that `prepare` wrote.
        splits: only these; by default all.
        check: false to open one whose patients cross, as an audit must.

    Raises:
        FileNotFoundError: the folder is no cache.
        ValueError: another format, splits that are absent, images that are, or a patient in two splits.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected a prepared cache ({HINT})")
    for name in (MANIFEST, "dataset_dict.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: holds no {name}, so it is no prepared cache ({HINT})")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise UserError(f"{folder}: format {manifest.get('format')} found; expected {FORMAT} ({HINT} anew)")
    with no_datasets_bars():
        loaded = datasets.DatasetDict.load_from_disk(str(folder))
    for split, counts in manifest["splits"].items():
        if split not in loaded or len(loaded[split]) != counts["images"]:
            found = len(loaded[split]) if split in loaded else 0
            raise UserError(f"{folder}: {found} images of {split} found; expected {counts['images']} ({HINT} anew)")
    if check:
        check_no_patient_overlap(
            {split: dataset.data.column("patient_id").to_pylist() for split, dataset in loaded.items()}
        )
    absent = [split for split in splits or () if split not in loaded]
    if absent:
        raise UserError(f"{folder}: splits {', '.join(loaded)} found; expected {', '.join(absent)} as well")
    wanted = datasets.DatasetDict({split: loaded[split] for split in (splits or loaded)})
    return Cache(wanted, tuple(manifest["label_names"]), manifest, folder)
