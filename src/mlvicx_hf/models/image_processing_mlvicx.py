# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Turn any picture of a chest radiograph into normalised `pixel_values` [B, num_channels, H, W].

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .hub_mlvicx import IMAGE_PROCESSOR_AUTO_MAP, save_code

FITS = ("pad", "squash", "crop")
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R 601, what PIL's mode "L" uses
OVERSHOOT = 1e-3  # what may exceed [0, 1] in floats
_TAIL = 0.005  # of the pixels at each end may be clipped
RESAMPLING = {  # of PIL, as transformers numbers it; torchvision has no other for tensors
    Image.Resampling.NEAREST: InterpolationMode.NEAREST_EXACT,
    Image.Resampling.BILINEAR: InterpolationMode.BILINEAR,
    Image.Resampling.BICUBIC: InterpolationMode.BICUBIC,
}


def _robust_range(pixels: np.ndarray) -> tuple[float, float]:
    """Find the values that become black and white: the 0.5th and 99.5th percentile of the pixels off the border.

    Border pixels are those of the least and of the greatest value: collimation, padding, direct exposure, markers.
    Where nothing or one value alone is left without them, they count as well. A 16-bit image rarely says which part of
    its range the film fills, and one marker or dead pixel must not darken the film.
    """
    values, counts = np.unique(pixels, return_counts=True)
    for kept in (slice(1, -1), slice(None)):
        inner, reached = values[kept], np.cumsum(counts[kept])
        if len(inner):
            ends = np.searchsorted(reached, (_TAIL * reached[-1], (1 - _TAIL) * reached[-1]))
            low, high = (float(value) for value in inner[np.minimum(ends, len(inner) - 1)])
            if low < high:
                return low, high
    return float(values[0]), float(values[-1])


def _pil_to_array(image: Image.Image) -> np.ndarray:
    """Convert a PIL image of any mode to an array [H, W] or [H, W, C] without loss of depth."""
    if image.mode in ("L", "RGB", "F", "I", "1") or image.mode.startswith("I;16"):
        return np.asarray(image)
    if image.mode == "LA" or image.mode == "La":
        return np.asarray(image)[..., 0]
    return np.asarray(image.convert("RGB"))  # palette, RGBA, CMYK, YCbCr, LAB, HSV


def _channels_first(array: np.ndarray, layout: str | None = None) -> np.ndarray:
    """Bring [H, W], [H, W, C] or [C, H, W] to [C, H, W] with C of 1 or 3. Drop an alpha channel."""
    if array.ndim == 2:
        return array[None]
    if array.ndim < 2:
        raise ValueError(
            f"image of shape {array.shape} found; expected an array [H, W], such as np.array of nested lists"
        )
    first, last = (array.ndim == 3 and array.shape[axis] in (1, 3, 4) for axis in (0, -1))
    if last and layout != "channels_first":
        channels = array.transpose(2, 0, 1)
    elif first and layout != "channels_last":
        channels = array
    else:
        expected = {"channels_first": "[C, H, W]", "channels_last": "[H, W, C]"}.get(
            layout or "", "[H, W, C] or [C, H, W]"
        )
        raise ValueError(f"image of shape {array.shape} found; expected [H, W], {expected} with C 1, 3 or 4")
    return channels[:3]


def _to_array(image: Any, layout: str | None = None) -> np.ndarray:
    """Bring one picture to a numeric array [C, H, W], C of 1 or 3, without loss of depth.

    Raises:
        ValueError: what is no image, an empty one, or NaN and infinite pixels.
    """
    if isinstance(image, Image.Image):
        array = _pil_to_array(image)
    elif isinstance(image, torch.Tensor):
        array = (image.float() if image.dtype in (torch.bfloat16, torch.float16) else image).detach().cpu().numpy()
    elif image is None or isinstance(image, (str, bytes, PathLike, Mapping)):
        kind = f"path {str(image)!r}" if isinstance(image, (str, PathLike)) else type(image).__name__
        raise ValueError(
            f"{kind} found; expected an image: a PIL image (of a file: `PIL.Image.open(path)`), an array or a tensor"
        )
    else:
        array = np.asarray(image)
    array = _channels_first(array, layout)
    if array.size == 0:
        raise ValueError(f"empty image of shape {array.shape} found; expected at least one pixel")
    if array.dtype.kind not in "biuf":
        raise ValueError(f"image of type {array.dtype} found; expected boolean, integer or float pixels")
    if not np.isfinite(array.min()) or not np.isfinite(array.max()):
        raise ValueError("image with NaN or infinite pixels found; expected finite values")
    return array


def _to_gray(array: np.ndarray, scale: float) -> torch.Tensor:
    """Divide [C, H, W] by a scale and take the luminance, float32 [1, H, W]."""
    pixels = torch.from_numpy(array.astype(np.float32)) / scale
    if len(pixels) == 3:
        pixels = (pixels * torch.tensor(LUMINANCE)[:, None, None]).sum(0, keepdim=True)
    return pixels


def to_unit_gray(image: Image.Image | np.ndarray | torch.Tensor, layout: str | None = None) -> torch.Tensor:
    """Convert one picture of any mode and bit depth to grey values in [0, 1].

    Whole numbers from 0 to 255 are grey levels of 8 bits, and are divided by 255. All other whole numbers are stretched
    from black to white of `_robust_range`, after colours became luminance. Floats must already lie in [0, 1]; what
    rounding adds is cut off. Booleans become 0 and 1.

    Args:
        image: PIL image of any mode, or array or tensor [H, W], [H, W, C] or [C, H, W].
        layout: of an array or tensor, "channels_first" or "channels_last"; None finds it out.

    Returns:
        Float32 tensor [1, H, W].

    Raises:
        ValueError: a shape, type or value range that no image has.
    """
    array = _to_array(image, layout)
    kind, low, high = array.dtype.kind, array.min(), array.max()
    if kind == "f" and (low < -OVERSHOOT or high > 1 + OVERSHOOT):
        raise ValueError(
            f"image with values from {low} to {high} found; expected [0, 1] for floats (rescale_factor=1/255 of an "
            "image in grey levels, image.clip(0, 1) of an interpolated one)"
        )
    if kind not in "iu" or 0 <= low <= high <= 255:
        return _to_gray(array.clip(0, 1) if kind == "f" else array, 255 if kind in "iu" else 1)
    gray = np.tensordot(LUMINANCE, array.astype(np.float64), 1)[None] if len(array) == 3 else array.astype(np.float64)
    black, white = _robust_range(gray)
    unit = ((gray - black) / max(float(white - black), float(np.finfo(np.float32).tiny))).clip(0, 1)
    return torch.from_numpy(unit.astype(np.float32))


def _padded(height: int, width: int, size: int) -> tuple[int, int, int, int]:
    """Find where "pad" puts a picture in a square: top, left, height, width."""
    scale = size / max(height, width)
    height, width = max(1, round(height * scale)), max(1, round(width * scale))
    return (size - height) // 2, (size - width) // 2, height, width


def fit_square(
    image: torch.Tensor,
    size: int,
    fit: str = "pad",
    mode: InterpolationMode = InterpolationMode.BILINEAR,
) -> torch.Tensor:
    """Resize to a square, with antialiasing.

    Args:
        image: [..., H, W].
        size: side of the result in pixels.
        fit: what happens to an image that is not square. "pad" adds black borders; "squash" changes the aspect ratio;
            "crop" keeps the central square alone.
        mode: of the interpolation; NEAREST_EXACT takes a pixel instead of a mean, for masks.

    Returns:
        Tensor [..., size, size] of the same type.
    """
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} found; expected one of {', '.join(FITS)}")
    height, width = image.shape[-2:]
    if fit == "crop":
        image = F.center_crop(image, [min(height, width)] * 2)
    top, left, height, width = _padded(height, width, size) if fit == "pad" else (0, 0, size, size)
    # Resize first and pad then, so that no border is interpolated into the image.
    image = F.resize(image, [height, width], mode, antialias=mode is not InterpolationMode.NEAREST_EXACT)
    return F.pad(image, [left, top, size - width - left, size - height - top])


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


def _unpad(logits: torch.Tensor, height: int, width: int, size: int) -> torch.Tensor:
    """Do what `unfit_square` does with "pad", where the borders were whole pixels of a square of another size.

    Args:
        logits: [C, S, S].
        height: of the image.
        width: of the image.
        size: side of the square in which the image got its borders.

    Returns:
        [C, H, W].
    """
    top, left, inner_height, inner_width = _padded(height, width, size)
    inner = [
        [inner_width / size, 0, (2 * left + inner_width) / size - 1],
        [0, inner_height / size, (2 * top + inner_height) / size - 1],
    ]
    theta = torch.tensor([inner], dtype=logits.dtype, device=logits.device)
    grid = torch.nn.functional.affine_grid(theta, [1, len(logits), height, width], align_corners=False)
    return torch.nn.functional.grid_sample(logits[None], grid, padding_mode="border", align_corners=False)[0]


def to_class_map(mask: Image.Image | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Convert a mask of class indices [H, W] to int64 [1, H, W].

    Raises:
        ValueError: another shape or type.
    """
    array = np.asarray(mask.detach().cpu() if isinstance(mask, torch.Tensor) else mask)
    if array.ndim != 2 or array.dtype.kind not in "biu":
        raise ValueError(f"mask of shape {array.shape} and type {array.dtype} found; expected whole numbers [H, W]")
    return torch.from_numpy(array.astype(np.int64))[None]


class MLVICXImageProcessorKwargs(ImagesKwargs, total=False):
    """Keywords of the image processor besides those of transformers.

    Args:
        image_size: side of the square in pixels, the short form of `size`.
        num_channels: 1, or 3 for weights that expect colour.
        fit: what happens to an image that is not square, see `fit_square`.
        prepared_size: side of the squares that the model was trained on, see `MLVICXImageProcessor`.
    """

    image_size: int
    num_channels: int
    fit: str
    prepared_size: int


# What transformers hands on from loading a model, or keeps in the file; none of it changes a pixel.
# fmt: off
_IGNORED = frozenset({
    "attn_implementation", "auto_map", "backend", "cache_dir", "code_revision", "config", "device_map",
    "dtype", "feature_extractor_type", "force_download", "image_processor_type", "local_files_only",
    "low_cpu_mem_usage", "max_memory", "processor_class", "proxies", "quantization_config", "revision",
    "subfolder", "tokenizer", "token", "torch_dtype", "trust_remote_code", "use_fast", "use_safetensors",
    "_auto_class", "_commit_hash", "_from_auto", "_from_pipeline",
})
# fmt: on
# What the processor does not do, and the values that ask for nothing.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "crop_size": (None,),
    "default_to_square": (None, True),
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "image_seq_length": (None,),
    "pad_size": (None,),
}
_AT_CALL = {  # of a call alone, and the values that ask for nothing
    "data_format": (None, "channels_first"),
    "device": (None,),
    "disable_grouping": (None, True, False),
    "input_data_format": (None,),
    "return_tensors": (None, "pt"),
}


class MLVICXImageProcessor(BaseImageProcessor):
    """Turn pictures of chest radiographs into `pixel_values`: grey in [0, 1], square, normalised.

    Nothing is random. The constants are saved beside the model in `preprocessor_config.json`. Every keyword of the
    constructor can also be given when images are processed, and holds for those.

    Args:
        image_size: side of the square in pixels; 224 where `size` says nothing else.
        num_channels: 1, or 3 for weights that expect colour (the grey image repeated).
        image_mean: mean that is subtracted from grey values in [0, 1]: one number, or one a channel.
        image_std: standard deviation by which they are then divided, likewise.
        fit: what happens to an image that is not square, see `fit_square`.
        size: {"height": S, "width": S} or S, another way to give `image_size`.
        do_resize: false leaves images as large as they are.
        resample: `PIL.Image.Resampling` NEAREST, BILINEAR or BICUBIC.
        do_rescale: false takes pixel values as they are instead of bringing them to [0, 1] by their bit depth.
        rescale_factor: factor that brings them to [0, 1] instead.
        do_normalize: false leaves out mean and standard deviation.
        prepared_size: fit an image to a square of this side first. A classifier or segmenter was trained on the squares
            of a cache, and its thresholds and probabilities hold for images with no more detail than those. On a square
            of this side it does nothing.
        kwargs: other keywords of transformers, with values that ask for nothing. `do_convert_rgb` changes nothing:
            colour becomes grey in any case.

    Raises:
        ValueError: a value that the processor cannot follow.
        TypeError: a keyword that no image processor has.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012 - the base class's own way
    valid_kwargs = MLVICXImageProcessorKwargs
    backend = "torchvision"
    size: Any  # {"height": S, "width": S}
    rescale_factor: float | None = None  # type: ignore[assignment]  # by the bit depth
    do_resize: bool | None = True  # transformers keeps None only beside such a default
    do_rescale: bool | None = True
    do_normalize: bool | None = True

    def __init__(
        self,
        image_size: int | None = None,
        num_channels: int = 1,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.25,
        fit: str = "pad",
        size: Any = None,
        do_resize: bool | None = True,
        resample: int = Image.Resampling.BILINEAR,
        do_rescale: bool | None = True,
        rescale_factor: float | None = None,
        do_normalize: bool | None = True,
        prepared_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**{name: value for name, value in kwargs.items() if name == "auto_map"})
        self.size = _side(size, image_size) or 224
        self.num_channels = num_channels
        self.image_mean = _own_copy(image_mean)
        self.image_std = _own_copy(image_std)
        self.fit = fit
        self.do_resize = do_resize
        self.resample = resample
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.prepared_size = prepared_size
        if kwargs.get("do_convert_rgb") is not None:
            self.do_convert_rgb = kwargs["do_convert_rgb"]
        _refuse(kwargs, _IGNORED)
        for name, harmless in _AT_CALL.items():
            if getattr(kwargs.get(name), "value", kwargs.get(name)) not in harmless:
                raise ValueError(f"{name}={kwargs[name]!r} found; give it when you process images")
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        """Take `size` in all forms that the constructor takes."""
        if name == "size":
            side = _side(value, None)
            value = {"height": side, "width": side}
        super().__setattr__(name, value)

    @property
    def image_size(self) -> int:
        """Side of the square in pixels."""
        return self.size["height"]

    @image_size.setter
    def image_size(self, side: int) -> None:
        self.size = side

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in the base class, but every keyword is used or refused.

        Args:
            image_processor_dict: constants, as `to_dict` gives them.
            kwargs: others that take their place; `return_unused_kwargs=True` returns unknown ones instead of
                refusing them.
        """
        unused_wanted = kwargs.pop("return_unused_kwargs", False)
        known = {name: value for name, value in kwargs.items() if name in cls.valid_kwargs.__annotations__}
        unused = {name: value for name, value in kwargs.items() if name not in known}
        if not unused_wanted:
            _refuse(unused, _IGNORED)
        if {"size", "image_size"} & set(known):  # each says what the other does
            image_processor_dict = {k: v for k, v in image_processor_dict.items() if k not in ("size", "image_size")}
        processor = cls(**(image_processor_dict | known))
        return (processor, unused) if unused_wanted else processor

    def to_dict(self) -> dict[str, Any]:
        """As in the base class; `size` is also given as `image_size`."""
        constants = super().to_dict() | {"image_size": self.image_size, "resample": int(self.resample)}
        return {name: value for name, value in constants.items() if value is not None or name.startswith("do_")}

    def to_json_file(self, json_file_path: str | PathLike[str]) -> None:
        """As in the base class. A processor that names its code, in `auto_map`, is saved with the code."""
        if found := getattr(self, "auto_map", None):  # which transformers sets without declaring it
            self.auto_map = save_code(Path(json_file_path).parent, found, IMAGE_PROCESSOR_AUTO_MAP)
        super().to_json_file(json_file_path)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """As in the base class. The code goes along, so that it also loads where this package is not installed."""
        self.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)
        return super().push_to_hub(*args, **kwargs)

    def normalize(self, unit: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # constants are the processor's own
        """Turn grey values in [0, 1], [..., 1, H, W], into model input [..., num_channels, H, W]."""
        channels = (*unit.shape[:-3], self.num_channels, *unit.shape[-2:])
        if not self.do_normalize:
            return unit.expand(channels)
        mean, std = (_of_channels(value, unit) for value in (self.image_mean, self.image_std))
        return ((unit - mean) / std).expand(channels)

    def preprocess(
        self, images: Any, segmentation_maps: Any = None, return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Prepare one image or a list of them.

        Args:
            images: one image or a list: PIL of any mode, or array or tensor [H, W], [H, W, C], [C, H, W]; a batch
                array or tensor has four dimensions.
            segmentation_maps: masks of class indices [H, W], as many and of the size of their images.
            return_tensors: "pt" or "np"; with None, images of different sizes are a list.
            kwargs: those of the constructor, for these images; `input_data_format` and `data_format`,
                "channels_first" or "channels_last", of arrays and of the result; `device` of the result.

        Returns:
            `pixel_values` [B, num_channels, image_size, image_size], float32, and with masks `labels`
            [B, image_size, image_size], int64, through the same geometry; borders are class 0.

        Raises:
            ValueError: something that is no image, a mask that does not fit its image, or a value that the processor
                cannot follow.
            TypeError: a keyword that no image processor has.
        """
        own, at_call = self._with(kwargs)
        layout, result_layout = (_layout(at_call.get(name), name) for name in ("input_data_format", "data_format"))
        items = _as_list(images, batch_dimensions=4)
        if not items:
            raise ValueError("no images found; expected at least one")
        gray = [own._gray(image, layout) for image in items]
        pixels = [own.normalize(own._fit(image)).contiguous() for image in gray]
        if result_layout == "channels_last":
            pixels = [image.movedim(0, -1).contiguous() for image in pixels]
        data = {"pixel_values": _stack(pixels, return_tensors)}
        if segmentation_maps is not None:
            masks = [to_class_map(mask) for mask in _as_list(segmentation_maps, batch_dimensions=3)]
            if len(masks) != len(gray):
                raise ValueError(f"{len(masks)} masks found; expected {len(gray)}, one an image")
            for image, mask in zip(gray, masks, strict=True):
                if mask.shape != image.shape:
                    found, expected = tuple(mask.shape[1:]), tuple(image.shape[1:])
                    raise ValueError(f"mask of {found} pixels found; expected the size of its image, {expected}")
            data["labels"] = _stack([own._fit(mask, nearest=True)[0] for mask in masks], return_tensors)
        features = BatchFeature(data, tensor_type=return_tensors)
        device = at_call.get("device")
        if device is not None:
            features.to(device)
        return features

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | None = None,
        return_segmentation_scores: bool = False,
    ) -> list[Any]:
        """Find the class of every pixel, in the geometry of the original images.

        Args:
            outputs: of `MLVICXForSemanticSegmentation`, with logits [B, K, H, W].
            target_sizes: (height, width) of the original images; by default the resolution of the logits. Borders that
                `fit` added are removed; pixels that it cut off get class 0.
            return_segmentation_scores: also return the logits in that geometry.

        Returns:
            For each image int64 [height, width]: the class with the highest logit; with one logit, 1 where it is
            above 0. With scores, for each image `segmentation` and `segmentation_scores` [K, height, width]; of pixels
            that `fit` cut off they are -inf.

        Raises:
            ValueError: another number of sizes than images.
        """
        logits = outputs.logits.float()
        if target_sizes is None:
            scores = list(logits)
        elif len(target_sizes) != len(logits):
            raise ValueError(f"{len(target_sizes)} target_sizes found; expected {len(logits)}, one an image")
        else:
            sizes = ((int(height), int(width)) for height, width in target_sizes)
            scores = [self._unfit(image, *size) for image, size in zip(logits, sizes, strict=True)]
        classes = [_decide(image[None])[0] for image in scores]
        if not return_segmentation_scores:
            return classes
        return [
            BatchFeature({"segmentation": found, "segmentation_scores": image})
            for found, image in zip(classes, scores, strict=True)
        ]

    def _with(self, kwargs: dict[str, Any]) -> tuple[MLVICXImageProcessor, dict[str, Any]]:
        """Split keywords of a call into a processor that has them and those that only a call has."""
        _refuse(kwargs, frozenset())
        given = {name: value for name, value in kwargs.items() if value is not None}
        own = {name: value for name, value in given.items() if name not in _AT_CALL}
        return (type(self).from_dict(self.to_dict(), **own) if own else self), given

    def _check(self) -> None:
        """Refuse constants that no image could be made with."""
        if self.fit not in FITS:
            raise ValueError(f"fit={self.fit!r} found; expected one of {', '.join(FITS)}")
        if not _is_whole(self.num_channels) or self.num_channels < 1:
            raise ValueError(f"num_channels={self.num_channels!r} found; expected 1, or 3 for weights of colour images")
        if self.resample not in RESAMPLING:
            names = ", ".join(f"{int(mode)} ({mode.name})" for mode in RESAMPLING)
            raise ValueError(f"resample={self.resample!r} found; expected one of {names}")
        for name in ("do_resize", "do_rescale", "do_normalize"):
            if getattr(self, name) not in (True, False, None):
                raise ValueError(f"{name}={getattr(self, name)!r} found; expected true or false")
        if self.prepared_size is not None and not (_is_whole(self.prepared_size) and self.prepared_size > 0):
            raise ValueError(f"prepared_size={self.prepared_size!r} found; expected 1 or more pixels, or None")
        factor = self.rescale_factor
        if factor is not None and not (_is_number(factor) and factor > 0):
            raise ValueError(f"rescale_factor={factor!r} found; expected a number above 0, or None")
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            values = list(value) if isinstance(value, (list, tuple)) else [value]
            fits = len(set(values)) == 1 or len(values) == self.num_channels
            if not (fits and all(_is_number(each) for each in values)):
                raise ValueError(f"{name}={value!r} found; expected a number, or {self.num_channels}, one a channel")
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"image_std={value!r} found; expected more than 0")

    def _gray(self, image: Any, layout: str | None) -> torch.Tensor:
        """One picture to grey values [1, H, W], by its bit depth, by `rescale_factor`, or as they are."""
        if self.do_rescale and self.rescale_factor is None:
            return to_unit_gray(image, layout)
        factor = self.rescale_factor if self.do_rescale else None
        return _to_gray(_to_array(image, layout), 1 if factor is None else 1 / factor)

    def _fit(self, image: torch.Tensor, nearest: bool = False) -> torch.Tensor:
        if not self.do_resize:
            return image
        mode = RESAMPLING[Image.Resampling.NEAREST if nearest else Image.Resampling(self.resample)]
        if self.prepared_size is not None and image.shape[-2:] != (self.prepared_size, self.prepared_size):
            of_cache = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BILINEAR
            image = fit_square(image, self.prepared_size, self.fit, of_cache)
        return fit_square(image, self.image_size, self.fit, mode)

    def _unfit(self, logits: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Bring logits [K, h, w] to an image of this size; what `fit` cut off becomes -inf."""
        fit = self.fit if self.do_resize and logits.shape[-2] == logits.shape[-1] else "squash"
        if fit == "pad" and self.prepared_size is not None:
            return _unpad(logits, height, width, self.prepared_size)
        found = unfit_square(logits, height, width, fit)
        top, left = (height - found.shape[-2]) // 2, (width - found.shape[-1]) // 2
        bottom, right = height - found.shape[-2] - top, width - found.shape[-1] - left
        return F.pad(found, [left, top, right, bottom], fill=-math.inf)


def _refuse(kwargs: dict[str, Any], ignored: frozenset[str]) -> None:
    """Refuse keywords that would change nothing though they ask for something, and those that nobody knows."""
    known = MLVICXImageProcessorKwargs.__annotations__
    for name, value in kwargs.items():
        if name in _REFUSED and value not in _REFUSED[name]:
            raise ValueError(f"{name}={value!r} found; this image processor has size, fit and num_channels instead")
        if name not in known and name not in ignored:
            similar = difflib.get_close_matches(name, known, 1)
            names = (
                "image_size, size, fit, prepared_size, num_channels, do_resize, do_rescale, do_normalize, image_mean"
            )
            raise TypeError(
                f"keyword {name!r} found; expected {similar[0] if similar else f'one of {names}, image_std, resample'}"
            )


def _side(size: Any, image_size: Any) -> int | None:
    """Side of the square that `size` or `image_size` says; None if neither does."""
    side = image_size
    if size is not None:
        sides = [size, size] if _is_whole(size) else list(size) if isinstance(size, (list, tuple)) else size
        if not isinstance(sides, list):
            pairs = dict(sides)  # a dictionary, or transformers' own form of one
            lengths = {name: value for name, value in pairs.items() if value is not None}
            sides = [lengths["height"], lengths["width"]] if set(lengths) == {"height", "width"} else []
        if len(sides) != 2 or sides[0] != sides[1]:
            raise ValueError(f'size={size!r} found; expected a square: S, or {{"height": S, "width": S}}')
        side = sides[0]
        if image_size not in (None, side):
            raise ValueError(f"size={size!r} and image_size={image_size!r} found; expected one of them, or the same")
    if side is not None and (not _is_whole(side) or side < 1):
        raise ValueError(f"image_size={side!r} found; expected 1 or more pixels")
    return side


def _is_whole(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)


def _own_copy(value: Any) -> Any:
    return (
        value.tolist() if isinstance(value, np.ndarray) else list(value) if isinstance(value, (list, tuple)) else value
    )


def _of_channels(value: Any, unit: torch.Tensor) -> Any:
    """One number, or a tensor [C, 1, 1] of one a channel."""
    if not isinstance(value, list):
        return value
    return (
        value[0] if len(set(value)) == 1 else torch.tensor(value, dtype=unit.dtype, device=unit.device)[:, None, None]
    )


def _layout(value: Any, name: str) -> str | None:
    layout = getattr(value, "value", value)  # of transformers' ChannelDimension
    if layout not in (None, "channels_first", "channels_last"):
        raise ValueError(f"{name}={value!r} found; expected 'channels_first' or 'channels_last'")
    return layout


def _stack(tensors: list[torch.Tensor], return_tensors: Any) -> Any:
    """Make a batch. Images of different sizes are none."""
    sizes = {tuple(tensor.shape) for tensor in tensors}
    if len(sizes) == 1:
        return torch.stack(tensors)
    if return_tensors is not None:
        raise ValueError(
            f"images of the sizes {sorted(sizes)} found with do_resize=False; expected one size, or return_tensors=None"
        )
    return tensors


def _as_list(images: Any, batch_dimensions: int) -> list[Any]:
    """Split a list, a list of lists or a batch array into its items; a single item becomes a list."""
    if isinstance(images, (list, tuple)):
        if images and all(isinstance(row, (list, tuple)) and row and not np.isscalar(row[0]) for row in images):
            return [item for row in images for item in row]
        return list(images)
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == batch_dimensions:
        return list(images)
    return [images]


def _decide(logits: torch.Tensor) -> torch.Tensor:
    """Choose classes [B, H, W] by logits [B, K, H, W]."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


__all__ = ["MLVICXImageProcessor"]
