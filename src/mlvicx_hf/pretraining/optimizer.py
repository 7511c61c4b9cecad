"""LARS, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

from timm.optim import Lars
from torch import nn

from .arguments import PretrainingArguments


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int, final_ratio: float) -> float:
    """Rate of a step, counted from 0: linear rise to the peak, then a cosine that ends on its floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Give all parameter groups this rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def create_optimizer(model: nn.Module, arguments: PretrainingArguments) -> Lars:
    """LARS whose layer-wise rate and weight decay act on matrices and kernels; vectors follow plain momentum SGD."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim > 1],
            "weight_decay": arguments.weight_decay,
            "always_adapt": True,  # timm adapts only groups with decay otherwise
        },
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=arguments.momentum, trust_coeff=arguments.trust_coefficient)
