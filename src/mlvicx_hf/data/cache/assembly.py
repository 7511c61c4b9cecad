# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""From finished shards to a cache: a `DatasetDict` in a folder, and beside it what is known of it."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from mlvicx_hf import __version__
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.progress import no_datasets_bars
from mlvicx_hf.common.provenance import git_commit
from mlvicx_hf.common.text import some

from ..collections.base import Collection, Listing
from ..copies.deduplication import Duplicate, count_across
from ..split_files import SPLIT_FILE, split_file
from .cache import DUPLICATES, FORMAT, MANIFEST
from .shards import Shard, read_note
from .summary import column, count_split, original_sizes, write_card, write_pictures

REJECTED = "rejected.csv"


@dataclass(frozen=True)
class Images:
    """What was made of the records.

    Attributes:
        parts: data set by split.
        masks: for every row of a split hash and values of its mask; None where it is unknown.
        rejected: file and reason.
        thinned: whether rows of the shards were left out.
    """

    parts: dict[str, datasets.Dataset]
    masks: dict[str, list[dict[str, Any] | None]]
    rejected: list[tuple[str, str]]
    thinned: bool = False

    def without(self, dropped: Mapping[tuple[str, int], str]) -> Images:
        """The same without these rows, by split and number, which are rejected for the reasons given."""
        if not dropped:
            return self
        parts, masks, rejected = {}, {}, list(self.rejected)
        for split, part in self.parts.items():
            sources = column(part, "source")
            rows = [row for row in range(len(part)) if (split, row) not in dropped]
            rejected += [
                (_file(sources[row]), dropped[split, row]) for row in sorted(set(range(len(part))) - set(rows))
            ]
            if rows:
                parts[split], masks[split] = part.select(rows), [self.masks[split][row] for row in rows]
        return Images(parts, masks, rejected, thinned=True)


def _file(source: str) -> str:
    return source.partition(":")[2]


def read_shards(shards: Sequence[Shard]) -> Images:
    """The finished shards, memory-mapped.

    Raises:
        ValueError: every image was rejected.
    """
    parts: dict[str, list[datasets.Dataset]] = {}
    masks: dict[str, list[dict[str, Any] | None]] = {}
    rejected: list[tuple[str, str]] = []
    for shard in shards:
        note, split = read_note(shard), shard.path.parent.name
        rejected += [(name, reason) for name, reason in note["rejected"]]
        if note["masks"]:
            parts.setdefault(split, []).append(datasets.Dataset.from_file(str(shard.path)))
            masks.setdefault(split, []).extend(note["masks"])
    if not parts:
        listed = some((f"{file} ({reason})" for file, reason in rejected), 3)
        raise UserError(f"all {len(rejected)} images were rejected: {listed}; nothing is written")
    return Images({split: datasets.concatenate_datasets(found) for split, found in parts.items()}, masks, rejected)


def count_duplicates(duplicates: Sequence[Duplicate], images: Images, dropped: int) -> dict[str, int]:
    """Pairs of each kind that were found, those of any kind that are left in two splits, and images left out."""
    counts = {kind: sum(pair.kind == kind for pair in duplicates) for kind in ("identical", "near")}
    return counts | {"across_splits": count_across(duplicates, images.parts), "dropped": dropped}


def describe(collection: Collection, listing: Listing, options: dict[str, Any], images: Images) -> dict[str, Any]:
    """Content of `cache.json`, but for the duplicates.

    Args:
        collection: that was read.
        listing: of it.
        options: of `prepare` that made the images.
        images: that are in the cache.
    """
    return {
        "format": FORMAT,
        "collection": collection.name,
        "synthetic": collection.synthetic,
        "label_names": list(listing.label_names),
        **({"mask_names": list(listing.mask_names)} if listing.mask_names else {}),
        "exclusive": listing.exclusive,
        "policy": listing.policy,
        "patients_known": listing.patients_known,
        "patient_source": listing.patient_source or collection.source,
        **options,
        "splits": {
            split: count_split(part, images.masks[split], listing.label_names, listing.mask_names)
            for split, part in images.parts.items()
        },
        "original_sizes": original_sizes(images.parts),
        "rejected": len(images.rejected),
        "missing": len(listing.missing),
        "split_hash": hashlib.sha256(_split_file(images.parts).encode()).hexdigest(),
        "data_hash": _data_hash(images),
        "version": __version__,
        "commit": git_commit(Path(__file__).parent),
    }


def _split_file(parts: Mapping[str, datasets.Dataset]) -> str:
    """`splits.csv`: every image with its patient and split."""
    return split_file(
        (source, patient, split)
        for split, part in parts.items()
        for source, patient in zip(column(part, "source"), column(part, "patient_id"), strict=True)
    )


def _data_hash(images: Images) -> str:
    """What identifies the images and their masks, whatever their order and split."""
    lines = []
    for split, part in images.parts.items():
        for image, mask in zip(column(part, "sha256"), images.masks[split], strict=True):
            known = "" if mask is None else mask["sha256"]
            lines.append(f"{image}\t{known}" if "mask" in part.features else image)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def assemble(
    folder: Path,
    shards: Sequence[Shard],
    images: Images,
    duplicates: Sequence[Duplicate],
    manifest: dict[str, Any],
    notes: Sequence[str],
    features: datasets.Features,
) -> list[str]:
    """The cache of finished shards: a `DatasetDict` on disk, and what is known of it. The shards are moved last.

    Args:
        folder: where the cache goes; what is there is removed.
        shards: all of them, finished.
        images: of the shards, perhaps without some rows.
        duplicates: that were found.
        manifest: content of `cache.json`.
        notes: for the card.
        features: columns.

    Returns:
        What the user should know.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / SPLIT_FILE).write_text(_split_file(images.parts), encoding="utf-8", newline="")
    _write_table(folder / REJECTED, ("file", "reason"), sorted(images.rejected))
    _write_table(folder / DUPLICATES, Duplicate._fields, duplicates)
    lacking = write_pictures(folder, images.parts)
    write_card(folder, manifest, notes)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(images.parts)}))
    names = ", ".join(manifest["label_names"]) or "none"
    info = datasets.DatasetInfo(description=f"labels: {names}", features=features)
    moved = [shard.path for shard in shards if read_note(shard)["masks"]]  # the others have no rows
    for split, part in images.parts.items():
        files = [path for path in moved if path.parent.name == split]
        if images.thinned:
            files = _save_rows(part, folder / split, len(files))
        what = (split, *(manifest.get(key) for key in ("split_hash", "data_hash", "size", "fit", "mask_names")))
        _describe_files(folder / split, files, hashlib.sha256(repr(what).encode()).hexdigest()[:16], info)
    if not images.thinned:
        for path in moved:
            path.rename(folder / path.parent.name / path.name)
    return lacking


def _describe_files(folder: Path, files: Sequence[Path], fingerprint: str, info: datasets.DatasetInfo) -> None:
    """What `load_from_disk` reads beside the Arrow files of a split; `save_to_disk` would copy every image again."""
    folder.mkdir(exist_ok=True)
    info.write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file.name} for file in files],
        "_fingerprint": fingerprint,
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": folder.name,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))


def _save_rows(part: datasets.Dataset, folder: Path, num_shards: int) -> list[Path]:
    """Copy the rows of a data set that are left into files of their own."""
    with no_datasets_bars():
        part.save_to_disk(folder, num_shards=min(num_shards, len(part)))
    return sorted(folder.glob("*.arrow"))


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
