"""Speed as ratios within one run, since the speed of a machine changes from one minute to the next."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch import nn

from .configuration_mlvicx import MLVICXConfig
from .machine import describe_hardware, use_cpu_threads
from .modeling_mlvicx import MLVICXForImageClassification
from .progress import progress_bar
from .provenance import code_version, write_json


def compare(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, description: str
) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a slow minute meets all of them.

    Args:
        candidates: what is timed, by name; each is called twice before.
        rounds: measurements of each.
        device: which is waited for.
        description: of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for run in candidates.values():
        run(), run()
    with progress_bar(rounds, description, "round") as bar:
        for _ in range(rounds):
            for name, run in candidates.items():
                _wait(device)
                start = time.perf_counter()
                run()
                _wait(device)
                seconds[name].append(time.perf_counter() - start)
            bar.update()
    return {name: median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def benchmark_inference(
    backbone: str, batch_sizes: list[int], image_size: int, rounds: int, device: torch.device, labels: int = 14
) -> list[dict[str, Any]]:
    """Forward pass of our classifier, context blocks included, eager and compiled, against timm's own network, eager.

    All channels-last, one input channel, evaluation mode.

    Returns:
        One row a batch size: median seconds and ratios to timm.
    """
    torch.manual_seed(0)
    config = MLVICXConfig(backbone=backbone, id2label={i: str(i) for i in range(labels)})

    def place(network: nn.Module) -> nn.Module:
        return network.to(device=device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

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
        ratios = {f"{name}_ratio": seconds[name] / seconds["timm"] for name in ("eager", "compiled")}
        rows.append({"batch_size": batch, "seconds": seconds} | ratios)
    return rows


def main() -> None:
    """The command `scripts/benchmark.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=500, help="measurements at batch 1; fewer at larger ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        use_cpu_threads()
    rows = benchmark_inference(
        arguments.backbone, arguments.batch_sizes, arguments.image_size, arguments.rounds, device
    )
    for row in rows:
        timm_rate = row["batch_size"] / row["seconds"]["timm"]
        print(
            f"inference, batch {row['batch_size']}: timm {timm_rate:.1f} img/s; our time over timm's: "
            f"eager {row['eager_ratio']:.3f}, compiled {row['compiled_ratio']:.3f}"
        )
    if arguments.json:
        report = {
            "backbone": arguments.backbone,
            "image_size": arguments.image_size,
            "inference": rows,
            "hardware": describe_hardware(device),
            "code": code_version(),
        }
        write_json(arguments.json, report)
