"""What the features of a frozen encoder are worth: nearest neighbours and a linear probe, in seconds.

The probes fit on the train split of a labelled cache and are scored on its validation split; the test split is never
read. Nothing is random: the same encoder and cache give the same scores, and the state of the caller's generators stays
as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .data.cache import load_cache
from .data.splits import patient_hash
from .image_processing_mlvicx import MLVICXImageProcessor
from .metrics import score_labels
from .progress import progress_bar

NEIGHBOURS = 20
TEMPERATURE = 0.07  # of the neighbours' weights, as usual for this probe (arXiv 1805.01978)
RIDGE = 0.1  # penalty of the linear probe over the number of images, for standardised features


class PreparedImages(Dataset[dict[str, Tensor]]):
    """Images of a cache as model input, without labels; nothing random.

    Args:
        images: rows with `image`.
        processor: of the model.
    """

    def __init__(self, images: Any, processor: MLVICXImageProcessor) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.processor(self.images[index]["image"])["pixel_values"][0]}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; behind it every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def encode(
    encoder: nn.Module,
    images: Dataset[dict[str, Tensor]],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    show: bool = True,
) -> dict[str, Tensor]:
    """Pooled features of images, once and in order, in evaluation mode.

    Args:
        encoder: `MLVICXModel`, on that device.
        images: give `pixel_values`, and what else they like.
        batch_size: images encoded at a time.
        device: of the encoder.
        show: a progress bar.

    Returns:
        `features` [N, C], float32 on the CPU, and what else the images give, such as `labels`.
    """
    columns: dict[str, list[Tensor]] = {"features": []}
    loader = DataLoader(images, batch_size, generator=torch.Generator())  # else it draws from the global one
    with evaluating(encoder), progress_bar(len(images), "encoding", "img", show=show) as bar:  # type: ignore[arg-type]
        for batch in loader:
            pixels = batch.pop("pixel_values")
            # Kernels are chosen by shape: with full batches alone no last digit depends on how many images are left.
            full = nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, batch_size - len(pixels)))
            columns["features"].append(encoder(full.to(device)).pooler_output[: len(pixels)].float().cpu())
            for name, values in batch.items():
                columns.setdefault(name, []).append(values)
            bar.update(len(pixels))
    return {name: torch.cat(parts) for name, parts in columns.items()}


def knn_scores(
    features: Tensor, labels: np.ndarray, queries: Tensor, same_patient: Tensor, neighbours: int = NEIGHBOURS
) -> np.ndarray:
    """Share of positives among the nearest images, by cosine, weighted with exp(cosine / 0.07).

    Features are centred on the mean of the fitted ones first: those behind a ReLU all point into one direction.

    Args:
        features: of the images whose labels are known, [N, C].
        labels: [N, L], 1, 0 or NaN; an image is no neighbour for a label that it does not know.
        queries: features of the images to score, [M, C].
        same_patient: [M, N]; images of a query's own patient are no neighbours.
        neighbours: how many.

    Returns:
        [M, L], from 0 to 1; 0 where a query has no neighbour.
    """
    mean = features.double().mean(0)
    units, asked = (nn.functional.normalize(x.double() - mean, dim=1) for x in (features, queries))
    cosine = (asked @ units.T).masked_fill(same_patient, -torch.inf)  # [M, N]
    scores = np.zeros((len(queries), labels.shape[1]))
    for column, values in enumerate(torch.from_numpy(labels).double().T):
        known = ~values.isnan()
        near = cosine[:, known].topk(min(neighbours, int(known.sum())), dim=1)
        weights = ((near.values - 1) / TEMPERATURE).exp()  # [M, k], 0 for the query's own patient
        share = (weights * values[known][near.indices]).sum(1) / weights.sum(1).clamp(min=1e-300)
        scores[:, column] = share.numpy()
    return scores


def linear_scores(features: Tensor, labels: np.ndarray, queries: Tensor, ridge: float = RIDGE) -> np.ndarray:
    """Scores of a linear layer, one label at a time over the images where it is known.

    Ridge regression on standardised features, in closed form: there are no iterations that may not converge, and it is
    a few times faster than a logistic regression, from whose AUROC it differs by some 0.01.

    Args:
        features: [N, C].
        labels: [N, L], 1, 0 or NaN.
        queries: [M, C].
        ridge: penalty over the number of images.

    Returns:
        [M, L].
    """
    mean, deviation = features.double().mean(0), features.double().std(0, correction=0)
    deviation = deviation.clamp(min=1e-6 * float(deviation.max()) + 1e-300)  # dead features
    x, asked = ((values.double() - mean) / deviation for values in (features, queries))
    identity = torch.eye(x.shape[1], dtype=torch.float64)
    scores = np.zeros((len(queries), labels.shape[1]))
    table = torch.from_numpy(labels).double()
    masks, mask_of = (~table.isnan()).unique(dim=1, return_inverse=True)
    for number, known in enumerate(masks.T):
        columns = mask_of == number  # labels that the same images know are solved together
        some, target = x[known] - x[known].mean(0), table[known][:, columns]
        weights = torch.linalg.solve(some.T @ some + ridge * len(some) * identity, some.T @ (target - target.mean(0)))
        scores[:, columns.numpy()] = (asked @ weights).numpy()
    return scores


class Probe:
    """kNN and linear probe of an encoder on a labelled cache.

    Args:
        path: of the cache; the splits train and validation are used.
        processor: of the model.
        max_train: of more training images, those of the patients whose hash comes first are taken.
        max_validation: likewise.
        seed: of that hash.
        batch_size: images encoded at a time.

    Raises:
        FileNotFoundError: no cache.
        ValueError: no labels, a split that is missing, or no label that both splits know with both values.
    """

    def __init__(
        self,
        path: str | Path,
        processor: MLVICXImageProcessor,
        max_train: int = 2000,
        max_validation: int = 1000,
        seed: int = 0,
        batch_size: int = 64,
    ) -> None:
        cache = load_cache(path, ["train", "validation"])
        if not cache.label_names:
            raise ValueError(f"{path} has no labels; expected some: prepare it with --metadata that has label columns")
        self.names, self.processor, self.batch_size = cache.label_names, processor, batch_size
        limits = {"train": max_train, "validation": max_validation}
        self.images = {split: _capped(cache.datasets[split], limit, seed) for split, limit in limits.items()}
        self.labels = {split: np.array(images["labels"], dtype=np.float64) for split, images in self.images.items()}
        fit, scored = self.labels["train"], self.labels["validation"]
        self.usable = [i for i in range(len(self.names)) if _has_both(fit[:, i]) and _has_both(scored[:, i])]
        if not self.usable:
            raise ValueError(f"{path}: no label has both values in train and in validation, so nothing can be probed")
        patients = [np.array(self.images[split]["patient_id"], dtype=object) for split in ("validation", "train")]
        self.same_patient = torch.from_numpy((patients[0][:, None] == patients[1][None]).astype(bool))

    def __call__(self, encoder: nn.Module, device: torch.device | str = "cpu") -> dict[str, float]:
        """Score an encoder as it is now; it is left in the mode that it was in.

        Returns:
            `probe_knn_auroc` and `probe_linear_auroc`, means over the labels that both splits know with both values,
            and `probe_knn_auroc/LABEL`, `probe_linear_auroc/LABEL`. Exclusive classes count one against the rest.
        """
        features = {
            split: encode(encoder, PreparedImages(images, self.processor), self.batch_size, device, show=False)[
                "features"
            ]
            for split, images in self.images.items()
        }
        names = [self.names[i] for i in self.usable]
        fit, truth = (self.labels[split][:, self.usable] for split in ("train", "validation"))
        found = {
            "knn": knn_scores(features["train"], fit, features["validation"], self.same_patient),
            "linear": linear_scores(features["train"], fit, features["validation"]),
        }
        scalars: dict[str, float] = {}
        for kind, scores in found.items():
            auroc = score_labels(scores, truth, names)
            scalars[f"probe_{kind}_auroc"] = auroc["auroc_macro"]
            scalars |= {f"probe_{kind}_auroc/{name}": value for name, value in auroc["auroc"].items()}
        return scalars


def _capped(images: Any, limit: int, seed: int) -> Any:
    """At most so many rows, patient after patient in the order of their hashes; the rows keep their order."""
    if limit < 1:
        raise ValueError(f"a limit of {limit} images found; expected 1 or more")
    patients: Sequence[str] = images["patient_id"][:]
    order = sorted(range(len(images)), key=lambda i: (patient_hash(patients[i], seed), i))
    return images.select(sorted(order[:limit]))


def _has_both(values: np.ndarray) -> bool:
    return len(np.unique(values[~np.isnan(values)])) == 2
