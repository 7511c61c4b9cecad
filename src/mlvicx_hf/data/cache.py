"""A prepared cache as training reads it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from .splits import check_no_patient_overlap

FORMAT = 1  # of the cache; another one is refused
MANIFEST = "cache.json"
HINT = "make one with scripts/prepare_data.py"


@dataclass(frozen=True)
class Cache:
    """A prepared cache.

    Attributes:
        datasets: splits with the columns image, patient_id, view, labels, source and sha256; with masks also mask,
            the class indices, None where they are unknown.
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
    def mask_names(self) -> tuple[str, ...]:
        """Empty without masks; one structure (pixels 0 and 1), or the classes by pixel value, the background first."""
        return tuple(self.manifest.get("mask_names", ()))


def load_cache(path: str | Path, splits: Sequence[str] | None = None) -> Cache:
    """Open a prepared cache and check that no patient is in two of its splits.

    Args:
        path: folder that `prepare` wrote.
        splits: only these; by default all.

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
        raise ValueError(f"{folder}: format {manifest.get('format')} found; expected {FORMAT} ({HINT} anew)")
    loaded = datasets.DatasetDict.load_from_disk(str(folder))
    for split, counts in manifest["splits"].items():
        if split not in loaded or len(loaded[split]) != counts["images"]:
            found = len(loaded[split]) if split in loaded else 0
            raise ValueError(f"{folder}: {found} images of {split} found; expected {counts['images']} ({HINT} anew)")
    check_no_patient_overlap(
        {split: dataset.data.column("patient_id").to_pylist() for split, dataset in loaded.items()}
    )
    absent = [split for split in splits or () if split not in loaded]
    if absent:
        raise ValueError(f"{folder}: splits {', '.join(loaded)} found; expected {', '.join(absent)} as well")
    wanted = datasets.DatasetDict({split: loaded[split] for split in (splits or loaded)})
    return Cache(wanted, tuple(manifest["label_names"]), manifest, folder)
