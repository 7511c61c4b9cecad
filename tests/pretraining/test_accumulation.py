"""Micro-batches that give the exact gradient of the whole batch, in one process and in two."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import in_two_processes, tiny_config
from torch import Tensor, nn

from mlvicx_hf import MLVICXForPreTraining
from mlvicx_hf.objectives import OBJECTIVES, Objective
from mlvicx_hf.pretraining.accumulation import accumulate

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
BATCH = 12


def views(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    one, two = (torch.randn(batch, 1, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    return one, two


def model(**options: Any) -> Objective:
    torch.manual_seed(2)
    return OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config(**options))).double()


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, {"multi_level_weight": 0.0}, {"global_weight": 0.0}])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_loss_and_gradients_are_those_of_the_whole_batch(steps: int, options: dict[str, float]):
    """In evaluation mode, where batch normalisation does not depend on the batch."""
    whole, parts = model(**options).eval(), model(**options).eval()
    expected = whole(*views())
    expected.loss.backward()
    output = accumulate(Accelerator(cpu=True), parts, views(), steps)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    found = gradients(parts)
    assert found.keys() == gradients(whole).keys()
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-12, msg=name)
    assert not output.loss.requires_grad


def test_the_mean_of_the_micro_batches_is_another_gradient():
    whole, parts = model().eval(), model().eval()
    whole(*views()).loss.backward()
    for one, two in zip(*(view.chunk(2) for view in views()), strict=True):
        (parts(one, two).loss / 2).backward()
    name = "model.mlvicx.backbone.conv1.0.weight"
    difference = (gradients(parts)[name] - gradients(whole)[name]).norm() / gradients(whole)[name].norm()
    assert difference > 0.05


def test_running_statistics_move_once_a_micro_batch():
    network, plain = model().train(), model().train()
    before = copy.deepcopy(network.state_dict())
    accumulate(Accelerator(cpu=True), network, views(), 3)
    with torch.no_grad():
        for one, two in zip(*(view.chunk(3) for view in views()), strict=True):
            plain(one, two)
    after = network.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-10, atol=1e-12, msg=name)
    name = "model.mlvicx.backbone.bn1.running_mean"
    moved = [key for key in after if key.endswith("running_mean") and not torch.equal(after[key], before[key])]
    assert len(moved) > 5, name
    assert all(m.track_running_stats for m in network.modules() if isinstance(m, nn.BatchNorm2d))


@pytest.mark.parametrize("steps", [5, 12])
def test_unequal_or_tiny_micro_batches_are_refused(steps: int):
    with pytest.raises(ValueError, match=rf"gradient_accumulation_steps={steps} found for 12 images"):
        accumulate(Accelerator(cpu=True), model(), views(), steps)


def process(rank: int, folder: str) -> None:
    """Half of the batch, in three micro-batches."""
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    network = accelerator.prepare(model().eval())
    one, two = (view.chunk(2)[rank] for view in views())
    output = accumulate(accelerator, network, (one, two), 3)
    results = {"loss": output.loss, "gradients": gradients(accelerator.unwrap_model(network))}
    torch.save(results, f"{folder}/{rank}.pt")
    accelerator.wait_for_everyone()
    accelerator.end_training()


@pytest.mark.thorough
def test_two_processes_with_micro_batches_equal_one_without(tmp_path: Path):
    in_two_processes(process, tmp_path)
    whole = model().eval()
    loss = whole(*views()).loss
    loss.backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-10, atol=0)
        for name, gradient in gradients(whole).items():
            torch.testing.assert_close(found["gradients"][name], gradient, rtol=1e-8, atol=1e-12, msg=name)
