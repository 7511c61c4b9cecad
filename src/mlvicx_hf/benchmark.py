"""Speed as ratios within one run, since the speed of a machine changes from one minute to the next."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from PIL import Image
from torch import nn

from .configuration_mlvicx import MLVICXConfig
from .data.collections import FolderCollection
from .data.pixels import image_files
from .data.prepare import prepare
from .machine import available_cores, describe_hardware, keep_freed_memory, use_cpu_threads
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


def bare_square(path: Path, size: int) -> None:
    """Decode a file and resize it, with Pillow alone."""
    with Image.open(path) as image:
        image.convert("L").resize((size, size), Image.Resampling.BILINEAR)


def bare_loop(files: Sequence[Path], size: int, num_workers: int) -> None:
    """Decode and resize files, and keep nothing, in as many processes."""
    with ProcessPoolExecutor(num_workers, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for _ in pool.map(partial(bare_square, size=size), files, chunksize=16):
            pass


def benchmark_prepare(root: Path, size: int, num_workers: int, rounds: int) -> dict[str, Any]:
    """Preparing a folder of images against a bare loop that decodes and resizes them.

    Both are timed from start to end, over all images and over a sixth of them. The whole includes what is done once
    (start of the processes, pictures, card); the difference of the two is what further images cost.

    Returns:
        Images, median seconds, and the share of the bare loop's speed, as a whole and for further images.
    """
    files = list(image_files(root))
    few = max(1, len(files) // 6)
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[float]] = {}
        for number in range(rounds):
            for images in (few, len(files)):
                output = Path(folder) / f"{number}-{images}"
                options = {"size": size, "num_workers": num_workers, "max_images": images, "progress": False}
                runs: dict[str, Callable[[], Any]] = {
                    "bare": partial(bare_loop, files[:images], size, num_workers),
                    "prepare": partial(prepare, FolderCollection(root), output, **options),  # type: ignore[arg-type]
                }
                for name, run in runs.items():
                    start = time.perf_counter()
                    run()
                    seconds.setdefault(f"{name}_{images}", []).append(time.perf_counter() - start)
    medians = {name: median(values) for name, values in seconds.items()}
    whole = {name: medians[f"{name}_{len(files)}"] for name in ("bare", "prepare")}
    further = {name: whole[name] - medians[f"{name}_{few}"] for name in whole}
    return {
        "images": len(files),
        "size": size,
        "num_workers": num_workers,
        "seconds": medians,
        "images_per_second": {name: len(files) / value for name, value in whole.items()},
        "speed_ratio": whole["bare"] / whole["prepare"],
        "further_speed_ratio": further["bare"] / further["prepare"],
    }


def main() -> None:
    """The command `scripts/benchmark.py`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 64])
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=500, help="measurements at batch 1; fewer at larger ones")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prepare", type=Path, metavar="ROOT", help="measure preparing these images instead")
    parser.add_argument("--prepare_rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        use_cpu_threads()
        keep_freed_memory()
    report: dict[str, Any]
    if arguments.prepare is not None:
        row = benchmark_prepare(arguments.prepare, 256, available_cores(), arguments.prepare_rounds)
        rates = row["images_per_second"]
        print(
            f"prepare, {row['images']} images, {row['num_workers']} workers: {rates['prepare']:.1f} img/s, "
            f"{row['speed_ratio']:.3f} of the bare loop's {rates['bare']:.1f}; further images "
            f"{row['further_speed_ratio']:.3f}"
        )
        report = {"prepare": row}
    else:
        rows = benchmark_inference(
            arguments.backbone, arguments.batch_sizes, arguments.image_size, arguments.rounds, device
        )
        for row in rows:
            timm_rate = row["batch_size"] / row["seconds"]["timm"]
            print(
                f"inference, batch {row['batch_size']}: timm {timm_rate:.1f} img/s; our time over timm's: "
                f"eager {row['eager_ratio']:.3f}, compiled {row['compiled_ratio']:.3f}"
            )
        report = {"backbone": arguments.backbone, "image_size": arguments.image_size, "inference": rows}
    if arguments.json:
        write_json(arguments.json, report | {"hardware": describe_hardware(device), "code": code_version()})
