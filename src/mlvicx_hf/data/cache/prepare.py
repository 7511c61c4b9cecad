"""Turn a collection into a prepared cache: 8-bit grey squares in a `datasets` folder, with a manifest beside them."""

import errno
import hashlib
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.common.files import old_folder, replace_folder, restore_folder
from mlvicx_hf.common.machine import available_cores
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.text import some

from ..collections.base import SPLITS, Collection, Listing, Record
from ..copies.deduplication import DROPS, choose_dropped, find_duplicates, note_contradictions
from ..images.pixels import DICOM_SUFFIXES, IMAGE_SUFFIXES
from ..options import check_choice, check_least
from ..split_files import SPLIT_FILE, plain_path, read_split_file
from ..splits import check_no_patient_overlap, first_patients, split_by_patient
from .assembly import (
    assemble,
    count_duplicates,
    describe_cache,
    is_of_cache,
    note_empty_splits,
    note_images,
    read_shards,
)
from .cache import MANIFEST, cache_features
from .shards import Making, Shard, is_made, plan_shards, write_in_order, write_shards

SPLIT_SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}
CACHE_FITS = ("pad", "squash", "crop")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OF_SYSTEMS = (".DS_Store", "Thumbs.db", "desktop.ini")  # files that file managers leave in folders that are looked at
USED = "used"  # new name of the folder `shards` when the new cache is complete
ROBUST = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in DICOM_SUFFIXES)  # decoders that do not crash


def prepare(
    collection: Collection,
    output: str | Path,
    *,
    size: int = 256,
    fit: str = "pad",
    splits: str | Path = "auto",
    seed: int = 0,
    drop_duplicates: str = "none",
    drop_flat: bool = False,
    allow_missing: bool = False,
    max_images: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Read every image of a collection and write the cache.

    The content depends on the arguments alone, not on the number of workers. Write everything beside `output` and
    rename it at the end, so that a cache is complete or absent. After a kill, the same call continues with the shards
    that were not finished. `rejected.csv` lists images that cannot be read or whose mask does not fit;
    `duplicates.csv` lists identical and nearly identical images; `notes.csv` lists images whose own grey scale does not
    fit their pixels, and flat images, which have no contrast or texture.

    Args:
        collection: the collection to read.
        output: folder of the cache, absent or empty.
        size: side of the images in pixels.
        fit: what happens to an image that is not square: "pad", "squash" or "crop".
        splits: "auto" takes the collection's own splits. If it has none, "auto" divides the patients
            of whom a label or mask is known, 70/10/20, and puts all others in train. "none" puts everything in train.
            Otherwise a CSV file with the columns source (or file_name) and split, such as `splits.csv` of another
            cache; images that it does not list are left out.
        seed: seed of that division.
        drop_duplicates: "identical" keeps one of several identical files; "near" also keeps one of several nearly
            identical images. An image of the test split is kept first, then one of validation, then one of train.
        drop_flat: leave out flat images. They are never copies of one another.
        allow_missing: continue without files that the collection lists and the disk lacks or does not give.
        max_images: prepare at most this number of images, patient by patient, for a trial.
        num_workers: number of processes; by default one per core, or none for a small collection. 0 uses this process.
        overwrite: replace an existing cache when the new one is complete.
        progress: show a progress bar on stderr.

    Returns:
        The manifest, "notes" for the user, and "first_rejected": name and reason of an unreadable image, or None.

    Raises:
        UserError: an argument or a table does not fit, or all images were rejected.
        OSError: files are missing or in the way.
    """
    check_choice("fit", fit, CACHE_FITS)
    check_choice("drop_duplicates", drop_duplicates, DROPS)
    check_least(1, size=size, max_images=max_images)
    check_least(0, num_workers=num_workers, seed=seed)
    output = Path(output).resolve()
    check_cache_output(output, overwrite)
    listing = _spelled_out(collection.read())
    records, notes = _assign_splits(_present(listing, allow_missing), splits, seed, bool(listing.mask_names))
    if max_images is not None:
        chosen = first_patients([record.patient_id for record in records], max_images, seed)
        records = [records[row] for row in chosen]
    features = cache_features(bool(listing.mask_names), any(record.boxes is not None for record in records))
    making = Making(
        features.arrow_schema, collection.source, size, fit, listing.mask_names, listing.origin, allow_missing
    )
    options = {"size": size, "fit": fit, "seed": seed, "max_images": max_images, "drop_flat": drop_flat}
    with _replacing(output, overwrite) as folder:
        shards = plan_shards(folder / "shards", records, SPLITS)
        _take_back(folder, shards)
        resumed = _write_shards(shards, making, listing, num_workers, progress)
        read = read_shards(shards)
        whole = read.without(read.where_flat()) if drop_flat else read
        duplicates = find_duplicates(whole.parts, progress=progress)
        images = whole.without(choose_dropped(whole.parts, duplicates, drop_duplicates))
        notes = [*listing.notes, *notes, *note_empty_splits(records, images), *note_images(images, drop_flat)]
        notes += note_contradictions(whole.parts, duplicates, listing.patients_known)
        manifest = describe_cache(collection, listing, options, images)
        manifest["duplicates"] = count_duplicates(duplicates, images, len(images.rejected) - len(whole.rejected))
        lacking = assemble(folder / "cache", shards, images, duplicates, manifest, notes, features)
        moved = _note_moved(output, records)
    return {
        **manifest,
        "notes": [*notes, *moved, *resumed, *lacking],
        "first_rejected": min(read.rejected, default=None),
    }


def check_cache_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is neither absent nor an empty folder nor, with `overwrite`, a cache and nothing else."""
    if output.resolve() == Path.cwd():  # another folder takes its place, and this one is in use
        raise FileExistsError(f"{output} is the working folder; expected another one")
    if os.path.lexists(output) and not output.is_dir():
        raise FileExistsError(f"{output}: no folder found; expected a folder to write, absent or empty")
    _put_right(output.resolve())
    _refuse_existing(output, overwrite)


def _refuse_existing(output: Path, overwrite: bool) -> None:
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{output}: exists and is not empty; --overwrite replaces a cache")
    if not (output / MANIFEST).is_file():
        raise FileExistsError(f"{output}: holds no {MANIFEST}, so it is no cache and is not overwritten")
    strange = [
        path.relative_to(output).as_posix()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not is_of_cache(path, output) and path.name not in OF_SYSTEMS
    ]
    if strange:
        raise FileExistsError(
            f"{output}: {len(strange)} files found that are not of the cache: {some(strange, 3)}; --overwrite would "
            "remove them, so move them away first"
        )


def partial_folder(output: Path) -> Path:
    """Name the folder in which a cache is made. A killed run leaves it, and the next run continues there."""
    return output.with_name(f".{output.name}.partial")


@contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """Lock the folder in which a cache is made, so that one run at a time uses it."""
    folder = partial_folder(output)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / "lock").acquire(blocking=False)
    except Timeout:
        raise FileExistsError(f"{folder}: another run is writing {output}; expected one at a time") from None
    with lock:
        yield folder


@contextmanager
def _replacing(output: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a folder for the new `cache`, which then replaces `output`.

    Remove the folder if the input does not fit. Keep it after an interruption, so that the next run can resume.
    """
    with _locked(output) as folder:
        try:
            _refuse_existing(output, overwrite)  # another run may have ended since the first check
        except FileExistsError:
            shutil.rmtree(folder)
            raise
        try:
            yield folder
        except MissingExtraError:  # once it is installed, the next run continues
            raise
        except UserError:
            shutil.rmtree(folder)
            raise
        except OSError as error:
            if error.errno in DISK_FULL and error.filename is None:  # writing does not tell where
                error.filename = str(folder)
            raise
        (folder / "shards").rename(folder / USED)
        replace_folder(folder / "cache", output)
        shutil.rmtree(folder)


def _put_right(output: Path) -> None:
    """Repair what a kill at the end of `_replacing` left: bring the old cache back, or tidy up for the new one."""
    if not (partial_folder(output).is_dir() or old_folder(output).is_dir()):
        return
    with _locked(output) as folder:
        restore_folder(output)
        if (folder / "cache").is_dir() and (folder / USED).is_dir():
            (folder / USED).rename(folder / "shards")
        if not (folder / "shards").is_dir():  # nothing to resume, or the new cache is in its place
            shutil.rmtree(old_folder(output), ignore_errors=True)
            shutil.rmtree(folder)


def _take_back(folder: Path, shards: Sequence[Shard]) -> None:
    """Move finished shards back that a killed run had moved into its cache. Remove notes without a shard."""
    for shard in shards:
        moved = folder / "cache" / shard.path.parent.name / shard.path.name
        if shard.note.is_file() and moved.is_file() and not shard.path.exists():
            moved.rename(shard.path)
    for note in (folder / "shards").glob("*/*.json"):
        if not note.with_suffix(".arrow").is_file():
            note.unlink()


def _spelled_out(listing: Listing) -> Listing:
    """Escape names that UTF-8 cannot hold, such as those of files from old archives."""

    def spell(text: str) -> str:
        return text.encode("utf-8", "backslashreplace").decode()

    records = [
        record
        if record.name.isascii() and record.patient_id.isascii()
        else replace(record, name=spell(record.name), patient_id=spell(record.patient_id))
        for record in listing.records
    ]
    texts = {name: getattr(listing, name) for name in ("label_names", "missing", "notes", "mask_names")}
    return replace(listing, records=records, **{name: type(found)(map(spell, found)) for name, found in texts.items()})


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


def _assign_splits(records: list[Record], splits: str | Path, seed: int, masks: bool) -> tuple[list[Record], list[str]]:
    """Give every record a split, and refuse a patient in two splits. Return the records and a note for the user."""
    given = sum(record.split is not None for record in records)
    if splits not in ("auto", "none"):
        return _splits_of_file(records, Path(splits))
    if splits == "none" or not (given or records[0].labels or masks):
        names, note = ["train"] * len(records), "no split: everything is in train"
    elif not given:
        names, note = _divided(records, seed)
    elif given == len(records):
        names, note = [str(record.split) for record in records], "split as the collection says"
    else:
        raise UserError(f"{len(records) - given} of {len(records)} images without a split; expected all or none")
    return _with_splits(records, names), [note]


def _note_moved(output: Path, records: list[Record]) -> list[str]:
    """Note the images that are in another split of the cache that is to be replaced. Models have been trained on it."""
    try:
        earlier = read_split_file(output / SPLIT_FILE)
    except (OSError, UserError):  # no cache, or a damaged one
        return []
    named = [(earlier.get(plain_path(record.name)), record) for record in records]
    moved = [record for split, record in named if split is not None and split != record.split]
    if not moved:
        return []
    patients = len({record.patient_id for record in moved})
    return [
        f"{len(moved)} images of {patients} patients were in another split of the replaced cache: do not evaluate "
        f"models that were made with it (a copy of its {SPLIT_FILE} as --splits keeps the division, without new images)"
    ]


def _divided(records: Sequence[Record], seed: int) -> tuple[list[str], str]:
    """Divide the patients of whom a label or mask is known. The others can only be trained on, so put them in train."""
    known = {record.patient_id for record in records if _is_known(record)}
    asked = [record for record in records if record.patient_id in known]
    # Without labels there is one stratum.
    labels = [record.labels for record in asked]
    names = split_by_patient([record.patient_id for record in asked], labels, SPLIT_SHARES, seed)
    split_of = dict(zip((record.patient_id for record in asked), names, strict=True))
    shares = ", ".join(f"{name} {share:.0%}" for name, share in SPLIT_SHARES.items())
    note = f"split by patient into {shares}, seed {seed}"
    if others := len({record.patient_id for record in records} - known):
        note += f"; in train alone: {others} patients of whom no label or mask is known"
    return [split_of.get(record.patient_id, "train") for record in records], note


def _is_known(record: Record) -> bool:
    masked = record.mask_path is not None or record.draw_mask is not None
    return masked or not all(math.isnan(label) for label in record.labels)


def _splits_of_file(records: list[Record], path: Path) -> tuple[list[Record], list[str]]:
    listed = read_split_file(path)
    named = [(plain_path(record.name), record) for record in records]
    chosen = [(name, record) for name, record in named if name in listed]
    if not chosen:
        raise UserError(f"{path}: {some(listed)} found; expected images of this collection, such as {records[0].name}")
    notes = [f"split as {path.name} says, SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()}"]
    others = [name for name, _ in named if name not in listed]
    absent = listed.keys() - {name for name, _ in chosen}
    if others:
        notes.append(f"{len(others)} images that {path.name} does not list were left out: {some(others, 3)}")
    if absent:
        notes.append(f"{len(absent)} images that {path.name} lists are not there: {some(sorted(absent), 3)}")
    return _with_splits([record for _, record in chosen], [listed[name] for name, _ in chosen]), notes


def _with_splits(records: list[Record], names: list[str]) -> list[Record]:
    by_split: dict[str, list[str]] = {}
    for name, record in zip(names, records, strict=True):
        by_split.setdefault(name, []).append(record.patient_id)
    check_no_patient_overlap(by_split)
    return [replace(record, split=name) for record, name in zip(records, names, strict=True)]


def _write_shards(
    shards: list[Shard], making: Making, listing: Listing, num_workers: int | None, progress: bool
) -> list[str]:
    """Make the shards that an earlier run did not finish. Return a note of those that it did finish."""
    finished = [is_made(shard, making) for shard in shards]
    todo = [shard for shard, done in zip(shards, finished, strict=True) if not done]
    if num_workers is None:
        num_workers = _choose_workers([record for shard in todo for record in shard.records])
    if listing.contents is not None:
        made = write_in_order(todo, listing.records, making, listing.contents)
    else:
        made = write_shards(todo, making, num_workers)
    total, rest = (sum(len(shard.records) for shard in some_shards) for some_shards in (shards, todo))
    with progress_bar(total, "preparing", "img", initial=total - rest, show=progress) as bar:
        for shard in made:
            bar.update(len(shard.records))
    return [f"resumed: {sum(finished)} of {len(shards)} shards were finished before"] if any(finished) else []


def _choose_workers(records: Sequence[Record]) -> int:
    """Choose one worker per core, or fewer for few images: starting workers takes seconds.

    Decoders that may crash always get workers.
    """
    if all(record.draw is not None for record in records):
        enough = len(records) // 128
    elif all(record.path is not None and record.path.suffix.lower() in ROBUST for record in records):
        enough = len(records) // 1024
    else:
        enough = available_cores()
    return min(available_cores(), enough)
