"""Features of the images of a prepared cache."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel


def prepared_images(images: datasets.Dataset, processor: MLVICXImageProcessor) -> Any:
    """Images of a cache as model input, without labels: a dataset whose rows have `pixel_values`.

    Args:
        images: rows with `image`.
        processor: the model's image processor.
    """
    return images.select_columns("image").with_transform(functools.partial(_prepare, processor))


def _prepare(processor: MLVICXImageProcessor, rows: dict[str, Any]) -> dict[str, Any]:
    return dict(processor(rows["image"]))


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode without gradients, and back to the mode that every part was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def encode(
    encoder: MLVICXModel,
    images: Dataset[dict[str, Tensor]],
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    show: bool = True,
    levels: str | None = None,
) -> dict[str, Tensor]:
    """Encode every image once, in order and in evaluation mode.

    Args:
        encoder: on that device.
        images: items with `pixel_values`, and other tensors if wanted.
        batch_size: images encoded at a time.
        device: where the encoder is.
        show: show a progress bar.
        levels: pool "last" or "all" levels; None for what the encoder's configuration says.

    Returns:
        `features` [N, C], float32 on the CPU, and the items' other tensors, such as `labels`.
    """
    columns: dict[str, list[Tensor]] = {"features": []}
    loader = DataLoader(images, batch_size, generator=torch.Generator())  # else it draws from the global one
    with evaluating(encoder), progress_bar(len(images), "encoding", "img", show=show) as bar:  # type: ignore[arg-type]  # it has a length
        for batch in loader:
            pixels = batch.pop("pixel_values")
            # torch chooses kernels by shape. Fill the last batch, so that no last digit depends on how full it is.
            full = nn.functional.pad(pixels, (0, 0, 0, 0, 0, 0, 0, batch_size - len(pixels)))
            maps = encoder(full.to(device), output_hidden_states=True).hidden_states
            columns["features"].append(encoder.pool(maps, levels)[: len(pixels)].float().cpu())
            for name, values in batch.items():
                columns.setdefault(name, []).append(values)
            bar.update(len(pixels))
    return {name: torch.cat(parts) for name, parts in columns.items()}
