"""What this machine has."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_threads(threads: int | None = None) -> None:
    """Give torch this process's share of the cores.

    `accelerate launch` and torchrun set OMP_NUM_THREADS to 1, which would leave the other cores idle.

    Args:
        threads: that many instead.

    Raises:
        ValueError: fewer than one.
    """
    import torch

    if threads is not None and threads < 1:
        raise ValueError(f"cpu_threads={threads} found; expected 1 or more")
    share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, share))
