import runpy
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_users_error, run_script, tiny_config
from transformers import AutoModel, AutoModelForPreTraining

from mlvicx_hf import MLVICXForPreTraining, MLVICXImageProcessor


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    MLVICXForPreTraining(tiny_config()).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


def test_as_a_command(run: Path, tmp_path: Path):
    words = ("--model", run, "--format", "hub", "--output", tmp_path / "encoder")
    done = run_script("export_model.py", *words)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'encoder'}: config.json, configuration_mlvicx.py, " in done.stdout
    assert AutoModel.from_pretrained(tmp_path / "encoder").config.architectures == ["MLVICXModel"]
    assert_users_error(run_script("export_model.py", *words), "encoder is there already")


def test_every_format(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(kind: str, *more: str) -> tuple[str, str]:
        words = ["export_model.py", "--model", run, "--format", kind, "--output", tmp_path / kind, *more]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "scripts" / "export_model.py"), run_name="__main__")
        return capsys.readouterr()

    call("hub", "--with_expanders")
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "hub")
    assert model.config.architectures == ["MLVICXForPreTraining"]
    assert call("timm")[0] == f"{tmp_path / 'timm'}: README.md, config.json, model.safetensors\n"
    assert f"{tmp_path / 'onnx'}: differs from torch by " in call("onnx")[0]
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    for kind, flags, part in (
        ("torchvision", [], "error: backbone='test_resnet' found; expected a ResNet of torchvision"),
        ("timm", ["--with_expanders"], "error: --with_expanders found; --format timm does not take it"),
    ):
        with pytest.raises(SystemExit) as caught:
            call(kind, *flags)
        assert caught.value.code == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "torchvision").exists()
