# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""The exact gradient of a batch that is too large for the memory, by micro-batches.

The loss is made of statistics of the whole batch: the mean of the micro-batches' losses is another loss, so adding up
their gradients would train another method. Instead all micro-batches are embedded without a graph, the loss and its
gradient at the embeddings are taken for the whole batch, and every micro-batch is embedded again to carry its part of
that gradient into the weights. It costs one more forward pass.

Batch normalisation works on micro-batches, in both passes alike; the running statistics move in the second one only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mlvicx_hf.models.modeling_mlvicx import MLVICXForPreTrainingOutput

from .memory import micro_batch

EMBEDDINGS = ("global_embeddings", "multi_level_embeddings")


def accumulate(
    accelerator: Accelerator, model: nn.Module, view_1: Tensor, view_2: Tensor, steps: int
) -> MLVICXForPreTrainingOutput:
    """Loss of a batch and its gradient in the weights, by so many micro-batches.

    Args:
        accelerator: that prepared the model.
        model: `MLVICXForPreTraining`, perhaps inside a data parallel wrapper.
        view_1: [B, C, H, W], this process's share of the batch.
        view_2: likewise.
        steps: micro-batches, equally large and of two images at least.

    Returns:
        Output for the whole share, without graph.

    Raises:
        ValueError: micro-batches that are unequal or smaller than two images.
    """
    micro_batch(len(view_1), steps)
    pieces = list(zip(view_1.chunk(steps), view_2.chunk(steps), strict=True))
    with torch.no_grad(), _running_statistics_kept(model):
        parts = [model(view_1=one, view_2=two, return_loss=False) for one, two in pieces]
    output = MLVICXForPreTrainingOutput()
    for name in EMBEDDINGS:
        if getattr(parts[0], name) is not None:
            views = zip(*(getattr(part, name) for part in parts), strict=True)
            setattr(output, name, tuple(torch.cat(view).requires_grad_() for view in views))
    accelerator.unwrap_model(model).add_losses(output)
    leaves = _embeddings(output)
    assert output.loss is not None
    slopes = zip(*(slope.chunk(steps) for slope in torch.autograd.grad(output.loss, leaves)), strict=True)
    for number, ((one, two), slope) in enumerate(zip(pieces, slopes, strict=True)):
        with accelerator.no_sync(model) if number < steps - 1 else nullcontext():
            again = model(view_1=one, view_2=two, return_loss=False)
            accelerator.backward(sum((z * s).sum() for z, s in zip(_embeddings(again), slope, strict=True)))
    return _detached(output)


def _embeddings(output: MLVICXForPreTrainingOutput) -> list[Tensor]:
    """Those of both losses and both views, as far as there are any."""
    return [embedding for name in EMBEDDINGS for embedding in getattr(output, name) or ()]


def _detached(output: MLVICXForPreTrainingOutput) -> MLVICXForPreTrainingOutput:
    values: dict[str, Any] = {
        name: tuple(tensor.detach() for tensor in value) if isinstance(value, tuple) else value.detach()
        for name, value in output.items()
    }
    return MLVICXForPreTrainingOutput(**values)


@contextmanager
def _running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch normalisation by the batch at hand that leaves no trace in the running statistics."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
