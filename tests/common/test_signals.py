"""SIGTERM and SIGINT to a run in this process, and to handlers alone."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import run_code, unlabelled_cache
from runs import pretrain, start

from mlvicx_hf.common import signals as stopping
from mlvicx_hf.common.signals import StoppedError, StopSignals
from mlvicx_hf.pretraining.loop import train


@pytest.fixture(autouse=True)
def interrupts_are_taken() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 images: five steps of eight an epoch."""
    return unlabelled_cache(tmp_path_factory.mktemp("stopping"), 44)


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(cache, tmp_path_factory.mktemp("runs") / "whole")


@contextmanager
def sent_after(lines: int, number: int, metrics: Path) -> Iterator[None]:
    """Send a signal to this process when so many lines of metrics are there."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and (not metrics.exists() or metrics.read_text().count("\n") < lines):
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_run_behind_its_step(cache: Path, whole: Path, tmp_path: Path, number: int):
    output, before = tmp_path / "run", [signal.getsignal(n) for n in stopping.SIGNALS]
    flags = ("--checkpoint_steps", 100, "--save_total_limit", 1)
    with sent_after(2, number, output / "metrics.jsonl"), pytest.raises(StoppedError) as caught:
        pretrain(cache, output, *flags)
    assert caught.value.number == number
    assert [signal.getsignal(n) for n in stopping.SIGNALS] == before
    step = len((output / "metrics.jsonl").read_text().splitlines())
    assert 2 <= step < 10
    name = signal.Signals(number).name
    assert str(caught.value) == (
        f"stopped by {name} after step {step} of 10; {output}/checkpoint-{step} is saved: "
        "the same command with --resume goes on from there"
    )
    resumed = start(cache, output, *flags, "--resume")
    assert resumed.step == step
    train(resumed)
    for name in ("model.safetensors", "metrics.jsonl", "checkpoint-10/optimizer.pt"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_second_signal_acts_as_before_and_an_echo_does_not(monkeypatch: pytest.MonkeyPatch):
    before = signal.getsignal(signal.SIGINT)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # a launcher's
        assert signals.received == signal.SIGTERM
        monkeypatch.setattr(stopping, "ECHO", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == before
    assert signal.getsignal(signal.SIGINT) == before


def test_handlers_are_left_alone_in_threads_and_where_a_signal_is_ignored():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def look() -> None:
        with StopSignals():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [before]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.received == 0
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


KEPT = """
import sys, torch
from torch.utils.data import DataLoader, TensorDataset
from mlvicx_hf.common.signals import leave_signals_to_the_main_process

options = {"num_workers": 2, "persistent_workers": True, "worker_init_fn": leave_signals_to_the_main_process}
loader = DataLoader(TensorDataset(torch.arange(8.0)), 4, **options)
iterator = iter(loader)
next(iterator)
sys.kept = (loader, iterator)  # so that nobody tells the workers to end
"""


@pytest.mark.thorough
def test_a_process_ends_although_its_image_workers_are_kept():
    done = run_code(KEPT, timeout=90)
    assert done.returncode == 0, done.stderr
