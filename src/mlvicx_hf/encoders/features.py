"""Features of the images of a prepared cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor


class PreparedImages(Dataset[dict[str, Tensor]]):
    """Images of a cache as model input, without labels; nothing random.

    Args:
        images: rows with `image`.
        processor: of the model.
    """

    def __init__(self, images: Any, processor: MLVICXImageProcessor) -> None:
        self.images, self.processor = images, processor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.processor(self.images[index]["image"])["pixel_values"][0]}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; behind it every part is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def encode(
    encoder: nn.Module,
    images: Dataset[dict[str, Tensor]],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    show: bool = True,
) -> dict[str, Tensor]:
    """Pooled features of images, once and in order, in evaluation mode.

    Args:
        encoder: `MLVICXModel`, on that device.
        images: give `pixel_values`, and what else they like.
        batch_size: images encoded at a time.
        device: of the encoder.
        show: a progress bar.

    Returns:
        `features` [N, C], float32 on the CPU, and what else the images give, such as `labels`.
    """
    columns: dict[str, list[Tensor]] = {"features": []}
    loader = DataLoader(images, batch_size, generator=torch.Generator())  # else it draws from the global one
    with evaluating(encoder), progress_bar(len(images), "encoding", "img", show=show) as bar:  # type: ignore[arg-type]
        for batch in loader:
            pixels = batch.pop("pixel_values")
            # Kernels are chosen by shape: with full batches alone no last digit depends on how many images are left.
            full = nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, batch_size - len(pixels)))
            columns["features"].append(encoder(full.to(device)).pooler_output[: len(pixels)].float().cpu())
            for name, values in batch.items():
                columns.setdefault(name, []).append(values)
            bar.update(len(pixels))
    return {name: torch.cat(parts) for name, parts in columns.items()}
