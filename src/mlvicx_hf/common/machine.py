"""Use and describe the machine's cores, memory and devices."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .signals import leave_signals_to_the_main_process

if TYPE_CHECKING:  # importing torch takes seconds, which --help does not have
    import torch

_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h


def available_cores() -> int:
    """Count the cores that this process may use.

    On shared machines these are fewer than there are: by the process's affinity, by the quotas of its control groups
    (as containers have), or by SLURM's `--cpus-per-task`. More threads than that would wait for one another.
    """
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    for (quota,) in _group_files("cpu.max"):
        limit, period = quota.split()
        if limit != "max":
            counts.append(int(limit) // int(period))
    if share := os.environ.get("SLURM_CPUS_PER_TASK", ""):
        counts.append(int(share))
    return max(1, min(counts))


def available_memory() -> int:
    """Bytes of memory that this machine and the control groups of this process still have for all processes in them."""
    import psutil

    left = [psutil.virtual_memory().available]
    for limit, used, parts in _group_files("memory.max", "memory.current", "memory.stat"):
        if limit != "max":
            cached = dict(line.split() for line in parts.splitlines())["inactive_file"]  # given back when needed
            left.append(int(limit) - int(used) + int(cached))
    return max(0, min(left))


def _group_files(*names: str) -> list[list[str]]:
    """Contents of files in this process's control group (version 2) and in those around it that have all of them.

    The outermost group has no limits, but some of the files.
    """
    try:
        groups = [line.partition("::")[2] for line in _GROUP.read_text().splitlines() if line.startswith("0::")]
    except OSError:  # not Linux
        return []
    folders = [folder for group in groups for folder in (Path(group), *Path(group).parents)]
    found = [[_GROUPS / folder.relative_to("/") / name for name in names] for folder in folders]
    return [[file.read_text().strip() for file in files] for files in found if all(file.is_file() for file in files)]


def use_cpu_threads(threads: int | None = None) -> None:
    """Give torch this process's share of the cores, or this number of threads.

    `accelerate launch` and torchrun set OMP_NUM_THREADS to 1, which would leave the other cores idle.
    """
    import torch

    share = available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, share))


def keep_freed_memory() -> None:
    """Make the C library keep the memory that torch frees, for the next tensor of that size.

    By default it gives large blocks back at once, and the system fills the pages of each new block with zeros. In a
    training step on the CPU every map is such a block, and zeros take longer than most operations. Only glibc has this
    setting; elsewhere do nothing.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, -1)


def begin_worker(worker: int) -> None:
    """Begin a worker of training's DataLoader, for its `worker_init_fn`: leave signals and memory to the main process.

    A forked worker shares the pages that `keep_freed_memory` keeps, until training writes to them: from then on each of
    them would be in memory twice.
    """
    leave_signals_to_the_main_process(worker)
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def refuse_other_launches() -> None:
    """Refuse what `accelerate launch` can ask for besides data parallel processes. Call it before Accelerate starts.

    The loss joins the embeddings of all processes, and checkpoints hold whole weights: each process needs a whole
    model. Accelerate would also divide every gradient by the accumulation steps that it was given.

    Raises:
        UserError: names what was asked for, and what to use.
    """
    sharding = {
        "ACCELERATE_USE_FSDP": "FSDP",
        "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
        "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
    }
    for variable, name in sharding.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise UserError(
                f"{name} found in the configuration of `accelerate launch` ({variable}); expected data parallel "
                "processes: distributed_type MULTI_GPU or MULTI_CPU, or `accelerate launch --multi_gpu`"
            )
    if os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":  # it would get round all checks of compiling
        raise UserError("dynamo found in the configuration of `accelerate launch`; expected none, and --torch_compile")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if steps not in ("1", "auto"):
        raise UserError(
            f"gradient_accumulation_steps={steps} found in the configuration of `accelerate launch`; expected 1 there, "
            "and --gradient_accumulation_steps of this command instead"
        )


def describe_hardware(device: Any, processes: int = 1) -> dict[str, Any]:
    """Describe what a run of `processes` processes computed on, for its result files.

    Returns:
        `device` (its type), `name`, `cores` (of a process's machine) and `processes`.
    """
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": device.type, "name": name, "cores": available_cores(), "processes": processes}


def _cpu_name() -> str:
    listing = Path("/proc/cpuinfo")
    if listing.is_file():  # Linux; platform.processor() is empty there
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def choose_device(name: str | None) -> torch.device:
    """Find the device of this name; by default a GPU if there is one.

    Raises:
        UserError: no such device.
    """
    import torch

    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise UserError(f"device={name!r} found; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device={name!r} found; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise UserError(f"device={name!r} found; this machine has {gpus} usable GPU(s)")
    return device
