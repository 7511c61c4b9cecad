"""The training step of every method of pretraining, against the bare backbone on two views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.objectives import OBJECTIVES, read_options
from mlvicx_hf.objectives.base import Schedule
from mlvicx_hf.pretraining.arguments import DataArguments, ModelArguments
from mlvicx_hf.pretraining.batches import Planner
from mlvicx_hf.pretraining.data import create_augmentation
from mlvicx_hf.pretraining.model import create_objective
from mlvicx_hf.pretraining.view_sets import ViewSet

from .timing import compare, peak_memory
from .training import Setting, training_step

BATCHES = 1000  # of an imagined epoch, which is large enough for every queue


def method_step(name: str, setting: Setting) -> Callable[[], None]:
    """A whole step of a method without optimiser: forward pass, loss, backward pass, momentum and queue.

    The views are made once, before: all methods but their number and kind have them in common.
    """
    if name == "bare":
        return training_step("bare", setting)
    torch.manual_seed(0)
    batch, side = setting.batch_size, setting.image_size
    arguments = ModelArguments(backbone=setting.backbone, image_size=side, objective=name)
    objective = create_objective(arguments)
    objective.prepare(Schedule(0, batch, BATCHES, 10, max(BATCHES * batch, 4 * 16384)))
    objective.to(device=setting.device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    aligned: dict[str, Any] = {"crop_area": [1.0, 1.0], "flip": 0.0} if name == "inter_moco" else {}
    augmentation = create_augmentation(DataArguments(dataset="", **aligned), MLVICXImageProcessor(side))
    views = ViewSet(augmentation, OBJECTIVES[name].views(read_options(name, {})))
    images = torch.randint(0, 256, (batch, 1, side, side), dtype=torch.uint8)
    planned = Planner(views, 0).plan(0, images, np.arange(batch))
    made = [view.to(setting.device) for view in views.apply(planned.images, planned.plans, planned.more)]
    made = [view.contiguous(memory_format=torch.channels_last) if view.ndim == 4 else view for view in made]

    def step() -> None:
        objective.start_step(0)
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.half):
            output = objective(*made)
        output.loss.backward()
        objective.zero_grad()
        objective.update(1)

    return step


def benchmark_methods(setting: Setting, rounds: int) -> dict[str, Any]:
    """The step of every method, in turns.

    Returns:
        By method `seconds` (min, median, max), `ratio` of medians to bare, `gigaflops` an image, `memory_bytes` at most
        and `memory_ratio`.
    """
    rows: dict[str, dict[str, Any]] = {}
    few = replace(setting, batch_size=4)
    for name in ("bare", *OBJECTIVES):
        step = method_step(name, few)
        with FlopCounterMode(display=False) as counter:
            step()
        row = rows[name] = {"gigaflops": counter.get_total_flops() / few.batch_size / 1e9}
        row["memory_bytes"] = peak_memory(partial(method_step, name, setting), setting.device)
        row["memory_ratio"] = row["memory_bytes"] / rows["bare"]["memory_bytes"]
    steps = {name: method_step(name, setting) for name in rows}
    seconds = compare(steps, rounds, setting.device, "training step, methods")
    for name, row in rows.items():
        row |= {"seconds": seconds[name], "ratio": seconds[name]["median"] / seconds["bare"]["median"]}
    return rows
