"""MLVICX as its authors' code computes it, written from the paper's equations and the README's table of differences.

Plain torch around torchvision's ResNet, slow and literal, with nothing of the package in it: what the benchmark
measures against, and the oracle of the tests. `state_dict()` has the keys of the authors' checkpoints.
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
        """[B, C, H, W] to the same shape."""
        average, maximum = F.adaptive_avg_pool2d(y, 1), F.adaptive_max_pool2d(y, 1)
        return y * torch.sigmoid(self.fc(average) + self.fc(maximum))


class SpatialGate(nn.Module):
    """Eq. 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, k: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        average, maximum = k.mean(dim=1, keepdim=True), k.max(dim=1, keepdim=True).values
        return k * torch.sigmoid(self.conv1(torch.cat([average, maximum], dim=1)))


class ContextHead(nn.Module):
    """Channel gate, then spatial gate."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cam = ChannelGate(channels)
        self.sam = SpatialGate()

    def forward(self, y: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return self.sam(self.cam(y))


class GlobalExpander(nn.Module):
    """g: three layers, each normalised."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.l1 = nn.Sequential(nn.Linear(inputs, width), nn.BatchNorm1d(width), nn.ReLU())
        self.l2 = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU())
        self.l3 = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width))

    def forward(self, y: Tensor) -> Tensor:
        """[B, C] to [B, width]."""
        return self.l3(self.l2(self.l1(y)))


class MultiLevelHead(nn.Module):
    """h: 4×4 pooling and three layers, each normalised."""

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
        """u, [B, inputs, 64, 64], to m, [B, width]."""
        return self.projection(u)


class ResizeProject(nn.Module):
    """Every level at 64×64, through a convolution of its own; their sum, pooled and expanded."""

    def __init__(self, channels: list[int], inputs: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(c, inputs, 1) for c in channels)
        self.conv_head = MultiLevelHead(inputs, width)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of all levels to m, [B, width]."""
        u = maps[0].new_zeros(())  # a sum over levels
        for y, conv in zip(maps, self.convs, strict=True):
            u = u + conv(F.interpolate(y, size=(64, 64), mode="bilinear", align_corners=False))
        return self.conv_head(u)


class AuthorsOrder(nn.Module):
    """The authors' network and loss, in their order of operations.

    Args:
        backbone: a ResNet of torchvision.
        aggregation_channels: of the level convolutions.
        width: of the expanders' layers.
    """

    def __init__(self, backbone: str = "resnet18", aggregation_channels: int = 512, width: int = 4096) -> None:
        super().__init__()
        resnet = torchvision.models.get_model(backbone, weights=None)
        self.encoder = nn.Sequential(*list(resnet.children())[:-2])
        last = resnet.fc.in_features
        channels = [64, last // 8, last // 4, last // 2, last]
        self.projetion = GlobalExpander(last, width)
        self.cbt1, self.cbt2, self.cbt3, self.cbt4, self.cbt5 = (ContextHead(count) for count in channels)
        self.resize_project = ResizeProject(channels, aggregation_channels, width)

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
        output: dict[str, Tensor] = {}
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
    return (matrix * (1 - torch.eye(r, dtype=z.dtype, device=z.device))).pow(2).sum() / r
