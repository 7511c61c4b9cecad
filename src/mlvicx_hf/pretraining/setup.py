"""Put a run together: check its arguments, read the data, build what is trained, find the checkpoint to resume."""

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list, send_to_device
from torch import nn

from mlvicx_hf.common.arguments import check_values
from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.machine import describe_hardware, keep_freed_memory, refuse_other_launches, use_cpu_threads
from mlvicx_hf.data.cache.cache import MANIFEST
from mlvicx_hf.encoders.weights import starting_processor
from mlvicx_hf.objectives import Objective, find_objective, read_options
from mlvicx_hf.objectives.base import Schedule

from .arguments import DataArguments, ModelArguments, PretrainingArguments
from .batches import PlannedBatch, Planner
from .checkpoints import Checkpoint, Checkpoints
from .collapse import Watcher
from .data import create_augmentation, load_data
from .memory import Trial
from .model import create_config, prepare_objective, synchronise_norms
from .optimizer import BUFFERS, create_optimizer
from .run import Run
from .settings import RunSettings, of_early_checkpoints
from .view_sets import Views, ViewSet

logger = logging.getLogger(__name__)

NOT_COMPILED = ("cpu",)  # devices on which compiling costs memory and gains no time


def set_up(model_arguments: ModelArguments, data_arguments: DataArguments, arguments: PretrainingArguments) -> Run:
    """Everything a run needs before its first step; writes no file.

    Raises:
        FileExistsError: an output folder that holds another run, without `resume`.
        UserError: arguments that do not fit the data, the checkpoint or one another.
    """
    check_values(model_arguments, data_arguments, arguments)
    _check_arguments(data_arguments, arguments)
    accelerator = _create_accelerator(arguments)
    device, on_main = accelerator.device, accelerator.is_main_process
    options = read_options(model_arguments.objective, model_arguments.objective_options)
    model_arguments = replace(model_arguments, objective_options={} if options is None else asdict(options))
    checkpoints, start = Checkpoints(Path(arguments.output_dir), arguments.save_total_limit), model_arguments.init_from
    if arguments.resume and start is not None and (saved := checkpoints.newest_whole()):
        start = str(saved.path)  # what the run started from may be gone
    with user_input():
        processor = starting_processor(create_config(model_arguments), start)
    wanted = find_objective(model_arguments.objective).views(options)
    view_set = ViewSet(create_augmentation(data_arguments, processor), wanted)
    planner = Planner(view_set, arguments.seed)
    data = load_data(data_arguments, arguments, accelerator, planner)
    view_set.check(data.side, paired=data.pair_share is not None)
    processor.fit = data.manifest["fit"]
    hardware = describe_hardware(device, accelerator.num_processes)
    settings = RunSettings(
        *(model_arguments, data_arguments, arguments, data.batches.num_images, data.manifest, device, hardware),
        pair_share=data.pair_share,
    )
    checkpoint = None
    if arguments.resume:
        checkpoint, settings = _find_checkpoint(checkpoints, settings, on_main)
    if checkpoint is None:
        _check_start(model_arguments, arguments)

    batches = data.batches
    schedule = Schedule(arguments.seed, arguments.batch_size, len(batches), arguments.epochs, batches.num_images)
    layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
    new = model_arguments if checkpoint is None else replace(model_arguments, init_from=None)  # else it is overwritten
    objective = prepare_objective(new, arguments, schedule)
    objective.to(device).to(memory_format=layout)

    make_views = _view_maker(view_set, device, layout)

    def views_of_noise(count: int) -> Views:
        shape = (count, 1, data.side, data.side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return make_views(planner.plan(0, images, np.arange(count)))

    steps = schedule.total_steps - (0 if checkpoint is None else checkpoint.step)
    notes = [*objective.notes, *_doubts(model_arguments, data_arguments, arguments, data.side)]
    if steps:
        trial = Trial(accelerator, objective, views_of_noise, data.batches.share, BUFFERS[arguments.optimizer])
        settings, more = _fit(trial, settings, steps, resumed=checkpoint is not None)
        _check_reached(trial.unreached)
        notes += more
    objective, wrapped, optimizer = _prepare_training(accelerator, objective, arguments)
    watcher = None
    if on_main:
        watcher = Watcher(objective, processor, data_arguments.probe_dataset, arguments.probe_steps, device=device)
    run = Run(
        settings=settings,
        accelerator=accelerator,
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        processor=processor,
        schedule=schedule,
        batches=data.batches,
        loader=data.loader,
        make_views=make_views,
        checkpoints=checkpoints,
        watcher=watcher,
        notes=notes,
    )
    if checkpoint is not None:
        run.load(checkpoint)
        if on_main:
            print(f"resuming {checkpoint.path} at step {run.step} of {run.total_steps}", flush=True)
    return run


def _view_maker(
    view_set: ViewSet, device: torch.device, layout: torch.memory_format
) -> Callable[[PlannedBatch], Views]:
    """Make a function that moves a batch to the device and makes its views there, in this layout."""

    def make_views(batch: PlannedBatch) -> Views:
        moved = send_to_device(batch, device, non_blocking=True)
        made = view_set.apply(moved.images, moved.plans, moved.more)
        return tuple(view.contiguous(memory_format=layout) if view.ndim == 4 else view for view in made)

    return make_views


def _prepare_training(
    accelerator: Accelerator, objective: Objective, arguments: PretrainingArguments
) -> tuple[Objective, nn.Module, AcceleratedOptimizer]:
    """Synchronise batch normalisation on GPUs, make the optimiser, compile if wanted, and let Accelerate wrap both.

    Returns:
        The objective, what Accelerate wraps it in, and its optimiser.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        objective = synchronise_norms(objective)
    own_rate = arguments.backbone_learning_rate_ratio != 1 or arguments.backbone_thaw_epochs > 0
    backbone = objective.encoder.backbone if own_rate else None
    optimizer = create_optimizer(objective, arguments, backbone, objective.own_rates())
    if arguments.torch_compile:
        objective.compile(mode=arguments.torch_compile_mode)  # in place: the keys of the state stay as they are
    wrapped, prepared = accelerator.prepare(objective, optimizer)
    return objective, wrapped, prepared


def _check_reached(unreached: list[str]) -> None:
    """Refuse weights that no embedding depends on: they would stay as they start, and be saved as pretrained."""
    if unreached:
        raise UserError(
            f"{len(unreached)} weights without a gradient found, such as {unreached[0]}; expected a loss that reaches "
            "all of them: aggregation_levels with the last level or a global_weight above 0; context bottlenecks "
            "between the stages, or none, for objectives that use the last level alone"
        )


def _doubts(model: ModelArguments, data: DataArguments, arguments: PretrainingArguments, side: int) -> list[str]:
    """Say which changed arguments wait for another one, and so change nothing, and whether views enlarge the images."""
    is_cache = (Path(data.dataset) / MANIFEST).is_file()
    waiting = (
        (
            model,
            ("context_reduction", "context_gain", "context_init_scale", "context_placement"),
            "use_context",
            model.use_context,
        ),
        (
            model,
            ("aggregation_levels", "aggregation_size", "aggregation_channels", "aggregation_resize"),
            "multi_level_weight",
            model.multi_level_weight > 0,
        ),
        (data, ("brightness", "contrast"), "jitter", data.jitter > 0),
        (arguments, ("momentum",), "optimizer lars or sgd", arguments.optimizer != "adamw"),
        (arguments, ("trust_coefficient",), "optimizer lars", arguments.optimizer == "lars"),
        (arguments, ("torch_compile_mode",), "torch_compile", arguments.torch_compile),
        (data, ("shuffle_buffer",), "streaming", data.streaming),
        (data, ("cache_size",), "streaming of other data than a cache", data.streaming and not is_cache),
    )
    notes = []
    for section, names, needed, given in waiting:
        usual = {each.name: each.default for each in fields(section)}
        if found := [name for name in names if not given and getattr(section, name) != usual[name]]:
            notes.append(f"{', '.join(found)}: without effect, since it needs {needed}")
    if model.image_size > side:
        notes.append(f"views of {model.image_size} px are made of squares of {side} px: none is sharp")
    return notes


def _check_arguments(data: DataArguments, arguments: PretrainingArguments) -> None:
    output = Path(arguments.output_dir)
    if not arguments.resume and output.is_dir() and any(output.iterdir()):
        raise FileExistsError(
            f"output_dir={output} holds files of another run; choose another folder, or --resume that run"
        )
    graphs = arguments.torch_compile and arguments.torch_compile_mode != "default"
    if graphs and (arguments.gradient_accumulation_steps > 1 or arguments.find_batch_size):
        raise UserError(
            f"torch_compile_mode={arguments.torch_compile_mode} with micro-batches found; expected default: replayed "
            "CUDA graphs would overwrite the gradients of the micro-batch before"
        )
    if arguments.gradient_checkpointing and arguments.torch_compile:
        raise UserError("gradient_checkpointing and torch_compile found; expected one of them at most")
    for name in ("crop_area", "blur", "solarize"):
        if len(getattr(data, name)) != 2:
            raise UserError(f"{name}={getattr(data, name)} found; expected two values")


def _check_start(model: ModelArguments, arguments: PretrainingArguments) -> None:
    if arguments.freeze_batch_norm and model.init_from is None:
        raise UserError(
            "freeze_batch_norm found without init_from; expected weights to start from: random ones have no statistics "
            "to keep, and timm starts the last normalisation of each block at 0, where it would stay"
        )


def _create_accelerator(arguments: PretrainingArguments) -> Accelerator:
    refuse_other_launches()
    if arguments.deterministic:
        use_deterministic_algorithms()
    trackers = None if arguments.report_to == "none" else arguments.report_to
    with user_input():  # a tracker that does not exist
        accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=trackers,
            project_dir=arguments.output_dir,
            # Otherwise Accelerate takes what torchrun starts without a GPU for independent runs.
            cpu=not torch.accelerator.is_available(),
            # Buffers are alike in all processes, or not used in training: sending queues would cost time.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    if trackers is not None and not accelerator.log_with:
        raise UserError(f"report_to={trackers} found, which is not installed; expected none, or a tracker that is")
    if arguments.torch_compile and accelerator.device.type in NOT_COMPILED:
        raise UserError(
            f"torch_compile found on the {accelerator.device.type.upper()}; expected a GPU: on a CPU the compiled step "
            "was measured to be no faster than the plain one, and to take a fifth more memory"
        )
    use_cpu_threads(arguments.cpu_threads)  # with a GPU, of probes and ranks
    if accelerator.device.type == "cpu":
        if arguments.mixed_precision == "fp16":  # Accelerate would compute in float32
            raise UserError("mixed_precision='fp16' found on the CPU; expected no or bf16 there")
        keep_freed_memory()
    return accelerator


def use_deterministic_algorithms() -> None:
    """Make torch compute the same bits every time, on GPUs too; what it cannot do that way is a RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def _fit(trial: Trial, settings: RunSettings, steps: int, resumed: bool) -> tuple[RunSettings, list[str]]:
    """Find micro-batches that fit, where that is wanted, and what the remaining steps need, before wrapping the model.

    Returns:
        The settings, perhaps with more micro-batches, and what to print.
    """
    arguments, notes = settings.training, []
    if arguments.find_batch_size:
        if not resumed:
            settings = settings.with_micro_batches(trial.find(arguments.gradient_accumulation_steps))
        notes.append(trial.describe_choice(settings.training.gradient_accumulation_steps))
    timed = not arguments.torch_compile  # timing would compile for other shapes as well
    steps_each = settings.training.gradient_accumulation_steps
    try:
        estimate = trial.estimate(steps_each, timed)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"batch_size={arguments.batch_size} in {steps_each} micro-batch(es) a process found, which the memory of "
            f"the device does not hold; expected more gradient_accumulation_steps, or find_batch_size: {error}"
        ) from error
    return settings, [*notes, f"expected: {estimate.describe(steps)}"]


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
