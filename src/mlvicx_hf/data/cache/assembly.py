"""Assemble finished shards into a cache: a `DatasetDict` in a folder, with tables, pictures and a card beside it."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets

from mlvicx_hf import __version__
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.progress import no_datasets_bars
from mlvicx_hf.common.provenance import package_commit
from mlvicx_hf.common.text import some

from ..collections.base import SPLITS, Collection, Listing, Record
from ..copies.deduplication import Duplicate, count_across
from ..copies.duplicates import FLAT
from ..split_files import SPLIT_FILE, split_file
from .cache import DUPLICATES, FORMAT, MANIFEST
from .shards import Shard, read_note
from .summary import CARD, CONTACT_SHEET, HISTOGRAM, column, count_split, original_sizes, write_card, write_pictures

REJECTED = "rejected.csv"
NOTED = "notes.csv"
TOP_FILES = (MANIFEST, "dataset_dict.json", SPLIT_FILE, DUPLICATES, REJECTED, NOTED, CARD, CONTACT_SHEET, HISTOGRAM)


def is_of_cache(path: Path, cache: Path) -> bool:
    """Whether a file below the folder of a cache is one that `prepare` writes there."""
    of_split = path.parent.parent == cache and path.parent.name in SPLITS and path.suffix in (".arrow", ".json")
    return of_split or (path.parent == cache and path.name in TOP_FILES)


@dataclass(frozen=True)
class PreparedParts:
    """The prepared images of all splits."""

    parts: dict[str, datasets.Dataset]  # split → data set
    # Split → hash and values of the mask of each row; None if it is unknown
    masks: dict[str, list[dict[str, Any] | None]]
    rejected: list[tuple[str, str]]  # file and reason of each rejected image
    noted: list[tuple[str, str]]  # file and note of each image whose grey scale the user should know of
    flat: list[str]  # files of the images without contrast or texture
    thinned: bool = False  # whether rows of the shards were left out

    def without(self, dropped: Mapping[tuple[str, int], str]) -> PreparedParts:
        """Leave out rows, given as (split, row) → reason, and list them as rejected."""
        if not dropped:
            return self
        parts, masks, rejected = {}, {}, list(self.rejected)
        for split, part in self.parts.items():
            rows = [row for row in range(len(part)) if (split, row) not in dropped]
            for row, source in enumerate(column(part, "source")):
                if (split, row) in dropped:
                    rejected.append((source.partition(":")[2], dropped[split, row]))
            if rows:
                parts[split], masks[split] = part.select(rows), [self.masks[split][row] for row in rows]
        if not parts:
            raise UserError(f"all {len(rejected)} images were left out, such as {rejected[-1][0]} ({rejected[-1][1]})")
        return replace(self, parts=parts, masks=masks, rejected=rejected, thinned=True)

    def where_flat(self) -> dict[tuple[str, int], str]:
        """Find the images without contrast or texture: (split, row) → reason to leave them out."""
        flat = set(self.flat)
        return {
            (split, row): "no contrast or texture"
            for split, part in self.parts.items()
            for row, source in enumerate(column(part, "source"))
            if flat and source.partition(":")[2] in flat
        }


def read_shards(shards: Sequence[Shard]) -> PreparedParts:
    """Open finished shards, memory-mapped.

    Raises:
        UserError: every image was rejected.
    """
    parts: dict[str, list[datasets.Dataset]] = {}
    masks: dict[str, list[dict[str, Any] | None]] = {}
    rejected: list[tuple[str, str]] = []
    noted: list[tuple[str, str]] = []
    flat: list[str] = []
    for shard in shards:
        note, split = read_note(shard), shard.path.parent.name
        rejected += [(name, reason) for name, reason in note["rejected"]]
        noted += [(name, text) for name, text in note["noted"]]
        flat += note["flat"]
        if note["masks"]:
            parts.setdefault(split, []).append(datasets.Dataset.from_file(str(shard.path)))
            masks.setdefault(split, []).extend(note["masks"])
    if not parts:
        listed = some((f"{file} ({reason})" for file, reason in rejected), 3)
        raise UserError(f"all {len(rejected)} images were rejected: {listed}; nothing is written")
    return PreparedParts(
        {split: datasets.concatenate_datasets(found) for split, found in parts.items()}, masks, rejected, noted, flat
    )


def count_duplicates(duplicates: Sequence[Duplicate], images: PreparedParts, dropped: int) -> dict[str, int]:
    """Count the pairs of each kind, the pairs that are left in two splits, and the images that were left out."""
    counts = {kind: sum(pair.kind == kind for pair in duplicates) for kind in ("identical", "near")}
    return counts | {"across_splits": count_across(duplicates, images.parts), "dropped": dropped}


def note_empty_splits(records: Sequence[Record], images: PreparedParts) -> list[str]:
    """Tell the user which splits of a divided collection have no image: too few patients, or all images left out."""
    if {record.split for record in records} == {"train"}:
        return []
    patients = len({record.patient_id for record in records})
    return [f"no image in the split {split}, of {patients} patients" for split in SPLITS if split not in images.parts]


def note_images(images: PreparedParts, drop_flat: bool) -> list[str]:
    """Tell the user of images whose own grey scale does not fit, and of flat images."""
    notes = []
    if images.noted:
        file, text = images.noted[0]
        notes.append(f"images whose grey scale does not fit their pixels: {len(images.noted)}, such as {file}: {text}")
    if images.flat:
        done = "left out" if drop_flat else "kept (--drop_flat leaves them out; masks look like that)"
        notes.append(f"images without contrast or texture: {len(images.flat)}, such as {images.flat[0]}; {done}")
    return notes


def describe_cache(
    collection: Collection, listing: Listing, options: dict[str, Any], images: PreparedParts
) -> dict[str, Any]:
    """Make the content of `cache.json`, without the duplicates. `options` are those of `prepare`."""
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
        "noted": len(images.noted),
        "flat": len(images.flat),
        "split_hash": hashlib.sha256(_split_file(images.parts).encode()).hexdigest(),
        "data_hash": _data_hash(images),
        "label_hash": _label_hash(images),
        "version": __version__,
        "commit": package_commit(),
    }


def _split_file(parts: Mapping[str, datasets.Dataset]) -> str:
    """Write the text of `splits.csv`: every image with its patient and split."""
    return split_file(
        (source, patient, split)
        for split, part in parts.items()
        for source, patient in zip(column(part, "source"), column(part, "patient_id"), strict=True)
    )


def _data_hash(images: PreparedParts) -> str:
    """Hash the images and their masks. Order and splits do not change the hash."""
    lines = []
    for split, part in images.parts.items():
        masked = "mask" in part.features  # `features` copies itself: not once an image
        for image, mask in zip(column(part, "sha256"), images.masks[split], strict=True):
            known = "" if mask is None else mask["sha256"]
            lines.append(f"{image}\t{known}" if masked else image)
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _label_hash(images: PreparedParts) -> str:
    """Hash what is known of the images: labels, view, sex and age. Order and splits do not change the hash."""
    lines = []
    for part in images.parts.values():
        known = zip(*(column(part, name) for name in ("source", "labels", "view", "sex", "age")), strict=True)
        lines += ["\t".join(map(str, each)) for each in known]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def assemble(
    folder: Path,
    shards: Sequence[Shard],
    images: PreparedParts,
    duplicates: Sequence[Duplicate],
    manifest: dict[str, Any],
    notes: Sequence[str],
    features: datasets.Features,
) -> list[str]:
    """Write a cache from finished shards into `folder`, in the place of an earlier one. Move the shards last.

    Return notes for the user.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / SPLIT_FILE).write_text(_split_file(images.parts), encoding="utf-8", newline="")
    _write_table(folder / REJECTED, ("file", "reason"), sorted(images.rejected))
    flat = [(name, f"{FLAT}: never taken for a copy of another image") for name in images.flat]
    _write_table(folder / NOTED, ("file", "note"), sorted([*images.noted, *flat]))
    _write_table(folder / DUPLICATES, Duplicate._fields, duplicates)
    lacking = write_pictures(folder, images.parts)
    write_card(folder, manifest, notes)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "dataset_dict.json").write_text(json.dumps({"splits": list(images.parts)}))
    names = ", ".join(manifest["label_names"]) or "none"
    info = datasets.DatasetInfo(description=f"labels: {names}", features=features)
    moved = [shard.path for shard in shards if read_note(shard)["masks"]]  # other shards have no rows
    for split, part in images.parts.items():
        files = [path for path in moved if path.parent.name == split]
        if images.thinned:  # copy the remaining rows
            with no_datasets_bars():
                part.save_to_disk(folder / split, num_shards=min(len(files), len(part)))
            files = sorted((folder / split).glob("*.arrow"))
        what = (split, *(manifest.get(key) for key in ("split_hash", "data_hash", "size", "fit", "mask_names")))
        _describe_files(folder / split, files, hashlib.sha256(repr(what).encode()).hexdigest()[:16], info)
    if not images.thinned:
        for path in moved:
            path.rename(folder / path.parent.name / path.name)
    return lacking


def _describe_files(folder: Path, files: Sequence[Path], fingerprint: str, info: datasets.DatasetInfo) -> None:
    """Write what `load_from_disk` needs beside the Arrow files. `save_to_disk` would copy every image again."""
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


def _write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
