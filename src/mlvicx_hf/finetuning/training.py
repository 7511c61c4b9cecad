"""Fine-tuning with the HF Trainer, what both heads share: frozen or not, early stopping, one test pass, results.

The protocol of sections IV-B and IV-C of the paper: a head on the encoder, validation chooses the epoch, and the test
split is looked at once, at the end. `classification` and `segmentation` are the two tasks.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoConfig,
    EarlyStoppingCallback,
    HfArgumentParser,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.machine import describe_hardware, keep_freed_memory, use_cpu_threads
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.common.text import some
from mlvicx_hf.data.cache.cache import Cache
from mlvicx_hf.data.reading.sampling import PatientBalancedSampler
from mlvicx_hf.data.split_files import split_file
from mlvicx_hf.data.splits import label_fraction
from mlvicx_hf.encoders.loading import check_source
from mlvicx_hf.encoders.weights import is_timm_source, load_timm_weights
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXPreTrainedModel
from mlvicx_hf.recipes import load_recipe, recipe_names

logger = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
AGE_BANDS = ("0-17", "18-39", "40-64", "65+")
AGE_LIMITS = (18, 40, 65)  # years at which the next band begins


@dataclass
class EncoderArguments:
    """Which network, and what of it is trained."""

    model: str = field(
        metadata={
            "help": "Pretrained model (folder or Hub name), 'random', 'imagenet' (timm's weights, without context "
            "blocks), or a file of timm weights."
        }
    )
    architecture: str | None = field(
        default=None,
        metadata={"help": "With random or timm's weights: take configuration and image processor from this model."},
    )
    freeze_backbone: bool = field(default=False, metadata={"help": "Train the head alone."})
    drop_context: bool = field(default=False, metadata={"help": "Leave the pretrained context blocks out."})


@dataclass
class LabelledDataArguments:
    """Which labelled images."""

    dataset: str = field(metadata={"help": "Cache written by prepare_data.py, labelled, with three splits."})
    label_fraction: float = field(
        default=1.0, metadata={"help": "Share of the training patients whose labels are used, stratified and nested."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first training images."})
    patient_balanced: bool = field(default=False, metadata={"help": "Draw all training patients equally often."})
    allow_leak: bool = field(
        default=False, metadata={"help": "Go on with copies of an image in two splits, and record it."}
    )


@dataclass
class FinetuningArguments(TrainingArguments):
    """The Trainer's own arguments with this protocol's defaults, and the patience of early stopping."""

    num_train_epochs: float = field(default=100, metadata={"help": "At most this many epochs."})
    patience: int = field(default=10, metadata={"help": "Epochs without a better validation score."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Batch size for training, a device."})
    per_device_eval_batch_size: int = field(default=64, metadata={"help": "Batch size for evaluation, a device."})
    seed: int = field(default=0, metadata={"help": "Of the head, the order of images and the label fraction."})

    def __post_init__(self) -> None:
        self.eval_strategy = self.save_strategy = self.logging_strategy = "epoch"
        self.load_best_model_at_end = True
        self.greater_is_better = True
        self.save_total_limit = 1
        self.save_only_model = True
        self.remove_unused_columns = False
        self.label_names = ["labels"]
        self.dataloader_pin_memory = torch.cuda.is_available()
        self.disable_tqdm = True  # one line an epoch instead, see EpochProgress
        # Else Accelerate takes what torchrun starts without a GPU for independent runs.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class EpochProgress(TrainerCallback):
    """A bar over the epochs with the validation score, instead of the Trainer's bar and printed dictionaries."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        self.bar = progress_bar(int(args.num_train_epochs), "training", "epoch", show=state.is_world_process_zero)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the score of the epoch that ended."""
        score = kwargs["metrics"].get(f"eval_{args.metric_for_best_model}")
        if score is not None:  # the test pass comes after the bar
            self.bar.set_postfix({f"validation_{args.metric_for_best_model}": f"{score:.4f}"}, refresh=False)
            self.bar.update()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.bar.close()


def start_run(arguments: FinetuningArguments) -> Path:
    """Give torch its threads; the folder of the results, which no other run has used.

    Raises:
        FileExistsError: it holds files.
    """
    if arguments.device.type == "cpu":
        use_cpu_threads()
        keep_freed_memory()
    output = Path(str(arguments.output_dir))
    if output.is_dir() and any(output.iterdir()):
        raise FileExistsError(f"output_dir={output} holds files of another run; choose another folder")
    return output


def load_config(arguments: EncoderArguments) -> MLVICXConfig:
    """Configuration of the model, or of the architecture that other weights have."""
    source = model_source(arguments)
    config: Any = MLVICXConfig() if source is None else AutoConfig.from_pretrained(check_source(source))
    if config.model_type != "mlvicx":
        raise UserError(f"{source} holds a {config.model_type} model; expected one of mlvicx")
    if arguments.drop_context or is_timm_source(arguments.model):
        config.use_context = False
    return config


def model_source(arguments: EncoderArguments) -> str | None:
    """Where configuration and image processor come from; None for the defaults."""
    pretrained = arguments.model != "random" and not is_timm_source(arguments.model)
    return arguments.model if pretrained else arguments.architecture


def load_for_task(
    model_class: type[MLVICXPreTrainedModel], config: MLVICXConfig, arguments: EncoderArguments, fit: str
) -> tuple[Any, MLVICXImageProcessor]:
    """A model with a new head for this configuration, and its image processor.

    Args:
        model_class: with the head of the task.
        config: adapted to the task.
        arguments: pretrained or random.
        fit: of the cache, for an image processor that no model brings along.

    Raises:
        ValueError: a model whose encoder lacks weights.
    """
    source = model_source(arguments)
    if source is None:
        processor = MLVICXImageProcessor(config.image_size, config.num_channels, fit=fit)
    else:
        processor = MLVICXImageProcessor.from_pretrained(source)
    if arguments.model == "random":
        return model_class(config), processor
    if is_timm_source(arguments.model):
        fresh: Any = model_class(config)
        load_timm_weights(fresh.base_model, arguments.model)
        return fresh, processor
    loaded: Any = model_class.from_pretrained(
        arguments.model, config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    lacking = sorted(key for key in report["missing_keys"] if key.startswith("mlvicx."))
    lacking += sorted(str(row[0]) for row in report["mismatched_keys"] if str(row[0]).startswith("mlvicx."))
    if lacking:
        raise UserError(f"{source} does not fit: {len(lacking)} weights of the encoder differ, such as {lacking[0]}")
    return model, processor


def check_splits(cache: Cache, allow_leak: bool = False) -> None:
    """Refuse a cache without the three splits, or in which two of them share an image; `load_cache` refuses patients.

    Args:
        cache: to fine-tune on.
        allow_leak: warn of shared images instead.

    Raises:
        ValueError: naming splits that are absent, or images that are shared.
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


def select_training(cache: Cache, arguments: LabelledDataArguments, seed: int) -> None:
    """Leave only the chosen part of the training split in the cache."""
    train = cache.datasets["train"]
    if arguments.label_fraction != 1:
        labels = np.array(train["labels"], dtype=np.float64)
        train = train.select(label_fraction(train["patient_id"], labels, arguments.label_fraction, seed))
    if arguments.max_train_samples is not None:
        if arguments.max_train_samples < 1:
            raise UserError(f"max_train_samples={arguments.max_train_samples} found; expected 1 or more")
        train = train.select(range(min(arguments.max_train_samples, len(train))))
    cache.datasets["train"] = train


def used_images(cache: Cache) -> str:
    """Text of a split file of the images that a run uses; its SHA-256 is the result's `used_hash`."""
    return split_file(
        (source, patient, str(split))
        for split, images in cache.datasets.items()
        for source, patient in zip(images["source"], images["patient_id"], strict=True)
    )


class BalancedTrainer(Trainer):
    """A Trainer that draws all patients equally often.

    Args:
        patients: patient of each training image.
    """

    def __init__(self, *args: Any, patients: Sequence[str], **kwargs: Any) -> None:
        self.patients = patients
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> PatientBalancedSampler:
        return PatientBalancedSampler(self.patients, self.args.seed)


def train(
    model: nn.Module,
    splits: Mapping[str, Dataset[Any]],
    arguments: FinetuningArguments,
    compute_metrics: Callable[..., dict[str, float]],
    patients: Sequence[str] | None = None,
    **options: Any,
) -> Trainer:
    """Train with early stopping and restore the best epoch.

    Args:
        model: what is trained.
        splits: "train" and "validation".
        arguments: of the Trainer.
        compute_metrics: scores of the validation split, `metric_for_best_model` among them.
        patients: patient of each training image, to draw all of them equally often; None draws every image once.
        options: further ones of the Trainer.
    """
    if isinstance(model, MLVICXPreTrainedModel):  # faster; others would have to be made contiguous for every checkpoint
        model.to(memory_format=torch.channels_last)  # type: ignore[call-arg]  # transformers' wrapper hides the signature
    make = Trainer if patients is None else partial(BalancedTrainer, patients=patients)
    trainer = make(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        compute_metrics=compute_metrics,
        callbacks=[EarlyStoppingCallback(arguments.patience), EpochProgress()],
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.remove_callback(EarlyStoppingCallback)  # what is evaluated from now on stops nothing
    return trainer


def describe(
    cache: Cache,
    model_arguments: EncoderArguments,
    data_arguments: LabelledDataArguments,
    arguments: FinetuningArguments,
    state: TrainerState,
) -> dict[str, Any]:
    """Which model, split, seed, data, code and machine made a result."""
    counts = {
        split: {"images": len(images), "patients": len(set(images["patient_id"]))}
        for split, images in cache.datasets.items()
    }
    best = state.best_global_step
    score = f"eval_{arguments.metric_for_best_model}"
    epochs = {int(row["step"]): row["epoch"] for row in state.log_history if score in row}
    return {
        "protocol": "frozen" if model_arguments.freeze_backbone else "finetuned",
        "model": model_arguments.model,
        "architecture": model_arguments.architecture,
        "drop_context": model_arguments.drop_context,
        "label_fraction": data_arguments.label_fraction,
        "seed": arguments.seed,
        "counts": counts,
        "data": {
            "cache": data_arguments.dataset,
            "collection": cache.manifest["collection"],
            "synthetic": cache.manifest["synthetic"],
            "policy": cache.manifest["policy"],
            "data_hash": cache.manifest["data_hash"],
            "split_hash": cache.manifest["split_hash"],
            "used_hash": hashlib.sha256(used_images(cache).encode()).hexdigest(),
            "copies_across_splits": cache.manifest["duplicates"]["across_splits"],
        },
        "hyperparameters": {
            "learning_rate": arguments.learning_rate,
            "batch_size": arguments.train_batch_size * arguments.world_size,
            "max_epochs": arguments.num_train_epochs,
            "weight_decay": arguments.weight_decay,
            "patience": arguments.patience,
            "patient_balanced": data_arguments.patient_balanced,
        },
        "epochs_trained": state.epoch,
        "best_epoch": epochs.get(best or -1),
        "hardware": describe_hardware(arguments.device, arguments.world_size),
        "code": code_version(),
    }


def subgroups(images: Any) -> dict[str, np.ndarray]:
    """View, sex and age band of every image of a split, [N] names each; "" where they are unknown."""
    ages = np.array(images["age"], dtype=np.float64)
    known = ~np.isnan(ages)
    bands = np.full(len(ages), "", dtype=object)
    bands[known] = np.array(AGE_BANDS, dtype=object)[np.searchsorted(AGE_LIMITS, ages[known], side="right")]
    columns = {kind: np.array(images[kind], dtype=object) for kind in ("view", "sex")}
    columns["view"][columns["view"] == "UNKNOWN"] = ""
    return columns | {"age": bands}


def score_subgroups(images: Any, score: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    """Scores of the images of each view, sex and age band, where there is more than one.

    Args:
        images: split of a cache.
        score: of some of its rows.

    Returns:
        {"view": {"PA": {"images", "patients", …scores}}, …}; without the kinds that have a single group. Images of
        which it is unknown are in none.
    """
    patients = np.array(images["patient_id"])
    found: dict[str, Any] = {}
    for kind, names in subgroups(images).items():
        present = sorted(set(names.tolist()) - {""}, key=_place)
        if len(present) < 2:
            continue
        found[kind] = {}
        for name in present:
            rows = np.flatnonzero(names == name)
            counts = {"images": len(rows), "patients": len(set(patients[rows].tolist()))}
            found[kind][name] = counts | score(rows)
    return found


def _place(name: str) -> tuple[int, str]:
    """Age bands in their order, other names by the alphabet."""
    return (AGE_BANDS.index(name) if name in AGE_BANDS else 0), name


class _RaisingParser(HfArgumentParser):
    """A parser whose errors do not end the process."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def parse_arguments(kind: str, sections: Sequence[type], words: list[str] | None = None) -> tuple[Any, ...]:
    """Arguments of a run from the command line: the recipe first, then the flags, which override it.

    Args:
        kind: "classification" or "segmentation", of which the recipes are.
        sections: dataclasses of arguments.
        words: what stands behind the command; None for `sys.argv`.

    Raises:
        ValueError: words that it does not understand. Those of `sys.argv` end the command instead.
    """
    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(
        "--recipe", default="default", help=f"Hyper-parameters: {', '.join(recipe_names(kind))}, or a .yaml file."
    )
    chosen, rest = first.parse_known_args(words)
    kind_of_parser = HfArgumentParser if words is None else _RaisingParser
    parser = kind_of_parser(sections, parents=[first], allow_abbrev=False)  # type: ignore[arg-type]  # a tuple of several
    names = {f.name for section in sections for f in fields(section)} - {"dataset", "output_dir", "model"}
    parser.set_defaults(**load_recipe(chosen.recipe, names, kind))
    *parsed, _ = parser.parse_args_into_dataclasses(rest)
    return tuple(parsed)
