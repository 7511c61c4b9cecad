# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Layers of the MLVICX models: context bottlenecks, multi-level aggregation, expanders, the U-Net decoder.

This file travels to the Hub, so it imports nothing from the package but its flat neighbours, relatively.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_legacy_batchedtensor  # of `is_grads_batched`; there is no public way
from torch.autograd import forward_ad
from torch.nn import functional as F

from .configuration_mlvicx import MLVICXConfig
from .loss_mlvicx import values_are_readable


class GateConv2d(nn.Conv2d):
    """Convolution of a gate. `config.context_init_scale` scales its initial weights.

    It keeps the constructor of its base class: adapters such as LoRA make layers of the type that they find.
    """


class ContextBottleneck(nn.Module):
    """Refine one level's map by a channel gate, then a spatial gate (Eqs. 1 and 2).

    Args:
        channels: channels of the map.
        reduction: None for the one shared 1×1 convolution of Eq. 1; a number for C → C/reduction → C with ReLU.
        gain: factor of each gate.
    """

    def __init__(self, channels: int, reduction: int | None = None, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = gain
        self.channel: nn.Module
        if reduction is None:
            self.channel = GateConv2d(channels, channels, 1, bias=False)
        else:
            hidden = max(1, channels // reduction)
            layers = (GateConv2d(channels, hidden, 1, bias=False), GateConv2d(hidden, channels, 1, bias=False))
            self.channel = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        self.spatial = GateConv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor, fused: bool = True) -> Tensor:
        """[B, C, H, W] to [B, C, H, W]; `fused` is the way of plain training, wherever it is possible."""
        if fused and self._can_fuse(x):
            return _Refinement.apply(x, self, *self.parameters())
        y = x * self.channel_gate(x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
        gate = self.spatial_gate(torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1))
        # Without gradients nobody else needs y. Passes over the map are the cost; one in place is the cheapest.
        # A tracer compares its graph without gradients with that with them, so it sees the same in both.
        return y * gate if torch.is_grad_enabled() or not values_are_readable(y) else y.mul_(gate)

    def _can_fuse(self, x: Tensor) -> bool:
        """Say whether everything is trained and nothing but autograd watches.

        A compiler fuses the plain operations by itself. Tracers, torch.func and forward gradients need to see them. The
        replicas of `nn.DataParallel` have no parameters, only tensors in their place.
        """
        if getattr(self, "_is_replica", False):
            return False
        trained = torch.is_grad_enabled() and all(tensor.requires_grad for tensor in (x, *self.parameters()))
        return trained and values_are_readable(x) and forward_ad.unpack_dual(x).tangent is None

    def channel_gate(self, average: Tensor, maximum: Tensor) -> Tensor:
        """Compute the gates of Eq. 1, [B, C, 1, 1], from the two pooled maps, [B, C, 1, 1] each."""
        return self.gain * torch.sigmoid(self.channel(average) + self.channel(maximum))

    def spatial_gate(self, planes: Tensor) -> Tensor:
        """Compute the gates of Eq. 2, [B, 1, H, W], from mean and maximum over the channels, [B, 2, H, W]."""
        return self.gain * torch.sigmoid(self.spatial(planes))


@contextmanager
def _small_graph() -> Iterator[None]:
    """Record operations of a few values. Gradient checkpointing must not forget them: it would repeat all for each.

    Keep them detached: a sigmoid that keeps its own output with the graph behind it is never freed.
    """
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, _as_it_is):
        yield


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Refinement(torch.autograd.Function):
    """`ContextBottleneck.forward` with few passes over the map. They are the cost: the stem's map is 112×112.

    With y = x · channel gate, the result is y · spatial gate. Keep only x and the places of the maxima, compute y again
    in the backward pass, and leave the small gates to autograd. One of several equal maxima takes the gradient.
    Give no leaves to modules: some hooks, such as torch's FLOP counter, refuse them inside a backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: ContextBottleneck, *parameters: Tensor) -> Tensor:
        average = x.mean((2, 3), keepdim=True)
        if x.is_cuda:  # where adaptive pooling reads each map with a single thread
            maximum, place = (found.unsqueeze(3) for found in x.flatten(2).max(2, keepdim=True))
        else:
            maximum, place = F.adaptive_max_pool2d(x, 1, return_indices=True)
        ctx.pooled = (average.requires_grad_(), maximum.requires_grad_())
        with _small_graph():
            ctx.channel_gate = block.channel_gate(*(leaf.view_as(leaf) for leaf in ctx.pooled))  # see the class
        y = x * ctx.channel_gate.detach()
        maximum, channel = y.max(1, keepdim=True)
        ctx.planes = torch.cat([y.mean(1, keepdim=True), maximum], 1).requires_grad_()
        with _small_graph():
            ctx.spatial_gate = block.spatial_gate(ctx.planes.view_as(ctx.planes))
        ctx.block = block
        ctx.channel_weights, ctx.spatial_weights = list(block.channel.parameters()), list(block.spatial.parameters())
        ctx.save_for_backward(x, place, channel)
        return y.mul_(ctx.spatial_gate.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, place, channel = ctx.saved_tensors
        if torch.is_grad_enabled() or not values_are_readable(gradient) or is_legacy_batchedtensor(gradient):
            return _Refinement._plain_backward(ctx, x, gradient)
        maps, slopes = x.flatten(2), gradient.flatten(2)  # [B, C, N] of N pixels, in either memory format
        gate = ctx.channel_gate.detach().flatten(2).to(x.dtype)  # [B, C, 1]; autocast may have made it half
        at_spatial_gate = (gate.mT @ (slopes * maps)).view_as(ctx.spatial_gate)
        *spatial_weights, at_planes = torch.autograd.grad(
            ctx.spatial_gate, [*ctx.spatial_weights, ctx.planes], at_spatial_gate.to(ctx.spatial_gate.dtype), True
        )
        at_mean, at_maximum = at_planes.flatten(2).split(1, 1)  # [B, 1, N] each
        at_y = slopes * ctx.spatial_gate.detach().flatten(2)  # [B, C, N]
        at_y += at_mean / x.shape[1]
        # Indexing, for no place comes twice, and a scatter on a CPU copies the whole map where it is half-precision.
        images, channels, pixels = (torch.arange(size, device=x.device) for size in maps.shape)
        at_y[images[:, None], channel.flatten(1), pixels] += at_maximum.squeeze(1)
        at_channel_gate = (at_y * maps).sum(2).view_as(ctx.channel_gate).to(ctx.channel_gate.dtype)
        *channel_weights, at_average, at_maximum = torch.autograd.grad(
            ctx.channel_gate, [*ctx.channel_weights, *ctx.pooled], at_channel_gate, True
        )
        at_x = at_y.mul_(gate)
        at_x += at_average.flatten(2) / maps.shape[2]
        at_x[images[:, None], channels, place.flatten(1)] += at_maximum.flatten(1)
        return at_x.view_as(x), None, *channel_weights, *spatial_weights

    @staticmethod
    def _plain_backward(ctx: Any, x: Tensor, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Compute gradients that are differentiated in their turn, or many at once by torch.func.vmap."""
        weights = [*ctx.channel_weights, *ctx.spatial_weights]
        named = {name: weight for (name, _), weight in zip(ctx.block.named_parameters(), weights, strict=True)}
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            refined = torch.func.functional_call(ctx.block, named, (x,), {"fused": False})
            at_x, *rest = torch.autograd.grad(refined, [x, *weights], gradient, create_graph=differentiable)
        return at_x, None, *rest


class MultiLevelAggregator(nn.Module):
    """Blend refined maps of every level into the compound representation u (section III-A of the paper).

    Pooling comes before the projection: a 1×1 convolution commutes with averaging, so this equals the authors'
    order of operations at a fraction of the work. One convolution over the concatenation equals one per level, summed.

    Args:
        config: the aggregation fields.
        channels: channels of every level.

    Raises:
        ValueError: a level that the backbone does not have.
    """

    def __init__(self, config: MLVICXConfig, channels: list[int]) -> None:
        super().__init__()
        self.levels = list(range(len(channels))) if config.aggregation_levels is None else config.aggregation_levels
        unknown = [level for level in self.levels if not 0 <= level < len(channels)]
        if unknown:
            raise ValueError(
                f"aggregation_levels={self.levels} found; {config.backbone} has levels 0 to {len(channels) - 1}"
            )
        self.size = config.aggregation_size
        self.resize = config.aggregation_resize
        # No bias, because the batch normalisation behind the first expander layer would cancel it.
        self.projection = nn.Conv2d(sum(channels[i] for i in self.levels), config.aggregation_channels, 1, bias=False)

    def forward(self, maps: tuple[Tensor, ...]) -> Tensor:
        """Maps [B, C_p, H_p, W_p] of all levels to u, [B, aggregation_channels, size, size]."""
        return self.projection(torch.cat([self._pool(maps[level]) for level in self.levels], 1))

    def _pool(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, size, size]."""
        if self.resize is not None:
            x = F.interpolate(x, (self.resize, self.resize), mode="bilinear", align_corners=False)
        return average_pool(x, self.size)


def average_pool(x: Tensor, size: int) -> Tensor:
    """Average a map [B, C, H, W] on a grid, [B, C, size, size], with a deterministic gradient if that is asked for."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.adaptive_avg_pool2d(x, size)
    # On GPUs the gradient of that is not deterministic. Matrix products give the same averages, and are.
    rows, columns = (_averages(side, size).to(x) for side in x.shape[2:])
    x = columns @ x.permute(0, 2, 3, 1)  # [B, H, size, C]
    x = (rows @ x.flatten(2)).unflatten(2, (size, -1))  # [B, size, size, C]
    return x.permute(0, 3, 1, 2)


def _averages(side: int, size: int) -> Tensor:
    """Make the matrix [size, side] whose products are the averages of `adaptive_avg_pool1d`."""
    matrix = torch.zeros(size, side)
    for row in range(size):
        start, end = row * side // size, -(-(row + 1) * side // size)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


class Expander(nn.Sequential):
    """MLP from a representation to the embedding on which the loss is computed (g and h of section III-B).

    Linear layers with batch normalisation and ReLU between them, without a bias where a normalisation or the loss
    would cancel it.

    Args:
        in_features: width of the representation.
        dims: widths of the linear layers.
        final_norm: batch normalisation after the last layer too.
    """

    def __init__(self, in_features: int, dims: list[int], final_norm: bool) -> None:
        layers: list[nn.Module] = []
        for i, width in enumerate(dims):
            last = i == len(dims) - 1
            layers.append(nn.Linear(in_features, width, bias=False))
            if not last or final_norm:
                layers.append(nn.BatchNorm1d(width))
            if not last:
                layers.append(nn.ReLU(inplace=True))
            in_features = width
        if final_norm:  # a constant shift of all embeddings cancels in the loss: keep it, do not train it
            keep_shift(layers[-1])
        super().__init__(*layers)


def keep_shift(norm: nn.Module) -> None:
    """Make the shift of a normalisation a buffer: a checkpoint holds it, and nothing trains it."""
    shift: Any = norm.bias
    del norm.bias
    norm.register_buffer("bias", shift.detach())


class DecoderBlock(nn.Sequential):
    """Two 3×3 convolutions with batch normalisation and ReLU.

    Args:
        in_channels: channels of the upsampled map and its skip connection together.
        out_channels: channels of the result.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
            layers += [nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)]
        super().__init__(*layers)


class UNetDecoder(nn.Module):
    """U-Net decoder over the refined maps and, at full resolution, the input itself.

    Args:
        config: `decoder_hidden_sizes` and `num_channels`.
        channels: channels of every level, finest first.

    Raises:
        ValueError: another number of widths than the backbone has levels.
    """

    def __init__(self, config: MLVICXConfig, channels: list[int]) -> None:
        super().__init__()
        widths = config.decoder_hidden_sizes or [16 * 2**i for i in reversed(range(len(channels)))]
        if len(widths) != len(channels):
            raise ValueError(
                f"decoder_hidden_sizes={widths} found; {config.backbone} has {len(channels)} levels, one width each"
            )
        below = [channels[-1], *widths[:-1]]
        skips = [*reversed(channels[:-1]), config.num_channels]
        self.blocks = nn.ModuleList(
            DecoderBlock(b + s, width) for b, s, width in zip(below, skips, widths, strict=True)
        )
        self.classifier = nn.Conv2d(widths[-1], int(config.num_labels or 0), 1)

    def forward(self, maps: tuple[Tensor, ...], pixel_values: Tensor) -> Tensor:
        """Compute logits [B, num_labels, H, W] from the refined maps, finest first, and the input [B, C, H, W]."""
        x = maps[-1]
        for block, skip in zip(self.blocks, (*reversed(maps[:-1]), pixel_values), strict=True):
            x = F.interpolate(x, skip.shape[2:], mode="nearest")  # whose gradient is deterministic on GPUs, too
            x = block(torch.cat([x, skip], 1))
        return self.classifier(x)
