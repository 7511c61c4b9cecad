"""The exact gradient of a batch that is too large for the memory, by micro-batches.

The loss uses statistics of the whole batch. The mean of the micro-batches' losses is another loss, so adding up their
gradients would train another method. Instead, embed all micro-batches without a graph, take the loss and its gradient
at the embeddings for the whole batch, and embed every micro-batch again to carry its part of that gradient into the
weights. This costs one more forward pass.

Batch normalisation works on micro-batches, in both passes alike. Its running statistics move in the second pass only.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mlvicx_hf.models.modeling_mlvicx import batch_norms
from mlvicx_hf.objectives.base import Embeddings, LossOutput

from .memory import micro_batch_size


def accumulate(accelerator: Accelerator, wrapped: nn.Module, views: Sequence[Tensor], steps: int) -> LossOutput:
    """Compute the loss of a batch, and add its gradient to the weights', by micro-batches.

    Args:
        accelerator: prepared the objective.
        wrapped: an `Objective`, perhaps inside a data parallel wrapper.
        views: this process's share of the batch: view 1 and view 2, [B, C, H, W] each, and the objective's extras.
        steps: micro-batches, equally large and of two images at least.

    Returns:
        What the objective gives for the whole share, without graph.

    Raises:
        UserError: micro-batches that are unequal or smaller than two images.
    """
    micro_batch_size(len(views[0]), steps)
    pieces = list(zip(*(view.chunk(steps) for view in views), strict=True))
    with torch.no_grad(), _statistics_untracked(wrapped):
        # Clones, because the CUDA graphs of a compiled model write the next piece into the same memory.
        parts = [[_clone(view) for view in wrapped(*piece, return_loss=False)] for piece in pieces]
    leaves = [
        {name: torch.cat([part[view][name] for part in parts]).requires_grad_() for name in parts[0][view]}
        for view in (0, 1)
    ]
    output: LossOutput = accelerator.unwrap_model(wrapped).loss(*leaves)
    gradients = _gradients(output.loss, leaves)
    for number, piece in enumerate(pieces):
        with accelerator.no_sync(wrapped) if number < steps - 1 else nullcontext():
            again = wrapped(*piece, return_loss=False)
            products = [
                (again[view][name] * gradient.chunk(steps)[number]).sum()
                for (view, name), gradient in gradients.items()
                if again[view][name].requires_grad  # a target has no gradient
            ]
            accelerator.backward(torch.stack(products).sum())
    embeddings = {name: (one.detach(), two.detach()) for name, (one, two) in output.embeddings.items()}
    terms = {name: value.detach() for name, value in output.terms.items()}
    return LossOutput(output.loss.detach(), terms, embeddings)


def _clone(embeddings: Embeddings) -> Embeddings:
    return {name: value.clone() for name, value in embeddings.items()}


def _gradients(loss: Tensor, leaves: list[Embeddings]) -> dict[tuple[int, str], Tensor]:
    """Gradient of the loss at every embedding that it depends on, by view and name."""
    places = [(view, name) for view in (0, 1) for name in leaves[view]]
    gradients = torch.autograd.grad(loss, [leaves[view][name] for view, name in places], allow_unused=True)
    found = zip(places, gradients, strict=True)
    return {place: gradient for place, gradient in found if gradient is not None}


@contextmanager
def _statistics_untracked(model: nn.Module) -> Iterator[None]:
    """Normalise by the batch at hand and leave no trace in the running statistics."""
    norms = [norm for norm in batch_norms(model) if norm.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
