"""Encoders of other libraries, so that they can be compared with ours under the same protocol.

A source is `KIND:NAME`: `timm:resnet50.a1_in1k`, `timm:resnet50:FILE`, `hub:microsoft/rad-dino`,
`xrv:densenet121-res224-all`, `callable:module:function`. Each becomes a module that turns images into pooled features
[B, D], with an image processor of its own size, channels and normalisation.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndNoAttention

from mlvicx_hf.common.errors import UserError, require, user_input
from mlvicx_hf.models.backbones_mlvicx import create_sized
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig, check_backbone
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import batch_norms

from .loading import check_source
from .weights import WEIGHT_FILES, find_network, read_weights

XRV_RANGE = 1024  # torchxrayvision's pixels go from minus to plus this
PILLOW_NAMES = {"nearest": 0, "bilinear": 2, "bicubic": 3}


class Adapted(NamedTuple):
    """An encoder, the function of its features, and how its images are made."""

    network: nn.Module
    features: Callable[[Tensor], Tensor]  # images [B, C, S, S] to [B, D]
    processor: MLVICXImageProcessor


class ExternalEncoder(nn.Module):
    """An encoder of another library in the place of a `MLVICXModel`: one level, of its pooled features.

    Args:
        adapted: what it runs.
        config: of the task; its backbone says nothing here.
        source: name of the encoder, with its kind.
    """

    frozen = False  # in evaluation mode through every call of `train()`
    norms_frozen = False  # its batch normalisation alone

    def __init__(self, adapted: Adapted, config: MLVICXConfig, source: str) -> None:
        super().__init__()
        self.network, self.config, self.source = adapted.network, config, source
        self._features = functools.partial(adapted.features)  # a module would be saved a second time
        side, channels = adapted.processor.image_size, adapted.processor.num_channels
        self.network.eval()
        try:
            with torch.no_grad():
                found = self._pooled(torch.zeros(1, channels, side, side))
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"image_size={side}: {' '.join(str(error).split())}") from error
        self.channels = [found.shape[1]]

    def train(self, mode: bool = True) -> ExternalEncoder:
        """As `nn.Module.train`, but what is frozen stays in evaluation mode."""
        super().train(mode and not self.frozen)
        for norm in batch_norms(self) if self.norms_frozen else ():
            norm.train(False)
        return self

    def forward(
        self, pixel_values: Tensor, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        """Pooled features [B, D], as `pooler_output` and as the map [B, D, 1, 1] of the one level."""
        features: Any = self._pooled(pixel_values)
        maps: Any = (features[:, :, None, None],) if output_hidden_states else None
        return BaseModelOutputWithPoolingAndNoAttention(pooler_output=features, hidden_states=maps)

    def pool(self, maps: tuple[Tensor, ...], levels: str | None = None) -> Tensor:
        """The features again, [B, D]."""
        return maps[-1].flatten(1)

    def _pooled(self, pixel_values: Tensor) -> Tensor:
        features = self._features(pixel_values)
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(pixel_values):
            found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(f"features {found} of {len(pixel_values)} image(s) found; expected a tensor [B, D]")
        return features


def is_external(source: str) -> bool:
    """Whether a source names an encoder of another library."""
    return source.partition(":")[0] in ADAPTERS and not Path(source).exists()


def adapt(source: str, image_size: int | None = None) -> Adapted:
    """Load an encoder of another library.

    Args:
        source: `KIND:NAME`.
        image_size: side of its input in pixels; None for its own.

    Raises:
        ImportError: its library is not installed.
        OSError: weights that are absent, damaged or not reachable.
        UserError: a name that does not exist, weights that do not fit, an encoder without pooled output, or a size
            that it does not take.
    """
    kind, _, name = source.partition(":")
    try:
        with user_input():
            return ADAPTERS[kind](name, image_size)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from error


def _adapt_timm(name: str, image_size: int | None) -> Adapted:
    name, _, file = name.partition(":")
    check_backbone(name)
    about = timm.get_pretrained_cfg(name)
    if about is None:
        raise UserError(f"timm:{name}: timm has no description of its input; expected a name with weights")
    side = image_size or about.input_size[-1]
    overlay: dict[str, Any] = {}
    if file:
        if not file.endswith(WEIGHT_FILES):
            raise UserError(f"timm:{name}:{file} found; expected a file that ends with {', '.join(WEIGHT_FILES)}")
        overlay["state_dict"], _ = find_network(read_weights(Path(file)), name, about.input_size[0], file)
    make = functools.partial(
        timm.create_model, name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay or None
    )
    network, _ = create_sized(make, side)
    options: Any = {"resample": PILLOW_NAMES.get(about.interpolation, PILLOW_NAMES["bilinear"])}
    processor = MLVICXImageProcessor(side, about.input_size[0], list(about.mean), list(about.std), **options)
    return Adapted(network, network, processor)


def _adapt_hub(name: str, image_size: int | None) -> Adapted:
    config = AutoConfig.from_pretrained(check_source(name))
    saved = (getattr(config, "architectures", None) or [""])[0]
    is_backbone = saved.endswith("Backbone")
    # AutoBackbone would take the path of a folder for a name on the Hub.
    loader: Any = getattr(transformers, saved, None) if is_backbone else AutoModel
    if loader is None:
        raise UserError(
            f"hub:{name}: a {saved} found, which transformers does not have; expected one of its own (the folder or "
            "name without hub: is for models of this package, and callable:module:function for others)"
        )
    network, report = loader.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"hub:{name}: {len(missing)} weights of {type(network).__name__} are not saved, such as {missing[0]}; "
            "expected an encoder with all of its weights (callable:module:function may make the features)"
        )

    def features(pixels: Tensor) -> Tensor:
        if is_backbone:
            return network(pixels).feature_maps[-1].mean((2, 3))
        pooled = getattr(network(pixels), "pooler_output", None)
        if pooled is None:
            raise UserError(
                f"hub:{name}: a {type(network).__name__} without pooled output found; expected pooler_output, or "
                "callable:module:function that makes the features"
            )
        return pooled.flatten(1)

    return Adapted(network, features, _hub_processor(name, config, image_size))


def _hub_processor(name: str, config: Any, image_size: int | None) -> MLVICXImageProcessor:
    """Make ours of the image processor of another model: size, constants and interpolation."""
    about = AutoImageProcessor.from_pretrained(name).to_dict()
    timms = about.get("data_config")  # the processor of a timm model keeps all there
    if timms is not None:
        resample = PILLOW_NAMES.get(timms["interpolation"])
        sides, constants, normalized = timms["input_size"][1:], (timms["mean"], timms["std"]), True
    else:
        resample = about.get("resample")
        size = about.get("crop_size") if about.get("do_center_crop") else about.get("size")
        sides = [value for key, value in (size or {}).items() if key in ("height", "width", "shortest_edge")]
        constants, normalized = (about.get("image_mean"), about.get("image_std")), bool(about.get("do_normalize"))
        if not about.get("do_rescale", True) or not math.isclose(about.get("rescale_factor") or 1 / 255, 1 / 255):
            raise UserError(
                f"hub:{name}: an image processor with do_rescale={about.get('do_rescale')}, "
                f"rescale_factor={about.get('rescale_factor')} found; expected one that gives grey values from 0 to 1, "
                "or callable:module:function"
            )
    channels = timms["input_size"][0] if timms else getattr(config, "num_channels", 3)
    side = image_size or (sides[0] if sides else getattr(config, "image_size", None))
    if not isinstance(side, int) or (normalized and None in constants):
        raise UserError(
            f"hub:{name}: an image processor without size or constants found; expected size, image_mean and image_std"
        )
    options: Any = {"resample": resample} if resample in PILLOW_NAMES.values() else {}
    mean, std = constants if normalized else (0.0, 1.0)
    return MLVICXImageProcessor(side, channels, mean, std, do_normalize=normalized, **options)


def _adapt_xrv(name: str, image_size: int | None) -> Adapted:
    require("an encoder of torchxrayvision", "xrv", "torchxrayvision")
    library = importlib.import_module("torchxrayvision")
    network = library.models.get_model(name)
    own = int(name.rpartition("-res")[2].partition("-")[0]) if "-res" in name else 224
    features = getattr(network, "features2", network.features)  # of its DenseNets; `features` are maps there
    processor = MLVICXImageProcessor(image_size or own, 1, 0.5, 0.5 / XRV_RANGE)
    return Adapted(network, features, processor)


def _adapt_callable(name: str, image_size: int | None) -> Adapted:
    module, _, function = name.partition(":")
    if not module or not function:
        raise UserError(f"callable:{name} found; expected callable:module:function")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise UserError(f"callable:{name}: {error}; expected a module on the path, and a function in it") from error
    network, options = make()
    if image_size is not None:
        options = options | {"image_size": image_size}
    return Adapted(network, network, MLVICXImageProcessor(**options))


ADAPTERS: dict[str, Callable[[str, int | None], Adapted]] = {  # by the word before the colon
    "timm": _adapt_timm,
    "hub": _adapt_hub,
    "xrv": _adapt_xrv,
    "callable": _adapt_callable,
}
