"""Segmentation on a prepared cache with masks: a U-Net decoder on the encoder, frozen or fine-tuned (section IV-B)."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from transformers import EvalPrediction
from transformers.trainer_utils import set_seed

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_file, write_json
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.masks import foreground
from mlvicx_hf.data.split_files import SPLIT_FILE
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForSemanticSegmentation
from mlvicx_hf.scoring.metrics import EMPTY_MASKS, overlap_counts, score_overlap

from .training import (
    SPLITS,
    EncoderArguments,
    FinetuningArguments,
    LabelledDataArguments,
    check_splits,
    describe,
    load_config,
    load_for_task,
    parse_arguments,
    score_subgroups,
    select_training,
    start_run,
    subgroups,
    train,
    used_images,
)

logger = logging.getLogger(__name__)

SCORES = ("dice", "dice_positive", "iou", "iou_positive")


@dataclass
class SegmentationDataArguments(LabelledDataArguments):
    """Which images and masks."""

    image_size: int | None = field(
        default=None, metadata={"help": "Side of the input in pixels; by default the model's."}
    )
    augment: bool = field(
        default=True, metadata={"help": "Flip, rotate, shift and scale training images and masks together."}
    )


@dataclass
class SegmentationArguments(FinetuningArguments):
    """How a segmenter is trained."""

    learning_rate: float = field(default=1e-3, metadata={"help": "Peak of AdamW."})

    metric_for_best_model: str = field(
        default="dice",
        metadata={"help": f"Validation score that chooses the epoch, of {', '.join(SCORES)}."},
    )

    def __post_init__(self) -> None:
        if self.metric_for_best_model not in SCORES:
            raise UserError(
                f"metric_for_best_model={self.metric_for_best_model!r} found; expected one of {', '.join(SCORES)}"
            )
        self.batch_eval_metrics = True  # masks of a whole split would not fit into memory
        super().__post_init__()


SECTIONS = (EncoderArguments, SegmentationDataArguments, SegmentationArguments)  # of the command line


class MaskedImages(Dataset[dict[str, Tensor]]):
    """Images of one split as model input, with masks through the same geometry.

    Args:
        images: split of a cache, every mask known.
        processor: of the model.
        augment: flip (half of the images), rotate (±10°), shift (5 %) and scale (10 %) at random.
    """

    def __init__(self, images: Any, processor: MLVICXImageProcessor, augment: bool = False) -> None:
        self.images, self.processor = images, processor
        geometry = [
            v2.RandomHorizontalFlip(),
            v2.RandomAffine(10, translate=(0.05, 0.05), scale=(0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
        ]
        self.transform = v2.Compose(geometry) if augment else None

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
    """A cache to segment, without the images whose mask is unknown.

    Raises:
        ValueError: no masks, a split that is missing or without known masks, a structure that no mask of train shows,
            or a validation split without any.
    """
    cache = load_cache(path)
    if not cache.mask_names:
        raise UserError(f"{path} has no masks; expected some: prepare it with a table that has mask_file_name")
    check_splits(cache, allow_leak)
    for split, images in cache.datasets.items():
        # Asked of the table itself: decoding every mask would take its time.
        known = np.flatnonzero([mask is not None for mask in images.with_format("arrow")["mask"].to_pylist()])
        if not len(known):
            raise UserError(f"{path}: no image of {split} has a known mask")
        if len(known) < len(images):
            logger.warning("%d images of %s have no known mask and are left out", len(images) - len(known), split)
            cache.datasets[split] = images.select(known)
    shown = cache.manifest["splits"]["train"]["masks"]["images_with"]
    absent = [name for name, count in shown.items() if not count]
    if absent:  # it would count as found wherever it is not, and raise every mean
        raise UserError(f"{path}: no mask of train shows {', '.join(absent)}; expected names of what the masks hold")
    if not any(cache.manifest["splits"]["validation"]["masks"]["images_with"].values()):
        raise UserError(f"{path}: every mask of the validation split is empty, so no epoch can be chosen by it")
    return cache


def load_segmenter(
    arguments: EncoderArguments, cache: Cache
) -> tuple[MLVICXForSemanticSegmentation, MLVICXImageProcessor]:
    """Segmenter for the masks of a cache, and its image processor.

    A single structure becomes two classes, background and structure: softmax over two logits is the sigmoid of their
    difference, and pipelines find a name for both.

    Raises:
        ValueError: a model of another kind, or whose encoder lacks weights.
    """
    config = load_config(arguments)
    names = cache.mask_names if len(cache.mask_names) > 1 else ("background", *cache.mask_names)
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    config.positive_weights = config.decision_thresholds = None
    return load_for_task(MLVICXForSemanticSegmentation, config, arguments, cache.manifest["fit"])


def calibrate(
    model: MLVICXForSemanticSegmentation, images: Any, processor: MLVICXImageProcessor, arguments: SegmentationArguments
) -> None:
    """Set the batch normalisation statistics of a random encoder from the training images.

    Without it a frozen random encoder shrinks its maps by a factor of 10,000, no decoder can use them, and the
    comparison would say nothing of the weights.
    """
    encoder: nn.Module = model.mlvicx
    encoder.to(arguments.device)
    loader = DataLoader(MaskedImages(images, processor), arguments.per_device_eval_batch_size)
    update_bn((batch["pixel_values"] for batch in loader), encoder, arguments.device)


class OverlapScorer:
    """Overlap with the true masks, image by image: what the Trainer calls after every batch.

    Args:
        names: of the classes behind the background.
        ignore_index: value of pixels that do not count.
    """

    def __init__(self, names: Sequence[str], ignore_index: int) -> None:
        self.names, self.ignore_index = list(names), ignore_index
        self.batches: list[np.ndarray] = []
        self.counts = np.zeros((0, len(self.names), 3), dtype=np.int64)  # of the last split that was finished

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        """Count a batch of class maps; after the last one the scalar scores of the split."""
        classes, truth = (
            np.asarray(torch.as_tensor(maps).cpu()) for maps in (prediction.predictions, prediction.label_ids)
        )
        self.batches.append(overlap_counts(classes, truth, len(self.names) + 1, self.ignore_index))
        if not compute_result:
            return {}
        self.counts, self.batches = np.concatenate(self.batches), []
        return {k: v for k, v in self.scores().items() if isinstance(v, (int, float))}

    def scores(self, rows: np.ndarray | slice = slice(None)) -> dict[str, Any]:
        """Scores of some images of the last split."""
        return score_overlap(self.counts[rows], self.names)


def decide(logits: Tensor, labels: Tensor) -> Tensor:
    """Class map [B, H, W] of logits [B, K, H, W]: all that is kept of them."""
    return logits.argmax(1)


def finetune(
    model_arguments: EncoderArguments, data_arguments: SegmentationDataArguments, arguments: SegmentationArguments
) -> dict[str, Any]:
    """Train a segmenter, restore its best epoch, test it once, and write model and `results.json`.

    Masks are compared at the resolution of the model's input.

    Returns:
        The content of `results.json`.

    Raises:
        FileExistsError: an output folder that is not empty.
        ValueError: a cache without masks or splits, or a model that does not fit.
    """
    output = start_run(arguments)
    cache = load_masked_cache(data_arguments.dataset, data_arguments.allow_leak)
    select_training(cache, data_arguments, arguments.seed)
    set_seed(arguments.seed)
    model, processor = load_segmenter(model_arguments, cache)
    if data_arguments.image_size is not None:
        processor.image_size = model.config.image_size = data_arguments.image_size
    splits = {
        split: MaskedImages(cache.datasets[split], processor, data_arguments.augment and split == "train")
        for split in SPLITS
    }
    if model_arguments.freeze_backbone:
        if model_arguments.model == "random":
            calibrate(model, cache.datasets["train"], processor, arguments)
        model.freeze_backbone()
    names = list(foreground(cache.mask_names))
    scorer = OverlapScorer(names, model.config.semantic_loss_ignore_index)
    arguments.output_dir = str(output / "trainer")
    patients = cache.datasets["train"]["patient_id"][:] if data_arguments.patient_balanced else None
    trainer = train(model, splits, arguments, scorer, patients, preprocess_logits_for_metrics=decide)
    scores: dict[str, dict[str, Any]] = {}
    for split in ("validation", "test"):
        trainer.evaluate(splits[split], metric_key_prefix=split)
        scores[split] = scorer.scores()
    scores["test"] |= {"subgroups": score_subgroups(cache.datasets["test"], scorer.scores)}
    results: dict[str, Any] = {
        "task": "segmentation",
        "labels": names,
        "image_size": processor.image_size,
        "empty_mask_convention": EMPTY_MASKS,
        **scores,
    } | describe(cache, model_arguments, data_arguments, arguments, trainer.state)
    results["hyperparameters"] |= {
        "augment": data_arguments.augment,
        "metric_for_best_model": arguments.metric_for_best_model,
    }
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
        processor.save_pretrained(output)
        write_overlaps(output / "test_overlaps.csv", cache, scorer)
        (output / SPLIT_FILE).write_text(used_images(cache), encoding="utf-8")
        write_json(output / "results.json", results)
        shutil.rmtree(arguments.output_dir, ignore_errors=True)
    return results


def write_overlaps(path: Path, cache: Cache, scorer: OverlapScorer) -> None:
    """One row a test image: source, patient, view, sex, age band, and pixels of overlap, prediction and truth."""
    test = cache.datasets["test"]
    columns = [f"{kind}:{name}" for name in scorer.names for kind in ("overlap", "predicted", "true")]
    with new_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        groups = subgroups(test)
        writer.writerow(["source", "patient_id", *groups, *columns])
        for *facts, row in zip(test["source"], test["patient_id"], *groups.values(), scorer.counts, strict=True):
            writer.writerow([*facts, *row.flatten().tolist()])


def main() -> None:
    """The command `scripts/finetune_segmentation.py`."""
    model, data, arguments = parse_arguments("segmentation", SECTIONS)
    results = finetune(model, data, arguments)
    if arguments.process_index != 0:
        return
    test = results["test"]
    for name, scores in [("macro", test), *test["per_label"].items()]:
        listed = ", ".join(
            f"{key} {value if isinstance(value, str) else f'{value:.4f}'}"
            for key, value in scores.items()
            if key in SCORES
        )
        print(f"test {name}: {listed}")
