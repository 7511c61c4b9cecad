# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Arguments of fine-tuning. Imports neither torch nor transformers, so that `--help` is quick."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from mlvicx_hf.common.errors import UserError

EPOCHS_COMPARED = "every epoch is scored on the validation split, and the best one is restored"
INPUTS = "the data sets have just the columns that the models take"
SEGMENTATION_SCORES = ("dice", "dice_positive", "iou", "iou_positive")

# What the protocol asks of the Trainer, and why: flag → (value, reason).
PROTOCOL: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), ("epoch", EPOCHS_COMPARED)),
    "load_best_model_at_end": (True, EPOCHS_COMPARED),
    "greater_is_better": (True, "a higher score is a better one"),
    "save_total_limit": (1, "only the best epoch is needed, and its checkpoint goes at the end"),
    "save_only_model": (True, "only the best epoch is needed, and its checkpoint goes at the end"),
    "remove_unused_columns": (False, INPUTS),
    "label_names": (["labels"], INPUTS),
    "disable_tqdm": (True, "one bar over the epochs is shown instead"),
}


@dataclass
class EncoderArguments:
    """Which network, and what of it is trained."""

    model: str = field(
        metadata={
            "help": "Pretrained model (folder or Hub name), 'random', 'imagenet' (timm's weights, without context "
            "blocks), or a file of timm weights.",
            "first": True,
        }
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "With random or timm's weights: take configuration and image processor from this model."},
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head alone.", "first": True})
    drop_context: bool = field(default=False, metadata={"help": "Leave the pretrained context blocks out."})


@dataclass
class LabelledDataArguments:
    """Which labelled images."""

    dataset: str = field(
        metadata={"help": "Cache written by prepare_data.py, labelled, with three splits.", "first": True}
    )
    label_fraction: float = field(
        default=1.0,
        metadata={
            "help": "Share of the training patients whose labels are used, stratified and nested.",
            "first": True,
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training images."})
    patient_balanced: bool = field(default=False, metadata={"help": "Draw all training patients equally often."})
    allow_leak: bool = field(
        default=False, metadata={"help": "Go on with copies of an image in two splits, and record it."}
    )


@dataclass
class FinetuningArguments:
    """How a head is trained: the arguments of the Trainer that are often needed, and the patience of early stopping.

    Raises:
        UserError: an option of the Trainer that does not exist, or that the protocol fixes.
    """

    protocol: ClassVar[Mapping[str, tuple[Any, str]]] = PROTOCOL

    output_dir: str = field(metadata={"help": "Folder of the results: model, scores, predictions.", "first": True})
    num_train_epochs: float = field(default=100, metadata={"help": "At most this many epochs.", "first": True})
    patience: int = field(default=10, metadata={"help": "Epochs without a better validation score.", "first": True})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Batch size for training, a device.", "first": True}
    )
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size for evaluation, a device."})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak of AdamW; by default 1e-3, and 1e-4 to fine-tune a classifier.", "first": True},
    )
    weight_decay: float = field(default=0.0, metadata={"help": "Of weight matrices; vectors have none."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the rate, by transformers' name."})
    warmup_steps: float = field(default=0, metadata={"help": "Steps of rising rate; below 1 the share of all steps."})
    max_steps: int = field(default=-1, metadata={"help": "Stop after this many steps; overrides num_train_epochs."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Batches that make a step."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Longest gradient; a longer one is shortened."})
    seed: int = field(
        default=0, metadata={"help": "Of the head, the order of images and the label fraction.", "first": True}
    )
    bf16: bool = field(default=False, metadata={"help": "Train in bfloat16 where that is safe.", "first": True})
    fp16: bool = field(default=False, metadata={"help": "Train in float16 where that is safe; GPUs only."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave GPUs alone."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that read images; 0: in this one."})
    report_to: str = field(default="none", metadata={"help": "Tracker: none, tensorboard, wandb, trackio, all."})
    trainer_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Other arguments of transformers.TrainingArguments.", "rest": True}
    )

    def __post_init__(self) -> None:
        for name, (expected, reason) in self.protocol.items():
            found = self.trainer_options.get(name, expected)
            if _word(found) != _word(expected):
                shown = expected if isinstance(expected, str) else repr(expected)
                raise UserError(f"{name}={found!r} found; expected {shown}: {reason}")
        options = {name: value for name, value in self.trainer_options.items() if name not in self.protocol}
        if options:
            self.trainer_options = read_trainer_options(options, own={each.name for each in fields(self)})


def _word(value: Any) -> str:
    """A value as it stands on the command line."""
    return " ".join(map(str, value)).lower() if isinstance(value, list) else str(value).lower()


def read_trainer_options(options: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """Check options of the Trainer, and convert words of the command line to the types that it wants.

    Args:
        options: name → value. A word and a list of words are converted, anything else stays as it is.
        own: names of the fields that `FinetuningArguments` has itself.

    Raises:
        UserError: a name that is no option of the Trainer, or a word that it does not take.
    """
    from transformers import HfArgumentParser, TrainingArguments

    names = {each.name for each in fields(TrainingArguments)} - own
    for name in options:
        if name not in names:
            close = difflib.get_close_matches(name, names | own) or ["a flag of --help or of TrainingArguments"]
            raise UserError(f"{name} found, which does not exist; did you mean {', '.join(close)}?")
    given = {name: [value] if isinstance(value, str) else value for name, value in options.items()}
    words = [w for name, value in given.items() if isinstance(value, list) for w in (f"--{name}", *map(str, value))]
    try:
        parsed = vars(HfArgumentParser(TrainingArguments, exit_on_error=False).parse_args(words))  # type: ignore[arg-type]  # one class will do
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    return {name: parsed[name] if isinstance(value, list) else value for name, value in given.items()}


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

    protocol: ClassVar[Mapping[str, tuple[Any, str]]] = PROTOCOL | {
        "metric_for_best_model": ("auroc_macro", "the mean AUROC of the validation split chooses the epoch"),
        "batch_eval_metrics": (False, "an AUROC needs the scores of all images"),
    }


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

    protocol: ClassVar[Mapping[str, tuple[Any, str]]] = PROTOCOL | {
        "batch_eval_metrics": (True, "the masks of a whole split would not fit into memory")
    }

    metric_for_best_model: str = field(
        default="dice",
        metadata={"help": "Validation score that chooses the epoch.", "choices": list(SEGMENTATION_SCORES)},
    )

    def __post_init__(self) -> None:
        if self.metric_for_best_model not in SEGMENTATION_SCORES:
            raise UserError(
                f"metric_for_best_model={self.metric_for_best_model!r} found; "
                f"expected one of {', '.join(SEGMENTATION_SCORES)}"
            )
        super().__post_init__()


CLASSIFICATION_SECTIONS = (ClassifierArguments, LabelledDataArguments, ClassificationArguments)
SEGMENTATION_SECTIONS = (EncoderArguments, SegmentationDataArguments, SegmentationArguments)
