"""Pretraining runs in this process, for several test files."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from kills import Forked
from mlvicx_hf.commands.pretrain import parse_pretraining
from mlvicx_hf.pretraining.loop import train
from mlvicx_hf.pretraining.run import Run
from mlvicx_hf.pretraining.setup import set_up


def start(cache: Path, output: Path, *flags: object) -> Run:
    """A run of the smoke recipe before its first step: a line of metrics a step, one thread, no workers."""
    words = ("--recipe", "smoke", "--dataset", cache, "--output_dir", output, "--num_workers", 0, "--logging_steps", 1)
    return set_up(*parse_pretraining([str(word) for word in (*words, "--cpu_threads", 1, *flags)]))


def pretrain(cache: Path, output: Path, *flags: object) -> Path:
    """Train such a run to its end; returns its folder."""
    return train(start(cache, output, *flags))


def lines(output: Path) -> list[dict[str, Any]]:
    """The lines of its metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def wait_for(path: Path, process: Forked, seconds: float = 120) -> None:
    """Until a file of a running command is there."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def weights(output: Path) -> dict[str, Tensor]:
    """Of its model."""
    return load_file(output / "model.safetensors")


def assert_same_bits(one: Path, other: Path, *files: str) -> None:
    """Two runs ended in the same weights and metrics."""
    for name in ("model.safetensors", "metrics.jsonl", *files):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def interrupted(finished: Path, output: Path, *steps: int) -> Path:
    """What a run leaves that is killed some steps after its newest checkpoint.

    Args:
        finished: the same run to its end, with those checkpoints among others.
        output: where to put it.
        steps: whose checkpoints are there.
    """
    output.mkdir()
    for step in steps:
        shutil.copytree(finished / f"checkpoint-{step}", output / f"checkpoint-{step}")
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(finished / name, output)
    (output / ".checkpoint-10.tmp").mkdir()
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    return output
