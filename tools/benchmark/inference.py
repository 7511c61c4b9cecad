"""The classifier's forward pass against timm's own network."""

from __future__ import annotations

from typing import Any

import timm
import torch
from torch import nn

from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification

from .timing import compare


@torch.inference_mode()
def benchmark_inference(
    backbone: str, batch_sizes: list[int], image_size: int, rounds: int, device: torch.device, labels: int = 14
) -> list[dict[str, Any]]:
    """Forward pass of our classifier, context blocks included, eager and compiled, against timm's own network, eager.

    All channels-last, one input channel, evaluation mode.

    Returns:
        One row a batch size: seconds (min, median, max) and ratios of medians to timm.
    """
    torch.manual_seed(0)
    config = MLVICXConfig(backbone=backbone, id2label={i: str(i) for i in range(labels)})

    def place(network: nn.Module) -> nn.Module:
        return network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]  # torch's stub lacks it

    ours = place(MLVICXForImageClassification(config))
    theirs = place(timm.create_model(backbone, in_chans=1, num_classes=labels))
    compiled = torch.compile(ours)
    rows = []
    for batch in batch_sizes:
        pixels = torch.randn(batch, 1, image_size, image_size, device=device)
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        candidates = {
            "timm": lambda x=pixels: theirs(x),
            "eager": lambda x=pixels: ours(x),
            "compiled": lambda x=pixels: compiled(x),
        }
        seconds = compare(candidates, max(5, rounds // batch), device, f"inference, batch {batch}")
        ratios = {
            f"{name}_ratio": seconds[name]["median"] / seconds["timm"]["median"] for name in ("eager", "compiled")
        }
        rows.append({"batch_size": batch, "seconds": seconds} | ratios)
    return rows
