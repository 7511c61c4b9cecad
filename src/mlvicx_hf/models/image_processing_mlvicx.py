# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Turn any picture of a chest radiograph into normalised `pixel_values` [B, num_channels, H, W].

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .hub_mlvicx import IMAGE_PROCESSOR_AUTO_MAP, save_code

FITS = ("pad", "squash", "crop")
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, what PIL's mode "L" uses
BIT_DEPTHS = (8, 10, 12, 14, 16)


def full_scale(maximum: int) -> int:
    """Find the largest value of the smallest usual bit depth (8, 10, 12, 14, 16) that holds `maximum`.

    A 16-bit file rarely says how many of its bits are used, and radiographs of 12 bits in 16 are common.

    Raises:
        ValueError: `maximum` does not fit into 16 bits.
    """
    for bits in BIT_DEPTHS:
        if maximum < 2**bits:
            return 2**bits - 1
    raise ValueError(f"pixel value {maximum} found; expected at most 16 bits (65535)")


def _pil_to_array(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to an array [H, W] or [H, W, C] without loss of depth."""
    if image.mode in ("L", "RGB", "F", "I", "1") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "LA" or image.mode == "La":
        return np.asarray(image)[..., 0]
    return np.asarray(image.convert("RGB"))  # palette, RGBA, CMYK, YCbCr, LAB, HSV


def _channels_first(array: np.ndarray) -> np.ndarray:
    """Bring [H, W], [H, W, C] or [C, H, W] to [C, H, W] with C of 1 or 3. Drop an alpha channel."""
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
    """Convert one picture of any mode and bit depth to grey values in [0, 1].

    Divide integers by the full scale of their bit depth (see `full_scale`; no value is saturated). Floats must already
    lie in [0, 1]. Booleans become 0 and 1.

    Args:
        image: PIL image of any mode, or array or tensor [H, W], [H, W, C] or [C, H, W].

    Returns:
        Float32 tensor [1, H, W].

    Raises:
        ValueError: a shape, type or value range that no image has.
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


def _padded(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Find where "pad" puts a picture in a square: top, left, height, width."""
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - height) // 2, (size - width) // 2, height, width


def fit_square(
    image: torch.Tensor, size: int, fit: str = "pad", fill: float = 0, nearest: bool = False
) -> torch.Tensor:
    """Resize to a square, with antialiasing.

    Args:
        image: [..., H, W].
        size: side of the result in pixels.
        fit: what happens to an image that is not square. "pad" adds black borders; "squash" changes the aspect ratio;
            "crop" keeps the central square alone.
        fill: grey value of the borders.
        nearest: take the nearest pixel instead of a mean, for masks.

    Returns:
        Tensor [..., size, size] of the same type.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} found; expected one of {', '.join(FITS)}")
    height, width = image.shape[-2:]
    if fit == "crop":
        image = F.center_crop(image, [min(height, width)] * 2)
    elif fit == "pad":
        # Resize first and pad then, so that no border is interpolated into the image.
        top, left, height, width = _padded(height, width, size)
        image = _resize(image, height, width, nearest)
        return F.pad(image, [left, top, size - width - left, size - height - top], fill=fill)
    return _resize(image, size, size, nearest)


def _resize(image: torch.Tensor, height: int, width: int, nearest: bool) -> torch.Tensor:
    mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
    return F.resize(image, [height, width], mode, antialias=not nearest)


def unfit_square(logits: torch.Tensor, height: int, width: int, fit: str = "pad") -> torch.Tensor:
    """Invert `fit_square`: bring logits of the square back to the geometry of the image.

    Args:
        logits: [C, S, S].
        height: of the image.
        width: of the image.
        fit: how the square was made.

    Returns:
        [C, H, W]; with "crop" [C, s, s], the central square of the image.
    """
    if fit == "pad":
        top, left, inner_height, inner_width = _padded(height, width, logits.shape[-1])
        logits = logits[:, top : top + inner_height, left : left + inner_width]
    elif fit == "crop":
        height = width = min(height, width)
    return torch.nn.functional.interpolate(logits[None], (height, width), mode="bilinear", align_corners=False)[0]


def to_class_map(mask: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert a mask of class indices [H, W] to int64 [1, H, W].

    Raises:
        ValueError: another shape or type.
    """
    array = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise ValueError(f"mask of shape {array.shape} and type {array.dtype} found; expected whole numbers [H, W]")
    return torch.from_numpy(array.astype(np.int64))[None]


class MLVICXImageProcessor(BaseImageProcessor):
    """Turn pictures of chest radiographs into `pixel_values`: grey in [0, 1], square, normalised.

    Nothing is random. The constants are saved beside the model in `preprocessor_config.json`.

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

    def to_json_file(self, json_file_path: str | PathLike[str]) -> None:
        """As of the base class. A processor that names its code, in `auto_map`, is saved with the code."""
        if getattr(self, "auto_map", None):  # which transformers sets without declaring it
            self.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)
            save_code(Path(json_file_path).parent)
        super().to_json_file(json_file_path)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As of the base class. The code goes along, so that it also loads where this package is not installed."""
        self.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)
        return super().push_to_hub(*args, **kwargs)

    def normalize(self, unit: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # constants are the processor's own
        """Turn grey values in [0, 1], [..., 1, H, W], into model input [..., num_channels, H, W]."""
        pixels = (unit - self.image_mean) / self.image_std
        return pixels.expand(*pixels.shape[:-3], self.num_channels, *pixels.shape[-2:])

    def preprocess(
        self, images: Any, segmentation_maps: Any = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Prepare one image or a list of them.

        Args:
            images: one image or a list: PIL of any mode, or array or tensor [H, W], [H, W, C], [C, H, W]; a batch
                array or tensor has four dimensions.
            segmentation_maps: masks of class indices [H, W], as many and of the size of their images.
            return_tensors: "pt" or "np".

        Returns:
            `pixel_values` [B, num_channels, image_size, image_size], float32, and with masks `labels`
            [B, image_size, image_size], int64, through the same geometry; borders are class 0.

        Raises:
            ValueError: something that is no image, or a mask that does not fit its image.
        """
        items = _as_list(images, batch_dimensions=4)
        if not items:
            raise ValueError("no images found; expected at least one")
        gray = [to_unit_gray(image) for image in items]
        pixels = torch.stack([fit_square(image, self.image_size, self.fit) for image in gray])
        data = {"pixel_values": self.normalize(pixels).contiguous()}
        if segmentation_maps is not None:
            masks = [to_class_map(mask) for mask in _as_list(segmentation_maps, batch_dimensions=3)]
            if len(masks) != len(gray):
                raise ValueError(f"{len(masks)} masks found; expected {len(gray)}, one an image")
            for image, mask in zip(gray, masks, strict=True):
                if mask.shape != image.shape:
                    found, expected = tuple(mask.shape[1:]), tuple(image.shape[1:])
                    raise ValueError(f"mask of {found} pixels found; expected the size of its image, {expected}")
            data["labels"] = torch.cat([fit_square(mask, self.image_size, self.fit, nearest=True) for mask in masks])
        return BatchFeature(data, tensor_type=return_tensors)

    def post_process_semantic_segmentation(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | None = None
    ) -> list[torch.Tensor]:
        """Find the class of every pixel, in the geometry of the original images.

        Args:
            outputs: of `MLVICXForSemanticSegmentation`, with logits [B, K, H, W].
            target_sizes: (height, width) of the original images; by default the resolution of the logits. Borders that
                `fit` added are removed; pixels that it cut off get class 0.

        Returns:
            For each image int64 [height, width]: the class with the highest logit; with one logit, 1 where it is
            above 0.

        Raises:
            ValueError: another number of sizes than images.
        """
        logits = outputs.logits.float()
        if target_sizes is None:
            return list(_decide(logits))
        if len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target_sizes found; expected {len(logits)}, one an image")
        maps = []
        for image, size in zip(logits, target_sizes, strict=True):
            height, width = (int(side) for side in size)
            classes = _decide(unfit_square(image, height, width, self.fit)[None])[0]
            # center_crop pads where the target is larger, as `fit="crop"` needs
            maps.append(F.center_crop(classes[None], [height, width])[0])
        return maps


def _as_list(images: Any, batch_dimensions: int) -> list[Any]:
    """Split a list or a batch array into its items; a single item becomes a list."""
    if isinstance(images, (list, tuple)) or (
        not isinstance(images, Image.Image) and np.ndim(images) == batch_dimensions
    ):
        return list(images)
    return [images]


def _decide(logits: torch.Tensor) -> torch.Tensor:
    """Choose classes [B, H, W] by logits [B, K, H, W]."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


__all__ = ["MLVICXImageProcessor"]
