"""Has a classifier seen the images that it is tested on? Its files and the cache of its training can tell."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import try_to_load_from_cache

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import json_field, read_json
from mlvicx_hf.data.cache.cache import MANIFEST, Cache, load_cache
from mlvicx_hf.data.copies.duplicates import find_copies
from mlvicx_hf.data.vocabulary import COLLECTIONS, SHARED_IMAGES
from mlvicx_hf.encoders.inference import LoadedModel

TRAINING_RESULTS = "results.json"
SEEN = {  # of the cache that the model was trained on
    "train": "the model was trained on these images: the scores say nothing about new ones",
    "validation": "the model's epoch and thresholds were chosen on these images: the scores are too good",
}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """What the files of a classifier say of its training images; None for what they do not say."""

    collection: str | None = None
    cache: str | None = None
    data_hash: str | None = None
    split_hash: str | None = None


def read_training(loaded: LoadedModel) -> Training:
    """Read the `results.json` beside a classifier, or else the record of its thresholds or calibration.

    Raises:
        UserError: a `results.json` that no fine-tuning wrote.
    """
    folder = Path(loaded.source)
    file: Any = folder / TRAINING_RESULTS
    if not folder.is_dir():  # `load` fetched what the repository has
        file = try_to_load_from_cache(loaded.source, TRAINING_RESULTS, revision=loaded.revision)
    if isinstance(file, (str, Path)) and Path(file).is_file():
        content = read_json(Path(file))
        names = ("collection", "cache", "data_hash", "split_hash")
        return Training(**{name: json_field(content, f"data.{name}", str, Path(file)) for name in names})
    config = loaded.model.config
    record = config.decision_thresholds or config.calibration or {}
    return Training(data_hash=record.get("data_hash"), split_hash=record.get("split_hash"))


def check_overlap(
    training: Training, cache: Cache, split: str, allow: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Compare a split with the images that a classifier was trained on or chosen by.

    Copies of an image are found as in `data.copies.duplicates`. Patients are compared if both caches number them alike.
    Images that only pretraining has seen are not looked for.

    Args:
        training: of the classifier.
        cache: with the split.
        split: on which the classifier is tested.
        allow: only warn of images or patients that were seen.
        progress: show a bar on stderr if there are many images.

    Returns:
        `compared` (with what), `images` and `patients` that were seen (None if they could not be compared), and
        `warnings`, which are also logged.

    Raises:
        UserError: images or patients were seen, and the cache is not the one of the training.
    """
    images: int | None = None
    patients: int | None = None
    warnings: list[str] = []
    refused = False
    where = f"{cache.path}, {split}"
    trained = _open(training)
    if training.split_hash == cache.manifest["split_hash"]:
        compared = "the training's own division into splits"
        if split in SEEN:
            warnings = [f"{where}: {SEEN[split]}"]
        elif copies := cache.manifest["duplicates"]["across_splits"]:
            images, patients = _count_seen(load_cache(cache.path), cache, split, progress)
            if images:
                found = f"{images} image(s) found that have copies in training or validation ({copies} pairs)"
                warnings = [f"{where}: {found}"]
        else:
            images = patients = 0
    elif trained is not None:
        compared = f"training and validation images of {training.cache}"
        images, patients = _count_seen(trained, cache, split, progress)
        if refused := bool(images or patients):
            found = f"{images} image(s)" + ("" if patients is None else f" and {patients} patient(s)")
            warnings = [f"{where}: {found} found that the model was trained on or chosen by ({training.cache})"]
        if patients is None:
            warnings.append(_patients_unknown(trained, cache, split, where))
    elif training.data_hash == cache.manifest["data_hash"]:
        compared, refused = "the training's own images, divided otherwise", True
        warnings = [f"{where}: the images of the model's training found, divided otherwise"]
    else:
        compared = "nothing"
        warnings = _doubts(training, cache, where)
    if refused and not allow:
        raise UserError(f"{warnings[0]}; expected unseen ones (--allow_overlap goes on and records it)")
    for warning in warnings:
        logger.warning("%s", warning)
    return {"compared": compared, "images": images, "patients": patients, "warnings": warnings}


def _open(training: Training) -> Cache | None:
    """Open the cache that a classifier was trained on, if it is still in its place."""
    if training.cache is None or not (Path(training.cache) / MANIFEST).is_file():
        return None
    manifest = read_json(Path(training.cache) / MANIFEST)
    if any(manifest.get(name) != getattr(training, name) for name in ("data_hash", "split_hash")):
        return None  # it is another cache
    return load_cache(training.cache)


def _count_seen(trained: Cache, cache: Cache, split: str, progress: bool) -> tuple[int, int | None]:
    """Count images, and patients if they can be compared, of a split that are in the training or validation split."""
    seen = datasets.concatenate_datasets([images for name, images in trained.datasets.items() if name in SEEN])
    tested = cache.datasets[split]
    known = set(seen["sha256"])
    images = {row for row, file in enumerate(tested["sha256"]) if file in known}
    copies = find_copies(
        list(tested["phash"]),
        lambda row: tested[row]["image"],
        list(seen["phash"]),
        lambda row: seen[row]["image"],
        skip=lambda row, _: row in images,
        progress=progress,
    )
    images |= {row for row, _, _ in copies}
    source = cache.manifest["patient_source"]
    if source not in COLLECTIONS or trained.manifest["patient_source"] != source:
        return len(images), None
    return len(images), len(set(seen["patient_id"]) & set(tested["patient_id"]))


def _patients_unknown(trained: Cache, cache: Cache, split: str, where: str) -> str:
    """Say why patients are not compared, and how many have the same name."""
    seen = {patient for name, images in trained.datasets.items() if name in SEEN for patient in images["patient_id"]}
    alike = sorted(seen & set(cache.datasets[split]["patient_id"]))
    here, there = cache.manifest["patient_source"], trained.manifest["patient_source"]
    text = f"{where}: patients are not compared, since {here} here and {there} in training may number them differently"
    if not alike:
        return f"{text}; no two have one name"
    return f"{text}; {len(alike)} have the same name in both, such as {alike[0]}: if they are the same, this is a leak"


def _doubts(training: Training, cache: Cache, where: str) -> list[str]:
    """Say what should have been compared but could not be."""
    here, there = cache.manifest["collection"], training.collection
    if there is None:
        return [f"{where}: the model does not say whether it was trained on these images"]
    shared = any({here, there} <= group for group in SHARED_IMAGES)
    if not (shared or here == there):
        return []
    doubt = f"{here} and {there} share images, and " if here in COLLECTIONS else ""
    text = f"{where}: {doubt}{training.cache} is not there to be compared with"
    return [f"{text}: the model may have been trained on some of these"]
