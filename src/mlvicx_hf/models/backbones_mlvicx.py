# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""timm backbones of every form, and the places where the maps of their levels can be refined.

timm gives features of a network in several forms: a list of layers that one runs in turn (`FeatureListNet`), networks
that collect maps as they run (EfficientNet, MobileNet, Xception, ViT), and maps that are made of several (HRNet). A map
is refined where it leaves its layer, so that the layers behind it see the refined map, as in Fig. 1 of the paper.

This file travels to the Hub, so it imports nothing from the package but its flat neighbours, relatively.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import timm
import torch
from timm.models import FeatureListNet
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .configuration_mlvicx import MLVICXConfig, check_backbone, create_features, even_levels


class Tap(NamedTuple):
    """A layer whose output is the map of a level.

    Attributes:
        name: of the layer in the network.
        layout: "NCHW", "NHWC", or "tokens": [B, prefix + H·W, C].
        prefix: tokens in front of those of the map.
    """

    name: str
    layout: str
    prefix: int = 0


def create_backbone(config: MLVICXConfig, **weights: Any) -> Any:
    """Make the timm backbone of a configuration, with random weights.

    Args:
        config: names the backbone.
        weights: timm's `pretrained` and `pretrained_cfg_overlay`, for other weights.

    Raises:
        ValueError: an unknown name, or a model that has no form with features.
    """
    check_backbone(config.backbone)
    return _create(config.backbone, config.num_channels, config.image_size, **weights)


def _create(name: str, num_channels: int, image_size: int, **weights: Any) -> Any:
    try:
        make = functools.partial(create_features, name, in_chans=num_channels, **_options(name), **weights)
        return create_sized(make, image_size)[0]
    except (RuntimeError, AttributeError, AssertionError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"backbone={name!r}: timm gives no features of it at {image_size} px: {reason}") from error


@functools.cache
def _options(name: str) -> dict[str, Any]:
    """Options of a network that is no list of layers; none for one that is."""
    with torch.device("meta"):
        network = create_features(name)
    return {} if is_plain(network) else even_levels(network)


def create_sized(make: Callable[..., Any], image_size: int) -> tuple[Any, dict[str, Any]]:
    """Make a network whose position embeddings follow the size of the input, or else have the size that is given.

    Returns:
        The network, and the arguments that did this.
    """
    choices: tuple[dict[str, Any], ...] = ({"dynamic_img_size": True}, {"img_size": image_size})
    for sizes in choices:
        try:
            return make(**sizes), sizes
        except TypeError:  # the network does not know this argument
            continue
    return make(), {}


def is_plain(backbone: nn.Module) -> bool:
    """Whether a backbone is a list of layers whose maps are [B, C, H, W], which need no care."""
    return type(backbone) is FeatureListNet and layout_of(backbone) == "NCHW"


def layout_of(backbone: Any) -> str:
    """Layout of the maps that a backbone returns: "NCHW" or "NHWC"."""
    return str(getattr(getattr(backbone, "output_fmt", None), "value", "NCHW"))


@functools.cache
def find_taps(name: str, num_channels: int, image_size: int) -> tuple[Tap, ...] | None:
    """Find the layers whose outputs are the maps of the levels, by a pass without values.

    Returns:
        A tap for each level; None if a map is made of several layers' outputs, so that nothing behind it sees it.

    Raises:
        ValueError: the network does not take images of this size.
    """
    with torch.device("meta"):
        network = _create(name, num_channels, image_size).eval()
    calls: list[tuple[str, Any]] = []  # layers in the order in which they end, and their outputs
    handles = [
        layer.register_forward_hook(functools.partial(_keep, calls, each))
        for each, layer in named_layers(network).items()
    ]
    try:
        maps = network(torch.empty(1, num_channels, image_size, image_size, device="meta"))
    except NotImplementedError:  # it needs values
        return None
    except (RuntimeError, AssertionError) as error:
        default = timm.get_pretrained_cfg(name)
        usual = "" if default is None else f" (timm's size is {default.input_size[-1]})"
        raise ValueError(
            f"backbone={name!r} does not take image_size={image_size}{usual}: {' '.join(str(error).split())}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    names = network.feature_info.module_name()
    taps = [_find_tap(each, calls, level, layout_of(network)) for each, level in zip(names, maps, strict=True)]
    # Networks that reduce the resolution may keep their tokens in another order than that of the map, as Hiera does.
    one_resolution = len(set(network.feature_info.reduction())) == 1
    found = [tap for tap in taps if tap is not None and (one_resolution or tap.layout != "tokens")]
    return tuple(found) if len(set(found)) == len(maps) else None


def _keep(calls: list[tuple[str, Any]], name: str, _: nn.Module, __: Any, output: Any) -> None:
    """Append the output of a layer, as a forward hook."""
    calls.append((name, output))


def named_layers(backbone: Any) -> dict[str, nn.Module]:
    """Layers of a backbone by the names that its levels use."""
    inner = backbone.model if isinstance(backbone, FeatureGetterNet) else backbone
    layers = dict(inner.named_modules())
    return {name.replace("_", "."): layer for name, layer in layers.items()} | layers  # lists call "a.b" "a_b"


def _find_tap(name: str, calls: list[tuple[str, Any]], level: Tensor, layout: str) -> Tap | None:
    """Compare what layers gave with the map of a level, as the network returns it.

    Args:
        name: of the layer that timm names for the level.
        calls: see `find_taps`.
        level: the map.
        layout: of the map.
    """
    outputs = [output for called, output in calls if called == name]
    if len(outputs) != 1 or not isinstance(outputs[0], Tensor):
        return None
    # An activation that works in place may follow: then the last layer that gave this very tensor counts.
    name = next((called for called, output in reversed(calls) if output is level), name)
    output, shape = outputs[0], tuple(level.shape)
    channels, height, width = shape[1:] if layout == "NCHW" else (shape[3], *shape[1:3])
    if tuple(output.shape[1:]) == (channels, height, width):
        return Tap(name, "NCHW")
    if tuple(output.shape[1:]) == (height, width, channels):
        return Tap(name, "NHWC")
    if output.ndim == 3 and output.shape[2] == channels and output.shape[1] >= height * width:
        return Tap(name, "tokens", output.shape[1] - height * width)
    return None


def refine(context: nn.Module, tap: Tap, ratio: float, x: Tensor) -> Tensor:
    """Refine what a layer gave, in its layout.

    Args:
        context: works on [B, C, H, W].
        tap: the layout.
        ratio: height over width of the input, which tells the form of the map behind tokens.
        x: in the layout.
    """
    if tap.layout == "NCHW":
        return context(x)
    if tap.layout == "NHWC":
        return context(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    prefix, tokens = x[:, : tap.prefix], x[:, tap.prefix :]
    height = round((tokens.shape[1] * ratio) ** 0.5)
    refined = context(tokens.mT.unflatten(2, (height, -1))).flatten(2).mT
    return torch.cat([prefix, refined], 1) if tap.prefix else refined
