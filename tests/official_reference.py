"""The authors' network as an oracle for the conversion, in float64, with weights of no special value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmark.authors_order import TERMS, AuthorsOrder

__all__ = ["TERMS", "OfficialReference", "calibrate", "converted_gradient", "randomise"]


class OfficialReference(AuthorsOrder):
    """In float64."""

    def __init__(self, backbone: str = "resnet18", aggregation_channels: int = 16, width: int = 8) -> None:
        super().__init__(backbone, aggregation_channels, width)
        self.double()


def on_grid(values: Tensor, steps: int) -> Tensor:
    """Multiples of 1/steps: sums of products of few bits are exact in float32, so a fold of biases loses nothing."""
    return (values * steps).round() / steps


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights, biases and running statistics of no special value, on a grid."""
    generator = torch.Generator().manual_seed(seed)

    def draw(target: Tensor, mean: float, deviation: float, steps: int = 256) -> None:
        target.copy_(on_grid(mean + deviation * torch.randn(target.shape, generator=generator), steps))

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                draw(module.weight, 0, module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    draw(module.bias, 0, 0.5, steps=16)
            elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                draw(module.weight, 1, 0.2)
                draw(module.bias, 0, 0.3)
                draw(module.running_mean, 0, 0.3)
                draw(module.running_var, 0, 0.5)
                module.running_var.square_().add_(0.5)


def calibrate(model: OfficialReference, *views: Tensor) -> None:
    """Running statistics near the true ones, so that embeddings vary in evaluation too."""
    norms = [module for module in model.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = 1.0
    model.train()
    with torch.no_grad():
        model(*views)
    for norm in norms:
        norm.momentum = 0.1
        norm.running_mean.copy_(on_grid(norm.running_mean, 256))
        norm.running_var.copy_(norm.running_var.float())


def converted_gradient(model: nn.Module, key: str) -> Tensor | None:
    """Gradient, in a converted `MLVICXForPreTraining`, of the parameter that has this key in the authors' checkpoint.

    Returns:
        The gradient, a slice of it for a level's convolution; None for what cancels in training and so has none: a bias
        before a batch normalisation, which ours lacks, and that of an expander's last one, which ours does not train.
    """
    ours = dict(model.named_parameters())
    match key.split("."):
        case ["projetion", _, "0", "bias"] | ["projetion", "l3", "1", "bias"] | ["resize_project", "convs", _, "bias"]:
            return None
        case ["resize_project", "conv_head", "projection", "2" | "5" | "8" | "9", "bias"]:
            return None
        case ["encoder", "0" | "1" as index, leaf]:
            name = f"mlvicx.backbone.{'conv1' if index == '0' else 'bn1'}.{leaf}"
        case ["encoder", index, *rest]:
            name = ".".join([f"mlvicx.backbone.layer{int(index) - 3}", *rest])
        case [level, "cam", "fc", layer, leaf]:
            name = f"mlvicx.context.{int(level[3:]) - 1}.channel.{layer}.{leaf}"
        case [level, "sam", "conv1", leaf]:
            name = f"mlvicx.context.{int(level[3:]) - 1}.spatial.{leaf}"
        case ["resize_project", "convs", level, "weight"]:
            channels = [ours[f"mlvicx.context.{i}.channel.2.weight"].shape[0] for i in range(5)]
            start = sum(channels[: int(level)])
            gradient = ours["aggregator.projection.weight"].grad
            return gradient[:, start : start + channels[int(level)]]
        case ["projetion", layer, index, leaf]:
            name = f"global_expander.{({'l1': 0, 'l2': 3, 'l3': 6}[layer]) + int(index)}.{leaf}"
        case ["resize_project", "conv_head", "projection", index, leaf]:
            name = f"multi_level_expander.{ {'2': 0, '3': 1, '5': 3, '6': 4, '8': 6, '9': 7}[index] }.{leaf}"
        case _:
            raise KeyError(key)
    return ours[name].grad
