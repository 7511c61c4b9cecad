# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Invariance, variance and covariance of a batch of embeddings: Eqs. 3-8 of MLVICX (arXiv 2403.11504).

Pure functions of [batch, dimension] tensors, computed in at least float32 whatever autocast says. Each is named for
its equation; the weights and their sums are in `variance_covariance_loss`. `segmentation_loss` is what the
segmentation head minimises.

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


class LossTerms(NamedTuple):
    """One of the two losses, L_G or L_L: the weighted sum and its unweighted terms, all scalars."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def _at_least_float32(embeddings: Tensor) -> Tensor:
    return embeddings if embeddings.dtype == torch.float64 else embeddings.float()


def _check_batch(embeddings: Tensor) -> None:
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)} found; expected [batch, dimension]")
    if embeddings.shape[0] < 2:
        raise ValueError(f"a batch of {embeddings.shape[0]} found; variance and covariance need at least 2 samples")


def invariance_loss(z_1: Tensor, z_2: Tensor, reduction: str = "mean") -> Tensor:
    """Squared distance between the embeddings of the two views (Eq. 6).

    Differs from the paper: the default also averages over the dimensions, which VICReg's weights 25/25/1 assume.

    Args:
        z_1: embeddings of view 1, [b, r].
        z_2: embeddings of view 2, [b, r].
        reduction: "mean" over batch and dimensions, or "sum" over the dimensions, Eq. 6 to the letter.

    Raises:
        ValueError: shapes that differ, or an unknown reduction.
    """
    if z_1.shape != z_2.shape:
        raise ValueError(f"views of shapes {tuple(z_1.shape)} and {tuple(z_2.shape)} found; expected equal shapes")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r} found; expected 'mean' or 'sum'")
    with torch.autocast(z_1.device.type, enabled=False):
        squares = (_at_least_float32(z_1) - _at_least_float32(z_2)).square()
        return squares.mean() if reduction == "mean" else squares.sum(1).mean()


def variance_loss(z: Tensor, target: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """Hinge that keeps the standard deviation of every dimension above a target (Eq. 7).

    Differs from the paper: ε stands under the root, whose gradient is infinite at zero otherwise.

    Args:
        z: embeddings, [b, r].
        target: Λ, the standard deviation below which a dimension is penalised.
        epsilon: ε.

    Raises:
        ValueError: fewer than two samples, or not two-dimensional.
    """
    _check_batch(z)
    with torch.autocast(z.device.type, enabled=False):
        deviation = (_at_least_float32(z).var(0) + epsilon).sqrt()  # [r]
        return (target - deviation).relu().mean()


def covariance_loss(z: Tensor) -> Tensor:
    """Squares of the off-diagonal covariances, summed, over the dimension (Eq. 8).

    With centred Z, ‖ZᵀZ‖ = ‖ZZᵀ‖ (Frobenius), so the smaller of the r×r covariance and the b×b Gram matrix serves.

    Args:
        z: embeddings, [b, r].

    Raises:
        ValueError: fewer than two samples, or not two-dimensional.
    """
    _check_batch(z)
    batch, dimension = z.shape
    with torch.autocast(z.device.type, enabled=False):
        z = _at_least_float32(z)
        z = (z - z.mean(0)) / (batch - 1) ** 0.5
        if batch <= dimension:
            off_diagonal = (z @ z.T).square().sum() - z.square().sum(0).square().sum()
        else:
            covariance = z.T @ z  # [r, r]
            off_diagonal = (covariance - covariance.diagonal().diag()).square().sum()
        return off_diagonal / dimension


def variance_covariance_loss(
    z_1: Tensor,
    z_2: Tensor,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    variance_target: float = 1.0,
    variance_epsilon: float = 1e-4,
    invariance_reduction: str = "mean",
) -> LossTerms:
    """L_G of Eq. 3 or L_L of Eq. 4: α·inv + β·var + γ·cov of the embeddings of two views.

    The variance term is the mean of the two views' (halved, as VICReg's code has it), the covariance term their sum.

    Args:
        z_1: embeddings of view 1, [b, r].
        z_2: embeddings of view 2, [b, r].
        invariance_weight: α.
        variance_weight: β.
        covariance_weight: γ.
        variance_target: Λ.
        variance_epsilon: ε.
        invariance_reduction: see `invariance_loss`.
    """
    invariance = invariance_loss(z_1, z_2, invariance_reduction)
    variance = (
        variance_loss(z_1, variance_target, variance_epsilon) + variance_loss(z_2, variance_target, variance_epsilon)
    ) / 2
    covariance = covariance_loss(z_1) + covariance_loss(z_2)
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return LossTerms(loss, invariance, variance, covariance)


class _GatherBatch(torch.autograd.Function):
    """All ranks' samples in rank order; backward sums every rank's gradient of this rank's samples."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        parts = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, local)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def gather_batch(local: Tensor) -> Tensor:
    """Embeddings of the global batch [W·b, r] from this process's [b, r], with gradients; itself in one process.

    Every rank computes the loss of the global batch. The gathered gradient is the sum over W ranks and distributed
    data parallel averages over W, so parameter gradients equal those of one process with the whole batch.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return local
    return _GatherBatch.apply(local.contiguous())


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Cross-entropy plus soft Dice loss, for one structure or several classes.

    With one logit a pixel: binary cross-entropy and the Dice loss of the structure. With K logits: cross-entropy over
    the classes and the mean Dice loss of the foreground classes 1 to K-1. Dice is taken over the whole batch, so images
    without the structure need no convention.

    Args:
        logits: [B, K, H, W]; K of 1 for a binary mask.
        labels: [B, H, W], 0 to K-1 (binary: 0 or 1), or `ignore_index` for pixels that do not count.
        ignore_index: see there.

    Returns:
        Scalar; 0, with gradients of 0, when no pixel counts.

    Raises:
        ValueError: labels of another shape, or a value out of range.
    """
    if labels.shape != (logits.shape[0], *logits.shape[2:]):
        expected = (logits.shape[0], *logits.shape[2:])
        raise ValueError(f"labels of shape {tuple(labels.shape)} found; expected {expected}, a class index a pixel")
    classes = max(2, logits.shape[1])
    known = labels != ignore_index
    if not torch.compiler.is_compiling() and bool(((labels < 0) | (labels >= classes))[known].any()):
        found = labels[known].unique().tolist()
        raise ValueError(f"labels with the values {found} found; expected 0 to {classes - 1}, or {ignore_index}")
    with torch.autocast(logits.device.type, enabled=False):
        logits = _at_least_float32(logits)
        truth = torch.where(known, labels, 0).long()
        target = F.one_hot(truth, classes).movedim(-1, 1).to(logits.dtype)[:, 1:]  # [B, K-1, H, W]
        if logits.shape[1] == 1:
            entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none").squeeze(1)
            probability = logits.sigmoid()
        else:
            entropy = F.cross_entropy(logits, truth, reduction="none")
            probability = logits.softmax(1)[:, 1:]
        mean = (entropy * known).sum() / known.sum().clamp(min=1)
        weight = known[:, None]
        overlap = (probability * target * weight).sum((0, 2, 3))  # [K-1]
        total = ((probability + target) * weight).sum((0, 2, 3))
        dice = (2 * overlap + 1) / (total + 1)  # the 1 keeps a batch without the structure from dividing by 0
        return mean + (1 - dice).mean()
