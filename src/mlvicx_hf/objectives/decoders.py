"""Decoders that restore an image from the maps of an encoder."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlvicx_hf.models.layers_mlvicx import DecoderBlock
from mlvicx_hf.models.loss_mlvicx import at_least_float32


class RestorationDecoder(nn.Module):
    """Blocks of two 3×3 convolutions, each after an enlargement; the input itself is no skip connection.

    `UNetDecoder` for segmentation also sees the input, which would give the restoration away.

    Args:
        channels: of every level of the encoder, finest first.
        skips: whether a block sees the encoder's map of its resolution.
    """

    def __init__(self, channels: Sequence[int], skips: bool = True) -> None:
        super().__init__()
        self.skips = skips
        self.widths = [16 * 2**level for level in reversed(range(len(channels)))]  # 256, …, 32, 16 for five levels
        below = [channels[-1], *self.widths[:-1]]
        beside = [*reversed(channels[:-1]), 0] if skips else [0] * len(channels)
        self.blocks = nn.ModuleList(
            DecoderBlock(b + s, width) for b, s, width in zip(below, beside, self.widths, strict=True)
        )

    def forward(self, maps: Sequence[Tensor], size: Sequence[int]) -> list[Tensor]:
        """Maps of all blocks, coarsest first; the last one has the resolution of the input.

        Args:
            maps: of the encoder, finest first, [B, C_p, H_p, W_p].
            size: height and width of the input.
        """
        x, made = maps[-1], []
        sizes = [*(level.shape[2:] for level in reversed(maps[:-1])), torch.Size(size)]
        beside = [*reversed(maps[:-1]), None] if self.skips else [None] * len(maps)
        for block, side, skip in zip(self.blocks, sizes, beside, strict=True):
            x = F.interpolate(x, tuple(side), mode="nearest")
            x = block(x if skip is None else torch.cat([x, skip], 1))
            made.append(x)
        return made


def squared_error(restored: Tensor, target: Tensor) -> Tensor:
    """Mean square of the difference of each image, in float32 or more: [B, 1]."""
    return (at_least_float32(restored) - at_least_float32(target)).square().flatten(1).mean(1, keepdim=True)
