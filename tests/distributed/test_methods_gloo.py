"""Two gloo processes with four images each equal one with eight, for every method that does not mix images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import in_two_processes
from methods import SMALL, small_objective, small_views
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
METHODS = [name for name in SMALL if not name.startswith("pcrl_v1")]


def evaluating(name: str) -> Any:
    """In evaluation mode: in training each process has its own batch statistics, on the CPU at least."""
    return small_objective(name).double().eval()


def results(objective: Any, loss: Tensor) -> dict[str, Any]:
    """What a step gives; afterwards, momentum copies and queues."""
    objective.update(1)
    slopes = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "gradients": slopes, "state": objective.state_dict()}


def process(rank: int, folder: str) -> None:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    found = {}
    for name in METHODS:
        objective = evaluating(name)
        wrapped = accelerator.prepare(objective)
        output = wrapped(*(view.chunk(2)[rank] for view in small_views(name)))
        accelerator.backward(output.loss)
        found[name] = results(objective, output.loss)
    torch.save(found, f"{folder}/{rank}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gloo")
    in_two_processes(process, folder)
    return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_equal_one(name: str, found: list[dict[str, Any]]):
    objective = evaluating(name)
    output = objective(*small_views(name))
    output.loss.backward()
    expected = results(objective, output.loss)
    for each in found:
        torch.testing.assert_close(each[name]["loss"], expected["loss"], rtol=1e-10, atol=1e-12)
        assert each[name]["gradients"].keys() == expected["gradients"].keys()
        for part in ("gradients", "state"):
            for key, value in expected[part].items():
                torch.testing.assert_close(each[name][part][key], value, rtol=1e-8, atol=1e-11, msg=f"{name} {key}")
