"""Choose the images of a cache for training, and their order, which depends on (seed, epoch) alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.streams import RandomStream, stream_generator

from ..options import check_choice
from .lanes import PLACE_BITS

VIEW_CHOICES = ("frontal", "all")  # for pretraining; "frontal" leaves out images known to be lateral
LATERAL = "LATERAL"


class PretrainingImages(Dataset[tuple[Tensor, int]]):
    """The images of a cache as uint8 [1, S, S], each with its index."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image: Image.Image = self.images[index]["image"]
        return torch.from_numpy(np.array(image, dtype=np.uint8))[None], index


def image_of(sample: int) -> int:
    """The index of a sample's image: its number without the bits for how often the epoch had the image before."""
    return sample % 2**PLACE_BITS


class PatientPartners:
    """Gives each image another one of its patient, if there is any; else the image itself.

    A partner is a function of (seed, epoch, sample), whatever the batches, workers and processes.

    Args:
        patients: patient of each of the N images.
        views: view of each image, if a partner must have the same; None if any will do.
        seed: of the run.
    """

    def __init__(self, patients: Sequence[str], views: Sequence[str] | None, seed: int) -> None:
        groups = list(patients) if views is None else list(zip(patients, views, strict=True))
        rows: dict[Any, list[int]] = {}
        for row, group in enumerate(groups):
            rows.setdefault(group, []).append(row)
        self.rows, self.groups, self.seed = rows, groups, seed

    @property
    def share(self) -> float:
        """Share of the images that have a partner."""
        return sum(len(rows) for rows in self.rows.values() if len(rows) > 1) / max(1, len(self.groups))

    def __call__(self, epoch: int, sample: int) -> int:
        """The partner of an image in an epoch, counted from 0; see `image_of`."""
        image = image_of(sample)
        others = [row for row in self.rows[self.groups[image]] if row != image]
        if not others:
            return image
        return others[stream_generator(self.seed, epoch, RandomStream.PARTNERS, sample).integers(len(others))]


def choose_views(images: Any, views: str = "frontal") -> tuple[Any, int]:
    """Select the rows whose view is wanted. Return them and the number of other rows.

    Args:
        images: a `datasets.Dataset` with the column view.
        views: "frontal" (PA, AP and unknown) or "all".

    Raises:
        UserError: `views` has another value, or no image is left.
    """
    check_choice("views", views, VIEW_CHOICES)
    lateral = np.array(images["view"][:]) == LATERAL
    if views == "all" or not lateral.any():
        return images, 0
    if lateral.all():
        raise UserError(f"{len(images)} lateral images found and no other; expected frontal ones, or --views all")
    return images.select(np.flatnonzero(~lateral)), int(lateral.sum())


def patient_balanced_order(patients: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Order N draws so that every patient comes equally often, however many images each has.

    Patients come in shuffled rounds of all patients, so the numbers of their draws differ by one at most. The images of
    a patient come in shuffled cycles. If one patient has more images than others, some of them wait for another epoch,
    and images of the others come more than once.

    Args:
        patients: patient of each of the N images.
        rng: random numbers for the order.

    Returns:
        N indices of images, int64.
    """
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    total = len(owner)
    if not total:
        return np.empty(0, np.int64)
    rounds = np.tile(np.arange(len(names)), (-(-total // len(names)), 1))
    turns = rng.permuted(rounds, axis=1).ravel()[:total]  # [N], the patient of each turn

    images_of = np.bincount(owner)  # [P]
    draws_of = np.bincount(turns, minlength=len(names))
    # Repeat the images of each patient once for each cycle that begins. Patients follow one another.
    needed = -(-draws_of // images_of) * images_of
    patient = np.repeat(np.arange(len(names)), needed)
    place = np.arange(needed.sum()) - np.repeat(_starts(needed), needed)  # within the patient
    cycle, place = np.divmod(place, images_of[patient])
    image = np.argsort(owner, kind="stable")[_starts(images_of)[patient] + place]
    image = image[np.lexsort((rng.random(len(image)), cycle, patient))]

    by_patient = np.argsort(turns, kind="stable")  # the turns of the first patient, of the second …
    number = np.arange(total) - np.repeat(_starts(draws_of), draws_of)  # of a turn, within its patient
    order = np.empty(total, np.int64)
    order[by_patient] = image[_starts(needed)[turns[by_patient]] + number]
    return order


def _times_before(order: np.ndarray) -> np.ndarray:
    """How often each of N numbers stands before its place, [N]."""
    counts = np.bincount(order)
    found = np.empty_like(order)
    found[np.argsort(order, kind="stable")] = np.arange(len(order)) - np.repeat(_starts(counts), counts)
    return found


def _starts(lengths: np.ndarray) -> np.ndarray:
    """Compute where pieces of these lengths begin if they follow one another."""
    return np.cumsum(lengths) - lengths


class PatientBalancedSampler(Sampler[int]):
    """Gives the indices of an epoch in `patient_balanced_order`, for a DataLoader or a Trainer.

    Args:
        patients: patient of each image.
        seed: seed of the run.
    """

    def __init__(self, patients: Sequence[str], seed: int = 0) -> None:
        self.patients, self.seed, self.epoch = patients, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration. Trainer and Accelerate call this."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.patients)

    def __iter__(self) -> Iterator[int]:
        rng = stream_generator(self.seed, self.epoch, RandomStream.ORDER)
        yield from patient_balanced_order(self.patients, rng).tolist()


class GlobalBatches:
    """This process's share of every global batch of an epoch.

    Args:
        num_images: number of images in an epoch. Those that do not fill the last batch are left out.
        batch_size: number of images in a global batch.
        seed: seed of the run.
        rank: number of this process.
        num_processes: number of processes that share a batch.

    Raises:
        UserError: the batch is larger than the data, or the processes cannot share it evenly.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int, rank: int, num_processes: int) -> None:
        if batch_size > num_images:
            raise UserError(
                f"batch_size={batch_size} found; expected at most {num_images}, as many images as there are"
            )
        if batch_size % num_processes:
            raise UserError(f"batch_size={batch_size} found; expected a multiple of the {num_processes} processes")
        if batch_size < 2:
            raise UserError(f"batch_size={batch_size} found; variance and covariance need at least 2")
        self.num_images, self.batch_size, self.seed = num_images, batch_size, seed
        self.rank, self.num_processes, self.share = rank, num_processes, batch_size // num_processes
        self.epoch = self.first_step = 0

    def start_at(self, epoch: int, first_step: int = 0) -> None:
        """Choose the epoch of the next iteration, and the step to begin with."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return self.num_images // self.batch_size


class EpochBatches(GlobalBatches, Sampler[list[int]]):
    """Gives the indices of every batch of an epoch, in an order that (seed, epoch) determines.

    In every epoch other images are left out of the last batch. With `patients`, the patient of each image, draw all
    patients equally often, and give numbers of samples, see `image_of`; without them draw every image once. For all
    else see `GlobalBatches`.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        num_processes: int = 1,
        patients: Sequence[str] | None = None,
    ) -> None:
        super().__init__(num_images, batch_size, seed, rank, num_processes)
        self.patients = patients

    def __iter__(self) -> Iterator[list[int]]:
        rng = stream_generator(self.seed, self.epoch, RandomStream.ORDER)
        if self.patients is None:
            order = rng.permutation(self.num_images)
        else:
            order = patient_balanced_order(self.patients, rng)
            # An image that comes again gets other views; after 128 times the first ones, since 64 bits hold no more.
            order += _times_before(order) % 2 ** (63 - PLACE_BITS) << PLACE_BITS
        for step in range(self.first_step, len(self)):
            start = step * self.batch_size + self.rank * self.share
            yield order[start : start + self.share].tolist()
