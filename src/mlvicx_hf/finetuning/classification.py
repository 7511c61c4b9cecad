"""Classification on a prepared cache: a linear layer on the encoder, frozen or fine-tuned (section IV-B)."""

from __future__ import annotations

import csv
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.special import expit, softmax
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer
from transformers.trainer_utils import set_seed

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_file, write_json
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.split_files import SPLIT_FILE
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification
from mlvicx_hf.scoring.metrics import score_accuracy, score_decisions, score_labels, score_precision, youden_thresholds

from .linear_probe import FeatureStore, LinearProbe, ProbeTrainer, prepare_probe
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


@dataclass
class ClassifierArguments(EncoderArguments):
    """Which classifier, and what of it is trained."""

    pooled_levels: str | None = field(
        default=None,
        metadata={
            "help": "Features of the last level or of all; by default as the model's.",
            "choices": ["last", "all"],
        },
    )
    cache_features: bool = field(
        default=True, metadata={"help": "Frozen: encode every image once instead of once an epoch."}
    )
    fast_probe: bool = field(
        default=False, metadata={"help": "Frozen, with cache_features: a plain loop in place of the Trainer."}
    )
    positive_weights: str = field(
        default="none", metadata={"help": "none, or balanced: negatives over positives of each label in training."}
    )


@dataclass
class ClassificationArguments(FinetuningArguments):
    """How a classifier is trained."""

    learning_rate: float | None = field(  # type: ignore[assignment]  # None is ours: by protocol
        default=None, metadata={"help": "Peak of AdamW; by default 1e-3 for a frozen encoder, 1e-4 for fine-tuning."}
    )

    def __post_init__(self) -> None:
        if self.metric_for_best_model not in (None, "auroc_macro"):
            raise UserError(f"metric_for_best_model={self.metric_for_best_model!r} found; expected auroc_macro")
        self.metric_for_best_model = "auroc_macro"
        super().__post_init__()


SECTIONS = (ClassifierArguments, LabelledDataArguments, ClassificationArguments)  # of the command line


class LabelledImages(Dataset[dict[str, Tensor]]):
    """Images of one split as model input, with their labels; nothing random.

    Args:
        images: split of a cache.
        processor: of the model.
        exclusive: labels are one class an image: its index instead of the vector.
        digest: of the cache.
    """

    def __init__(self, images: Any, processor: MLVICXImageProcessor, exclusive: bool, digest: str = "") -> None:
        self.images, self.processor, self.exclusive, self.digest = images, processor, exclusive, digest
        self.names: list[str] = images["source"][:]
        self.key = f"{digest} {processor.to_json_string()}"

    @property
    def labels(self) -> Tensor:
        """[N, L], or class indices [N]."""
        labels = torch.tensor(self.images["labels"][:], dtype=torch.float32)
        return labels.argmax(1) if self.exclusive else labels

    def rows(self, indices: Sequence[int]) -> LabelledImages:
        """Some of the images."""
        return LabelledImages(self.images.select(indices), self.processor, self.exclusive, self.digest)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.images[index]
        image: Image.Image = row["image"]
        labels = torch.tensor(row["labels"], dtype=torch.float32)
        pixels: Tensor = self.processor(image)["pixel_values"][0]
        return {"pixel_values": pixels, "labels": labels.argmax() if self.exclusive else labels}


def load_classifier(
    arguments: ClassifierArguments, cache: Cache
) -> tuple[MLVICXForImageClassification, MLVICXImageProcessor]:
    """Classifier for the labels of a cache, and its image processor.

    Raises:
        ValueError: a model of another kind, or whose encoder lacks weights.
    """
    config = load_config(arguments)
    names = dict(enumerate(cache.label_names))
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    config.problem_type = "single_label_classification" if cache.exclusive else "multi_label_classification"
    config.positive_weights = config.decision_thresholds = None
    config.pooled_levels = arguments.pooled_levels or config.pooled_levels
    if arguments.positive_weights == "balanced" and not cache.exclusive:
        config.positive_weights = balanced_weights(np.array(cache.datasets["train"]["labels"], dtype=np.float64))
    return load_for_task(MLVICXForImageClassification, config, arguments, cache.manifest["fit"])


def balanced_weights(labels: np.ndarray) -> list[float]:
    """Negatives over positives of each label [N, L], unknown ones (NaN) left out; 1 where either is missing."""
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    return [float(n / p) if n and p else 1.0 for p, n in zip(positives, negatives, strict=True)]


def load_labelled_cache(path: str, allow_leak: bool = False) -> Cache:
    """A cache that can be fine-tuned on; of exclusive classes only the images whose class is known.

    Raises:
        ValueError: no labels, a split that is missing, or a validation split on which nothing can be scored.
    """
    cache = load_cache(path)
    if not cache.label_names:
        raise UserError(f"{path} has no labels; expected some: prepare it with --metadata that has label columns")
    check_splits(cache, allow_leak)
    if cache.exclusive:
        for split, images in cache.datasets.items():
            known = [i for i, labels in enumerate(images["labels"]) if not math.isnan(labels[0])]
            if len(known) < len(images):
                logger.warning("%d images of %s have no class and are left out", len(images) - len(known), split)
                cache.datasets[split] = images.select(known)
            if not known:
                raise UserError(f"{path}: no image of {split} has a known class")
    labels = np.array(cache.datasets["validation"]["labels"], dtype=np.float64)
    if not any(len(np.unique(column[~np.isnan(column)])) > 1 for column in labels.T):
        raise UserError(
            f"{path}: no label has both values in the validation split, so no epoch can be chosen by it; "
            "expected more images (--max_images of prepare_data.py?), or another --seed there"
        )
    return cache


class Scorer:
    """Metrics of a split from logits and labels, for the Trainer and for the results.

    Args:
        label_names: one a column.
        exclusive: labels arrive as class indices.
    """

    def __init__(self, label_names: tuple[str, ...], exclusive: bool) -> None:
        self.names, self.exclusive = list(label_names), exclusive

    def __call__(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """`auroc_macro`, `auroc` by label, `num_scored_labels`, `auprc_macro`, `auprc` by label, `accuracy`.

        Exclusive classes are scored one against the rest by their probability, as `write_predictions` writes it.
        """
        table = np.eye(len(self.names))[labels.astype(int)] if self.exclusive else labels
        scores = softmax(logits.astype(np.float64), axis=1) if self.exclusive else logits.astype(np.float64)
        references = table.astype(np.float64)
        # What the classes of `metrics` compute, without the tables that `evaluate` writes: this runs every epoch.
        return (
            score_labels(scores, references, self.names)
            | score_precision(scores, references, self.names)
            | score_accuracy(scores, references, self.exclusive)
        )

    def for_trainer(self, prediction: EvalPrediction) -> dict[str, float]:
        """The scalars alone."""
        scores = self(prediction.predictions, prediction.label_ids)  # type: ignore[arg-type]  # arrays, here
        return {k: v for k, v in scores.items() if isinstance(v, (int, float))}


def choose_thresholds(cache: Cache, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any] | None:
    """Decision thresholds from the validation split, as they are saved with the model; None for exclusive classes."""
    if cache.exclusive:
        return None
    probabilities = torch.from_numpy(np.asarray(logits)).double().sigmoid().numpy()
    return {
        "values": youden_thresholds(probabilities, labels, cache.label_names),
        "criterion": "youden",
        "split": "validation",
        "split_hash": cache.manifest["split_hash"],
        "data_hash": cache.manifest["data_hash"],
    }


def finetune(
    model_arguments: ClassifierArguments,
    data_arguments: LabelledDataArguments,
    arguments: ClassificationArguments,
    store: FeatureStore | None = None,
) -> dict[str, Any]:
    """Train a classifier, restore its best epoch, test it once, and write model and `results.json`.

    Args:
        model_arguments: which model, and what of it is trained.
        data_arguments: on which images.
        arguments: how.
        store: features of a frozen encoder that several runs share.

    Returns:
        The content of `results.json`.

    Raises:
        FileExistsError: an output folder that is not empty.
        ValueError: a cache without labels or splits, or a model that does not fit.
    """
    output = start_run(arguments)
    if model_arguments.positive_weights not in ("none", "balanced"):
        raise UserError(f"positive_weights={model_arguments.positive_weights!r} found; expected none or balanced")
    frozen = model_arguments.freeze_backbone
    if model_arguments.fast_probe and not (frozen and model_arguments.cache_features):
        raise UserError("fast_probe found for a classifier that is not frozen; expected freeze_backbone as well")
    if arguments.learning_rate is None:
        arguments.learning_rate = 1e-3 if frozen else 1e-4
    cache = load_labelled_cache(data_arguments.dataset, data_arguments.allow_leak)
    select_training(cache, data_arguments, arguments.seed)
    set_seed(arguments.seed)
    model, processor = load_classifier(model_arguments, cache)
    splits: Mapping[str, Dataset[Any]] = {
        split: LabelledImages(cache.datasets[split], processor, cache.exclusive, cache.digest) for split in SPLITS
    }
    trained: nn.Module = model
    prepare: Callable[[Dataset[Any]], Dataset[Any]] = _unchanged
    if frozen:
        batch = arguments.per_device_eval_batch_size
        trained, prepare = prepare_probe(
            model, splits["train"], model_arguments.cache_features, batch, arguments.device, store
        )
    chosen_on = {split: prepare(splits[split]) for split in ("train", "validation")}
    scorer = Scorer(cache.label_names, cache.exclusive)
    arguments.output_dir = str(output / "trainer")
    patients = cache.datasets["train"]["patient_id"][:] if data_arguments.patient_balanced else None
    trainer: Trainer | ProbeTrainer
    if model_arguments.fast_probe and isinstance(trained, LinearProbe):
        trainer = ProbeTrainer(trained, chosen_on, arguments, scorer.for_trainer, patients)
        trainer.train()
    else:
        trainer = train(trained, chosen_on, arguments, scorer.for_trainer, patients)
    chosen, chosen_labels = _predict(trainer, chosen_on["validation"])
    thresholds = choose_thresholds(cache, chosen, chosen_labels)
    model.config.decision_thresholds = thresholds
    # Everything is chosen. Only now is the test split looked at, once.
    logits, labels = _predict(trainer, prepare(splits["test"]))
    if isinstance(trained, LinearProbe):
        trained.fold()
    test = scorer(logits, labels)
    if thresholds is not None:
        probabilities = expit(logits.astype(np.float64))
        test["decisions"] = score_decisions(probabilities, labels, thresholds["values"])
    groups = score_subgroups(cache.datasets["test"], lambda rows: scorer(logits[rows], labels[rows]))
    results = {
        "task": "classification",
        "labels": list(cache.label_names),
        "validation": scorer(chosen, chosen_labels),
        "test": test | {"subgroups": groups},
        "thresholds": thresholds,
    } | describe(cache, model_arguments, data_arguments, arguments, trainer.state)
    results["hyperparameters"] |= {
        "positive_weights": model_arguments.positive_weights,
        "cache_features": frozen and model_arguments.cache_features,
        "fast_probe": model_arguments.fast_probe,
        "pooled_levels": model.config.pooled_levels,
    }
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
        processor.save_pretrained(output)
        write_predictions(output / "test_predictions.csv", cache, logits)
        (output / SPLIT_FILE).write_text(used_images(cache), encoding="utf-8")
        write_json(output / "results.json", results)
        shutil.rmtree(arguments.output_dir, ignore_errors=True)
    return results


def _unchanged(images: Dataset[Any]) -> Dataset[Any]:
    return images


def _predict(trainer: Trainer | ProbeTrainer, images: Dataset[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a split."""
    done = trainer.predict(images)
    return np.asarray(done.predictions), np.asarray(done.label_ids)


def write_predictions(path: Path, cache: Cache, logits: np.ndarray) -> None:
    """One row a test image: source, patient, view, sex, age band, and of every label its truth and its probability."""
    scores = torch.from_numpy(np.asarray(logits)).double()
    probabilities = scores.softmax(1) if cache.exclusive else scores.sigmoid()
    test = cache.datasets["test"]
    columns = [f"{kind}:{name}" for kind in ("label", "probability") for name in cache.label_names]
    groups = subgroups(test)
    with new_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "patient_id", *groups, *columns])
        about = zip(test["source"], test["patient_id"], *groups.values(), strict=True)
        for facts, labels, row in zip(about, test["labels"], probabilities.tolist(), strict=True):
            known = ["" if value != value else int(value) for value in labels]
            writer.writerow([*facts, *known, *(f"{value:.10g}" for value in row)])


def main() -> None:
    """The command `scripts/finetune_classification.py`."""
    model, data, arguments = parse_arguments("classification", SECTIONS)
    results = finetune(model, data, arguments)
    if arguments.process_index != 0:
        return
    test = results["test"]
    for name, value in [("macro", test["auroc_macro"]), *test["auroc"].items()]:
        print(f"test AUROC {name:24s} {value if isinstance(value, str) else f'{value:.4f}'}")
