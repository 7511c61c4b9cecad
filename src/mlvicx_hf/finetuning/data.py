"""What a run trains, chooses and tests on: three splits without a common image, and the chosen part of the first."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some
from mlvicx_hf.data.cache.cache import Cache
from mlvicx_hf.data.collections.base import SPLITS
from mlvicx_hf.data.split_files import split_file
from mlvicx_hf.data.splits import label_fraction
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor

from .arguments import LabelledDataArguments

logger = logging.getLogger(__name__)


def check_splits(cache: Cache, allow_leak: bool = False) -> None:
    """Refuse a cache without the three splits, or in which two splits share an image; `load_cache` refuses patients.

    Raises:
        UserError: naming splits that are absent, or images that are shared; with `allow_leak` these are a warning.
    """
    absent = [split for split in SPLITS if split not in cache.datasets]
    if absent:
        raise UserError(
            f"{cache.path} has the splits {', '.join(cache.datasets)}; expected {', '.join(absent)} as well"
        )
    shared = cache.manifest["duplicates"]["across_splits"]
    if not shared:
        return
    left = {source for images in cache.datasets.values() for source in images["source"]}
    pairs = (
        f"{row['source']} ({row['split']}) = {row['other_source']} ({row['other_split']})"
        for row in cache.duplicates()
        if row["split"] != row["other_split"] and {row["source"], row["other_source"]} <= left
    )
    message = f"{cache.path}: {shared} pair(s) of copies of an image in two splits, such as {some(pairs, 3)}"
    if not allow_leak:
        raise UserError(f"{message}; prepare it with --drop_duplicates near (--allow_leak goes on and records it)")
    logger.warning("%s", message)


def with_splits(cache: Cache, changed: Mapping[str, Any]) -> Cache:
    """The same cache with other images in some splits."""
    return replace(cache, datasets=datasets.DatasetDict({**cache.datasets, **changed}))


def keep_known(cache: Cache, known: Mapping[str, Sequence[int]], what: str) -> Cache:
    """Keep the known rows of every split (split → rows). Say how many images have no known `what`, such as class.

    Raises:
        UserError: a split of which nothing is left.
    """
    kept = {}
    for split, rows in known.items():
        images = cache.datasets[split]
        if not len(rows):
            raise UserError(f"{cache.path}: no image of {split} has a known {what}")
        if len(rows) < len(images):
            logger.warning("%d images of %s have no known %s and are left out", len(images) - len(rows), split, what)
            kept[split] = images.select(rows)
    return with_splits(cache, kept)


def select_training(cache: Cache, arguments: LabelledDataArguments, seed: int) -> Cache:
    """Leave only the chosen part of the training split.

    Raises:
        UserError: a label fraction that leaves nothing.
    """
    train = cache.datasets["train"]
    if arguments.label_fraction != 1:
        labels = np.array(train["labels"], dtype=np.float64)
        train = train.select(label_fraction(train["patient_id"], labels, arguments.label_fraction, seed))
    if arguments.max_train_samples is not None:
        train = train.select(range(min(arguments.max_train_samples, len(train))))
    return with_splits(cache, {"train": train})


def random_moves() -> v2.Transform:
    """Flip (half of the images), rotate (±10°), shift (5 %) and scale (10 %) at random."""
    moves = v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
    return v2.Compose([v2.RandomHorizontalFlip(), moves])


class LabelledImages(Dataset[dict[str, Tensor]]):
    """Images of one split as model input, with their labels.

    Args:
        images: split of a cache.
        processor: of the model.
        exclusive: labels are one class an image: its index instead of the vector.
        digest: of the cache.
        augment: move images at random, as `random_moves` does; otherwise nothing is random.
    """

    def __init__(
        self,
        images: Any,
        processor: MLVICXImageProcessor,
        exclusive: bool,
        digest: str = "",
        augment: bool = False,
    ) -> None:
        self.images, self.processor, self.exclusive, self.digest = images, processor, exclusive, digest
        self.transform = random_moves() if augment else None
        self.names: list[str] = images["source"][:]
        self.key = f"{digest} {processor.to_json_string()}"

    @property
    def labels(self) -> Tensor:
        """[N, L], or class indices [N]."""
        labels = torch.tensor(self.images["labels"][:], dtype=torch.float32)
        return labels.argmax(1) if self.exclusive else labels

    def rows(self, indices: Sequence[int]) -> LabelledImages:
        """Some of the images, as they are."""
        return LabelledImages(self.images.select(indices), self.processor, self.exclusive, self.digest)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.images[index]
        image: Image.Image = row["image"] if self.transform is None else self.transform(row["image"])
        labels = torch.tensor(row["labels"], dtype=torch.float32)
        pixels: Tensor = self.processor(image)["pixel_values"][0]
        return {"pixel_values": pixels, "labels": labels.argmax() if self.exclusive else labels}


def used_images(cache: Cache) -> str:
    """Text of a split file of the images that a run uses; its SHA-256 is the result's `used_hash`."""
    return split_file(
        (source, patient, str(split))
        for split, images in cache.datasets.items()
        for source, patient in zip(images["source"], images["patient_id"], strict=True)
    )
