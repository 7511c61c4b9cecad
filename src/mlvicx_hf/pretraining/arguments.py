"""Arguments of a pretraining run, in three groups. Imports neither torch nor transformers."""

# ruff: noqa: RUF009 - `_option` makes a field

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _option(help: str, default: Any = None, **metadata: Any) -> Any:
    """A field with the text of its flag; a list as default is copied for each object."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _required(help: str, metavar: str) -> Any:
    return field(metadata={"help": help, "metavar": metavar, "first": True})


@dataclass
class ModelArguments:
    """What is trained: the method, the fields of `MLVICXConfig` under the same names, and the starting weights."""

    backbone: str = _option("timm model that can return feature maps.", "resnet18", first=True)
    num_channels: int = _option("Channels of the views: 1, or 3 for weights that expect colour.", 1)
    image_size: int = _option("Side of the views in pixels.", 224)
    use_context: bool = _option("Refine every level by a context bottleneck.", True)
    context_reduction: int | None = _option("Use a two-layer channel gate with C/REDUCTION channels between.")
    context_gain: float = _option("Factor of each gate; with 2 the gates start at 1.", 1.0)
    context_init_scale: float = _option("Factor of the gates' random weights; 1 is what torch draws.", 0.01)
    aggregation_levels: list[int] | None = _option("Levels of the multi-level embedding, 0 the finest; default all.")
    aggregation_size: int = _option("Side of the grid on which the levels meet.", 4)
    aggregation_channels: int = _option("Channels of the compound representation.", 512)
    aggregation_resize: int | None = _option(
        "Interpolate the maps to this side first (authors: 64); on GPUs an error with --deterministic."
    )
    expander_dims: list[int] = _option("Widths of the expanders' linear layers.", [2048, 2048, 2048])
    expander_final_norm: bool = _option("Normalise after the last expander layer.", False)
    invariance_weight: float = _option("alpha of Eq. 3.", 25.0)
    variance_weight: float = _option("beta of Eq. 3.", 25.0)
    covariance_weight: float = _option("gamma of Eq. 3.", 1.0)
    global_weight: float = _option("Weight of the global loss L_G; 0 leaves it out.", 1.0)
    multi_level_weight: float = _option("lambda of Eq. 5; 0 leaves the multi-level loss out.", 1.0)
    invariance_reduction: str = _option(
        "Mean over the dimensions, or their sum as in Eq. 6.", "mean", choices=("mean", "sum")
    )
    objective: str = _option("Method of pretraining: mlvicx.", "mlvicx")
    init_from: str | None = _option(
        "Start from an earlier model (folder or Hub name), from 'imagenet', or from a file of timm weights.",
        first=True,
        metavar="MODEL",
    )


@dataclass
class DataArguments:
    """Which images, and how their two views are made."""

    dataset: str = _required(
        "Cache written by `mlvicx prepare`; with --streaming also parquet or Arrow files, a folder or pattern of them, "
        "or a dataset on the Hub.",
        "CACHE",
    )
    split: str = _option("Split to pretrain on; labels are never read.", "train")
    max_train_samples: int | None = _option("Use only the first images of the split.")
    views: str = _option("frontal leaves out lateral images; all uses them.", "frontal", choices=("frontal", "all"))
    patient_balanced: bool = _option("Draw all patients equally often.", False)
    streaming: bool = _option("Read the dataset in order and never hold all of it.", False)
    shuffle_buffer: int = _option("Streaming: number of undecoded images to draw from.", 4096)
    num_images: int | None = _option("Streaming: images of an epoch, where the dataset does not say it.")
    cache_size: int = _option("Streaming: side of the squares, where the dataset is no cache.", 256)
    image_column: str | None = _option("Streaming: column of the images.")
    probe_dataset: str | None = _option(
        "Labelled cache; nearest neighbours and a linear probe on it show what is learned.", metavar="CACHE"
    )
    num_workers: int = _option("Processes that decode images.", 2)
    crop_area: list[float] = _option("Smallest and largest share of the image's area in a crop.", [0.2, 1.0])
    rotation: float = _option("Largest angle in degrees.", 10.0)
    brightness: float = _option("Largest change of brightness.", 0.4)
    contrast: float = _option("Largest change of contrast.", 0.4)
    blur: list[float] = _option("Probability of blur in view 1 and in view 2.", [1.0, 0.1])
    solarize: list[float] = _option("Probability of solarisation in view 1 and in view 2.", [0.0, 0.2])


@dataclass
class PretrainingArguments:
    """How it is trained."""

    output_dir: str = _required("Folder of the run: model, checkpoints, metrics.jsonl.", "DIR")
    epochs: int = _option("Passes over the data.", 300, first=True)
    batch_size: int = _option("Images of a step, over all processes.", 64, first=True)
    base_learning_rate: float = _option("Peak rate for a batch of 256 images; it is scaled.", 0.2, first=True)
    weight_decay: float = _option("Weight decay of matrices; vectors have none.", 1e-6)
    momentum: float = _option("Momentum of LARS.", 0.9)
    trust_coefficient: float = _option("Trust coefficient of LARS.", 0.001)
    warmup_epochs: float = _option("Epochs in which the rate rises linearly.", 2.0)
    final_learning_rate_ratio: float = _option("Last rate of the cosine over its peak.", 0.001)
    seed: int = _option("Seed of weights, order and views.", 0)
    mixed_precision: str = _option("Precision; fp16 on GPUs only.", "no", choices=("no", "bf16", "fp16"), first=True)
    cpu_threads: int | None = _option("Threads of a process on the CPU; by default its share of the cores.")
    torch_compile: bool = _option("Compile the model.", False, aliases=["--compile"])
    channels_last: bool = _option("Use the channels-last memory layout, faster on most machines.", True)
    deterministic: bool = _option("Compute the same bits on GPUs, too: slower, and an error where impossible.", False)
    checkpoint_steps: int = _option("Steps between checkpoints; one more is written at the end.", 500)
    save_total_limit: int = _option("Number of newest checkpoints to keep, besides the best.", 2)
    gradient_accumulation_steps: int = _option(
        "Micro-batches of a process; the gradient stays exact, at the cost of one more forward pass.", 1
    )
    find_batch_size: bool = _option(
        "Double gradient_accumulation_steps until a step fits into the memory. batch_size stays, and so does the "
        "method, except that batch normalisation works on micro-batches.",
        False,
    )
    probe_steps: int = _option("Steps between probes; one more comes at the end.", 1000)
    logging_steps: int = _option("Steps between lines of metrics.jsonl.", 10)
    report_to: str = _option("Tracker: none, tensorboard, wandb, trackio, all.", "none")
    resume: bool = _option("Go on from the newest whole checkpoint of output_dir.", False, first=True)


SECTIONS_OF_PRETRAINING = (ModelArguments, DataArguments, PretrainingArguments)
