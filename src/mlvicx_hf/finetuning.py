"""Classification on a prepared cache with the HF Trainer: frozen or fine-tuned, early stopping, one test pass.

The protocol of sections IV-B and IV-C of the paper: one linear layer on the encoder, validation chooses the epoch, and
the test split is looked at once, at the end.
"""

from __future__ import annotations

import csv
import logging
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    EvalPrediction,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed

from .configuration_mlvicx import MLVICXConfig
from .data.cache import Cache, load_cache
from .data.splits import label_fraction
from .hub import check_source
from .image_processing_mlvicx import MLVICXImageProcessor
from .linear_probe import LinearProbe, prepare_probe
from .machine import use_cpu_threads
from .metrics import Accuracy, MultiLabelAUROC
from .modeling_mlvicx import MLVICXForImageClassification
from .progress import progress_bar
from .provenance import code_version, write_json

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")


@dataclass
class ModelArguments:
    """Which network, and what of it is trained."""

    model: str = field(metadata={"help": "Pretrained model (folder or Hub name), or 'random'."})
    architecture: str | None = field(
        default=None, metadata={"help": "With --model random: take configuration and image processor from this model."}
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the linear layer alone."})
    cache_features: bool = field(
        default=True, metadata={"help": "Frozen: encode every image once instead of once an epoch."}
    )
    positive_weights: str = field(
        default="none", metadata={"help": "none, or balanced: negatives over positives of each label in training."}
    )


@dataclass
class DataArguments:
    """Which labelled images."""

    dataset: str = field(metadata={"help": "Cache written by prepare_data.py, with labels and three splits."})
    label_fraction: float = field(
        default=1.0, metadata={"help": "Share of the training patients whose labels are used, stratified and nested."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training images."})


@dataclass
class FinetuningArguments(TrainingArguments):
    """The Trainer's own arguments with this protocol's defaults, and the patience of early stopping."""

    num_train_epochs: float = field(default=100, metadata={"help": "At most this many epochs."})
    patience: int = field(default=10, metadata={"help": "Epochs without a better validation macro AUROC."})
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak of AdamW; by default 1e-3 for a frozen encoder, 1e-4 for fine-tuning."}
    )
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size for training, a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size for evaluation, a device."})
    seed: int = field(default=0, metadata={"help": "Of the head, the order of images and the label fraction."})

    def __post_init__(self) -> None:
        self.eval_strategy = self.save_strategy = self.logging_strategy = "epoch"
        self.load_best_model_at_end = True
        self.metric_for_best_model = "auroc_macro"
        self.greater_is_better = True
        self.save_total_limit = 1
        self.save_only_model = True
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        self.dataloader_pin_memory = torch.cuda.is_available()
        self.disable_tqdm = True  # one line an epoch instead, see EpochProgress
        super().__post_init__()


class EpochProgress(TrainerCallback):
    """A bar over the epochs with the validation score, instead of the Trainer's bar and printed dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = progress_bar(int(args.num_train_epochs), "training", "epoch", show=state.is_world_process_zero)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the score of the epoch that ended."""
        self.bar.set_postfix(validation_auroc=f"{kwargs['metrics']['eval_auroc_macro']:.4f}", refresh=False)
        self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


class LabelledImages(Dataset[dict[str, Tensor]]):
    """Images of one split as model input, with their labels; nothing random.

    Args:
        images: split of a cache.
        processor: of the model.
        exclusive: labels are one class an image: its index instead of the vector.
    """

    def __init__(self, images: Any, processor: MLVICXImageProcessor, exclusive: bool) -> None:
        self.images, self.processor, self.exclusive = images, processor, exclusive

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = self.images[index]
        image: Image.Image = row["image"]
        labels = torch.tensor(row["labels"], dtype=torch.float32)
        pixels: Tensor = self.processor(image)["pixel_values"][0]
        return {"pixel_values": pixels, "labels": labels.argmax() if self.exclusive else labels}


def load_model(arguments: ModelArguments, cache: Cache) -> tuple[MLVICXForImageClassification, MLVICXImageProcessor]:
    """Classifier for the labels of a cache, and its image processor.

    Raises:
        ValueError: a model of another kind, or whose encoder lacks weights.
    """
    names = dict(enumerate(cache.label_names))
    source = arguments.model if arguments.model != "random" else arguments.architecture
    config = MLVICXConfig() if source is None else AutoConfig.from_pretrained(check_source(source))
    if config.model_type != "mlvicx":
        raise ValueError(f"{source} holds a {config.model_type} model; expected one of mlvicx")
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    config.problem_type = "single_label_classification" if cache.exclusive else "multi_label_classification"
    config.positive_weights = None
    if arguments.positive_weights == "balanced" and not cache.exclusive:
        config.positive_weights = balanced_weights(np.array(cache.datasets["train"]["labels"], dtype=np.float64))
    if source is None:
        processor = MLVICXImageProcessor(config.image_size, config.num_channels, fit=cache.manifest["fit"])
    else:
        processor = MLVICXImageProcessor.from_pretrained(source)
    if arguments.model == "random":
        return MLVICXForImageClassification(config), processor
    loaded: Any = MLVICXForImageClassification.from_pretrained(
        arguments.model, config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    lacking = sorted(key for key in report["missing_keys"] if key.startswith("mlvicx."))
    lacking += sorted(str(row[0]) for row in report["mismatched_keys"] if not str(row[0]).startswith("classifier."))
    if lacking:
        raise ValueError(f"{source} does not fit: {len(lacking)} weights of the encoder differ, such as {lacking[0]}")
    return model, processor


def balanced_weights(labels: np.ndarray) -> list[float]:
    """Negatives over positives of each label [N, L], unknown ones (NaN) left out; 1 where either is missing."""
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    return [float(n / p) if n and p else 1.0 for p, n in zip(positives, negatives, strict=True)]


def select_training(cache: Cache, arguments: DataArguments, seed: int) -> None:
    """Leave only the chosen part of the training split in the cache."""
    train = cache.datasets["train"]
    if arguments.label_fraction != 1:
        labels = np.array(train["labels"], dtype=np.float64)
        train = train.select(label_fraction(train["patient_id"], labels, arguments.label_fraction, seed))
    if arguments.max_train_samples is not None:
        if arguments.max_train_samples < 1:
            raise ValueError(f"max_train_samples={arguments.max_train_samples} found; expected 1 or more")
        train = train.select(range(min(arguments.max_train_samples, len(train))))
    cache.datasets["train"] = train


def load_labelled_cache(path: str) -> Cache:
    """A cache that can be fine-tuned on; of exclusive classes only the images whose class is known.

    Raises:
        ValueError: no labels, a split that is missing, or a validation split on which nothing can be scored.
    """
    cache = load_cache(path)
    if not cache.label_names:
        raise ValueError(f"{path} has no labels; expected some: prepare it with --metadata that has label columns")
    absent = [split for split in SPLITS if split not in cache.datasets]
    if absent:
        raise ValueError(f"{path} has the splits {', '.join(cache.datasets)}; expected {', '.join(absent)} as well")
    if cache.exclusive:
        for split, images in cache.datasets.items():
            known = [i for i, labels in enumerate(images["labels"]) if not math.isnan(labels[0])]
            if len(known) < len(images):
                logger.warning("%d images of %s have no class and are left out", len(images) - len(known), split)
                cache.datasets[split] = images.select(known)
            if not known:
                raise ValueError(f"{path}: no image of {split} has a known class")
    labels = np.array(cache.datasets["validation"]["labels"], dtype=np.float64)
    if not any(len(np.unique(column[~np.isnan(column)])) > 1 for column in labels.T):
        raise ValueError(f"{path}: no label has both values in the validation split, so no epoch can be chosen by it")
    return cache


class Scorer:
    """Metrics of a split from logits and labels, for the Trainer and for the results.

    Args:
        label_names: one a column.
        exclusive: labels arrive as class indices.
    """

    def __init__(self, label_names: tuple[str, ...], exclusive: bool) -> None:
        self.names, self.exclusive = list(label_names), exclusive
        self.auroc, self.accuracy = MultiLabelAUROC(), Accuracy()

    def __call__(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """`auroc_macro`, `auroc` by label, `num_scored_labels`, `accuracy`."""
        table = np.eye(len(self.names))[labels.astype(int)] if self.exclusive else labels
        rows = {"predictions": logits.astype(np.float64), "references": table.astype(np.float64)}
        return self.auroc.compute(**rows, label_names=self.names) | self.accuracy.compute(
            **rows, label_names=self.names, exclusive=self.exclusive
        )

    def for_trainer(self, prediction: EvalPrediction) -> dict[str, float]:
        """The scalars alone."""
        scores = self(prediction.predictions, prediction.label_ids)  # type: ignore[arg-type]
        return {k: v for k, v in scores.items() if isinstance(v, (int, float))}


def finetune(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: FinetuningArguments
) -> dict[str, Any]:
    """Train a classifier, restore its best epoch, test it once, and write model and `results.json`.

    Returns:
        The content of `results.json`.

    Raises:
        FileExistsError: an output folder that is not empty.
        ValueError: a cache without labels or splits, or a model that does not fit.
    """
    output = Path(str(arguments.output_dir))
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output_dir={output} holds files of another run; choose another folder")
    if model_arguments.positive_weights not in ("none", "balanced"):
        raise ValueError(f"positive_weights={model_arguments.positive_weights!r} found; expected none or balanced")
    frozen = model_arguments.freeze_backbone
    if arguments.learning_rate is None:
        arguments.learning_rate = 1e-3 if frozen else 1e-4
    if arguments.device.type == "cpu":
        use_cpu_threads()
    cache = load_labelled_cache(data_arguments.dataset)
    select_training(cache, data_arguments, arguments.seed)
    set_seed(arguments.seed)
    model, processor = load_model(model_arguments, cache)
    splits: Mapping[str, Dataset[Any]] = {
        split: LabelledImages(cache.datasets[split], processor, cache.exclusive) for split in SPLITS
    }
    trained: nn.Module = model
    if frozen:
        batch = arguments.per_device_eval_batch_size
        trained, splits = prepare_probe(model, splits, model_arguments.cache_features, batch, arguments.device)
    scorer = Scorer(cache.label_names, cache.exclusive)
    arguments.output_dir = str(output / "trainer")
    trainer = Trainer(
        model=trained,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        compute_metrics=scorer.for_trainer,
        callbacks=[EarlyStoppingCallback(arguments.patience), EpochProgress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    validation, test = (trainer.predict(splits[split]) for split in ("validation", "test"))
    if isinstance(trained, LinearProbe):
        trained.fold()
    results = {
        "task": "classification",
        "protocol": "frozen" if frozen else "finetuned",
        "validation": scorer(validation.predictions, validation.label_ids),  # type: ignore[arg-type]
        "test": scorer(test.predictions, test.label_ids),  # type: ignore[arg-type]
    } | describe(cache, model_arguments, data_arguments, arguments, trainer)
    if trainer.is_world_process_zero():
        model.save_pretrained(output)
        processor.save_pretrained(output)
        write_predictions(output / "test_predictions.csv", cache, test.predictions)  # type: ignore[arg-type]
        write_json(output / "results.json", results)
        shutil.rmtree(arguments.output_dir, ignore_errors=True)
    return results


def describe(
    cache: Cache,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: FinetuningArguments,
    trainer: Trainer,
) -> dict[str, Any]:
    """Which model, split, seed, data and code made a result."""
    counts = {
        split: {"images": len(images), "patients": len(set(images["patient_id"]))}
        for split, images in cache.datasets.items()
    }
    best = trainer.state.best_global_step
    epochs = {int(row["step"]): row["epoch"] for row in trainer.state.log_history if "eval_auroc_macro" in row}
    return {
        "model": model_arguments.model,
        "architecture": model_arguments.architecture,
        "labels": list(cache.label_names),
        "label_fraction": data_arguments.label_fraction,
        "seed": arguments.seed,
        "counts": counts,
        "data": {
            "cache": data_arguments.dataset,
            "collection": cache.manifest["collection"],
            "synthetic": cache.manifest["synthetic"],
            "data_hash": cache.manifest["data_hash"],
            "split_hash": cache.manifest["split_hash"],
        },
        "hyperparameters": {
            "learning_rate": arguments.learning_rate,
            "batch_size": arguments.train_batch_size * arguments.world_size,
            "max_epochs": arguments.num_train_epochs,
            "weight_decay": arguments.weight_decay,
            "patience": arguments.patience,
            "positive_weights": model_arguments.positive_weights,
            "cache_features": model_arguments.freeze_backbone and model_arguments.cache_features,
        },
        "epochs_trained": trainer.state.epoch,
        "best_epoch": epochs.get(best or -1),
        "code": code_version(),
    }


def write_predictions(path: Path, cache: Cache, logits: np.ndarray) -> None:
    """One row a test image: source, patient, and for every label its truth and its probability."""
    scores = torch.from_numpy(np.asarray(logits)).float()
    probabilities = scores.softmax(1) if cache.exclusive else scores.sigmoid()
    test = cache.datasets["test"]
    columns = [f"{kind}:{name}" for kind in ("label", "probability") for name in cache.label_names]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "patient_id", *columns])
        rows = zip(test["source"], test["patient_id"], test["labels"], probabilities.tolist(), strict=True)
        for source, patient, labels, row in rows:
            known = ["" if value != value else int(value) for value in labels]
            writer.writerow([source, patient, *known, *(f"{value:.6f}" for value in row)])


def main() -> None:
    """The command `scripts/finetune_classification.py`."""
    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    parser = HfArgumentParser((ModelArguments, DataArguments, FinetuningArguments), allow_abbrev=False)  # type: ignore[arg-type]
    results = finetune(*parser.parse_args_into_dataclasses())
    test = results["test"]
    for name, value in [("macro", test["auroc_macro"]), *test["auroc"].items()]:
        print(f"test AUROC {name:24s} {value if isinstance(value, str) else f'{value:.4f}'}")
