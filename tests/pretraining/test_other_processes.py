"""Streams that go on with another number of processes: one, then two that gloo joins, then one again."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from helpers import in_two_processes, make_cache
from runs import assert_same_bits, lines, start, weights
from torch import Tensor
from torch.nn import functional as F

from mlvicx_hf.pretraining.batches import PlannedBatch
from mlvicx_hf.pretraining.loop import train

STEPS, TO_TWO, TO_ONE = 8, 3, 6  # two epochs of four steps; where the number of processes changes
# Name of a run, workers of its last readers, and whether the norms use their running statistics
RUNS = (("norms", 0, False), ("again", 2, False), ("frozen", 0, True))
Views = dict[int, tuple[Tensor, Tensor, Tensor]]  # step → the images and both views


@contextmanager
def frozen_norms(frozen: bool) -> Iterator[None]:
    """Batch statistics of a process on the CPU are its own. Running ones depend on no number of processes."""
    norm = F.batch_norm

    def with_running_statistics(*arguments: Any) -> Tensor:
        return norm(*arguments[:5], False, *arguments[6:])

    with mock.patch.object(F, "batch_norm", with_running_statistics) if frozen else ExitStack():
        yield


def go_on(folder: Path, name: str, workers: int, frozen: bool, *flags: object) -> Views:
    """Train a run of the folder to its end, and return what was seen."""
    words = ("--streaming", "--shuffle_buffer", 20, "--checkpoint_steps", 1, "--save_total_limit", 9)
    with frozen_norms(frozen):
        run = start(folder / "cache", folder / name, *words, "--num_workers", workers, *flags)
        seen: Views = {}
        make_views = run.make_views

        def remember(batch: PlannedBatch) -> tuple[Tensor, Tensor]:
            views = make_views(batch)
            seen[run.step] = (batch.images, *views)
            return views

        run.make_views = remember
        train(run)
    return seen


def process(rank: int, folder: str) -> None:
    """What one of two processes does; it leaves what it saw in a file."""
    with (
        mock.patch("mlvicx_hf.pretraining.reporting.plot_curves"),
        mock.patch.object(Accelerator, "end_training"),  # which would part the processes after the first run
    ):
        seen = {name: go_on(Path(folder), name, 0, frozen, "--resume") for name, _, frozen in RUNS}
    torch.save(seen, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def drop_behind(run: Path, step: int) -> None:
    """Remove what a run wrote after a checkpoint, as if it had been killed there."""
    for later in range(step + 1, STEPS + 1):
        shutil.rmtree(run / f"checkpoint-{later}")
    (run / "model.safetensors").unlink()


@pytest.mark.thorough
def test_one_process_then_two_then_one_see_what_one_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    rows = [{"patient_id": f"p{i}", "view": "LATERAL" if i % 5 == 0 else "PA", "_draw": {}} for i in range(40)]
    make_cache(tmp_path, rows)
    whole = {}
    for name, frozen in (("whole", False), ("whole-frozen", True)):
        whole[name] = go_on(tmp_path, name, 0, frozen)
    for name, _, frozen in RUNS:
        shutil.copytree(tmp_path / ("whole-frozen" if frozen else "whole"), tmp_path / name)
        drop_behind(tmp_path / name, TO_TWO)

    in_two_processes(process, tmp_path)
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, workers, frozen in RUNS:
        expected = whole["whole-frozen" if frozen else "whole"]
        for step in range(TO_TWO, STEPS):
            pairs = zip(parts[0][name][step], parts[1][name][step], strict=True)
            images, *views = (torch.stack(both, 1).flatten(0, 1) for both in pairs)
            assert torch.equal(images, expected[step][0])
            torch.testing.assert_close(views, list(expected[step][1:]), rtol=0, atol=1e-5)
        drop_behind(tmp_path / name, TO_ONE)
        last = go_on(tmp_path, name, workers, frozen, "--resume")
        assert last.keys() == set(range(TO_ONE, STEPS))
        for step, seen in last.items():
            assert all(torch.equal(a, b) for a, b in zip(seen, expected[step], strict=True))
    assert sum("processes was 2, now 1" in message for message in caplog.messages) == len(RUNS)

    # Bits depend on where the number of processes changed, not on workers, nor on what came in between.
    assert_same_bits(tmp_path / "norms", tmp_path / "again")
    # Apart from the statistics of the norms, two processes compute what one does, up to rounding.
    one, other = weights(tmp_path / "whole-frozen"), weights(tmp_path / "frozen")
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)
    for before, now in zip(lines(tmp_path / "whole-frozen"), lines(tmp_path / "frozen"), strict=True):
        assert now["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert lines(tmp_path / "norms")[:TO_TWO] == lines(tmp_path / "whole")[:TO_TWO]
    assert len(lines(tmp_path / "norms")) == STEPS
