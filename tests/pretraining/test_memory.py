"""Micro-batches that fit into the memory, what a step needs, and that looking for it leaves no trace."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from helpers import in_two_processes, tiny_config
from runs import assert_same_bits, pretrain, start
from torch import Tensor, nn

from mlvicx_hf import MLVICXForPreTraining
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.objectives import OBJECTIVES
from mlvicx_hf.pretraining import setup
from mlvicx_hf.pretraining.memory import ResourceEstimate, Trial, largest_that_fits, micro_batch_size


@pytest.fixture(autouse=True)
def _one_thread(fresh_accelerate: None) -> None:
    """Other processes may have the rest of the cores."""
    torch.set_num_threads(1)


def noise(count: int) -> tuple[Tensor, Tensor]:
    one, two = torch.randn(2, count, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    return one, two


def trial(share: int = 16, **options: Any) -> Trial:
    torch.manual_seed(0)
    objective = OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config(**options)))
    return Trial(Accelerator(cpu=True), objective, noise, share)


def out_of_memory_above(limit: int, tried: list[int]) -> Callable[[int], None]:
    """What a GPU does."""

    def attempt(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    return attempt


# -- how many micro-batches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "steps", "limit", "expected"),
    [
        (64, 1, 64, [64]),
        (64, 1, 9, [64, 32, 16, 8]),
        (64, 4, 9, [16, 8]),
        (64, 1, 2, [64, 32, 16, 8, 4, 2]),
        (48, 1, 2, [48, 24, 12, 6, 3, 2]),
        (45, 1, 4, [45, 15, 5, 3]),
        (7, 1, 7, [7]),
    ],
)
def test_micro_batches_are_halved_until_they_fit(share: int, steps: int, limit: int, expected: list[int]):
    tried: list[int] = []
    assert largest_that_fits(share, steps, out_of_memory_above(limit, tried)) == expected[-1]
    assert tried == expected


@pytest.mark.parametrize(("share", "smallest"), [(16, 2), (45, 3), (7, 7)])
def test_where_nothing_fits_the_error_says_so(share: int, smallest: int):
    with pytest.raises(ValueError, match=f"{share} images a process, and not even micro-batches of {smallest} of them"):
        largest_that_fits(share, 1, out_of_memory_above(1, []))


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def attempt(size: int) -> None:
        raise RuntimeError(f"mat1 and mat2 shapes cannot be multiplied ({size}x3 and 4x5)")

    with pytest.raises(RuntimeError, match=r"16x3"):
        largest_that_fits(16, 1, attempt)


@pytest.mark.parametrize("steps", [3, 5, 16])
def test_no_number_of_micro_batches(steps: int):
    with pytest.raises(ValueError, match=f"gradient_accumulation_steps={steps} found for 16 images of a process"):
        micro_batch_size(16, steps)
    with pytest.raises(ValueError, match=f"gradient_accumulation_steps={steps} found"):
        largest_that_fits(16, steps, out_of_memory_above(99, []))


def test_a_step_that_runs_out_of_memory_is_tried_with_less(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: the forward pass itself raises, in the middle of the model."""
    tried = trial()
    before = {name: value.clone() for name, value in tried.objective.state_dict().items()}
    forward = tried.objective.model.aggregator.forward
    sizes: list[int] = []

    def limited(maps: tuple[Tensor, ...]) -> Tensor:
        sizes.append(len(maps[0]))
        if len(maps[0]) > 4:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return forward(maps)

    monkeypatch.setattr(tried.objective.model.aggregator, "forward", limited)
    monkeypatch.setattr(tried, "_attempt", tried.run)
    assert tried.find(1) == 4
    assert sizes[:3] == [16, 8, 4]
    assert_untouched(tried.objective, before)


@pytest.mark.parametrize(("images", "expected"), [(16, 1), (15, 2), (4, 4), (2, 8), (1, None)])
def test_on_the_cpu_the_memory_that_is_available_decides(
    images: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
):
    tried = trial()
    tried.image_bytes = 2.0**30  # far above what the memory of the tests moves
    memory = SimpleNamespace(available=tried.process_memory(images) - psutil.Process().memory_info().rss + 2**28)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    if expected is None:
        with pytest.raises(ValueError, match="not even micro-batches of 2"):
            tried.find(1)
    else:
        assert tried.find(1) == expected


def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch):
    tried = trial()
    tried.image_bytes = 2.0**30
    memory = SimpleNamespace(available=tried.process_memory(16) - psutil.Process().memory_info().rss + 2**28)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert tried.find(1) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert tried.find(1) > 1


def process(rank: int, folder: str) -> None:
    """First 8 images fit into the memory of process 0 and 4 into that of process 1, then 1 image."""
    tried = trial()
    assert tried.accelerator.num_processes == 2
    if rank == 0:  # alone: nothing waits for the other process
        tried.run(8)
    tried._attempt = out_of_memory_above((8, 4)[rank], [])  # type: ignore[method-assign]
    found = tried.find(1)
    tried._attempt = out_of_memory_above((8, 1)[rank], [])  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="not even micro-batches of 2"):
        tried.find(1)
    Path(folder, f"{rank}.txt").write_text(str(found))
    tried.accelerator.wait_for_everyone()
    tried.accelerator.end_training()


@pytest.mark.thorough
def test_all_processes_take_the_most_of_any(tmp_path: Path):
    in_two_processes(process, tmp_path)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == ["4", "4"]


# -- no trace ----------------------------------------------------------------------------------------------------------


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("mode", [False, True])
def test_a_trial_leaves_no_trace(mode: bool):
    torch.manual_seed(0)
    model = OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config())).train(mode)
    model.encoder.backbone.eval()
    model.model.global_expander.append(nn.Dropout())  # takes random numbers
    modes = [part.training for part in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    numbers = torch.get_rng_state()
    tried = Trial(Accelerator(cpu=True), model, noise, 16)
    tried.run(16)
    tried.run(4)
    tried.estimate(2)
    assert torch.equal(torch.get_rng_state(), numbers)
    assert [part.training for part in model.modules()] == modes
    assert_untouched(model, before)


# -- estimates ---------------------------------------------------------------------------------------------------------


def test_what_autograd_saves_grows_with_the_images_and_weights_do_not_count():
    tried = trial()
    few, more = tried._saved(4), tried._saved(12)
    assert (more - few) / 8 == pytest.approx(tried.image_bytes, rel=0.01)
    assert tried.image_bytes * 4 + tried.fixed_bytes == pytest.approx(few, rel=0.01)
    assert abs(tried.fixed_bytes) < 0.1 * tried.weights
    assert trial(use_context=False).image_bytes < tried.image_bytes
    assert trial(expander_dims=[512, 512]).weights > tried.weights


def test_memory_grows_with_the_micro_batch():
    tried = trial()
    assert tried.process_memory(16) - tried.process_memory(8) == pytest.approx(8 * 1.1 * tried.image_bytes, abs=2)
    assert tried.estimate(1).memory >= tried.process_memory(16)
    assert 0.1 < tried.estimate(1).memory / 2**30 < 20


def test_a_loss_alone_can_be_tried():
    assert trial(multi_level_weight=0.0).estimate(1).seconds
    assert trial(global_weight=0.0).estimate(4).seconds


def test_lines():
    assert ResourceEstimate(3 * 2**29, False, 1.26).describe(1000) == (
        "about 1.5 GiB of memory at the peak; about 1.3 s a step, 0:21:00 for 1000 steps"
    )
    assert ResourceEstimate(2**30, True, None).describe(9) == (
        "about 1.0 GiB of GPU memory at the peak; the time of a compiled step is measured after the first ones"
    )
    assert trial().describe_choice(1) == "find_batch_size: all 16 images of a process fit into the memory at once"
    assert trial().describe_choice(4) == (
        "find_batch_size: 4 micro-batches of 4 images a process fit into the memory (gradient_accumulation_steps=4); "
        "batch_size stays, batch normalisation works on micro-batches"
    )


# -- in a run ----------------------------------------------------------------------------------------------------------


def fits(monkeypatch: pytest.MonkeyPatch, limit: int) -> list[int]:
    tried: list[int] = []
    monkeypatch.setattr(Trial, "_attempt", lambda self, size: out_of_memory_above(limit, tried)(size))
    return tried


def test_a_run_with_and_without_estimate_ends_in_the_same_bits(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    one = pretrain(cache, tmp_path / "one")
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("expected: ")]
    assert re.fullmatch(
        r"expected: about \d\.\d GiB of memory at the peak; about [\d.e-]+ s a step, 0:00:\d\d for 10 steps", line
    )
    monkeypatch.setattr(setup, "_fit", lambda trial, settings, steps, resumed: (settings, []))
    assert_same_bits(one, pretrain(cache, tmp_path / "other"))
    assert "expected: " not in capsys.readouterr().out


def test_a_compiled_model_is_not_timed_before(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode: compiled.append(mode))
    monkeypatch.setattr(setup, "NOT_COMPILED", ())
    monkeypatch.setattr(Trial, "run", lambda self, size: pytest.fail("timed"))
    pretrain(cache, tmp_path / "run", "--compile", "--epochs", 1, "--torch_compile_mode", "reduce-overhead")
    assert compiled == ["reduce-overhead"]
    assert "the time of a compiled step is measured after the first ones" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [("--find_batch_size",), ("--gradient_accumulation_steps", 2)])
def test_graphs_that_overwrite_gradients_of_micro_batches_are_refused(
    cache: Path, tmp_path: Path, flags: tuple[object, ...]
):
    with pytest.raises(UserError, match="reduce-overhead with micro-batches found; expected default"):
        pretrain(cache, tmp_path / "run", "--compile", "--torch_compile_mode", "reduce-overhead", *flags)


def test_found_micro_batches_are_said_recorded_and_kept(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    plain = pretrain(cache, tmp_path / "plain", "--gradient_accumulation_steps", 4, "--checkpoint_steps", 3)
    flags = ("--find_batch_size", "--checkpoint_steps", 3, "--save_total_limit", 9)
    tried = fits(monkeypatch, 3)
    found = pretrain(cache, tmp_path / "found", *flags)
    assert tried == [8, 4, 2]
    assert "find_batch_size: 4 micro-batches of 2 images a process fit" in capsys.readouterr().out
    assert_same_bits(plain, found)
    training = json.loads((found / "run.json").read_text())["training"]
    assert (training["gradient_accumulation_steps"], training["batch_size"]) == (4, 8)

    for path in found.glob("checkpoint-*"):  # a run that was killed after its second checkpoint
        if path.name not in ("checkpoint-3", "checkpoint-6"):
            shutil.rmtree(path)
    (found / "model.safetensors").unlink()
    tried = fits(monkeypatch, 8)  # more memory now: the checkpoint decides all the same
    pretrain(cache, found, *flags, "--resume")
    assert tried == []
    assert "find_batch_size: 4 micro-batches of 2 images" in capsys.readouterr().out
    assert_same_bits(plain, found)

    with pytest.raises(ValueError, match=r"training\.gradient_accumulation_steps was 4, now 1; expected"):
        start(cache, found, "--resume")
    assert start(cache, found, "--resume", "--gradient_accumulation_steps", 4).step == 10
    with pytest.raises(ValueError, match=r"training\.gradient_accumulation_steps was 2, now 4; expected"):
        start(cache, with_two(cache, tmp_path), "--resume", "--find_batch_size", "--gradient_accumulation_steps", 4)


def with_two(cache: Path, folder: Path) -> Path:
    return pretrain(cache, folder / "two", "--gradient_accumulation_steps", 2, "--epochs", 2)


def test_a_resume_without_checkpoint_searches(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tried = fits(monkeypatch, 4)
    run = start(cache, tmp_path / "run", "--find_batch_size", "--resume", "--gradient_accumulation_steps", 1)
    assert tried == [8, 4]
    assert run.arguments.gradient_accumulation_steps == 2


def test_a_run_that_does_not_fit_writes_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fits(monkeypatch, 1)
    with pytest.raises(ValueError, match="batch_size gives 8 images a process, and not even micro-batches of 2"):
        start(cache, tmp_path / "run", "--find_batch_size")
    assert not (tmp_path / "run").exists()
