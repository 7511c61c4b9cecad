"""The frozen protocol: a linear layer on features that are computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from .modeling_mlvicx import MLVICXForImageClassification
from .probing import encode


class LinearProbe(nn.Module):
    """The linear layer of a classifier, trained on standardised features of its frozen encoder.

    Standardising with the mean and deviation of the training features makes one learning rate fit encoders of any
    scale, pretrained and random alike. It is an affine map before an affine map: `fold` moves it into the layer.

    Args:
        model: classifier whose linear layer is trained, in place.
        features: training features [N, C].
        encode: features are computed from `pixel_values` in every step instead of given.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: MLVICXForImageClassification, features: Tensor, encode: bool) -> None:
        super().__init__()
        model.freeze_backbone()
        self.classifier = model.classifier
        self.encoder = model.mlvicx if encode else None
        self.loss: Callable[[Tensor, Tensor], Tensor] = model.compute_loss
        deviation = features.std(0, correction=0)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", deviation.clamp(min=1e-3 * float(deviation.max()) + 1e-12))

    def train(self, mode: bool = True) -> LinearProbe:
        """As `nn.Module.train`; the encoder stays in evaluation mode."""
        super().train(mode)
        if self.encoder is not None:
            self.encoder.train(False)
        return self

    def forward(
        self, features: Tensor | None = None, pixel_values: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits [B, L], and the loss if labels are given, from features [B, C] or images."""
        if self.encoder is not None:
            features = self.encoder(pixel_values).pooler_output
        assert features is not None
        logits = self.classifier((features - self.mean) / self.deviation)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}

    @torch.no_grad()
    def fold(self) -> None:
        """Make the linear layer work on plain features, with the same logits."""
        self.classifier.weight.div_(self.deviation)
        self.classifier.bias.sub_(self.classifier.weight @ self.mean)


def prepare_probe(
    model: MLVICXForImageClassification,
    splits: Mapping[str, Dataset[Any]],
    cache_features: bool,
    batch_size: int,
    device: torch.device,
) -> tuple[LinearProbe, Mapping[str, Dataset[Any]]]:
    """The probe of the frozen protocol, and its data: features computed once, or the images themselves.

    Args:
        model: classifier whose linear layer is trained, in place.
        splits: images by split; the features of "train" give the scale.
        cache_features: whether the features are computed once.
        batch_size: images encoded at a time.
        device: on which they are.
    """
    wanted = splits if cache_features else ("train",)
    encoder: nn.Module = model.mlvicx
    encoder.to(device)
    encoded = {split: encode(encoder, splits[split], batch_size, device) for split in wanted}
    probe = LinearProbe(model, encoded["train"]["features"], encode=not cache_features)
    if not cache_features:
        return probe, splits
    return probe, {split: _Features(columns["features"], columns["labels"]) for split, columns in encoded.items()}


class _Features(Dataset[dict[str, Tensor]]):
    """Features and labels under the names that the probe takes."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.rows = TensorDataset(features, labels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        features, labels = self.rows[index]
        return {"features": features, "labels": labels}
