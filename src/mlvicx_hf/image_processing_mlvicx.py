# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Image processor: any picture of a chest radiograph to normalised `pixel_values` [B, num_channels, H, W].

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

FITS = ("pad", "squash", "crop")
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, what PIL's mode "L" uses
BIT_DEPTHS = (8, 10, 12, 14, 16)


def full_scale(maximum: int) -> int:
    """Largest value of the smallest usual bit depth (8, 10, 12, 14, 16) that holds `maximum`.

    A 16-bit file rarely says how many of its bits are used; 12-bit radiographs stored in 16 bits are common.

    Raises:
        ValueError: `maximum` does not fit into 16 bits.
    """
    for bits in BIT_DEPTHS:
        if maximum < 2**bits:
            return 2**bits - 1
    raise ValueError(f"pixel value {maximum} found; expected at most 16 bits (65535)")


def _pil_to_array(image: Image.Image) -> np.ndarray:
    """PIL image of any mode to an array [H, W] or [H, W, C] that keeps its depth."""
    if image.mode in ("L", "RGB", "F", "I", "1") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "LA" or image.mode == "La":
        return np.asarray(image)[..., 0]
    return np.asarray(image.convert("RGB"))  # palette, RGBA, CMYK, YCbCr, LAB, HSV


def _channels_first(array: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] to [C, H, W] with C of 1 or 3; an alpha channel is dropped."""
    if array.ndim == 2:
        return array[None]
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        channels = array
    elif array.ndim == 3 and array.shape[-1] in (1, 3, 4):
        channels = array.transpose(2, 0, 1)
    elif array.ndim == 3 and array.shape[0] in (1, 3, 4):
        channels = array
    else:
        raise ValueError(
            f"image of shape {array.shape} found; expected [H, W], [H, W, C] or [C, H, W] with C 1, 3 or 4"
        )
    return channels[:3]


def to_unit_gray(image: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """One picture of any mode and bit depth to grey values in [0, 1].

    Integers are divided by the full scale of their bit depth (16-bit values are rescaled, never saturated; see
    `full_scale`), floats must lie in [0, 1] already, booleans become 0 and 1.

    Args:
        image: PIL image of any mode, or array or tensor [H, W], [H, W, C] or [C, H, W].

    Returns:
        Float32 tensor [1, H, W].

    Raises:
        ValueError: a shape, type or value range that is not an image's.
    """
    if isinstance(image, Image.Image):
        array = _pil_to_array(image)
    elif isinstance(image, torch.Tensor):
        array = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).detach().cpu().numpy()
    else:
        array = np.asarray(image)
    array = _channels_first(array)
    if array.size == 0:
        raise ValueError(f"empty image of shape {array.shape} found; expected at least one pixel")
    kind = array.dtype.kind
    if kind not in "biuf":
        raise ValueError(f"image of type {array.dtype} found; expected boolean, integer or float pixels")
    low, high = array.min(), array.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise ValueError("image with NaN or infinite pixels found; expected finite values")
    if low < 0 or (kind == "f" and high > 1):
        expected = "[0, 1] for floats" if kind == "f" else "0 or more for integers"
        raise ValueError(f"image with values from {low} to {high} found; expected {expected}")
    scale = 255 if array.dtype == np.uint8 else full_scale(int(high)) if kind in "iu" else 1
    pixels = torch.from_numpy(array.astype(np.float32)) / scale  # [C, H, W]
    if len(pixels) == 3:
        pixels = (pixels * torch.tensor(LUMINANCE)[:, None, None]).sum(0, keepdim=True)
    return pixels


def fit_square(image: torch.Tensor, size: int, fit: str = "pad", fill: float = 0) -> torch.Tensor:
    """Resize to a square, antialiased, and say what happens to an image that is not one.

    Args:
        image: [..., H, W].
        size: side of the result in pixels.
        fit: "pad" keeps everything and the aspect ratio (black borders), "squash" keeps everything but not the
            aspect ratio, "crop" keeps the aspect ratio of the central square.
        fill: grey value of the borders.

    Returns:
        Tensor [..., size, size] of the same type.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} found; expected one of {', '.join(FITS)}")
    height, width = image.shape[-2:]
    if fit == "crop":
        image = F.center_crop(image, [min(height, width)] * 2)
    elif fit == "pad":
        # The long side first, then the border: a border is never interpolated into the image.
        scale = size / max(height, width)
        height, width = max(1, round(height * scale)), max(1, round(width * scale))
        image = F.resize(image, [height, width], antialias=True)
        left, top = (size - width) // 2, (size - height) // 2
        return F.pad(image, [left, top, size - width - left, size - height - top], fill=fill)
    return F.resize(image, [size, size], antialias=True)


class MLVICXImageProcessor(BaseImageProcessor):
    """Pictures of chest radiographs to `pixel_values`: grey in [0, 1], square, normalised.

    Deterministic: no random transforms. The constants are saved with the model as `preprocessor_config.json`.

    Args:
        image_size: side of the square in pixels.
        num_channels: 1, or 3 for weights that expect colour (the grey image repeated).
        image_mean: mean that is subtracted from grey values in [0, 1].
        image_std: standard deviation by which they are then divided.
        fit: what happens to an image that is not square, see `fit_square`.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the base class's own way

    def __init__(
        self,
        image_size: int = 224,
        num_channels: int = 1,
        image_mean: float = 0.5,
        image_std: float = 0.25,
        fit: str = "pad",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if fit not in FITS:
            raise ValueError(f"fit={fit!r} found; expected one of {', '.join(FITS)}")
        self.image_size = image_size
        self.num_channels = num_channels
        self.image_mean = image_mean
        self.image_std = image_std
        self.fit = fit

    def normalize(self, unit: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Grey values in [0, 1], [..., 1, H, W], to model input [..., num_channels, H, W]."""
        pixels = (unit - self.image_mean) / self.image_std
        return pixels.expand(*pixels.shape[:-3], self.num_channels, *pixels.shape[-2:])

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """Prepare one image or a list of them.

        Args:
            images: one image or a list: PIL of any mode, or array or tensor [H, W], [H, W, C], [C, H, W]; a batch
                array or tensor has four dimensions.
            return_tensors: "pt" or "np".

        Returns:
            `{"pixel_values": [B, num_channels, image_size, image_size]}`, float32.
        """
        batch = isinstance(images, (list, tuple)) or (not isinstance(images, Image.Image) and np.ndim(images) == 4)
        items = list(images) if batch else [images]
        if not items:
            raise ValueError("no images found; expected at least one")
        pixels = torch.stack([fit_square(to_unit_gray(image), self.image_size, self.fit) for image in items])
        return BatchFeature({"pixel_values": self.normalize(pixels).contiguous()}, tensor_type=return_tensors)


__all__ = ["MLVICXImageProcessor"]
