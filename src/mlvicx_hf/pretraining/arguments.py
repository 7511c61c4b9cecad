"""Arguments of a pretraining run: three groups, filled by a recipe, then by flags."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, field, fields

from transformers import HfArgumentParser

from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.recipes import load_recipe, recipe_names


@dataclass
class ModelArguments:
    """What is trained; the fields of `MLVICXConfig` under the same names, and where the weights start."""

    backbone: str = field(default="resnet18", metadata={"help": "timm model that gives a FeatureListNet."})
    num_channels: int = field(default=1, metadata={"help": "1, or 3 for weights that expect colour."})
    image_size: int = field(default=224, metadata={"help": "Side of the views in pixels."})
    use_context: bool = field(default=True, metadata={"help": "Refine every level by a context bottleneck."})
    context_reduction: int | None = field(default=None, metadata={"help": "Two-layer channel gate C/reduction."})
    context_gain: float = field(default=1.0, metadata={"help": "Factor of each gate; 2 makes gates start at 1."})
    context_init_scale: float = field(
        default=0.01, metadata={"help": "Factor of the gates' random weights; 1 draws them as torch does."}
    )
    aggregation_levels: list[int] | None = field(
        default=None, metadata={"help": "Levels in the multi-level embedding, finest 0; by default all."}
    )
    aggregation_size: int = field(default=4, metadata={"help": "Side of the grid on which the levels meet."})
    aggregation_channels: int = field(default=512, metadata={"help": "Channels of the compound representation."})
    aggregation_resize: int | None = field(
        default=None,
        metadata={"help": "Interpolate the maps first (authors: 64); on GPUs an error with --deterministic."},
    )
    expander_dims: list[int] = field(
        default_factory=lambda: [2048, 2048, 2048], metadata={"help": "Widths of the expanders' linear layers."}
    )
    expander_final_norm: bool = field(default=False, metadata={"help": "Normalise after the last expander layer."})
    invariance_weight: float = field(default=25.0, metadata={"help": "alpha of Eq. 3."})
    variance_weight: float = field(default=25.0, metadata={"help": "beta of Eq. 3."})
    covariance_weight: float = field(default=1.0, metadata={"help": "gamma of Eq. 3."})
    global_weight: float = field(default=1.0, metadata={"help": "Weight of the global loss L_G."})
    multi_level_weight: float = field(default=1.0, metadata={"help": "lambda of Eq. 5."})
    invariance_reduction: str = field(default="mean", metadata={"help": "mean, or sum as Eq. 6."})
    init_from: str | None = field(
        default=None,
        metadata={"help": "Start: an earlier model (folder or Hub name), 'imagenet', or a file of timm weights."},
    )

    def config(self) -> MLVICXConfig:
        """The model configuration these arguments describe."""
        values = asdict(self)
        values.pop("init_from")
        return MLVICXConfig(**values)


@dataclass
class DataArguments:
    """Which images, and how their two views are made."""

    dataset: str = field(
        metadata={
            "help": "Cache written by prepare_data.py; with --streaming also parquet or Arrow files, a folder or "
            "pattern of them, or a dataset on the Hub."
        }
    )
    split: str = field(default="train", metadata={"help": "Split to pretrain on; labels are never read."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first images of the split."})
    views: str = field(default="frontal", metadata={"help": "frontal leaves out lateral images; all takes them."})
    patient_balanced: bool = field(default=False, metadata={"help": "Draw all patients equally often."})
    streaming: bool = field(default=False, metadata={"help": "Read the dataset in order, never all of it at hand."})
    shuffle_buffer: int = field(default=4096, metadata={"help": "Streaming: undecoded images to draw from."})
    num_images: int | None = field(
        default=None, metadata={"help": "Streaming: images of an epoch, where the dataset does not say it."}
    )
    cache_size: int = field(default=256, metadata={"help": "Streaming: side of the squares of what is no cache."})
    image_column: str | None = field(default=None, metadata={"help": "Streaming: column of the images."})
    probe_dataset: str | None = field(
        default=None,
        metadata={"help": "Labelled cache: nearest neighbours and a linear probe on it show what is learned."},
    )
    num_workers: int = field(default=2, metadata={"help": "Processes that decode images."})
    crop_area: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata={"help": "Share of area of a crop."})
    rotation: float = field(default=10.0, metadata={"help": "Largest angle in degrees."})
    brightness: float = field(default=0.4, metadata={"help": "Largest change of brightness."})
    contrast: float = field(default=0.4, metadata={"help": "Largest change of contrast."})
    blur: list[float] = field(default_factory=lambda: [1.0, 0.1], metadata={"help": "Probability of blur, by view."})
    solarize: list[float] = field(default_factory=lambda: [0.0, 0.2], metadata={"help": "Probability, by view."})


@dataclass
class PretrainingArguments:
    """How it is trained."""

    output_dir: str = field(metadata={"help": "Folder of the run: model, checkpoints, metrics.jsonl."})
    epochs: int = field(default=300, metadata={"help": "Passes over the data."})
    batch_size: int = field(default=64, metadata={"help": "Images a step, over all processes."})
    base_learning_rate: float = field(default=0.2, metadata={"help": "Peak rate per 256 images of batch."})
    weight_decay: float = field(default=1e-6, metadata={"help": "Of weight matrices; vectors have none."})
    momentum: float = field(default=0.9, metadata={"help": "Of LARS."})
    trust_coefficient: float = field(default=0.001, metadata={"help": "Of LARS."})
    warmup_epochs: float = field(default=2.0, metadata={"help": "Linear rise of the rate."})
    final_learning_rate_ratio: float = field(default=0.001, metadata={"help": "Floor of the cosine over its peak."})
    seed: int = field(default=0, metadata={"help": "Of weights, order and views."})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16, or fp16 (GPUs only)."})
    cpu_threads: int | None = field(
        default=None, metadata={"help": "Threads of a process on the CPU; by default its share of the cores."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model.", "aliases": ["--compile"]})
    channels_last: bool = field(default=True, metadata={"help": "Memory layout; faster on most machines."})
    deterministic: bool = field(
        default=False, metadata={"help": "The same bits on GPUs, too: slower, and an error where that cannot be."}
    )
    checkpoint_steps: int = field(default=500, metadata={"help": "Steps between checkpoints; one at the end always."})
    save_total_limit: int = field(default=2, metadata={"help": "Newest checkpoints that are kept, besides the best."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches of a process; the exact gradient, for one more forward pass."}
    )
    find_batch_size: bool = field(
        default=False,
        metadata={
            "help": "Double gradient_accumulation_steps until a step fits into the memory; batch_size, and with it the "
            "method, stays, but for batch normalisation, which works on micro-batches."
        },
    )
    probe_steps: int = field(default=1000, metadata={"help": "Steps between probes, and one at the end."})
    logging_steps: int = field(default=10, metadata={"help": "Steps between lines of metrics.jsonl."})
    report_to: str = field(default="none", metadata={"help": "Tracker: none, tensorboard, wandb, trackio, all."})
    resume: bool = field(default=False, metadata={"help": "Go on from the newest whole checkpoint of output_dir."})


def parse_arguments(
    words: list[str] | None = None,
) -> tuple[ModelArguments, DataArguments, PretrainingArguments]:
    """Arguments of a run from the command line: the recipe first, then the flags, which override it.

    Args:
        words: what stands behind the command; None for `sys.argv`.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument(
        "--recipe", default="default", help=f"Hyper-parameters: {', '.join(recipe_names())}, or a .yaml file."
    )
    chosen, rest = first.parse_known_args(words)
    sections = (ModelArguments, DataArguments, PretrainingArguments)
    parser = HfArgumentParser(sections, parents=[first], allow_abbrev=False)  # type: ignore[arg-type]
    names = {f.name for section in sections for f in fields(section)} - {"dataset", "output_dir", "resume"}
    parser.set_defaults(**load_recipe(chosen.recipe, names))
    model, data, training, _ = parser.parse_args_into_dataclasses(rest)
    return model, data, training
