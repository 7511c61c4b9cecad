"""A training step asks the device for no value, and sends it nothing but the batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import send_to_device
from methods import SMALL, small_objective, small_views
from runs import start
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mlvicx_hf.pretraining.arguments import ModelArguments
from mlvicx_hf.pretraining.batches import PlannedBatch
from mlvicx_hf.pretraining.loop import train
from mlvicx_hf.pretraining.model import create_objective
from mlvicx_hf.pretraining.views import TwoViewAugmentation, view_draws

# Operations whose result the processor must have before it can go on
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"}


class Recorder(TorchDispatchMode):
    """Counts the operations that wait for a device, and copies from the CPU to another device by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []
        self.copied: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in WAITING:
            self.waited.append(func.name())
        on_cpu = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.device.type == "cpu"]
        if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in tree_leaves(result)):
            self.copied += [tuple(tensor.shape) for tensor in on_cpu]
        return result


def test_the_recorder_sees_a_value_that_is_read():
    with Recorder() as recorder:
        _ = torch.ones(3).sum().item()
    assert recorder.waited == ["aten::_local_scalar_dense"]


def test_steps_that_write_nothing_wait_for_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--num_workers", 1, "--logging_steps", 100, "--checkpoint_steps", 100]
    run = start(cache, tmp_path / "run", *words, "--gradient_accumulation_steps", 1)
    waited = []
    with Recorder() as recorder:
        monkeypatch.setattr(run.objective, "update", lambda step: waited.append(len(recorder.waited)))
        train(run)
    # PyTorch's loader draws a seed on the CPU when it starts. At the end the losses are checked and written.
    assert waited == [1] * run.total_steps
    assert len(recorder.waited) > 5


@pytest.mark.parametrize("name", SMALL)
def test_a_step_of_a_method_waits_for_nothing(name: str):
    objective, views = small_objective(name), [view.float() for view in small_views(name)]
    with Recorder() as recorder:
        for step in range(2):
            objective.start_step(step)
            objective(*views).loss.backward()
            objective.update(step + 1)
    assert not recorder.waited


def on_fake_gpu(module: nn.Module) -> None:
    """Replace all parameters and buffers by fake ones on a GPU."""
    for part in module.modules():
        for name, value in list(part.named_parameters(recurse=False)):
            fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
            setattr(part, name, nn.Parameter(fake, requires_grad=value.requires_grad))
        for name, value in list(part.named_buffers(recurse=False)):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype, device="cuda")


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch was built without CUDA")
def test_a_gpu_is_sent_the_batch_alone():
    arguments = ModelArguments(backbone="test_resnet", image_size=32, expander_dims=[32, 32], aggregation_channels=16)
    objective = create_objective(arguments)
    augment = TwoViewAugmentation(image_size=32)
    plans = augment.plan(view_draws(0, 0, range(8)))
    batch = PlannedBatch(0, torch.zeros(8, 1, 40, 40, dtype=torch.uint8), plans)
    with FakeTensorMode() as mode:  # whatever reads a value is an error here
        on_fake_gpu(objective)
        fake = tree_map(lambda value: mode.from_tensor(value) if isinstance(value, Tensor) else value, batch)
        with Recorder() as recorder:
            moved = send_to_device(fake, torch.device("cuda"), non_blocking=True)
            output = objective(*augment.apply(moved.images, moved.plans))
    tensors = [value for value in tree_leaves(batch) if isinstance(value, Tensor)]
    assert recorder.copied == [tuple(tensor.shape) for tensor in tensors]
    values = [output.loss, *output.terms.values(), *tree_leaves(output.embeddings)]
    assert {value.device.type for value in values} == {"cuda"}
