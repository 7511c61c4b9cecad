"""Candidates that take turns, and what they take: seconds and memory."""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch

from mlvicx_hf.common.machine import keep_freed_memory, use_cpu_threads
from mlvicx_hf.common.progress import progress_bar

Spread = dict[str, float]  # min, median, max


def spread(values: Sequence[float]) -> Spread:
    """Least, median and greatest."""
    return {"min": min(values), "median": median(values), "max": max(values)}


def compare(
    candidates: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, description: str
) -> dict[str, Spread]:
    """Seconds of each candidate; they take turns, so that a slow minute meets all of them.

    Args:
        candidates: what is timed, by name; each is called twice before.
        rounds: measurements of each.
        device: which is waited for.
        description: of the progress bar.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with progress_bar((rounds + 2) * len(candidates), description, "call") as bar:
        for turn in range(-2, rounds):
            for name, run in candidates.items():
                elapsed = seconds_of(run, device)
                if turn >= 0:
                    seconds[name].append(elapsed)
                bar.update()
    return {name: spread(values) for name, values in seconds.items()}


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OwnProcess:
    """A candidate in a process of its own, in which memory that torch frees goes back to the system, as by default.

    Args:
        build: gives what is called; a function that can be pickled.
    """

    def __init__(self, build: Callable[[], Callable[[], Any]]) -> None:
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        self.pool.submit(_build_here, build).result()

    def __call__(self) -> None:
        """Call it there, and wait."""
        self.pool.submit(_call_here).result()

    def close(self) -> None:
        """End the process, and with it the memory that it has."""
        self.pool.shutdown()


_here: list[Callable[[], Any]] = []


def _build_here(build: Callable[[], Callable[[], Any]]) -> None:
    use_cpu_threads()
    _here.append(build())


def _call_here() -> None:
    _here[0]()


def peak_memory(build: Callable[[], Callable[[], Any]], device: torch.device) -> int:
    """Bytes that a candidate needs at most, weights and gradients included, measured in a process of its own.

    On a GPU what torch allocates; on the CPU by how much the resident memory of the process grows.

    Args:
        build: gives what is called twice; a function that can be pickled.
        device: where it runs.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_peak_memory_here, build, device).result()


def _peak_memory_here(build: Callable[[], Callable[[], Any]], device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.set_device(device)
        run = build()
        run(), run()
        return torch.cuda.max_memory_allocated(device)
    use_cpu_threads()
    keep_freed_memory()
    gc.collect()
    before = psutil.Process().memory_info().rss
    run = build()
    run(), run()
    return _highest_resident() - before


def _highest_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status; expected Linux")
