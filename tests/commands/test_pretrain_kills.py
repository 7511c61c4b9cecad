"""`mlvicx pretrain` under SIGKILL (by `tools/kill_test.py`), SIGTERM and SIGINT, in one process and in two."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT, environment, unlabelled_cache

from kill_test import kill_often
from kills import Forked, Forks, differences
from mlvicx_hf.objectives import OBJECTIVES
from mlvicx_hf.pretraining.checkpoints import Checkpoints


def test_the_comparison_sees_every_difference(tmp_path: Path):
    for run in ("one", "other"):
        (tmp_path / run / "checkpoint-1").mkdir(parents=True)
        (tmp_path / run / "checkpoint-1" / "optimizer.pt").write_bytes(b"same")
        (tmp_path / run / "run.json").write_text(run)
    one, other = tmp_path / "one", tmp_path / "other"
    assert differences(one, other, ["run.json"]) == []
    assert differences(one, other) == ["run.json"]
    (other / "checkpoint-1" / "optimizer.pt").write_bytes(b"sane")
    (one / "model.safetensors").touch()
    (other / ".checkpoint-2.tmp").touch()
    found = differences(one, other, ["run.json"])
    assert found == [".checkpoint-2.tmp", "checkpoint-1/optimizer.pt", "model.safetensors"]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unlabelled_cache(tmp_path_factory.mktemp("signals"), 40)


def flags(cache: Path, output: Path, workers: int) -> list[object]:
    """A run of 5,000 steps."""
    words = ["--recipe", "smoke", "--dataset", cache, "--output_dir", output, "--epochs", 1000, "--logging_steps", 1]
    return [*words, "--num_workers", workers, "--cpu_threads", 1]


def send_after_some_steps(output: Path, poll: Callable[[], int | None], send: Callable[[], Any]) -> None:
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 200
    while not metrics.exists() or metrics.read_text().count("\n") < 5:
        assert poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    send()


def step_of_the_checkpoint(output: Path) -> int:
    checkpoint = Checkpoints(output, 1).newest_whole()
    assert checkpoint is not None
    lines = (output / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == checkpoint.step, "the step of the checkpoint is the last one"
    return checkpoint.step


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_and_says_how_to_resume(forks: Forks, cache: Path, tmp_path: Path):
    started: dict[signal.Signals, Forked] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        started[number] = forks.start("pretrain", *flags(cache, tmp_path / number.name, workers=2))
    for number, process in started.items():
        output = tmp_path / number.name
        send_after_some_steps(output, process.poll, partial(os.killpg, process.pid, number))
        assert process.wait(100) == 128 + number, process.output
        step = step_of_the_checkpoint(output)
        [last] = [line for line in process.output.splitlines() if line.startswith("stopped by ")]
        assert last.startswith(f"stopped by {number.name} after step {step} of 5000; ")
        assert last.endswith(f"{output}/checkpoint-{step} is saved: the same command with --resume goes on from there")
        assert "Traceback" not in process.output


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_behind_the_same_step(cache: Path, tmp_path: Path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "scripts" / "pretrain.py")
    process = subprocess.Popen(
        [sys.executable, *map(str, (*launcher, *flags(cache, tmp_path / "run", workers=0)))],
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def send() -> None:
        [second] = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGTERM)

    try:
        send_after_some_steps(tmp_path / "run", process.poll, send)
        _, errors = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    step = step_of_the_checkpoint(tmp_path / "run")
    assert process.returncode != 0
    assert errors.count(f"stopped by SIGTERM after step {step} of 5000; ") == 1  # the main process speaks
    assert "exitcode  : 143" in errors, errors
    assert "Error: " not in errors.replace("ChildFailedError: ", ""), errors


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough
def test_thirty_kills_end_in_the_same_bits(forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    faults = kill_often(forks, tmp_path, 30, random.Random(5))
    output = capsys.readouterr().out
    assert not faults, output
    found = [line for line in output.splitlines() if line.startswith("kill ")]
    assert len(found) == 30
    assert all(re.search(r"step \d+, .* killed (after|before) .* -> (resumed at|killed again)", line) for line in found)
    assert any("killed before" in line and "checkpoint-" in line for line in found)
    assert re.search(r"run-\d ended: the same bits", output)


@pytest.mark.thorough
@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"mlvicx"}))
def test_kills_of_other_methods_end_in_the_same_bits(
    forks: Forks, tmp_path: Path, capsys: pytest.CaptureFixture[str], objective: str
):
    """Also their momentum copies, queues, predictors and decoders."""
    faults = kill_often(forks, tmp_path, 4, random.Random(5), objective)
    output = capsys.readouterr().out
    assert not faults, output
    assert output.count(" killed ") >= 4
    assert re.search(r"run-\d ended: the same bits", output)
