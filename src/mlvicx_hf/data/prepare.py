# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""From a collection to a prepared cache: 8-bit grey squares in a `datasets` folder, with a manifest beside them."""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from tqdm import tqdm

from .. import __version__
from ..progress import progress_bar
from ..provenance import git_commit
from .cache import FORMAT, MANIFEST
from .collections.base import SPLITS, Collection, Listing, Record, some
from .encoding import Picture, stream_pictures
from .masks import foreground
from .splits import check_no_patient_overlap, patient_hash, split_by_patient

REJECTED = "rejected.csv"
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
FITS = ("pad", "squash", "crop")
ROWS = 100  # images a batch of the Arrow file

Parts = dict[str, list[dict[str, Any]]]  # rows by split: what the manifest needs of them, so no pixels
Rejections = list[tuple[str, str]]  # file, reason


def prepare(
    collection: Collection,
    output: str | Path,
    *,
    size: int = 256,
    fit: str = "pad",
    splits: str = "auto",
    seed: int = 0,
    allow_missing: bool = False,
    max_images: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Read every image of a collection and write the cache.

    The content depends on the arguments alone, not on the number of workers. Everything is written beside `output` and
    renamed at the end, so a cache is there as a whole or not at all; what a killed run left is removed by the next one.
    Images that cannot be read, or whose mask does not fit, are listed in `rejected.csv`.

    Args:
        collection: what to read.
        output: folder of the cache, absent or empty.
        size: side of the images in pixels.
        fit: what happens to an image that is not square: "pad", "squash" or "crop".
        splits: "auto" takes the collection's own splits, or divides a collection with labels or masks 70/10/20 by
            patient and keeps one with neither in train; "none" puts everything in train.
        seed: seeds that division.
        allow_missing: go on without files that the collection lists and the disk lacks.
        max_images: only that many images, whole patients first, for a trial.
        num_workers: processes; by default one a core, or none for a small collection. 0 or 1 uses this process.
        overwrite: replace a cache that is there, once the new one is complete.
        progress: show a progress bar on stderr.

    Returns:
        The manifest, with "notes" for the user added.

    Raises:
        ValueError: an argument, a table or all images that do not fit.
        OSError: files missing or in the way.
    """
    _check_arguments(size, fit, splits, max_images, num_workers)
    output = Path(output).resolve()
    check_output(output, overwrite)
    listing = collection.read()
    masks = bool(listing.mask_names)
    records, note = _assign_splits(_present(listing, allow_missing), splits, seed, masks)
    if max_images is not None:
        records = _first_patients(records, max_images, seed)
    with _replacing(output) as folder:
        pictures = stream_pictures(records, size, fit, listing.mask_names, num_workers=num_workers)
        with progress_bar(len(records), "preparing", "img", show=progress) as bar:
            parts, rejected = _write_parts(records, pictures, collection.source, masks, folder, bar)
        options = {"size": size, "fit": fit, "seed": seed, "max_images": max_images}
        manifest = _manifest(collection, listing, options, parts, rejected)
        _write_cache(folder, list(parts), manifest, rejected)
    return {**manifest, "notes": [*listing.notes, note]}


def _check_arguments(size: int, fit: str, splits: str, max_images: int | None, num_workers: int | None) -> None:
    if size < 1 or fit not in FITS or splits not in ("auto", "none"):
        raise ValueError(
            f"size={size}, fit={fit!r}, splits={splits!r} found; expected size of 1 or more, fit one of "
            f"{', '.join(FITS)}, splits auto or none"
        )
    if (max_images is not None and max_images < 1) or (num_workers is not None and num_workers < 0):
        raise ValueError(
            f"max_images={max_images}, num_workers={num_workers} found; expected 1 or more images, 0 or more workers"
        )


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse to write over anything but an empty folder or, if the user says so, a cache."""
    if output.is_file():
        raise FileExistsError(f"{output}: a file found; expected a folder to write, absent or empty")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output}: exists and is not empty; --overwrite replaces a cache")
    if not (output / MANIFEST).is_file():
        raise FileExistsError(f"{output}: holds no {MANIFEST}, so it is no cache and is not overwritten")


def remove_leftovers(output: Path) -> None:
    """Remove what a killed run left beside `output`. Two runs into one output at a time do not work."""
    for path in output.parent.glob(f"{glob.escape(output.name)}.tmp-*"):
        shutil.rmtree(path)
    if (output / MANIFEST).is_file():
        for path in output.parent.glob(f"{glob.escape(output.name)}.old-*"):
            shutil.rmtree(path)


@contextmanager
def _replacing(output: Path) -> Iterator[Path]:
    """A folder beside `output` that takes its place at the end; an exception removes it."""
    temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
    remove_leftovers(output)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _swap(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(temporary: Path, output: Path) -> None:
    """Put the new cache in the place of the old one."""
    if (output / MANIFEST).is_file():
        old = output.with_name(f"{output.name}.old-{os.getpid()}")
        output.rename(old)
        temporary.rename(output)
        shutil.rmtree(old)
    else:
        temporary.rename(output)


def _present(listing: Listing, allow_missing: bool) -> list[Record]:
    if listing.missing and not allow_missing:
        lacking = "are missing or lack their mask" if listing.mask_names else "are missing"
        raise FileNotFoundError(
            f"{len(listing.missing)} of {len(listing.missing) + len(listing.records)} listed images {lacking}: "
            f"{some(listing.missing)}; --allow_missing goes on without them"
        )
    if not listing.records:
        raise FileNotFoundError(f"none of the {len(listing.missing)} listed images found: {some(listing.missing)}")
    return listing.records


def _assign_splits(records: list[Record], splits: str, seed: int, masks: bool) -> tuple[list[Record], str]:
    """Give every record a split, and refuse a patient in two; also says what was done."""
    patients = [record.patient_id for record in records]
    given = sum(record.split is not None for record in records)
    if splits == "none" or not (given or records[0].labels or masks):
        names, note = ["train"] * len(records), "no split: everything is in train"
    elif not given:
        # Without labels known masks are shared out alike, so that validation and test get theirs.
        strata = [record.labels or (float(record.mask_path is not None),) for record in records]
        names = split_by_patient(patients, strata, SHARES, seed)
        note = (
            f"split by patient into {', '.join(f'{name} {share:.0%}' for name, share in SHARES.items())}, seed {seed}"
        )
    elif given == len(records):
        names, note = [str(record.split) for record in records], "split as the collection says"
    else:
        raise ValueError(f"{len(records) - given} of {len(records)} images without a split; expected all or none")
    by_split: dict[str, list[str]] = {}
    for name, patient in zip(names, patients, strict=True):
        by_split.setdefault(name, []).append(patient)
    check_no_patient_overlap(by_split)
    return [replace(record, split=name) for record, name in zip(records, names, strict=True)], note


def _first_patients(records: list[Record], limit: int, seed: int) -> list[Record]:
    """At most `limit` records, patient after patient in a seeded order, in their original order."""
    order = sorted(range(len(records)), key=lambda index: (patient_hash(records[index].patient_id, seed), index))
    return [records[index] for index in sorted(order[:limit])]


def cache_features(masks: bool = False) -> datasets.Features:
    """Columns of a cache."""
    text = datasets.Value("string")
    return datasets.Features(
        {
            "image": datasets.Image(mode="L"),
            **({"mask": datasets.Image(mode="L")} if masks else {}),
            "patient_id": text,
            "view": text,
            "labels": datasets.List(datasets.Value("float32")),
            "source": text,
            "sha256": text,
        }
    )


def _write_parts(
    records: list[Record], pictures: Iterable[Picture], source: str, masks: bool, folder: Path, bar: tqdm[Any]
) -> tuple[Parts, Rejections]:
    """One Arrow file a split; returns its rows without the pixels, and the files left out with the reason."""
    (folder / "parts").mkdir()
    parts: Parts = {split: [] for split in SPLITS}
    rejected: Rejections = []
    with ExitStack() as stack:
        writers: dict[str, ArrowWriter] = {}
        for record, picture in zip(records, pictures, strict=True):
            bar.update()
            if picture.reason:
                rejected.append((record.name, picture.reason))
                continue
            split = str(record.split)
            if split not in writers:
                path = str(folder / "parts" / f"{split}.arrow")
                writer = ArrowWriter(features=cache_features(masks), path=path, writer_batch_size=ROWS)
                writers[split] = stack.enter_context(writer)
            row = {
                "patient_id": record.patient_id,
                "view": record.view,
                "labels": list(record.labels),
                "source": f"{source}:{record.name}",
                "sha256": picture.sha256,
            }
            writers[split].write(_pixels(picture, masks) | row)
            parts[split].append(row | {"mask": picture.mask and replace(picture.mask, png=b"")})
        for writer in writers.values():
            writer.finalize()
    if not writers:
        listed = some((f"{file} ({reason})" for file, reason in rejected), 3)
        raise ValueError(f"all {len(rejected)} images were rejected: {listed}; nothing is written")
    return {split: rows for split, rows in parts.items() if rows}, rejected


def _pixels(picture: Picture, masks: bool) -> dict[str, Any]:
    """Image columns of a row as `datasets` stores them."""
    columns: dict[str, Any] = {"image": {"bytes": picture.png, "path": None}}
    if masks:
        columns["mask"] = picture.mask and {"bytes": picture.mask.png, "path": None}
    return columns


def _manifest(
    collection: Collection, listing: Listing, options: dict[str, Any], parts: Parts, rejected: Rejections
) -> dict[str, Any]:
    masks = bool(listing.mask_names)
    return {
        "format": FORMAT,
        "collection": collection.name,
        "synthetic": collection.synthetic,
        "label_names": list(listing.label_names),
        **({"mask_names": list(listing.mask_names)} if masks else {}),
        "exclusive": listing.exclusive,
        **options,
        "splits": {split: _count(rows, listing.label_names, listing.mask_names) for split, rows in parts.items()},
        "rejected": len(rejected),
        "missing": len(listing.missing),
        **_hashes(parts, masks),
        "version": __version__,
        "commit": git_commit(Path(__file__).parent),
    }


def _count(rows: list[dict[str, Any]], label_names: Sequence[str], mask_names: Sequence[str]) -> dict[str, Any]:
    labels = np.array([row["labels"] for row in rows], dtype=float).reshape(len(rows), len(label_names))
    counts = {
        "images": len(rows),
        "patients": len({row["patient_id"] for row in rows}),
        "positives": dict(zip(label_names, (labels == 1).sum(axis=0).tolist(), strict=True)),
        "unknown": dict(zip(label_names, np.isnan(labels).sum(axis=0).tolist(), strict=True)),
    }
    if mask_names:
        known = [row["mask"] for row in rows if row["mask"] is not None]
        images_with = {
            name: sum(value in mask.values for mask in known) for name, value in foreground(mask_names).items()
        }
        counts["masks"] = {"known": len(known), "images_with": images_with}
    return counts


def _hashes(parts: Parts, masks: bool) -> dict[str, str]:
    """What identifies the division into splits, and the images with their masks."""
    division = [f"{split}\t{row['patient_id']}\t{row['source']}" for split, rows in parts.items() for row in rows]
    images = [row["sha256"] for rows in parts.values() for row in rows]
    if masks:
        of_masks = ["" if row["mask"] is None else row["mask"].sha256 for rows in parts.values() for row in rows]
        images = [f"{image}\t{mask}" for image, mask in zip(images, of_masks, strict=True)]
    return {"split_hash": _hash_lines(division), "data_hash": _hash_lines(images)}


def _hash_lines(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _write_cache(
    folder: Path, splits: Iterable[str], manifest: dict[str, Any], rejected: list[tuple[str, str]]
) -> None:
    """The parts to a `DatasetDict` on disk, with manifest and rejections; the parts are removed."""
    names = ", ".join(manifest["label_names"]) or "none"
    masks = manifest.get("mask_names", [])
    info = datasets.DatasetInfo(description=f"labels: {names}", features=cache_features(bool(masks)))
    loaded = datasets.DatasetDict()
    for split in splits:
        part = datasets.Dataset.from_file(str(folder / "parts" / f"{split}.arrow"))
        identity = f"{split} {manifest['split_hash']} {manifest['data_hash']} {manifest['size']} {manifest['fit']}"
        identity += f" {masks}" if masks else ""
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:16]
        loaded[split] = datasets.Dataset(
            part.data, info=info, split=datasets.NamedSplit(split), fingerprint=fingerprint
        )
    bars = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        loaded.save_to_disk(folder)
    finally:
        if bars:
            datasets.enable_progress_bars()
    del loaded, part
    shutil.rmtree(folder / "parts")
    with (folder / REJECTED).open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file", "reason"), *rejected])
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
