"""What lies around the step: views, the input path, the whole command, several processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.transforms.functional import pil_to_tensor

from mlvicx_hf.common.machine import available_cores
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.phantom import PhantomCollection
from mlvicx_hf.data.reading.sampling import EpochBatches, PretrainingImages
from mlvicx_hf.pretraining.run import METRICS_FILE
from mlvicx_hf.pretraining.views import TwoViewAugmentation, view_draws

from .timing import compare, seconds_of, spread
from .training import Setting, training_step

LOGGING_STEPS = 5


def phantom_cache(folder: Path, images: int = 256) -> Path:
    """A cache of synthetic radiographs of 256 px, all for training."""
    prepare(PhantomCollection(images, 1), folder / "all", size=256, splits="none", progress=False)
    return folder / "all"


def torchvision_pipeline(view: int, recipe: TwoViewAugmentation) -> Callable[[Image.Image], Tensor]:
    """The paper's six transforms of one image after another by torchvision, with our magnitudes."""
    jitter = transforms.ColorJitter(brightness=recipe.brightness, contrast=recipe.contrast)
    size = recipe.image_size
    kernel = size // 10 // 2 * 2 + 1
    steps = [
        transforms.RandomResizedCrop(size, recipe.crop_area, recipe.crop_ratio),
        transforms.RandomHorizontalFlip(recipe.flip),
        transforms.RandomRotation(recipe.rotation, transforms.InterpolationMode.BILINEAR),
        transforms.RandomApply([jitter], recipe.jitter),
        transforms.RandomApply([transforms.GaussianBlur(kernel, recipe.blur_sigma)], recipe.blur[view]),
        transforms.RandomSolarize(round(255 * recipe.solarize_threshold), recipe.solarize[view]),
        transforms.ToTensor(),
        transforms.Normalize([recipe.mean], [recipe.std]),
    ]
    return transforms.Compose(steps)


def benchmark_views(cache: Path, setting: Setting, rounds: int) -> dict[str, Any]:
    """Both views of a batch: ours, on the device, against torchvision's image by image; one core for either.

    Returns:
        Seconds, images/s, and how many times faster ours is.
    """
    recipe = TwoViewAugmentation(image_size=setting.image_size)
    rows = load_cache(cache).datasets["train"]
    pictures = [rows[i % len(rows)]["image"] for i in range(setting.batch_size)]
    pixels = torch.stack([pil_to_tensor(picture) for picture in pictures]).to(setting.device)
    draws = view_draws(0, 0, range(setting.batch_size))
    pipelines = [torchvision_pipeline(view, recipe) for view in (0, 1)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = compare(
        {
            "ours": lambda: recipe(pixels, draws),
            "torchvision": lambda: [torch.stack([make(picture) for picture in pictures]) for make in pipelines],
        },
        rounds,
        setting.device,
        "views",
    )
    torch.set_num_threads(threads)
    return {
        "seconds": seconds,
        "images_per_second": {name: setting.batch_size / values["median"] for name, values in seconds.items()},
        "times_torchvision": seconds["torchvision"]["median"] / seconds["ours"]["median"],
    }


def benchmark_input(cache: Path, setting: Setting, rounds: int) -> dict[str, Any]:
    """From a cache to uint8 batches on the device, with nothing else to do.

    Returns:
        Images/s (min, median, max) and the median a core, with as many workers as there are cores.
    """
    workers = available_cores()
    images = load_cache(cache).datasets["train"].select_columns("image")
    batches = EpochBatches(len(images), setting.batch_size, seed=0)
    loader = DataLoader(
        PretrainingImages(images),
        batch_sampler=batches,
        num_workers=workers,
        persistent_workers=True,
        pin_memory=setting.device.type == "cuda",
    )
    epochs = max(1, 2000 // len(images))

    def read() -> None:
        for epoch in range(epochs):
            batches.start_at(epoch, 0)
            for pixels, _ in loader:
                pixels.to(setting.device, non_blocking=True)

    read()  # the workers start
    count = epochs * len(batches) * setting.batch_size
    rates = spread([count / seconds_of(read, setting.device) for _ in range(rounds)])
    return {"workers": workers, "images_per_second": rates, "images_per_second_a_core": rates["median"] / workers}


def pretraining_seconds(
    script: Path, cache: Path, setting: Setting, options: list[str], processes: int = 1, steps: int = 4 * LOGGING_STEPS
) -> list[float]:
    """Seconds of a step of the real command, read off the times at which lines of its metrics appear.

    Args:
        script: scripts/pretrain.py.
        cache: its data set.
        setting: batch size (over all processes), backbone, image size.
        options: more flags.
        processes: how many torchrun starts.
        steps: as many are run; those up to the first line are not counted.

    Returns:
        The mean of each interval of `LOGGING_STEPS` steps.

    Raises:
        RuntimeError: the command failed.
    """
    images = len(load_cache(cache).datasets["train"])
    flags: dict[str, Any] = {
        "dataset": cache,
        "backbone": setting.backbone,
        "image_size": setting.image_size,
        "batch_size": setting.batch_size,
        "epochs": -(-steps // (images // setting.batch_size)),
        "logging_steps": LOGGING_STEPS,
        "num_workers": max(1, available_cores() // processes),
        "mixed_precision": "bf16" if setting.half else "no",
    }
    words = [sys.executable] if processes == 1 else [sys.executable, "-m", "torch.distributed.run"]
    if processes > 1:
        words += ["--nproc_per_node", str(processes), "--master_port", "0", "--rdzv_backend", "c10d"]
        words += ["--rdzv_endpoint", "localhost:0"]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        words += [str(script), "--output_dir", str(output)]
        words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        words += options  # behind the flags that they replace
        with (Path(folder) / "log").open("w+") as log, subprocess.Popen(words, stdout=log, stderr=log) as command:
            times = _times_of_lines(output / METRICS_FILE, steps // LOGGING_STEPS, command)
            command.terminate()  # it ends its step, and its workers with it: a kill would leave them and their memory
            command.wait()
            if len(times) < 2:
                log.seek(0)
                raise RuntimeError(f"{' '.join(words)} failed:\n{log.read()[-2000:]}")
    return [(after - before) / LOGGING_STEPS for before, after in itertools.pairwise(times)]


def _times_of_lines(file: Path, lines: int, command: subprocess.Popen[bytes]) -> list[float]:
    times: list[float] = []
    while len(times) < lines and command.poll() is None:
        if file.exists() and len(file.read_text().splitlines()) > len(times):
            times.append(time.perf_counter())
        time.sleep(0.02)
    return times


def benchmark_pretraining(script: Path, cache: Path, setting: Setting, rounds: int) -> dict[str, Any]:
    """Images/s of the whole command, eager and on GPUs compiled, against the bare backbone's step; they take turns.

    Returns:
        Images/s (min, median, max) of each and the share of the bare step's.
    """
    bare = training_step("bare", setting)
    bare()
    forms: dict[str, list[str]] = {"eager": []}
    if setting.device.type == "cuda":
        forms["compiled"] = ["--torch_compile"]
    seconds: dict[str, list[float]] = {name: [] for name in ("bare", *forms)}
    for _ in range(rounds):
        seconds["bare"] += [seconds_of(bare, setting.device) for _ in range(3)]
        for name, options in forms.items():
            seconds[name] += pretraining_seconds(script, cache, setting, options)
    return _rates(seconds, setting)


def benchmark_processes(script: Path, cache: Path, setting: Setting, rounds: int, processes: int = 2) -> dict[str, Any]:
    """Images/s of the whole command in one process and in several that share the batch.

    Returns:
        Images/s (min, median, max) of each, and the share of one process's that the several reach together.
    """
    seconds: dict[str, list[float]] = {"one": [], "several": []}
    for _ in range(rounds):
        for name, count in (("one", 1), ("several", processes)):
            seconds[name] += pretraining_seconds(script, cache, setting, [], count)
    return {"processes": processes} | _rates(seconds, setting)


def _rates(seconds: dict[str, list[float]], setting: Setting) -> dict[str, Any]:
    """Images/s of each, and the share of the first one's."""
    rates = {name: spread([setting.batch_size / value for value in values]) for name, values in seconds.items()}
    first, *others = rates
    return {
        "images_per_second": rates,
        "share": {name: rates[name]["median"] / rates[first]["median"] for name in others},
    }
