"""MLVICX as its authors' code computes it, written from the paper's equations and the README's table of differences.

An oracle for the conversion: plain torch around torchvision's ResNet, slow and literal, with nothing of the package in
it. `state_dict()` has the keys of the authors' checkpoints. Everything runs in float64.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

TERMS = ("invariance", "variance", "covariance")


class ChannelGate(nn.Module):
    """Eq. 1 with two layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 1, bias=False),
        )

    def forward(self, y: Tensor) -> Tensor:
        average, maximum = F.adaptive_avg_pool2d(y, 1), F.adaptive_max_pool2d(y, 1)
        return y * torch.sigmoid(self.fc(average) + self.fc(maximum))


class SpatialGate(nn.Module):
    """Eq. 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, k: Tensor) -> Tensor:
        average, maximum = k.mean(dim=1, keepdim=True), k.max(dim=1, keepdim=True).values
        return k * torch.sigmoid(self.conv1(torch.cat([average, maximum], dim=1)))


class ContextHead(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cam = ChannelGate(channels)
        self.sam = SpatialGate()

    def forward(self, y: Tensor) -> Tensor:
        return self.sam(self.cam(y))


class GlobalExpander(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.l1 = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU())
        self.l2 = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.l3 = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    def forward(self, y: Tensor) -> Tensor:
        return self.l3(self.l2(self.l1(y)))


class MultiLevelHead(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(inputs * 16, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
        )

    def forward(self, u: Tensor) -> Tensor:
        return self.projection(u)


class ResizeProject(nn.Module):
    """Every level at 64×64, through a convolution of its own; their sum, pooled and expanded."""

    def __init__(self, channels: list[int], inputs: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, inputs, 1) for c in channels)
        self.conv_head = MultiLevelHead(inputs, width)

    def forward(self, maps: list[Tensor]) -> Tensor:
        u = torch.zeros(())  # a sum over levels
        for y, conv in zip(maps, self.convs, strict=True):
            u = u + conv(F.interpolate(y, size=(64, 64), mode="bilinear", align_corners=False))
        return self.conv_head(u)


class OfficialReference(nn.Module):
    """The authors' network and loss.

    Args:
        backbone: a ResNet of torchvision.
        aggregation_channels: of the level convolutions.
        width: of the expanders' layers.
    """

    def __init__(self, backbone: str = "resnet18", aggregation_channels: int = 16, width: int = 8) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(backbone, weights=None)
        self.encoder = nn.Sequential(*list(resnet.children())[:-2])
        last = resnet.fc.in_features
        channels = [64, last // 8, last // 4, last // 2, last]
        self.projetion = GlobalExpander(last, width)
        for number, count in enumerate(channels, start=1):
            self.add_module(f"cbt{number}", ContextHead(count))
        self.resize_project = ResizeProject(channels, aggregation_channels, width)
        self.double()

    def embed(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """z = g(y) and m = h(u) of one view."""
        conv, norm, relu, pool, *stages = self.encoder
        y = self.cbt1(relu(norm(conv(view))))
        maps = [y]
        y = pool(y)
        for stage, context in zip(stages, (self.cbt2, self.cbt3, self.cbt4, self.cbt5), strict=True):
            y = context(stage(y))
            maps.append(y)
        return self.projetion(F.adaptive_avg_pool2d(y, 1).flatten(1)), self.resize_project(maps)

    def forward(self, view_1: Tensor, view_2: Tensor) -> dict[str, Tensor]:
        """Embeddings, terms and losses under the names of `official_outputs.safetensors`."""
        output = {}
        (z_1, m_1), (z_2, m_2) = self.embed(view_1), self.embed(view_2)
        for name, one, other in (("global", z_1, z_2), ("multi_level", m_1, m_2)):
            output |= {f"{name}_embedding_1": one, f"{name}_embedding_2": other}
            terms = (
                (one - other).pow(2).mean(),
                variance(one) / 2 + variance(other) / 2,
                covariance(one) + covariance(other),
            )
            output |= {f"{name}_{term}": value for term, value in zip(TERMS, terms, strict=True)}
            output[f"{name}_loss"] = 25 * terms[0] + 25 * terms[1] + terms[2]
        output["loss"] = output["global_loss"] + output["multi_level_loss"]
        return output


def variance(z: Tensor) -> Tensor:
    """Eq. 7 with Λ = 1 and ε = 1e-4 under the root."""
    centred = z - z.mean(dim=0)
    squares = (centred**2).sum(dim=0) / (len(z) - 1)
    return torch.clamp(1 - torch.sqrt(squares + 1e-4), min=0).mean()


def covariance(z: Tensor) -> Tensor:
    """Eq. 8, the r × r matrix."""
    b, r = z.shape
    centred = z - z.mean(dim=0)
    matrix = centred.T @ centred / (b - 1)
    return (matrix * (1 - torch.eye(r, dtype=z.dtype))).pow(2).sum() / r


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
