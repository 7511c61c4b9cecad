"""Batches of a run: images, and what happens to them in their two views.

All of this is made where the images are read, in a loader's workers, so that a training step waits for nothing: it
moves the tensors to the device without blocking, and the device needs no more than these.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import recursively_apply
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mlvicx_hf.common.machine import begin_worker
from mlvicx_hf.data.reading.sampling import EpochBatches, PatientPartners, PretrainingImages, image_of
from mlvicx_hf.data.reading.streaming import StreamBatches

from .view_sets import MorePlans, ViewSet
from .views import ViewPlan


class PlannedBatch(NamedTuple):
    """B images of a process."""

    epoch: int  # counted from 0
    images: Tensor  # uint8 [B, 1, S, S]; [B, 2, S, S] if view 2 has an image of its own
    plans: tuple[ViewPlan, ViewPlan]
    more: MorePlans | None = None


class Planner:
    """Makes batches: draws the random numbers of each sample, and plans its views.

    Args:
        view_set: how views are made.
        seed: of the run.
    """

    def __init__(self, view_set: ViewSet, seed: int) -> None:
        self.view_set, self.seed = view_set, seed

    def plan(self, epoch: int, images: Tensor, samples: np.ndarray) -> PlannedBatch:
        """Add the plans to images [B, 1, S, S] or [B, 2, S, S] of these samples, [B]."""
        return PlannedBatch(epoch, images, *self.view_set.plan(self.seed, epoch, samples))

    def __call__(self, rows: list[tuple[int, Tensor, int]]) -> PlannedBatch:
        """Join rows of (epoch, image, sample), all of one epoch: a `collate_fn`."""
        epochs, images, samples = zip(*rows, strict=True)
        return self.plan(epochs[0], torch.stack(images), np.array(samples))


class _Numbered(Dataset[tuple[int, Tensor, int]]):
    """The images of a cache by (epoch, sample): workers live through all epochs and are not told of a new one."""

    def __init__(self, images: PretrainingImages, partners: PatientPartners | None = None) -> None:
        self.images, self.partners = images, partners

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Tensor, int]:
        epoch, sample = key
        own = image_of(sample)
        image, _ = self.images[own]
        if self.partners is not None:
            partner = self.partners(epoch, sample)
            image = torch.cat([image, image if partner == own else self.images[partner][0]])
        return epoch, image, sample


class _WithEpoch(Sampler[list[tuple[int, int]]]):
    """Gives (epoch, sample) for every sample of the batches."""

    def __init__(self, batches: EpochBatches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for samples in self.batches:
            yield [(self.batches.epoch, sample) for sample in samples]


def cache_loader(
    images: PretrainingImages,
    batches: EpochBatches,
    planner: Planner,
    num_workers: int,
    pin_memory: bool,
    partners: PatientPartners | None = None,
) -> DataLoader[Any]:
    """Load the batches of a cache, planned by the workers. With partners, view 2 is made of another image."""
    return DataLoader(
        _Numbered(images, partners),
        batch_sampler=_WithEpoch(batches),
        collate_fn=planner,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=begin_worker,
        pin_memory=pin_memory,
    )


class StreamLoader:
    """Loads the batches of a stream. This process plans them, since it is the one that puts them together."""

    def __init__(self, batches: StreamBatches, planner: Planner, pin_memory: bool) -> None:
        self.batches, self.planner, self.pin_memory = batches, planner, pin_memory

    def __iter__(self) -> Iterator[PlannedBatch]:
        for images, samples in self.batches:
            batch = self.planner.plan(self.batches.epoch, images, samples.numpy())
            yield recursively_apply(torch.Tensor.pin_memory, batch) if self.pin_memory else batch
