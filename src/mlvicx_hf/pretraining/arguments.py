"""Arguments of a pretraining run, in three groups. Imports neither torch nor transformers."""

# ruff: noqa: RUF009 - `option` makes a field

from dataclasses import dataclass
from typing import Any

from mlvicx_hf.common.arguments import option


@dataclass
class ModelArguments:
    """What is trained: the method, the fields of `MLVICXConfig` under the same names, and the starting weights."""

    backbone: str = option("timm model that can return feature maps.", "resnet18", first=True)
    num_channels: int = option("Channels of the views: 1, or 3 for weights that expect colour.", 1)
    image_size: int = option("Side of the views in pixels.", 224)
    use_context: bool | None = option(
        "Refine every level by a context bottleneck; by default true for the objective mlvicx, false for the others.",
        None,
    )
    context_placement: str | None = option(
        "Refine between the layers, or the levels alone; by default between them where the backbone allows it.",
        None,
        choices=("between", "taps"),
    )
    context_reduction: int | None = option("Use a two-layer channel gate with C/REDUCTION channels between.", None)
    context_gain: float = option("Factor of each gate; with 2 the gates start at 1.", 1.0)
    context_init_scale: float = option("Factor of the gates' random weights; 1 is what torch draws.", 0.01)
    aggregation_levels: list[int] | None = option(
        "Levels of the multi-level embedding, 0 the finest; default all.", None
    )
    aggregation_size: int = option("Side of the grid on which the levels meet.", 4)
    aggregation_channels: int = option("Channels of the compound representation.", 512)
    aggregation_resize: int | None = option(
        "Interpolate the maps to this side first (authors: 64); on GPUs slow with --deterministic.", None
    )
    expander_dims: list[int] = option("Widths of the expanders' linear layers.", [2048, 2048, 2048])
    expander_final_norm: bool = option("Normalise after the last expander layer.", False)
    invariance_weight: float = option("alpha of Eq. 3.", 25.0)
    variance_weight: float = option("beta of Eq. 3.", 25.0)
    covariance_weight: float = option("gamma of Eq. 3.", 1.0)
    global_weight: float = option("Weight of the global loss L_G; 0 leaves it out.", 1.0)
    multi_level_weight: float = option("lambda of Eq. 5; 0 leaves the multi-level loss out.", 1.0)
    invariance_reduction: str = option(
        "Mean over the dimensions, or their sum as in Eq. 6.", "mean", choices=("mean", "sum")
    )
    objective: str = option(
        "Method of pretraining: mlvicx, or another name in `mlvicx_hf.objectives`.", "mlvicx", first=True
    )
    objective_options: dict[str, Any] = option(
        "Options of the objective; commas separate the numbers of a list.", {}, metavar="NAME=VALUE"
    )
    init_from: str | None = option(
        "Start from an earlier model (folder or Hub name), from 'imagenet', from a timm name with the tag of its "
        "weights, or from a file of timm, torchvision or another self-supervised method.",
        None,
        first=True,
        metavar="MODEL",
    )

    def __post_init__(self) -> None:
        if self.use_context is None:
            self.use_context = self.objective == "mlvicx"


@dataclass
class DataArguments:
    """Which images, and how their two views are made."""

    dataset: str = option(
        "Cache written by `mlvicx prepare`; with --streaming also parquet or Arrow files, a folder or pattern of them, "
        "or a dataset on the Hub.",
        first=True,
        metavar="CACHE",
    )
    split: str = option("Split to pretrain on; labels are never read.", "train")
    max_train_samples: int | None = option("Use only the first images of the split.", None, least=1)
    views: str = option("frontal leaves out lateral images; all uses them.", "frontal", choices=("frontal", "all"))
    positives: str = option(
        "What view 2 is made of: the image of view 1, or another image of the patient where there is one, perhaps of "
        "the same view (PA, AP, …).",
        "same_image",
        choices=("same_image", "same_patient", "same_patient_same_view"),
    )
    patient_balanced: bool = option("Draw all patients equally often.", False)
    streaming: bool = option("Read the dataset in order and never hold all of it.", False)
    shuffle_buffer: int = option("Streaming: number of undecoded images to draw from.", 4096)
    num_images: int | None = option("Streaming: images of an epoch, where the dataset does not say it.", None)
    cache_size: int = option("Streaming: side of the squares, where the dataset is no cache.", 256)
    image_column: str | None = option("Streaming: column of the images.", None)
    probe_dataset: str | None = option(
        "Labelled cache; nearest neighbours and a linear probe on it show what is learned.", None, metavar="CACHE"
    )
    num_workers: int = option("Processes that decode images.", 2, least=0)
    crop_area: list[float] = option("Smallest and largest share of the image's area in a crop.", [0.2, 1.0])
    flip: float = option("Probability of a horizontal flip.", 0.5)
    rotation: float = option("Largest angle in degrees.", 10.0)
    jitter: float = option("Probability of changing brightness and contrast.", 0.8)
    brightness: float = option("Largest change of brightness.", 0.4)
    contrast: float = option("Largest change of contrast.", 0.4)
    blur: list[float] = option("Probability of blur in view 1 and in view 2.", [1.0, 0.1])
    solarize: list[float] = option("Probability of solarisation in view 1 and in view 2.", [0.0, 0.2])


@dataclass
class PretrainingArguments:
    """How it is trained."""

    output_dir: str = option("Folder of the run: model, checkpoints, metrics.jsonl.", first=True, metavar="DIR")
    epochs: float = option("Passes over the data; the last may be a part of one.", 300, first=True, above=0)
    batch_size: int = option("Images of a step, over all processes.", 64, first=True)
    base_learning_rate: float = option("Peak rate for a batch of 256 images; it is scaled.", 0.2, first=True, above=0)
    optimizer: str = option("LARS, AdamW or SGD.", "lars", choices=("lars", "adamw", "sgd"))
    weight_decay: float = option("Weight decay of matrices; vectors have none.", 1e-6, least=0)
    momentum: float = option("Momentum of LARS and SGD.", 0.9, least=0, most=1)
    trust_coefficient: float = option("Trust coefficient of LARS.", 0.001, above=0)
    warmup_epochs: float = option("Epochs in which the rate rises linearly.", 2.0, least=0)
    final_learning_rate_ratio: float = option("Last rate of the cosine over its peak.", 0.001, least=0, most=1)
    backbone_learning_rate_ratio: float = option("Rate of the backbone over that of the rest.", 1.0, least=0)
    backbone_thaw_epochs: float = option(
        "Epochs in which the backbone's rate rises from 0, so that new layers do not spoil good weights.", 0.0, least=0
    )
    freeze_batch_norm: bool = option(
        "Keep statistics, scales and shifts of the backbone's batch normalisation as they start.", False
    )
    seed: int = option("Seed of weights, order and views.", 0, least=0, most=2**32 - 1)
    mixed_precision: str = option("Precision; fp16 on GPUs only.", "no", choices=("no", "bf16", "fp16"), first=True)
    cpu_threads: int | None = option(
        "Threads of a process on the CPU; by default its share of the cores.", None, least=1
    )
    torch_compile: bool = option("Compile the model.", False, aliases=["--compile"])
    torch_compile_mode: str = option(
        "Mode of the compiler; with reduce-overhead a GPU replays the step from CUDA graphs.",
        "default",
        choices=("default", "reduce-overhead", "max-autotune"),
    )
    channels_last: bool = option("Use the channels-last memory layout, faster on most machines.", True)
    deterministic: bool = option("Compute the same bits on GPUs, too: slower, and an error where impossible.", False)
    checkpoint_steps: int = option("Steps between checkpoints; one more is written at the end.", 500, least=1)
    save_total_limit: int = option("Number of newest checkpoints to keep, besides the best.", 2, least=1)
    gradient_accumulation_steps: int = option(
        "Micro-batches of a process; the gradient stays exact, at the cost of one more forward pass.", 1, least=1
    )
    find_batch_size: bool = option(
        "Double gradient_accumulation_steps until a step fits into the memory. batch_size stays, and so does the "
        "method, except that batch normalisation works on micro-batches.",
        False,
    )
    gradient_checkpointing: bool = option(
        "Compute the maps inside a stage again instead of keeping them: less memory, the same gradients.", False
    )
    probe_steps: int = option("Steps between probes; one more comes at the end.", 1000, least=1)
    logging_steps: int = option("Steps between lines of metrics.jsonl.", 10, least=1)
    report_to: str = option("Tracker: none, tensorboard, wandb, trackio, all.", "none")
    resume: bool = option("Go on from the newest whole checkpoint of output_dir.", False, first=True)


SECTIONS_OF_PRETRAINING = (ModelArguments, DataArguments, PretrainingArguments)
