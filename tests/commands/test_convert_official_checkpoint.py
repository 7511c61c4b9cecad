"""The command: both formats, and one clear line for every file that does not fit."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import mlvicx, run_script
from official_reference import OfficialReference
from torch import Tensor

from mlvicx_hf import MLVICXForPreTraining, MLVICXModel


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return OfficialReference().float().state_dict()


def convert(*words: object) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout and stderr."""
    done = mlvicx("convert", *words)
    return done.returncode, done.stdout, done.stderr


def test_an_official_checkpoint_in_a_fresh_process(tmp_path: Path, state: dict[str, Tensor]):
    model = {f"encoder.{key}": value for key, value in state.items()}
    torch.save({"config": {}, "epoch": 9, "steps": 4, "model": model, "optimizer": {}}, tmp_path / "run.pth")
    done = run_script("convert_official_checkpoint.py", tmp_path / "run.pth", tmp_path / "new" / "ours")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'new' / 'ours'}: MLVICXForPreTraining, resnet18, 3 channel(s)\n"
    loaded = MLVICXForPreTraining.from_pretrained(tmp_path / "new" / "ours")
    assert torch.equal(loaded.mlvicx.backbone.conv1.weight, state["encoder.0.weight"])
    code, _, err = convert(tmp_path / "run.pth", tmp_path / "new" / "ours")
    assert code == 2
    assert f"error: {tmp_path / 'new' / 'ours'} is there already; expected a new or an empty folder" in err


@pytest.mark.parametrize(("options", "channels"), [((), 1), (("--num_channels", 3), 3)])
def test_a_plain_resnet(tmp_path: Path, options: tuple[object, ...], channels: int):
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet18.pth")
    code, out, _ = convert(tmp_path / "resnet18.pth", tmp_path / "ours", *options)
    assert code == 0
    assert out.endswith(f"ours: MLVICXModel, resnet18, {channels} channel(s); left out: fc.weight, fc.bias\n")
    model = MLVICXModel.from_pretrained(tmp_path / "ours")
    assert model(torch.zeros(1, channels, 32, 32)).pooler_output.shape == (1, 512)


def assert_one_clear_line(answer: tuple[int, str, str], output: Path, *parts: str) -> None:
    code, out, err = answer
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert all(part in err for part in parts), err
    assert not output.exists()
    assert not list(output.parent.glob(".*"))  # nor a temporary folder


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda s: {"online": {k: v for k, v in s.items() if "cbt2" not in k}}, ["3 missing", "cbt2.cam.fc.0.weight"]),
        (lambda s: {"online": {k: v for k, v in s.items() if "convs" not in k}}, ["no resize_project.convs.0.weight"]),
        (lambda s: {"online": s | {"cbt6.sam.conv1.weight": torch.zeros(1)}}, ["1 not expected (cbt6.sam.conv1."]),
        (lambda s: {"online": s | {"encoder.1.weight": torch.zeros(65)}}, ["encoder.1.weight (65,), expected (64,)"]),
        (lambda s: {"model": s | {"head.weight": torch.zeros(1)}}, ["found in 'model'; expected the authors' keys"]),
        (lambda s: s, ["keys encoder.0.weight, encoder.1.weight", "expected 'online' or 'model'"]),
        (lambda s: list(s), ["list found; expected a dictionary of weights"]),
    ],
)
def test_a_checkpoint_that_does_not_fit(
    tmp_path: Path, state: dict[str, Tensor], change: Callable[[Any], Any], parts: list[str]
):
    torch.save(change(state), tmp_path / "official.pth")
    answer = convert(tmp_path / "official.pth", tmp_path / "ours")
    assert_one_clear_line(answer, tmp_path / "ours", str(tmp_path / "official.pth"), *parts)


def test_files_that_cannot_be_read(tmp_path: Path, state: dict[str, Tensor]):
    path, output = tmp_path / "official.pth", tmp_path / "ours"
    assert_one_clear_line(convert(path, output), output, str(path), "expected a checkpoint, a file that exists")
    torch.save({"online": state}, path)
    path.write_bytes(path.read_bytes()[:-1000])
    assert_one_clear_line(convert(path, output), output, str(path), "damaged", "expected a whole .pth or .safetensors")


def test_code_is_refused_and_not_run(tmp_path: Path, state: dict[str, Tensor]):
    path, output, marker = tmp_path / "official.pth", tmp_path / "ours", tmp_path / "marker"
    torch.save({"online": state, "config": Malicious(marker)}, path)
    torch.load(path, weights_only=False)
    assert marker.exists()  # so the file is dangerous
    marker.unlink()
    assert_one_clear_line(convert(path, output), output, str(path), "refused", "expected tensors and plain values")
    path.write_bytes(pickle.dumps(Malicious(marker)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning would be a second line
        assert_one_clear_line(convert(path, output), output, str(path), "damaged")
    assert not marker.exists()
