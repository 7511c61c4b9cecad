"""Preparing a cache against a bare loop over the same files."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.images.pixels import image_files


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

    Both are timed from start to end, over all images and over half of them. The whole includes what is done once (start
    of the processes, pictures, card); the difference of the two is what further images cost. Take 1,200 images or more:
    the pictures count up to 512 of them.

    Returns:
        Images, median seconds, and the share of the bare loop's speed, as a whole and for further images.
    """
    files = list(image_files(root))
    few = max(1, len(files) // 2)
    with tempfile.TemporaryDirectory() as folder:
        seconds: dict[str, list[float]] = {}
        for number in range(rounds):
            for images in (few, len(files)):
                output = Path(folder) / f"{number}-{images}"
                options = {"size": size, "num_workers": num_workers, "max_images": images, "progress": False}
                runs: dict[str, Callable[[], Any]] = {
                    "bare": partial(bare_loop, files[:images], size, num_workers),
                    "prepare": partial(prepare, FolderCollection(root), output, **options),  # type: ignore[arg-type]  # a dict of several types
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
