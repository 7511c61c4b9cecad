from pathlib import Path

import pytest
import torch
from helpers import assert_users_error, mlvicx, tiny_config
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
    done = mlvicx("export", *words)
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path / 'encoder'}: backbones_mlvicx.py, config.json, " in done.stdout
    assert AutoModel.from_pretrained(tmp_path / "encoder").config.architectures == ["MLVICXModel"]
    assert_users_error(mlvicx("export", *words), "encoder is there already")


def test_every_format(run: Path, tmp_path: Path):
    def call(kind: str, *more: str) -> str:
        done = mlvicx("export", "--model", run, "--format", kind, "--output", tmp_path / kind, *more)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call("hub", "--with_expanders")
    model = AutoModelForPreTraining.from_pretrained(tmp_path / "hub")
    assert model.config.architectures == ["MLVICXForPreTraining"]
    assert call("timm") == f"{tmp_path / 'timm'}: README.md, config.json, model.safetensors\n"
    assert f"{tmp_path / 'onnx'}: differs from torch by " in call("onnx")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    for kind, flags, part in (
        ("torchvision", [], "backbone='test_resnet' found; expected a ResNet of torchvision"),
        ("timm", ["--with_expanders"], "--with_expanders found; --format timm does not take it"),
    ):
        words = ("--model", run, "--format", kind, "--output", tmp_path / kind, *flags)
        assert_users_error(mlvicx("export", *words), part)
    assert not (tmp_path / "torchvision").exists()
