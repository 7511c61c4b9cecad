"""Segmentation on a prepared cache with masks: a U-Net decoder on the encoder, frozen or fine-tuned (section IV-B)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from transformers import EvalPrediction, Trainer

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.masks import foreground
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForSemanticSegmentation
from mlvicx_hf.scoring.overlap import EMPTY_MASKS, overlap_counts, score_overlap

from .arguments import EncoderArguments, SegmentationArguments, SegmentationDataArguments
from .data import check_splits, keep_known, random_moves
from .heads import load_config, load_for_task
from .results import write_images
from .training import FinetuningTask, Split, train_with_trainer


class MaskedImages(Dataset[dict[str, Tensor]]):
    """Images of one split as model input, with masks through the same geometry.

    Args:
        images: split of a cache, every mask known.
        processor: of the model.
        augment: move images at random, as `random_moves` does.
    """

    def __init__(self, images: Any, processor: MLVICXImageProcessor, augment: bool = False) -> None:
        self.images, self.processor = images, processor
        self.transform = random_moves() if augment else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.images[index]
        image, mask = row["image"], tv_tensors.Mask(np.array(row["mask"])[None])
        if self.transform is not None:
            image, mask = self.transform(image, mask)
        made = self.processor.preprocess(image, mask[0].as_subclass(Tensor))
        return {"pixel_values": made["pixel_values"][0], "labels": made["labels"][0]}


def load_masked_cache(path: str, allow_leak: bool = False) -> Cache:
    """Open a cache to segment, without the images whose mask is unknown.

    Raises:
        UserError: no masks, a split that is missing or without known masks, a structure that no mask of train shows,
            or a validation split without any.
    """
    cache = load_cache(path)
    if not cache.mask_names:
        raise UserError(f"{path} has no masks; expected some: prepare it with a table that has mask_file_name")
    check_splits(cache, allow_leak)
    # Ask the table itself: decoding every mask would take time.
    masks = {split: images.with_format("arrow")["mask"].to_pylist() for split, images in cache.datasets.items()}
    known = {split: [i for i, mask in enumerate(rows) if mask is not None] for split, rows in masks.items()}
    cache = keep_known(cache, known, "mask")
    shown = cache.manifest["splits"]["train"]["masks"]["images_with"]
    absent = [name for name, count in shown.items() if not count]
    if absent:  # it would count as found wherever it is not, and raise every mean
        raise UserError(f"{path}: no mask of train shows {', '.join(absent)}; expected names of what the masks hold")
    if not any(cache.manifest["splits"]["validation"]["masks"]["images_with"].values()):
        raise UserError(f"{path}: every mask of the validation split is empty, so no epoch can be chosen by it")
    return cache


def load_segmenter(
    arguments: EncoderArguments, cache: Cache, image_size: int | None = None
) -> tuple[MLVICXForSemanticSegmentation, MLVICXImageProcessor]:
    """Load a segmenter for the masks of a cache, and its image processor, with another size of its input if wanted.

    A single structure becomes two classes, background and structure: softmax over two logits is the sigmoid of their
    difference, and pipelines find a name for both.

    Raises:
        UserError: a model of another kind, or whose encoder lacks weights.
    """
    config = load_config(arguments)
    names = cache.mask_names if len(cache.mask_names) > 1 else ("background", *cache.mask_names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.positive_weights = config.decision_thresholds = config.calibration = None
    return load_for_task(MLVICXForSemanticSegmentation, config, arguments, cache.square, image_size)


def decide(logits: Tensor, labels: Tensor) -> Tensor:
    """Class map [B, H, W] of logits [B, K, H, W]: all that is kept of them."""
    return logits.argmax(1)


@dataclass
class Segmented:
    """Pixels of overlap, prediction and truth of the images of a split, [N, L, 3], and the L names."""

    counts: np.ndarray
    names: Sequence[str]

    def scores(self, rows: Any = slice(None)) -> dict[str, Any]:
        """Scores of some of the images."""
        return score_overlap(self.counts[rows], self.names)


class Segmentation(FinetuningTask):
    """Train a segmenter. Masks are compared at the resolution of the model's input."""

    name = "segmentation"
    keeps_norms = False
    data: SegmentationDataArguments
    arguments: SegmentationArguments

    def _load_cache(self) -> Cache:
        return load_masked_cache(self.data.dataset, self.data.allow_leak)

    def _load_model(self) -> tuple[MLVICXForSemanticSegmentation, MLVICXImageProcessor]:
        self.names = list(foreground(self.cache.mask_names))
        self.batches: list[np.ndarray] = []
        with user_input():
            return load_segmenter(self.encoder, self.cache, self.data.image_size)

    def _check_training(self) -> None:
        """Refuse a structure that no chosen mask shows."""
        lacking = {value: name for name, value in foreground(self.cache.mask_names).items()}
        images = self.cache.datasets["train"]
        for row in images.select_columns("mask"):
            lacking = {value: name for value, name in lacking.items() if value not in np.asarray(row["mask"])}
            if not lacking:
                return
        raise UserError(
            f"{self.data.dataset}: no mask of the {len(images)} training images that were chosen shows "
            f"{', '.join(lacking.values())}; expected one at least: a larger label_fraction, or another seed"
        )

    def _images(self, split: str) -> MaskedImages:
        return MaskedImages(self.cache.datasets[split], self.processor, self._augments and split == "train")

    def _prepare(self, training: Split) -> tuple[nn.Module, Callable[[Split], Split]]:
        if self.encoder.freeze_backbone:
            if self.encoder.model == "random":
                self._calibrate()
            self.model.freeze_backbone()
        elif self._freezes_batch_norm:
            self.model.freeze_batch_norm()
        return self.model, lambda images: images

    def _calibrate(self) -> None:
        """Set the batch normalisation statistics of a random encoder from the training images.

        Without it a frozen random encoder shrinks its maps by a factor of 10,000, no decoder can use them, and the
        comparison would say nothing of the weights.
        """
        encoder: nn.Module = self.model.mlvicx
        encoder.to(self.settings.device)
        images = MaskedImages(self.cache.datasets["train"], self.processor)
        loader = DataLoader(images, self.settings.per_device_eval_batch_size)
        update_bn((batch["pixel_values"] for batch in loader), encoder, self.settings.device)

    def _train(self, trained: nn.Module, splits: Mapping[str, Split], patients: Sequence[str] | None) -> Trainer:
        how = (splits, self.settings, self.arguments.patience, self._count, patients)
        return train_with_trainer(trained, *how, preprocess_logits_for_metrics=decide)

    def _count(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Count the pixels of a batch of class maps; after the last one return the scalar scores of the split."""
        found, true = (
            np.asarray(torch.as_tensor(maps).cpu()) for maps in (prediction.predictions, prediction.label_ids)
        )
        ignored = self.model.config.semantic_loss_ignore_index
        self.batches.append(overlap_counts(found, true, len(self.names) + 1, ignored))
        if not compute_result:
            return {}
        self.outcome, self.batches = Segmented(np.concatenate(self.batches), self.names), []
        return {name: value for name, value in self.outcome.scores().items() if isinstance(value, (int, float))}

    def _evaluate(self, trainer: Trainer, images: Split) -> Segmented:
        trainer.evaluate(images, metric_key_prefix="final")
        return self.outcome

    def _results(self, validation: Segmented, test: Segmented) -> dict[str, Any]:
        return {
            "labels": self.names,
            "image_size": self.processor.image_size,
            "empty_mask_convention": EMPTY_MASKS,
            "validation": validation.scores(),
            "test": test.scores(),
            "hyperparameters": {"metric_for_best_model": self.arguments.metric_for_best_model},
        }

    def _write_test(self, folder: Path, test: Segmented) -> None:
        """Write pixels of overlap, prediction and truth of every test image."""
        columns = [f"{kind}:{name}" for name in test.names for kind in ("overlap", "predicted", "true")]
        rows = test.counts.reshape(len(test.counts), -1).tolist()
        write_images(folder / "test_overlaps.csv", self.cache.datasets["test"], columns, rows)


def finetune_segmenter(
    encoder: EncoderArguments, data: SegmentationDataArguments, arguments: SegmentationArguments
) -> dict[str, Any]:
    """Train a segmenter and test it once: see `Segmentation`."""
    return Segmentation(encoder, data, arguments).finetune()
