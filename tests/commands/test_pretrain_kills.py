"""`scripts/pretrain.py` under SIGKILL (by `tools/kill_test.py`), SIGTERM and SIGINT, in one process and in two."""

import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers import ROOT, environment, unlabelled_cache

from mlvicx_hf.pretraining.checkpoints import Checkpoints

SCRIPT = ROOT / "scripts" / "pretrain.py"


@pytest.fixture(scope="module", autouse=True)
def kills() -> Iterator[subprocess.Popen[str]]:
    """Three kills, which take place beside the other tests: they mostly wait for imports."""
    command = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", "3", "--seed", "5"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment(), start_new_session=True, **pipes) as process:
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_comparison_sees_every_difference(tmp_path: Path):
    differences = runpy.run_path(str(ROOT / "tools" / "kill_test.py"))["differences"]
    for run in ("one", "other"):
        (tmp_path / run / "checkpoint-1").mkdir(parents=True)
        (tmp_path / run / "checkpoint-1" / "optimizer.pt").write_bytes(b"same")
        (tmp_path / run / "run.json").write_text(run)
    one, other = tmp_path / "one", tmp_path / "other"
    assert differences(one, other) == []
    (other / "checkpoint-1" / "optimizer.pt").write_bytes(b"sane")
    (one / "model.safetensors").touch()
    (other / ".checkpoint-2.tmp").touch()
    assert differences(one, other) == [".checkpoint-2.tmp", "checkpoint-1/optimizer.pt", "model.safetensors"]


# -- signals -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unlabelled_cache(tmp_path_factory.mktemp("signals"), 40)


def start(cache: Path, output: Path, *launcher: object, workers: int) -> subprocess.Popen[str]:
    """A run of 5,000 steps in a group of its own, in which SIGINT is not ignored."""
    flags = ("--recipe", "smoke", "--dataset", cache, "--output_dir", output, "--epochs", 1000, "--logging_steps", 1)
    words = (*launcher, SCRIPT, *flags, "--num_workers", workers, "--cpu_threads", 1)
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env=environment(ACCELERATE_USE_CPU="true"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop(process: subprocess.Popen[str], output: Path, send: Callable[[], Any]) -> tuple[str, int]:
    """Send the signal after some steps; returns what stderr says, and the step of the checkpoint."""
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + 200
    try:
        while not metrics.exists() or metrics.read_text().count("\n") < 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        send()
        _, errors = process.communicate(timeout=100)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    checkpoint = Checkpoints(output, 1).newest_whole()
    assert checkpoint is not None, errors
    assert len(metrics.read_text().splitlines()) == checkpoint.step, "the step of the checkpoint is the last one"
    return errors, checkpoint.step


@pytest.mark.slow
def test_a_signal_to_the_whole_group_saves_and_says_how_to_resume(cache: Path, tmp_path: Path):
    processes = {n: start(cache, tmp_path / str(int(n)), workers=2) for n in (signal.SIGTERM, signal.SIGINT)}
    for number, process in processes.items():
        output = tmp_path / str(int(number))
        errors, step = stop(process, output, partial(os.killpg, process.pid, number))
        assert process.returncode == 128 + number, errors
        last = errors.splitlines()[-1]
        assert last.startswith(f"stopped by {number.name} after step {step} of 5000; ")
        assert last.endswith(f"{output}/checkpoint-{step} is saved: the same command with --resume goes on from there")
        assert "Traceback" not in errors


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both_behind_the_same_step(cache: Path, tmp_path: Path):
    output = tmp_path / "run"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    process = start(cache, output, *launcher, workers=0)

    def send() -> None:
        [second] = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGTERM)

    errors, step = stop(process, output, send)
    assert process.returncode != 0
    assert errors.count(f"stopped by SIGTERM after step {step} of 5000; ") == 1  # the main process speaks
    assert "exitcode  : 143" in errors, errors
    assert "Error: " not in errors.replace("ChildFailedError: ", ""), errors


# -- SIGKILL -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_kills_end_in_the_same_bits(kills: subprocess.Popen[str]):
    output, _ = kills.communicate(timeout=500)
    assert kills.returncode == 0, output
    found = [line for line in output.splitlines() if line.startswith("kill ")]
    assert len(found) == 3
    assert all(re.search(r"step \d+, .* killed (after|before) .* -> resumed at", line) for line in found), found
    assert any("killed before" in line and "checkpoint-" in line for line in found)
    assert re.search(r"run-\d ended: the same bits", output)
    assert output.splitlines()[-1] == "3 kills, 0 faults"
