"""Optimisers, and the learning rate of every step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from mlvicx_hf.objectives.base import OwnRate

from .arguments import PretrainingArguments

BUFFERS = {"lars": 1, "sgd": 1, "adamw": 2}  # optimiser → values that it keeps for each weight


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int, final_ratio: float) -> float:
    """Rate of a step, counted from 0: linear rise to the peak, then a cosine that ends on its floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def set_learning_rate(optimizer: Any, rate: float, backbone_ratio: float = 1.0, peak: float | None = None) -> None:
    """Give all parameter groups this rate, and those of the backbone the rate times a ratio.

    Groups with a rate of their own get it times theirs; a group whose rate is constant has the peak, by default this
    rate, in its place.
    """
    for group in optimizer.param_groups:
        base = peak if group.get("constant", False) and peak is not None else rate
        base *= group.get("rate_ratio", 1.0)
        group["lr"] = base * (backbone_ratio if group.get("of_backbone", False) else 1.0)


def create_optimizer(
    model: nn.Module,
    arguments: PretrainingArguments,
    backbone: nn.Module | None = None,
    own_rates: Sequence[OwnRate] = (),
) -> torch.optim.Optimizer:
    """Make the optimiser that the arguments name. Weight decay acts on matrices and kernels, never on vectors.

    Under LARS the layer-wise rate acts on them alone, too; vectors follow plain momentum SGD.

    Args:
        model: what is trained.
        arguments: its settings.
        backbone: part of the model whose groups are marked, so that they can have a rate of their own; None for none.
        own_rates: further parameters with a rate of their own.
    """
    inside = set() if backbone is None else set(backbone.parameters())
    own_rates = [own for own in own_rates if arguments.optimizer == "lars" or not own.under_lars]
    special = {p: {"rate_ratio": own.ratio, "constant": own.constant} for own in own_rates for p in own.parameters}
    parts: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {(): []}  # by the marks of their groups
    for p in model.parameters():
        if p.requires_grad:
            marks = special.get(p, {}) | ({"of_backbone": True} if p in inside else {})
            parts.setdefault(tuple(marks.items()), []).append(p)
    groups = [group | dict(marks) for marks, part in parts.items() for group in _groups(part, arguments)]
    if arguments.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0)
    if arguments.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=arguments.momentum)
    return Lars(groups, lr=0.0, momentum=arguments.momentum, trust_coeff=arguments.trust_coefficient)


def _groups(parameters: Sequence[nn.Parameter], arguments: PretrainingArguments) -> list[dict[str, Any]]:
    """Matrices and kernels, then vectors."""
    matrices: dict[str, Any] = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": arguments.weight_decay}
    vectors: dict[str, Any] = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
    if arguments.optimizer == "lars":
        matrices["always_adapt"], vectors["always_adapt"] = True, False  # timm adapts only groups with decay otherwise
    return [matrices, vectors]
