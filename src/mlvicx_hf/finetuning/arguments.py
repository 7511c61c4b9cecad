"""Arguments of fine-tuning. Imports neither torch nor transformers, so that `--help` is quick."""

# ruff: noqa: RUF009 - `option` makes a field

import argparse
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from mlvicx_hf.common.arguments import option
from mlvicx_hf.common.errors import UserError

SEGMENTATION_SCORES = ("dice", "dice_positive", "iou", "iou_positive")

_EPOCHS = "every epoch is scored on the validation split, and the best one is restored"
_BEST = "only the best epoch is kept, until the run ends"
_INPUTS = "the data sets give just what the models take"
_WHOLE = "every image is scored"

# What the protocol asks of the Trainer: argument → (value, reason).
PROTOCOL: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("eval_strategy", "save_strategy", "logging_strategy"), ("epoch", _EPOCHS)),
    "load_best_model_at_end": (True, _EPOCHS),
    "greater_is_better": (True, "a higher score is a better one"),
    "save_total_limit": (1, _BEST),
    "save_only_model": (True, _BEST),
    "remove_unused_columns": (False, _INPUTS),
    "label_names": (["labels"], _INPUTS),
    "disable_tqdm": (True, "one bar over the epochs is shown instead"),
    "dataloader_drop_last": (False, _WHOLE),
    "prediction_loss_only": (False, _WHOLE),
    "label_smoothing_factor": (0.0, "the loss is that of the model"),
    **dict.fromkeys(("fp16_full_eval", "bf16_full_eval"), (False, "scores are those of the weights that are saved")),
    "eval_delay": (0, _EPOCHS),
    "eval_do_concat_batches": (True, _WHOLE),
    "train_sampling_strategy": ("random", "every epoch has an order of its own"),  # not in all versions
    "group_by_length": (False, "all images have one size"),  # in earlier versions
    "resume_from_checkpoint": (None, "an interrupted run starts anew"),
}


@dataclass
class EncoderArguments:
    """Which network, and what of it is trained."""

    model: str = option(
        "Pretrained model (folder or Hub name), 'random', 'imagenet' (timm's weights, without context blocks), a file "
        "of timm weights, or for classify an encoder of another library: timm:NAME, hub:NAME, xrv:NAME, "
        "callable:MODULE:FUNCTION.",
        first=True,
        metavar="MODEL",
    )
    architecture: str | None = option(
        "With random or timm's weights: take configuration and image processor from this model.", None, metavar="MODEL"
    )
    freeze_backbone: bool = option("Train the head alone.", False, first=True)
    drop_context: bool = option("Leave the pretrained context blocks out.", False)
    freeze_batch_norm: bool | None = option(
        "Not frozen: keep statistics, scales and shifts of the encoder's batch normalisation; by default for classify, "
        "but not for random weights.",
        None,
    )


@dataclass
class LabelledDataArguments:
    """Which labelled images."""

    dataset: str = option(
        "Cache written by `mlvicx prepare`, with labels (segment: masks) and three splits.", first=True, metavar="CACHE"
    )
    label_fraction: float = option(
        "Share of the training patients whose labels are used, stratified and nested.", 1.0, first=True
    )
    max_train_samples: int | None = option("Use only the first training images.", None, least=1)
    patient_balanced: bool = option("Draw all training patients equally often.", False)
    augment: bool | None = option(
        "Flip, rotate, shift and scale training images, and masks with them; by default, but not for classify with "
        "--freeze_backbone.",
        None,
    )
    allow_leak: bool = option("Go on with copies of an image in two splits, and record it.", False)


@dataclass
class FinetuningArguments:
    """How a head is trained: the arguments of transformers' Trainer that are often needed, and early stopping.

    Raises:
        UserError: an argument of the Trainer that does not exist, or that the protocol fixes.
    """

    protocol: ClassVar[Mapping[str, tuple[Any, str]]] = PROTOCOL

    output_dir: str = option("Folder of the results: model, scores, predictions.", first=True, metavar="DIR")
    num_train_epochs: float = option("At most this many epochs.", 100, first=True, above=0)
    patience: int = option("Stop after this many epochs without a better validation score.", 10, first=True, least=1)
    per_device_train_batch_size: int = option("Images of a training step, a device.", 64, first=True, least=1)
    per_device_eval_batch_size: int = option("Images of an evaluation step, a device.", 64, least=1)
    learning_rate: float | None = option(
        "Peak of AdamW; by default 1e-3, and 3e-4 for classify without --freeze_backbone.", None, first=True, above=0
    )
    weight_decay: float = option("Of weight matrices; vectors have none.", 0.0, least=0)
    lr_scheduler_type: str = option("Schedule of the rate, by transformers' name.", "linear")
    warmup_steps: float = option("Steps of rising rate; below 1 the share of all steps.", 0)
    max_steps: int = option("Stop after this many steps; -1 leaves it to the epochs.", -1)
    gradient_accumulation_steps: int = option("Batches that make one step.", 1, least=1)
    max_grad_norm: float = option("Shorten gradients that are longer.", 1.0)
    seed: int = option(
        "Of the head, the order of images and the label fraction.", 0, first=True, least=0, most=2**32 - 1
    )
    bf16: bool = option("Train in bfloat16 where that is safe.", False)
    fp16: bool = option("Train in float16 where that is safe; GPUs only.", False)
    use_cpu: bool = option("Leave GPUs alone.", False)
    dataloader_num_workers: int = option("Processes that read images; 0 reads them in this one.", 0, least=0)
    report_to: str = option("Tracker: none, tensorboard, wandb, trackio, all.", "none")
    trainer_options: dict[str, Any] = option("Other arguments of transformers.TrainingArguments.", {}, rest=True)

    def __post_init__(self) -> None:
        if self.max_steps < 1 and self.max_steps != -1:
            raise UserError(
                f"max_steps={self.max_steps} found; expected 1 or more, or -1 for as many as the epochs have"
            )
        for name, (expected, reason) in self.protocol.items():
            found = self.trainer_options.get(name, expected)
            if _word(found) != _word(expected):
                raise UserError(f"{name}={found!r} found; expected {_word(expected)}: {reason}")
        options = {name: value for name, value in self.trainer_options.items() if name not in self.protocol}
        if options:
            self.trainer_options = read_trainer_options(options, own={each.name for each in fields(self)})


def _word(value: Any) -> str:
    """A value as it stands on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).lower()


def read_trainer_options(options: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    """Check arguments of the Trainer, and convert words of the command line to their types.

    Args:
        options: name → value. A word and a list of words are converted, anything else stays as it is.
        own: names of the fields that `FinetuningArguments` has itself.

    Raises:
        UserError: a name that is no argument of the Trainer, or a word that it does not take.
    """
    from transformers import HfArgumentParser, TrainingArguments

    names = {each.name for each in fields(TrainingArguments)} - own
    for name in options:
        if name not in names:
            close = sorted(each for each in names | own if each.endswith(f"_{name}"))
            close = close or difflib.get_close_matches(name, names | own)
            close = close or ["a flag of --help or of TrainingArguments"]
            raise UserError(f"{name} found, which does not exist; did you mean {', '.join(close)}?")
    for name, value in options.items():
        if not isinstance(value, (str, int, float, list, dict, type(None))):
            raise UserError(f"{name}={value!r} found; expected text, a number, true, false, a list or a mapping")
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

    image_size: int | None = option("Side of the input in pixels; by default the model's.", None)
    pooled_levels: str | None = option(
        "Features of the last level or of all; by default as the model's.", None, choices=("last", "all")
    )
    cache_features: bool = option("Frozen: encode every image once instead of once an epoch.", True)
    fast_probe: bool = option("Frozen, with cache_features: a plain loop in place of the Trainer.", False)
    positive_weights: str = option(
        "Weight of positives in the loss; balanced: negatives over positives of each label in training.",
        "none",
        choices=("none", "balanced"),
    )
    band_level: float = option(
        "Answers absent, present, unsure: at least this share of the positives is not called absent, and of the "
        "negatives not called present. Between 0.5 and 1.",
        0.9,
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

    image_size: int | None = option("Side of the input in pixels; by default the model's.", None)


@dataclass
class SegmentationArguments(FinetuningArguments):
    """How a segmenter is trained."""

    protocol: ClassVar[Mapping[str, tuple[Any, str]]] = PROTOCOL | {
        "batch_eval_metrics": (True, "the masks of a whole split would not fit into memory")
    }

    metric_for_best_model: str = option("Validation score that chooses the epoch.", "dice", choices=SEGMENTATION_SCORES)


CLASSIFICATION_SECTIONS = (ClassifierArguments, LabelledDataArguments, ClassificationArguments)
SEGMENTATION_SECTIONS = (EncoderArguments, SegmentationDataArguments, SegmentationArguments)
