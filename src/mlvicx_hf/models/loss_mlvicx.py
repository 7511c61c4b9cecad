# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Invariance, variance and covariance of a batch of embeddings: Eqs. 3-8 of MLVICX (arXiv 2403.11504).

Functions of [batch, dimension] tensors, computed in float32 or more, also under autocast. `variance_covariance_loss`
weights and adds the terms. `multi_label_loss`, `single_label_loss` and `segmentation_loss` are those of the heads.

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

_UNKNOWN_CLASS = -100  # as torch and transformers have it


class LossTerms(NamedTuple):
    """One of the two losses, L_G or L_L: the weighted sum and its unweighted terms, all scalars."""

    loss: Tensor
    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Convert anything but float64 to float32."""
    return values if values.dtype == torch.float64 else values.float()


def own_precision(tensor: Tensor) -> AbstractContextManager[Any]:
    """Switch autocast off on the device of a tensor; rounded to half precision, sums and scores would be too coarse."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def _check_batch(embeddings: Tensor) -> None:
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings of shape {tuple(embeddings.shape)} found; expected [batch, dimension]")
    if embeddings.shape[0] < 2:
        raise ValueError(f"a batch of {embeddings.shape[0]} found; variance and covariance need at least 2 samples")


def invariance_loss(z_1: Tensor, z_2: Tensor, reduction: str = "mean") -> Tensor:
    """Compute the squared distance between the embeddings of the two views (Eq. 6).

    Unlike the paper, average over the dimensions by default: VICReg's weights 25/25/1 assume that.

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
    with own_precision(z_1):
        squares = (at_least_float32(z_1) - at_least_float32(z_2)).square()
        return squares.mean() if reduction == "mean" else squares.sum(1).mean()


def variance_loss(z: Tensor, target: float = 1.0, epsilon: float = 1e-4) -> Tensor:
    """Compute the hinge that keeps the standard deviation of every dimension above a target (Eq. 7).

    Unlike in the paper, ε stands under the root: otherwise its gradient at zero is infinite.

    Args:
        z: embeddings, [b, r].
        target: Λ, the standard deviation below which a dimension is penalised.
        epsilon: ε.

    Raises:
        ValueError: fewer than two samples, or not two-dimensional.
    """
    _check_batch(z)
    with own_precision(z):
        return _hinge(_center(at_least_float32(z)[None]), target, epsilon).squeeze(0)


def covariance_loss(z: Tensor) -> Tensor:
    """Sum the squares of the off-diagonal covariances, and divide by the dimension (Eq. 8).

    With centred Z, ‖ZᵀZ‖ = ‖ZZᵀ‖ (Frobenius). So use the smaller of the r×r covariance and the n×n Gram matrix.

    Args:
        z: embeddings, [b, r].

    Raises:
        ValueError: fewer than two samples, or not two-dimensional.
    """
    _check_batch(z)
    with own_precision(z):
        return _off_diagonal(_center(at_least_float32(z)[None])).squeeze(0)


def _center(z: Tensor) -> Tensor:
    """Centre over the global batch of n and divide by √(n-1), [V, b, r]: then squares add up to the variance."""
    count = z.shape[1] * world_size()
    return (z - sum_over_ranks(z.sum(1, keepdim=True)) / count) / (count - 1) ** 0.5


def _hinge(centered: Tensor, target: float, epsilon: float) -> Tensor:
    """Eq. 7 of each view, [V]."""
    deviation = (sum_over_ranks(centered.square().sum(1)) + epsilon).sqrt()  # [V, r]
    return (target - deviation).relu().mean(1)


def _off_diagonal(centered: Tensor) -> Tensor:
    """Eq. 8 of each view, [V]."""
    squares: Tensor = _OffDiagonalSquares.apply(centered)
    return squares / centered.shape[2]


class _OffDiagonalSquares(torch.autograd.Function):
    """Sum of squares of the off-diagonal covariances: from [V, b, r] of this rank to [V] of the global batch.

    Every rank computes its own rows, forward and backward. The gradient of ‖ZZᵀ‖² is 4 ZZᵀZ, so a rank needs no other
    rank's gradient. Autograd would compute it twice.
    """

    @staticmethod
    def forward(ctx: Any, centered: Tensor) -> Tensor:
        count = centered.shape[1] * world_size()
        if count <= centered.shape[2]:
            everyone = gather_batch(centered)  # [V, n, r]
            products = centered @ everyone.mT  # [V, b, n], this rank's rows of the Gram matrix
            variance = everyone.square().sum(1, keepdim=True)  # [V, 1, r], the diagonal of the covariance
            squares = _all_reduce(products.square().sum((1, 2))) - variance.square().sum((1, 2))
            ctx.save_for_backward(centered, products, everyone, variance)
        else:
            products = _all_reduce(centered.mT @ centered)  # [V, r, r]
            products.diagonal(dim1=1, dim2=2).zero_()
            squares = products.square().sum((1, 2))
            ctx.save_for_backward(centered, products)
        return squares

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        centered, products, *rest = ctx.saved_tensors
        if torch.is_grad_enabled() and values_are_readable(centered):  # for second derivatives nothing is a constant
            if world_size() > 1:
                raise RuntimeError("a second derivative over several processes found; expected first ones there")
            slope = centered @ centered.mT @ centered - centered * centered.square().sum(1, keepdim=True)
        elif rest:
            everyone, variance = rest
            slope = products @ everyone - centered * variance
        else:
            slope = centered @ products
        # The gradient of the sum of all ranks' losses, as in `sum_over_ranks`.
        return 4 * world_size() * gradient[:, None, None] * slope


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
    """Compute L_G of Eq. 3 or L_L of Eq. 4: α·inv + β·var + γ·cov of the embeddings of two views.

    The variance term is the mean over the two views (as in VICReg's code), the covariance term the sum. Under
    torch.distributed all terms are those of the global batch, and every process computes its share.

    Args:
        z_1: this process's embeddings of view 1, [b, r]; all processes have equally many.
        z_2: likewise of view 2.
        invariance_weight: α.
        variance_weight: β.
        covariance_weight: γ.
        variance_target: Λ.
        variance_epsilon: ε.
        invariance_reduction: see `invariance_loss`.
    """
    invariance = sum_over_ranks(invariance_loss(z_1, z_2, invariance_reduction)) / world_size()
    _check_batch(z_1)
    with own_precision(z_1):
        centered = _center(torch.stack([at_least_float32(z_1), at_least_float32(z_2)]))  # [2, b, r]
        variance = _hinge(centered, variance_target, variance_epsilon).mean()
        covariance = _off_diagonal(centered).sum()
    loss = invariance_weight * invariance + variance_weight * variance + covariance_weight * covariance
    return LossTerms(loss, invariance, variance, covariance)


def world_size() -> int:
    """Number of processes that share a batch."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(tensor: Tensor) -> Tensor:
    """Add up over all ranks, without gradients."""
    if world_size() > 1:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _all_reduce(local.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient.clone())


def sum_over_ranks(local: Tensor) -> Tensor:
    """Add up over all processes, with gradients.

    Every rank computes the loss of the global batch, and the gradient is that of the sum of all ranks' losses.
    Distributed data parallel averages over the W ranks, so parameters get the gradients of one process with the
    whole batch.
    """
    return local if world_size() == 1 else _SumOverRanks.apply(local)


def gather_batch(local: Tensor) -> Tensor:
    """Gather the samples of all ranks, in rank order and without gradients: [V, b, r] to [V, W·b, r].

    All ranks must have the same number of samples.
    """
    if world_size() == 1:
        return local
    local = local.contiguous()
    parts = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(parts, local)
    return torch.cat(parts, 1)


def values_are_readable(*tensors: Tensor) -> bool:
    """Say whether code may look at the values of tensors: not while a compiler, a tracer or torch.func runs it."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()  # what autograd itself asks; there is no public way
        or any(tensor.is_meta for tensor in tensors)
    )


def _is_to_check(labels: Tensor, check: bool | None) -> bool:
    """Say whether to look at the labels. On a GPU that waits for the device, which must not happen in every step."""
    if not values_are_readable(labels):
        return False
    return labels.device.type == "cpu" or not torch.is_grad_enabled() if check is None else check


def _refuse(wrong: Tensor, labels: Tensor, expected: str) -> None:
    """Raise ValueError if any label is wrong."""
    if bool(wrong.any()):
        found = labels[wrong].unique().tolist()
        more = ", …" if len(found) > 5 else ""
        values = ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in found[:5])
        raise ValueError(f"labels with the values [{values}{more}] found; expected {expected}")


def _check_class_indices(labels: Tensor, shape: tuple[int, ...], hint: str) -> None:
    if labels.shape != shape:
        raise ValueError(f"labels of shape {tuple(labels.shape)} found; expected {tuple(shape)}, {hint}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels of type {labels.dtype} found; expected an integer type, {hint}")


def multi_label_loss(
    logits: Tensor, labels: Tensor, positive_weights: list[float] | None = None, check: bool | None = None
) -> Tensor:
    """Compute the binary cross-entropy over the known labels.

    Args:
        logits: [B, L].
        labels: [B, L], from 0 to 1, or NaN for unknown labels, which do not count.
        positive_weights: L weights of the positives, None for 1.
        check: whether to look at the labels' values. None: always on the CPU; on a GPU only without gradients, because
            looking waits for the device. A wrong value that is not looked at makes the loss and its gradients NaN.

    Returns:
        Mean over the known labels; 0, with gradients of 0, if no label is known.

    Raises:
        ValueError: labels of another shape than the logits, or a value outside of 0 to 1.
    """
    if labels.shape != logits.shape:
        hint = "class indices need problem_type='single_label_classification'"
        if labels.shape == logits.shape[:1] and logits.shape[1] == 1:
            hint = "of one finding: labels[:, None]"
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} found; expected {tuple(logits.shape)}, as the logits ({hint})"
        )
    known = ~labels.isnan()
    wrong = known & ~((labels >= 0) & (labels <= 1))
    if _is_to_check(labels, check):
        _refuse(wrong, labels, "0 for absent, 1 for present (or a probability between them), NaN for unknown")
    labels = labels.to(logits.dtype)
    weight = None if positive_weights is None else logits.new_tensor(positive_weights)
    losses = F.binary_cross_entropy_with_logits(logits, labels.nan_to_num(0.0), pos_weight=weight, reduction="none")
    losses = losses * torch.where(wrong, torch.nan, 1.0).to(losses.dtype)
    return (losses * known).sum() / known.sum().clamp(min=1)


def single_label_loss(logits: Tensor, labels: Tensor, check: bool | None = None) -> Tensor:
    """Compute the cross-entropy of exclusive classes over the images whose class is known.

    Args:
        logits: [B, L].
        labels: [B], class indices 0 to L-1, or -100 for images that do not count.
        check: see `multi_label_loss`.

    Returns:
        Mean over the images that count; 0, with gradients of 0, if none counts.

    Raises:
        ValueError: labels of another shape or type, or a value out of range.
    """
    hint = "class indices (of one-hot labels: `labels.argmax(1)`)"
    _check_class_indices(labels, (logits.shape[0],), hint)
    labels = labels.long()
    known = labels != _UNKNOWN_CLASS
    wrong = known & ((labels < 0) | (labels >= logits.shape[1]))
    if _is_to_check(labels, check):
        expected = f"class indices from 0 to {logits.shape[1] - 1}, or {_UNKNOWN_CLASS} for images that do not count"
        _refuse(wrong, labels, expected)
    # A GPU stops for good at an index out of range. NaN shows, too, and says nothing else.
    labels = labels.masked_fill(wrong, _UNKNOWN_CLASS)
    loss = F.cross_entropy(logits, labels, ignore_index=_UNKNOWN_CLASS, reduction="sum") / known.sum().clamp(min=1)
    return loss * torch.where(wrong.any(), torch.nan, 1.0)


def segmentation_loss(logits: Tensor, labels: Tensor, ignore_index: int = 255, check: bool | None = None) -> Tensor:
    """Compute cross-entropy plus soft Dice loss, for one structure or several classes.

    With one logit a pixel: binary cross-entropy and the Dice loss of the structure. With K logits: cross-entropy over
    the classes and the mean Dice loss of the foreground classes 1 to K-1. Dice is computed over the whole batch, so
    images without the structure need no convention.

    Args:
        logits: [B, K, H, W]; K of 1 for a binary mask.
        labels: [B, H, W], 0 to K-1 (binary: 0 or 1), or `ignore_index`.
        ignore_index: value of pixels that do not count.
        check: see `multi_label_loss`.

    Returns:
        Scalar; 0, with gradients of 0, if no pixel counts.

    Raises:
        ValueError: labels of another shape or type, or a value out of range.
    """
    _check_class_indices(labels, (logits.shape[0], *logits.shape[2:]), "a class index a pixel")
    labels, classes = labels.long(), max(2, logits.shape[1])
    known = labels != ignore_index
    wrong = known & ((labels < 0) | (labels >= classes))
    if _is_to_check(labels, check):
        _refuse(wrong, labels, f"0 to {classes - 1}, or {ignore_index}")
    with own_precision(logits):
        logits = at_least_float32(logits)
        truth = labels.masked_fill(~known | wrong, 0)
        foreground = torch.arange(1, classes, device=labels.device)[:, None, None]
        target = (truth[:, None] == foreground).to(logits.dtype)  # [B, K-1, H, W]
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
        dice = (2 * overlap + 1) / (total + 1)  # + 1, because a batch without the structure would divide by 0
        return (mean + (1 - dice).mean()) * torch.where(wrong.any(), torch.nan, 1.0)
