"""What several methods share: heads, momentum copies, queues, and batches that are spread over processes."""

import copy
import itertools
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from mlvicx_hf.models.layers_mlvicx import keep_shift
from mlvicx_hf.models.loss_mlvicx import at_least_float32, gather_batch, own_precision, sum_over_ranks, world_size

Network = TypeVar("Network", bound=nn.Module)


# -- heads -------------------------------------------------------------------------------------------------------------


class ProjectionHead(nn.Sequential):
    """Linear layers with ReLU between them.

    Args:
        widths: of the input and of every layer.
        norm: batch normalisation before every ReLU; the layers before one have no bias.
        last: what follows the last layer: "" for nothing, "scale" for a batch normalisation without shift, "fixed" for
            one without weights. The layer then has no bias.
    """

    def __init__(self, widths: Sequence[int], norm: bool = True, last: str = "") -> None:
        layers: list[nn.Module] = []
        for before, width in itertools.pairwise(widths[:-1]):
            layers.append(nn.Linear(before, width, bias=not norm))
            layers += [nn.BatchNorm1d(width)] if norm else []
            layers.append(nn.ReLU(inplace=True))
        layers.append(nn.Linear(widths[-2], widths[-1], bias=not last))
        if last:
            layers.append(nn.BatchNorm1d(widths[-1], affine=last == "scale"))
        if last == "scale":
            keep_shift(layers[-1])
        super().__init__(*layers)


# -- momentum ----------------------------------------------------------------------------------------------------------


def momentum_copy(network: Network) -> Network:
    """Copy a network, weights and all, so that it follows by `follow` and gets no gradients."""
    return copy.deepcopy(network).requires_grad_(False)


@torch.no_grad()
def follow(copied: nn.Module, network: nn.Module, momentum: float) -> None:
    """Move the weights of a copy: k ← m·k + (1−m)·q. Its running statistics are its own."""
    slow: list[Tensor] = list(copied.parameters())
    fast: list[Tensor] = list(network.parameters())
    get_ema_multi_avg_fn(momentum)(slow, fast, 0)


def scale_momentum(momentum: float, batch_size: int, reference: int) -> float:
    """Momentum that forgets after as many images as the published one does at its batch: m^(B/B_ref).

    Busbridge et al. 2023, "How to scale your EMA".
    """
    return float(momentum ** (batch_size / reference))


def note_on_momentum(momentum: float, total_steps: int, name: str) -> list[str]:
    """Say that a copy forgets too slowly for a run of `total_steps`; `name` is the option of its momentum."""
    steps = 1 / max(1 - momentum, 1e-12)
    if steps <= total_steps:
        return []
    return [
        f"the momentum copy forgets after {steps:.0f} steps, but the run has {total_steps}, so it stays near its "
        f"start: a lower {name} or scale_momentum=false may help (--objective_options)"
    ]


class KeyQueue(nn.Module):
    """The newest K keys. It starts with random unit vectors.

    Args:
        size: K.
        width: of a key.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("keys", F.normalize(torch.randn(size, width), dim=1))  # [K, D]
        self.keys: Tensor

    def push(self, keys: Tensor, number: int) -> None:
        """Replace the oldest keys.

        Args:
            keys: [B, D]; B divides K.
            number: of batches that were pushed before. The place follows from it, so a GPU need not be asked.
        """
        place = number * len(keys) % len(self.keys)
        self.keys[place : place + len(keys)] = keys


# -- batches -----------------------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """Every process computes the same loss of the gathered batch, so the others' gradients equal its own.

    As with `sum_over_ranks`, the gradient is that of the sum of all processes' losses: distributed data parallel
    averages it.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        ctx.count = len(local)
        return gather_batch(local.detach()[None])[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        start = dist.get_rank() * ctx.count
        return world_size() * gradient[start : start + ctx.count]


def gather(local: Tensor) -> Tensor:
    """Join the samples of all processes in their order, with gradients: [b, D] to [W·b, D], float32 or more.

    What follows must be the same in all processes, up to the loss.
    """
    local = at_least_float32(local)
    return local if world_size() == 1 else _Gather.apply(local)


def mean_over_batch(values: Tensor) -> Tensor:
    """Mean over the samples of all processes and all other dimensions, float32 or more; [b, …] to a scalar."""
    return sum_over_ranks(at_least_float32(values).mean()) / world_size()


def unit_vectors(vectors: Tensor) -> Tensor:
    """Vectors [B, D] of length 1, in float32 or more."""
    return F.normalize(at_least_float32(vectors), dim=1)


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """Cosine of the angle between vectors, [B, D] and [B, D] to [B]; in float32 or more."""
    with own_precision(one):
        return F.cosine_similarity(at_least_float32(one), at_least_float32(other), dim=1)
