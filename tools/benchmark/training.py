"""The training step against a bare backbone, the authors' order of operations and lightly's VICReg; the covariance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.loss_mlvicx import covariance_loss
from mlvicx_hf.models.modeling_mlvicx import MLVICXForPreTraining

from . import authors_order
from .timing import OwnProcess, compare, peak_memory

CANDIDATES = ("bare", "eager", "compiled", "authors", "authors_kept", "lightly")


@dataclass(frozen=True)
class Setting:
    """What the candidates have in common.

    Args:
        backbone: its name, of timm and, for the authors' order, of torchvision.
        image_size: of the views.
        batch_size: images, of which there are two views each.
        device: where.
        half: bfloat16 by autocast.
    """

    backbone: str
    image_size: int
    batch_size: int
    device: torch.device
    half: bool = False


def training_step(name: str, setting: Setting) -> Callable[[], None]:
    """Forward pass of two views, loss and backward pass, without optimiser; what `name` is, see `benchmark_step`."""
    torch.manual_seed(0)
    theirs = name.startswith("authors")
    channels, layout = (3, torch.contiguous_format) if theirs else (1, torch.channels_last)
    shape = (2, setting.batch_size, channels, setting.image_size, setting.image_size)
    views = [view.contiguous(memory_format=layout) for view in torch.randn(shape, device=setting.device)]
    network, loss = _candidate(name, setting)
    network.to(device=setting.device, memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it

    def step() -> None:
        with torch.autocast(setting.device.type, torch.bfloat16, enabled=setting.half):
            value = loss(*views)
        value.backward()
        network.zero_grad()

    return step


def _candidate(name: str, setting: Setting) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    if name in ("eager", "compiled"):
        ours = MLVICXForPreTraining(MLVICXConfig(backbone=setting.backbone))
        forward = torch.compile(ours) if name == "compiled" else ours
        return ours, lambda one, two: forward(view_1=one, view_2=two).loss
    if name.startswith("authors"):
        theirs = authors_order.AuthorsOrder(setting.backbone)
        return theirs, lambda one, two: theirs(one, two)["loss"]
    backbone: Any = timm.create_model(setting.backbone, features_only=True, in_chans=1)
    if name == "bare":
        return backbone, lambda one, two: backbone(one)[-1].mean() + backbone(two)[-1].mean()
    from lightly.loss import VICRegLoss
    from lightly.models.modules.heads import VICRegProjectionHead

    width = backbone.feature_info.channels()[-1]
    head, vicreg = VICRegProjectionHead(width, 2048, 2048), VICRegLoss()

    def embed(view: Tensor) -> Tensor:
        return head(backbone(view)[-1].mean((2, 3)))

    return nn.ModuleList([backbone, head]), lambda one, two: vicreg(embed(one), embed(two))


def gigaflops(name: str, setting: Setting) -> float:
    """GFLOP an image: two views, forward and backward; a multiplication and an addition count as two."""
    few = replace(setting, batch_size=2)
    step = training_step(name, few)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / few.batch_size / 1e9


def benchmark_step(setting: Setting, rounds: int, names: tuple[str, ...] = CANDIDATES) -> dict[str, Any]:
    """The training step of every candidate, against the bare backbone.

    - bare: timm's backbone on both views; the mean of its last map is the loss.
    - eager, compiled: `MLVICXForPreTraining`.
    - authors: every level enlarged or reduced to 64×64 before its projection, covariance matrices built and masked,
      three channels, contiguous, eager, in a process of its own that gives freed memory back to the system, as
      theirs does. That costs time on the CPU: authors_kept is the same with freed memory kept, as ours. ResNets only.
      It takes turns with bare and eager alone, whose times then are `seconds_beside`.
    - lightly: the backbone, lightly's VICReg head (one, 2048 wide, two layers of it normalised) and loss.

    All but authors are channels-last with one input channel.

    Returns:
        By candidate `seconds` (min, median, max), `ratio` of medians to bare, `gigaflops` an image, `memory_bytes` at
        most and `memory_ratio`.
    """
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    for name, row in rows.items():
        if name not in ("authors_kept", "compiled"):  # the same operations as authors and eager
            row["gigaflops"] = gigaflops(name, setting)
        if name != "authors_kept":
            row["memory_bytes"] = peak_memory(partial(training_step, name, setting), setting.device)
            row["memory_ratio"] = row["memory_bytes"] / rows["bare"]["memory_bytes"]
    builders = {name: partial(training_step, name, setting) for name in names}
    if "authors" in builders:  # first, and on its own: with authors_kept beside it 24 GiB would not be enough
        own = OwnProcess(builders.pop("authors"))
        candidates = {name: builders[name]() for name in ("bare", "eager")} | {"authors": own}
        seconds = compare(candidates, rounds, setting.device, "training step, authors")
        own.close()
        rows["authors"] |= {
            "seconds": seconds["authors"],
            "ratio": seconds["authors"]["median"] / seconds["bare"]["median"],
            "seconds_beside": {name: seconds[name] for name in ("bare", "eager")},
        }
    seconds = compare({name: build() for name, build in builders.items()}, rounds, setting.device, "training step")
    for name in builders:
        rows[name] |= {"seconds": seconds[name], "ratio": seconds[name]["median"] / seconds["bare"]["median"]}
    return rows


def benchmark_covariance(
    batch_sizes: list[int], dimensions: list[int], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Eq. 8 of [b, r] embeddings, forward and backward: ours against the r×r matrix, plain and masked as the authors'.

    Returns:
        One row a shape: seconds, and how many times faster ours is.
    """

    def plain(z: Tensor) -> Tensor:
        centered = z - z.mean(0)
        matrix = centered.T @ centered / (len(z) - 1)
        return (matrix.square().sum() - matrix.diagonal().square().sum()) / z.shape[1]

    def run(function: Callable[[Tensor], Tensor], z: Tensor) -> None:
        z.grad = None
        function(z).backward()

    forms = {"ours": covariance_loss, "plain": plain, "masked": authors_order.covariance}
    rows = []
    for dimension in dimensions:
        for batch in batch_sizes:
            z = torch.randn(batch, dimension, device=device, requires_grad=True)
            candidates = {name: partial(run, form, z) for name, form in forms.items()}
            seconds = compare(candidates, rounds, device, f"covariance, {batch}×{dimension}")
            speed = {
                f"times_{name}": seconds[name]["median"] / seconds["ours"]["median"] for name in ("plain", "masked")
            }
            rows.append({"batch_size": batch, "dimension": dimension, "seconds": seconds} | speed)
    return rows
