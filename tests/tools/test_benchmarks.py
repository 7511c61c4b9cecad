"""What the benchmark compares does the same work, and its figures are what was measured; speed itself is not tested."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from benchmark import gpu
from benchmark.authors_order import covariance
from benchmark.command import main
from benchmark.methods import method_step
from benchmark.pipeline import benchmark_views, phantom_cache, pretraining_seconds
from benchmark.timing import compare, peak_memory, spread
from benchmark.training import Setting, benchmark_step, gigaflops, training_step
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.models.loss_mlvicx import covariance_loss
from mlvicx_hf.objectives import OBJECTIVES

pytestmark = pytest.mark.thorough

CPU = torch.device("cpu")
SMALL = Setting("resnet18", 32, 4, CPU)


def test_candidates_take_turns_and_are_measured_without_the_first_calls():
    calls = []

    def run(name: str) -> None:
        calls.append(name)
        time.sleep(0.2 if calls.count(name) <= 2 else 0.01)

    seconds = compare({name: lambda name=name: run(name) for name in "ab"}, 3, CPU, "test")
    assert calls == ["a", "b"] * 5
    assert all(values["max"] < 0.2 for values in seconds.values())


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"min": 1.0, "median": 2.0, "max": 3.0}


def allocate() -> object:
    """256 MiB, filled."""
    return lambda: torch.ones(64 * 2**20).sum()


def test_peak_memory_is_that_of_a_process_of_its_own():
    """The C library may put the second block behind the first one."""
    assert 256 <= peak_memory(allocate, CPU) / 2**20 < 650


def test_the_forms_of_the_covariance_agree():
    z = torch.randn(8, 32, dtype=torch.float64)
    torch.testing.assert_close(covariance_loss(z), covariance(z))


@pytest.mark.parametrize("name", ["bare", "eager", "authors"])
def test_a_step_leaves_no_gradient_behind(name: str):
    training_step(name, SMALL)()
    training_step(name, Setting("resnet18", 32, 2, CPU, half=True))()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_every_method_runs_twice(name: str):
    step = method_step(name, Setting("test_resnet", 64, 4, CPU))
    step()
    step()


def test_work_of_the_step():
    """At 224 px a bare ResNet-18 costs 20.7 GFLOP an image and MLVICX little more; the authors' order twice as much."""
    setting = Setting("resnet18", 224, 2, CPU)
    bare, ours, theirs = (gigaflops(name, setting) for name in ("bare", "eager", "authors"))
    assert 20 < bare < 21 < ours <= 21.3
    assert theirs > 2 * ours


def test_figures_of_the_step():
    rows = benchmark_step(SMALL, 2, ("bare", "eager"))
    assert rows["bare"]["ratio"] == rows["bare"]["memory_ratio"] == 1
    eager = rows["eager"]
    assert eager["ratio"] == eager["seconds"]["median"] / rows["bare"]["seconds"]["median"]
    assert eager["memory_bytes"] > 0


def test_views_and_the_whole_command(tmp_path: Path):
    cache = phantom_cache(tmp_path, 12)
    row = benchmark_views(cache, SMALL, 2)
    assert row["times_torchvision"] == pytest.approx(
        row["seconds"]["torchvision"]["median"] / row["seconds"]["ours"]["median"]
    )
    seconds = pretraining_seconds(
        ROOT / "scripts" / "pretrain.py", cache, SMALL, ["--expander_dims", "16", "16"], steps=15
    )
    assert len(seconds) == 2
    assert all(value > 0 for value in seconds)
    with pytest.raises(RuntimeError, match="patch_size"):
        pretraining_seconds(ROOT / "scripts" / "pretrain.py", cache, SMALL, ["--patch_size", "3"])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "benchmark.json"
    words = ["--sections", "inference", "--rounds", "1", "--image_size", "32", "--inference_batch_sizes", "1", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark", *words, "--json", str(output)])
    main(ROOT / "scripts" / "pretrain.py")
    report, printed = json.loads(output.read_text()), capsys.readouterr().out
    for row, batch in zip(report["inference"], (1, 2), strict=True):
        assert row["eager_ratio"] == row["seconds"]["eager"]["median"] / row["seconds"]["timm"]["median"]
        assert f"inference, batch {batch}: timm" in printed
    assert report["precision"] == "float32"
    monkeypatch.setattr(sys, "argv", ["benchmark", "--sections", "speed"])
    with pytest.raises(UserError, match="sections speed found; expected some of step"):
        main(ROOT / "scripts" / "pretrain.py")


def test_what_a_gpu_should_show_runs_on_the_cpu_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["--output", str(tmp_path), "--device", "cpu", "--tiny", "--parts"]
    monkeypatch.setattr(sys, "argv", ["gpu", *words, *gpu.PARTS])
    with pytest.raises(SystemExit) as caught:
        gpu.main()
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert caught.value.code is False, report
    assert list(report["parts"]) == list(gpu.PARTS)
    checks = ("waits", "against the CPU", "resume", "curves", "compiled")
    assert all(report["parts"][name]["passed"] for name in checks)
    assert report["parts"]["overflow"] == {"left_out": "needs a GPU"}
    assert report["parts"]["steps"][0]["of_bare"] == 1
    assert (tmp_path / "gpu.md").read_text().count("## ") == len(gpu.PARTS)
