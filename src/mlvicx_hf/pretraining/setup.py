"""Put a run together: check its arguments, read the data, build what is trained, find the checkpoint to resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.machine import describe_hardware, keep_freed_memory, refuse_other_launches, use_cpu_threads
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.reading.sampling import EpochBatches, PatientPartners, PretrainingImages, choose_views
from mlvicx_hf.data.reading.streaming import Stream, StreamBatches, open_stream
from mlvicx_hf.encoders.loading import check_source
from mlvicx_hf.encoders.weights import is_timm_source, load_timm_weights, starting_processor
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel
from mlvicx_hf.objectives import Objective, find_objective, make_objective, read_options
from mlvicx_hf.objectives.base import Schedule

from .arguments import DataArguments, ModelArguments, PretrainingArguments
from .batches import PlannedBatch, Planner, StreamLoader, cache_loader
from .checkpoints import Checkpoint, Checkpoints
from .collapse import Watcher
from .memory import Trial
from .optimizer import create_optimizer
from .run import Run
from .settings import RunSettings, of_early_checkpoints
from .view_sets import Views, ViewSet
from .views import TwoViewAugmentation

logger = logging.getLogger(__name__)

NOT_COMPILED = ("cpu",)  # devices on which compiling costs memory and gains no time


def set_up(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: PretrainingArguments) -> Run:
    """Everything a run needs before its first step; writes no file.

    Raises:
        FileExistsError: an output folder that holds another run, without `resume`.
        UserError: arguments that do not fit the data, the checkpoint or one another.
    """
    _check_arguments(data_arguments, arguments)
    accelerator = _create_accelerator(arguments)
    device, on_main = accelerator.device, accelerator.is_main_process
    options = read_options(model_arguments.objective, model_arguments.objective_options)
    model_arguments = replace(model_arguments, objective_options={} if options is None else asdict(options))
    with user_input():
        processor = starting_processor(create_config(model_arguments), model_arguments.init_from)
    wanted = find_objective(model_arguments.objective).views(options)
    view_set = ViewSet(create_augmentation(data_arguments, processor), wanted)
    planner = Planner(view_set, arguments.seed)
    data = _load_data(data_arguments, arguments, accelerator, planner)
    view_set.check(data.side, paired=data.pair_share is not None)
    processor.fit = data.manifest["fit"]
    hardware = describe_hardware(device, accelerator.num_processes)
    settings = RunSettings(
        *(model_arguments, data_arguments, arguments, data.batches.num_images, data.manifest, device, hardware),
        pair_share=data.pair_share,
    )
    checkpoints = Checkpoints(Path(arguments.output_dir), arguments.save_total_limit)
    checkpoint = None
    if arguments.resume:
        checkpoint, settings = _find_checkpoint(checkpoints, settings, on_main)

    torch.manual_seed(arguments.seed)
    objective = create_objective(model_arguments)
    _check_accumulation(objective, model_arguments.objective, arguments)
    batches = data.batches
    schedule = Schedule(arguments.seed, arguments.batch_size, len(batches), arguments.epochs, batches.num_images)
    if not schedule.total_steps:
        raise UserError(f"epochs={arguments.epochs:g} found; expected a step at least, of {len(batches)} in an epoch")
    objective.prepare(schedule)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    objective.to(device).to(memory_format=layout)

    def make_views(batch: PlannedBatch) -> Views:
        moved = send_to_device(batch, device, non_blocking=True)
        made = view_set.apply(moved.images, moved.plans, moved.more)
        return tuple(view.contiguous(memory_format=layout) if view.ndim == 4 else view for view in made)

    def views_of_noise(count: int) -> Views:
        shape = (count, 1, data.side, data.side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return make_views(planner.plan(0, images, np.arange(count)))

    if arguments.gradient_checkpointing:
        if not objective.encoder.is_plain:
            raise UserError(
                f"gradient_checkpointing found with backbone={model_arguments.backbone!r}; expected a backbone that is "
                "a list of layers, such as a ResNet"
            )
        objective.encoder.backbone.set_grad_checkpointing()
    steps = schedule.total_steps - (0 if checkpoint is None else checkpoint.step)
    for norm in _backbone_norms(objective) if arguments.freeze_batch_norm else ():
        norm.requires_grad_(False)
    notes = [*_unused_arguments(objective, model_arguments), *objective.notes]
    notes += [objective.start] if objective.start else []
    if steps:
        trial = Trial(accelerator, objective, views_of_noise, data.batches.share)
        settings, more = _fit(trial, settings, steps, resumed=checkpoint is not None)
        notes += more
    if accelerator.num_processes > 1 and device.type == "cuda":
        objective = synchronise_norms(objective)
    own_rate = arguments.backbone_learning_rate_ratio != 1 or arguments.backbone_thaw_epochs > 0
    backbone = objective.encoder.backbone if own_rate else None
    optimizer = create_optimizer(objective, arguments, backbone, objective.own_rates())
    if arguments.torch_compile:
        objective.compile(mode=arguments.torch_compile_mode)  # in place: the keys of the state stay as they are
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    watcher = None
    if on_main:
        watcher = Watcher(objective, processor, data_arguments.probe_dataset, arguments.probe_steps, device=device)
    run = Run(
        settings=settings,
        accelerator=accelerator,
        objective=objective,
        wrapped=wrapped,
        optimizer=prepared,
        processor=processor,
        batches=data.batches,
        loader=data.loader,
        make_views=make_views,
        checkpoints=checkpoints,
        watcher=watcher,
        notes=notes,
        frozen_norms=_backbone_norms(objective) if arguments.freeze_batch_norm else [],
    )
    if checkpoint is not None:
        run.load(checkpoint)
        if on_main:
            print(f"resuming {checkpoint.path} at step {run.step} of {run.total_steps}", flush=True)
    return run


def _check_arguments(data: DataArguments, arguments: PretrainingArguments) -> None:
    output = Path(arguments.output_dir)
    if not arguments.resume and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"output_dir={output} holds files of another run; choose another folder, or --resume that run"
        )
    counts = ("checkpoint_steps", "logging_steps", "save_total_limit", "probe_steps")
    least = dict.fromkeys((*counts, "gradient_accumulation_steps"), 1)
    least |= dict.fromkeys(
        ("seed", "epochs", "warmup_epochs", "backbone_thaw_epochs", "backbone_learning_rate_ratio"), 0
    )
    for name, smallest in least.items():
        if getattr(arguments, name) < smallest:
            raise UserError(f"{name}={getattr(arguments, name)} found; expected {smallest} or more")
    if arguments.gradient_checkpointing and arguments.torch_compile:
        raise UserError("gradient_checkpointing and torch_compile found; expected one of them at most")
    for name in ("crop_area", "blur", "solarize"):
        if len(getattr(data, name)) != 2:
            raise UserError(f"{name}={getattr(data, name)} found; expected two values")


def _unused_arguments(objective: Objective, arguments: ModelArguments) -> list[str]:
    """Say which arguments that differ from their defaults change nothing."""
    usual = ModelArguments()
    found = [name for name in objective.unused if getattr(arguments, name) != getattr(usual, name)]
    return [f"objective={arguments.objective} does not use {', '.join(found)}"] if found else []


def _check_accumulation(objective: Objective, name: str, arguments: PretrainingArguments) -> None:
    steps = arguments.gradient_accumulation_steps
    if objective.inexact_accumulation and (steps > 1 or arguments.find_batch_size):
        found = f"gradient_accumulation_steps={steps}" if steps > 1 else "find_batch_size"
        raise UserError(f"{found} found with objective={name}; expected neither: {objective.inexact_accumulation}")


def _create_accelerator(arguments: PretrainingArguments) -> Accelerator:
    refuse_other_launches()
    if arguments.deterministic:
        use_deterministic_algorithms()
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=arguments.output_dir,
        # Otherwise Accelerate takes what torchrun starts without a GPU for independent runs.
        cpu=not torch.accelerator.is_available(),
    )
    if arguments.torch_compile and accelerator.device.type in NOT_COMPILED:
        raise UserError(
            f"torch_compile found on the {accelerator.device.type.upper()}; expected a GPU: on a CPU the compiled step "
            "was measured to be no faster than the plain one, and to take a fifth more memory"
        )
    if accelerator.device.type == "cpu":
        if arguments.mixed_precision == "fp16":  # Accelerate would compute in float32
            raise UserError("mixed_precision='fp16' found on the CPU; expected no or bf16 there")
        use_cpu_threads(arguments.cpu_threads)
        keep_freed_memory()
    return accelerator


def _backbone_norms(objective: Objective) -> list[nn.Module]:
    """Those of a momentum copy, too: it would else see other statistics than the encoder that it follows."""
    encoders = [part for part in objective.modules() if isinstance(part, MLVICXModel)]
    return [part for encoder in encoders for part in encoder.backbone.modules() if isinstance(part, _BatchNorm)]


def synchronise_norms(objective: Objective) -> Objective:
    """Take batch statistics over all processes, unless the objective needs those of each process.

    The shifts of an expander's last norm are buffers, for which torch's conversion has no place: they are parameters
    while it runs.
    """
    if not objective.synchronise_norms:
        return objective
    norms = {
        n: m for n, m in objective.named_modules() if isinstance(m, _BatchNorm) and "bias" in dict(m.named_buffers())
    }
    for norm in norms.values():
        shift = norm.bias
        del norm.bias
        norm.bias = nn.Parameter(shift, requires_grad=False)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(objective)
    for name in norms:
        norm = synchronised.get_submodule(name)
        shift = norm.bias.detach()
        del norm.bias
        norm.register_buffer("bias", shift)
    return synchronised


def use_deterministic_algorithms() -> None:
    """Make torch compute the same bits every time, on GPUs too; what it cannot do that way is a RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


# -- data --------------------------------------------------------------------------------------------------------------


class _Data(NamedTuple):
    """Images to pretrain on; `side` in pixels."""

    batches: EpochBatches | StreamBatches
    loader: Iterable[PlannedBatch]
    manifest: dict[str, Any]
    side: int
    pair_share: float | None = None


def _load_data(
    data: DataArguments, arguments: PretrainingArguments, accelerator: Accelerator, planner: Planner
) -> _Data:
    pin_memory = accelerator.device.type == "cuda"
    place = (arguments.seed, accelerator.process_index, accelerator.num_processes)
    if data.streaming:
        stream = _load_stream(data)
        left_out = stream.left_out
        options = {"num_workers": data.num_workers, "shuffle_buffer": data.shuffle_buffer}
        reader = StreamBatches(stream, arguments.batch_size, *place, **options)
        found = _Data(reader, StreamLoader(reader, planner, pin_memory), stream.manifest, stream.size)
        if accelerator.is_main_process:
            print(
                f"a stream leaves out up to {reader.most_unreadable} unreadable images a process; more end the run",
                flush=True,
            )
            if stream.shards.lengths is None:
                print("rows of each file not known: in an epoch some images come twice, and others wait", flush=True)
    else:
        images, manifest, left_out = _load_images(data)
        patients = images["patient_id"][:] if data.patient_balanced else None
        batches = EpochBatches(len(images), arguments.batch_size, *place, patients)
        rows = PretrainingImages(images.select_columns("image"))
        partners = None if data.positives == "same_image" else _partners(data, images, arguments.seed)
        loader = cache_loader(rows, batches, planner, data.num_workers, pin_memory, partners)
        share = None if partners is None else partners.share
        found = _Data(batches, loader, manifest, manifest["size"], share)
        if share is not None and accelerator.is_main_process:
            print(f"positives={data.positives}: {share:.1%} of the images have another one", flush=True)
        if data.views == "frontal" and accelerator.is_main_process:
            _count_unknown_views(images)
    if left_out != 0 and accelerator.is_main_process:
        number = "lateral images are" if left_out is None else f"{left_out} lateral images are"
        print(f"{number} left out (--views all takes them)", flush=True)
    return found


def _count_unknown_views(images: Any) -> None:
    """Say that images of unknown view count as frontal, and how many there are."""
    unknown = sum(view == "UNKNOWN" for view in images["view"][:])
    if unknown:
        print(f"{unknown} images of unknown view count as frontal (the column view tells them apart)", flush=True)


def _load_images(data: DataArguments) -> tuple[Any, dict[str, Any], int]:
    """Rows of a cache, its manifest, and how many lateral images are left out."""
    for name in ("num_images", "image_column"):
        if getattr(data, name) is not None:
            raise UserError(f"{name}={getattr(data, name)} found without streaming; expected --streaming as well")
    cache = load_cache(data.dataset)
    if data.split not in cache.datasets:
        raise UserError(f"split={data.split!r} found; {data.dataset} has {', '.join(cache.datasets)}")
    images, left_out = choose_views(cache.datasets[data.split], data.views)
    limit = data.max_train_samples
    if limit is not None:
        if limit < 1:
            raise UserError(f"max_train_samples={limit} found; expected 1 or more")
        images = images.select(range(min(limit, len(images))))
    return images, cache.manifest, left_out


def _partners(data: DataArguments, images: Any, seed: int) -> PatientPartners:
    views = images["view"][:] if data.positives == "same_patient_same_view" else None
    partners = PatientPartners(images["patient_id"][:], views, seed)
    if not partners.share:
        raise UserError(f"positives={data.positives} found; no patient of {data.dataset} has two such images")
    return partners


def _load_stream(data: DataArguments) -> Stream:
    if data.patient_balanced:
        raise UserError("patient_balanced found with streaming; a stream is read in order, so expected one of them")
    if data.positives != "same_image":
        raise UserError(f"positives={data.positives} found with streaming; a stream is read in order, so expected one")
    if data.max_train_samples is not None:
        raise UserError(f"max_train_samples={data.max_train_samples} found with streaming; expected --num_images")
    return open_stream(
        data.dataset,
        data.split,
        views=data.views,
        num_images=data.num_images,
        size=data.cache_size,
        image_column=data.image_column,
    )


def create_augmentation(data: DataArguments, processor: MLVICXImageProcessor) -> TwoViewAugmentation:
    """The random views that the arguments describe, as input for models of this processor."""
    return TwoViewAugmentation(
        image_size=processor.image_size,
        crop_area=(data.crop_area[0], data.crop_area[1]),
        flip=data.flip,
        flip_together=data.positives != "same_image",
        rotation=data.rotation,
        jitter=data.jitter,
        brightness=data.brightness,
        contrast=data.contrast,
        blur=(data.blur[0], data.blur[1]),
        solarize=(data.solarize[0], data.solarize[1]),
        mean=processor.image_mean,
        std=processor.image_std,
        num_channels=processor.num_channels,
    )


# -- model -------------------------------------------------------------------------------------------------------------


def create_config(arguments: ModelArguments) -> MLVICXConfig:
    """Make the configuration of what a run trains.

    Raises:
        UserError: an unknown objective.
        ValueError: a value that no model can have.
    """
    values = asdict(arguments)
    for name in ("init_from", "objective", "objective_options"):
        del values[name]
    return MLVICXConfig(**find_objective(arguments.objective).configure(values))


def create_objective(arguments: ModelArguments) -> Objective:
    """Make what a run trains, with the starting weights that `init_from` names.

    Raises:
        UserError: an unknown objective, a model that cannot be built, or an earlier model that does not fit.
    """
    objective_class, source, start = find_objective(arguments.objective), arguments.init_from, ""
    with user_input():
        config = create_config(arguments)
        if source is None:
            model = objective_class.model_class(config)
        elif is_timm_source(source):
            model = objective_class.model_class(config)
            start = load_timm_weights(objective_class.encoder_of(model), source)
        else:
            model, start = _load_earlier(objective_class.model_class, config, source)
    objective = make_objective(arguments.objective, model, arguments.objective_options)
    objective.start = start
    return objective


def _load_earlier(model_class: type[PreTrainedModel], config: MLVICXConfig, source: str) -> tuple[PreTrainedModel, str]:
    """A model with the weights of an earlier one, which must hold all of the encoder but gates, and what is new."""
    loaded: Any = model_class.from_pretrained(
        check_source(source), config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = sorted(key for key in report["missing_keys"] if key.startswith(encoder))
    gates = {key for key in model.state_dict() if key.startswith(f"{encoder}context.")}
    start = f"started from {source}"
    if gates and gates <= set(lacking):  # a plain network gets gates
        lacking = [key for key in lacking if key not in gates]
        start += ", which has no context bottlenecks: they start anew"
    if lacking:
        raise UserError(f"init_from={source} lacks {len(lacking)} weights of this encoder, such as {lacking[0]}")
    wrong = sorted(str(row[0]) for row in report["mismatched_keys"])
    if wrong:
        raise UserError(f"init_from={source}: {len(wrong)} weights have another shape, such as {wrong[0]}")
    return model, start


def _fit(trial: Trial, settings: RunSettings, steps: int, resumed: bool) -> tuple[RunSettings, list[str]]:
    """Find micro-batches that fit, where that is wanted, and what the remaining steps need, before wrapping the model.

    Returns:
        The settings, perhaps with more micro-batches, and what to print.
    """
    arguments, notes = settings.training, []
    if arguments.find_batch_size:
        if not resumed:
            settings = settings.with_micro_batches(trial.find(arguments.gradient_accumulation_steps))
        notes.append(trial.choice(settings.training.gradient_accumulation_steps))
    timed = not arguments.torch_compile  # timing would compile for other shapes as well
    estimate = trial.estimate(settings.training.gradient_accumulation_steps, timed)
    return settings, [*notes, f"expected: {estimate.line(steps)}"]


# -- resume ------------------------------------------------------------------------------------------------------------


def _find_checkpoint(
    checkpoints: Checkpoints, settings: RunSettings, on_main: bool
) -> tuple[Checkpoint | None, RunSettings]:
    """The newest whole checkpoint, chosen by the main process, and the settings to go on with; None without any."""
    chosen: list[tuple[Checkpoint | None, int] | UserError | None] = [None]
    if on_main:
        try:
            chosen = [_choose_checkpoint(checkpoints, settings)]
        except UserError as error:  # all processes must end
            chosen = [error]
    found = broadcast_object_list(chosen)[0]
    if isinstance(found, UserError):
        raise found
    checkpoint, steps = found
    return checkpoint, settings.with_micro_batches(steps)


def _choose_checkpoint(checkpoints: Checkpoints, settings: RunSettings) -> tuple[Checkpoint | None, int]:
    """The checkpoint, and the number of micro-batches to go on with.

    With `find_batch_size` that is the checkpoint's, unless more are asked for.
    """
    checkpoint, steps = checkpoints.newest_whole(), settings.training.gradient_accumulation_steps
    if checkpoint is None:
        logger.warning("%s has no checkpoint: starting from the beginning", checkpoints.folder)
        return None, steps
    fixed, machine = of_early_checkpoints(checkpoint.fixed, checkpoint.machine)
    checkpoint = replace(checkpoint, fixed=fixed, machine=machine)
    if settings.training.find_batch_size:
        steps = max(steps, checkpoint.fixed.get("training.gradient_accumulation_steps", steps))
    checkpoint.check_same_run(settings.with_micro_batches(steps).fixed(), settings.machine())
    return checkpoint, steps
