"""Methods of pretraining with the smallest networks, for several test files."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from helpers import tiny_config
from torch import Tensor

from mlvicx_hf.objectives import Objective, find_objective, make_objective, read_options
from mlvicx_hf.objectives.base import Schedule
from mlvicx_hf.pretraining.view_sets import ViewSet
from mlvicx_hf.pretraining.views import TwoViewAugmentation

_QUEUE = {"queue_size": 8, "projection_size": 16, "reference_batch": 16, "key_momentum": 0.9}
SMALL: dict[str, dict[str, Any]] = {  # options by "method" or "method:variant"; the queue fits 32 images
    "vicreg": {},
    "barlow_twins": {"projector_dims": [32, 32]},
    "simclr": {"projection_size": 16},
    "simsiam": {"projection_size": 32, "predictor_size": 16},
    "byol": {"hidden_size": 32, "projection_size": 16, "target_momentum": 0.5, "reference_batch": 64},
    "moco_v2": _QUEUE,
    "inter_moco": _QUEUE,
    "inter_moco:barlow": _QUEUE | {"variant": "barlow", "level_dims": [16, 16]},
    "caid": _QUEUE,
    "pcrl_v1": _QUEUE,
    "pcrl_v1:nce": _QUEUE | {"contrast": "nce"},
    "pcrl_v2": {"local_views": 2, "local_size": 16},
}
ALIGNED = ["--crop_area", 1, 1, "--flip", 0]
FLAGS: dict[str, list[object]] = {"inter_moco": ALIGNED, "inter_moco:barlow": ALIGNED}  # what a method demands
SCHEDULE = Schedule(seed=3, batch_size=8, batches=4, epochs=1, images=64)


def method_of(name: str) -> str:
    """The method of "method:variant"."""
    return name.partition(":")[0]


def small_objective(name: str, seed: int = 2, **options: Any) -> Objective:
    """A method on the smallest backbone, prepared for `SCHEDULE`, in training mode."""
    torch.manual_seed(seed)
    values = tiny_config(use_context=False).to_dict()
    kind = find_objective(method_of(name))
    config = type(tiny_config())(**kind.configure(values))
    objective = make_objective(method_of(name), kind.model_class(config), SMALL[name] | options)
    objective.prepare(SCHEDULE)
    objective.start_step(0)
    return objective.train()


def small_views(name: str, batch: int = 8, epoch: int = 0, **options: Any) -> tuple[Tensor, ...]:
    """What a step of the method sees of random images, as `ViewSet` makes it, in float64."""
    images = torch.randint(0, 256, (batch, 1, 40, 40), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    method = method_of(name)
    wanted = find_objective(method).views(read_options(method, SMALL[name] | options))
    view_set = ViewSet(TwoViewAugmentation(image_size=32), wanted)
    made = view_set.apply(images, *view_set.plan(3, epoch, np.arange(batch)))
    return tuple(view.double() for view in made)
