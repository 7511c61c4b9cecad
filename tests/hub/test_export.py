import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import tiny_config
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from mlvicx_hf import (
    MLVICXBackbone,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXImageProcessor,
    MLVICXModel,
    MLVICXPreTrainedModel,
)
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.hub.exports import Tensors, compare_onnx, export_onnx, export_timm, export_torchvision

HEADS = {
    MLVICXForImageClassification: {"id2label": {0: "Edema", 1: "Mass", 2: "Nodule"}},
    MLVICXForSemanticSegmentation: {"id2label": {0: "background", 1: "heart"}},
}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(model_class: type[MLVICXPreTrainedModel], **values: Any) -> MLVICXPreTrainedModel:
    """In evaluation mode, with normalisation statistics of its own."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**(HEADS.get(model_class, {}) | values)))
    encoder = model.base_model.train()
    for seed in range(2):
        encoder(noise(4, encoder.config.num_channels, 64, 64, seed=seed))
    return model.eval()


def saved(folder: Path, model_class: type[MLVICXPreTrainedModel], fit: str = "pad", **values: Any) -> Path:
    model = build(model_class, **values)
    model.save_pretrained(folder)
    size, channels = model.config.image_size, model.config.num_channels
    MLVICXImageProcessor(size, channels, image_mean=0.45, image_std=0.2, fit=fit).save_pretrained(folder)
    return folder


def without_context(folder: Path) -> MLVICXModel:
    """The model as it would be with the same trunk and no context bottlenecks."""
    return MLVICXModel.from_pretrained(folder, use_context=False).eval()


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


# -- timm --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "model_class", "initial"),
    [
        pytest.param("test_resnet", MLVICXForPreTraining, [], marks=pytest.mark.lowest),
        ("test_convnext", MLVICXModel, ["head.norm.weight", "head.norm.bias"]),
        ("densenet121", MLVICXForPreTraining, []),
        ("regnety_002", MLVICXForImageClassification, []),
    ],
)
@torch.no_grad()
def test_timm_gets_the_trunk(
    tmp_path: Path, backbone: str, model_class: type[MLVICXPreTrainedModel], initial: list[str]
):
    source = saved(tmp_path / "source", model_class, backbone=backbone, image_size=64)
    folder = export_timm(source, tmp_path / "timm")
    assert {file.name for file in folder.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    x = noise(2, 1, 64, 64, seed=3)
    expected = without_context(source)(x, output_hidden_states=True)
    features = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    for found, wanted in zip(features(x), expected.hidden_states, strict=True):
        same(found, wanted)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    same(model.forward_features(x), expected.last_hidden_state)
    if not initial:
        same(model(x), expected.pooler_output)
    own = MLVICXModel.from_pretrained(source)(x)
    assert (own.pooler_output - expected.pooler_output).norm() > 0.1 * own.pooler_output.norm()  # as the note says
    note = (folder / "README.md").read_text()
    assert "its features differ" in note
    assert all(name in note for name in initial)
    assert ("not pretrained" in note) == bool(initial)
    assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).eval()
    assert other(x).shape == (2, 5)
    same(other.forward_features(x), expected.last_hidden_state)


@pytest.mark.parametrize(
    ("fit", "shape"), [("pad", (32, 32)), ("pad", (48, 24)), ("squash", (48, 24)), ("crop", (48, 24))]
)
def test_timm_gets_the_constants(tmp_path: Path, fit: str, shape: tuple[int, int]):
    source = saved(tmp_path / "source", MLVICXModel, fit=fit)
    folder = export_timm(source, tmp_path / "timm")
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "test_resnet"
    assert config["num_classes"] == 0
    assert config["pretrained_cfg"]["input_size"] == [1, 32, 32]
    assert not {"tag", "license", "paper_ids", "origin_url", "hf_hub_id", "url"} & config["pretrained_cfg"].keys()
    assert str(tmp_path) not in (folder / "config.json").read_text()
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    settings = resolve_model_data_config(model)
    assert resolve_model_data_config(model, use_test_size=True) == settings
    transform = create_transform(**settings)
    # A ramp: the libraries' filters differ a little at edges, and PIL rounds to whole grey values.
    ramp = np.linspace(40, 200, shape[0])[:, None] + np.linspace(0, 50, shape[1])[None]
    image = Image.fromarray(ramp.astype(np.uint8))
    expected = MLVICXImageProcessor.from_pretrained(source)(image)["pixel_values"][0]
    found = transform(image)
    if shape == (32, 32):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    elif fit == "pad":  # timm's borders have the mean, as the note says
        assert (found[..., 8:-8] - expected[..., 8:-8]).abs().max() <= 2 / 255 / 0.2
        assert (found[..., :8].abs() < 0.01).all()
        assert "black ones" in (folder / "README.md").read_text()
    else:
        assert (found - expected).abs().max() <= 2 / 255 / 0.2
        assert "black ones" not in (folder / "README.md").read_text()


def test_timm_exports_are_reproducible(tmp_path: Path):
    source = saved(tmp_path / "source", MLVICXModel, backbone="test_convnext")
    for seed in range(2):
        torch.manual_seed(seed)
        export_timm(source, tmp_path / str(seed))
    for file in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "0" / file).read_bytes() == (tmp_path / "1" / file).read_bytes()


def test_the_note_of_a_model_without_context(tmp_path: Path):
    source = saved(tmp_path / "source", MLVICXModel, use_context=False)
    note = (export_timm(source, tmp_path / "timm") / "README.md").read_text()
    assert "its features are the model's own" in note
    assert "differ" not in note


# -- torchvision -------------------------------------------------------------------------------------------------------


def torchvision_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """What torchvision's ResNet computes, level by level."""
    maps = [model.relu(model.bn1(model.conv1(x)))]
    y = model.maxpool(maps[0])
    for layer in (model.layer1, model.layer2, model.layer3, model.layer4):
        y = layer(y)
        maps.append(y)
    return maps


@pytest.mark.parametrize(("backbone", "channels"), [("resnet18", 1), ("resnet50", 3)])
@torch.no_grad()
def test_torchvision_gets_the_trunk(tmp_path: Path, backbone: str, channels: int):
    source = saved(tmp_path / "source", MLVICXForPreTraining, backbone=backbone, num_channels=channels, image_size=64)
    folder = export_torchvision(source, tmp_path / "torchvision")
    assert {file.name for file in folder.iterdir()} == {"README.md", "preprocessing.json", "model.safetensors"}
    model = torchvision.models.get_model(backbone, weights=None).eval()
    keys = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert keys.missing_keys == ["fc.weight", "fc.bias"]
    assert keys.unexpected_keys == []
    gray = noise(2, 1, 64, 64, seed=3)
    colour = gray.repeat(1, 3, 1, 1) if channels == 1 else noise(2, 3, 64, 64, seed=4)
    encoder = without_context(source).double()
    expected = encoder((gray if channels == 1 else colour).double(), output_hidden_states=True).hidden_states
    for found, wanted in zip(torchvision_maps(model.double(), colour.double()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6 * float(wanted.abs().max()))
    assert "its features differ" in (folder / "README.md").read_text()
    constants = json.loads((folder / "preprocessing.json").read_text())
    assert constants == {"image_size": 64, "num_channels": 3, "image_mean": 0.45, "image_std": 0.2, "fit": "pad"} | {
        "prepared_size": None, "resample": 2, "rescale_factor": None,
        "do_resize": True, "do_rescale": True, "do_normalize": True,
    }  # fmt: skip


def test_timm_gets_the_images_of_the_processor(tmp_path: Path):
    model = tmp_path / "model"
    MLVICXModel(tiny_config()).save_pretrained(model)
    MLVICXImageProcessor(32, resample=3, do_normalize=False).save_pretrained(model)
    export_timm(model, tmp_path / "timm")
    about = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    assert (about["mean"], about["std"], about["interpolation"]) == ([0.0], [1.0], "bicubic")
    MLVICXImageProcessor(32, rescale_factor=1 / 4095).save_pretrained(model)
    with pytest.raises(UserError, match=r"rescale_factor=0\.0002.* found; expected grey values from 0 to 1"):
        export_timm(model, tmp_path / "other")


def test_every_resnet_of_torchvision_has_timms_names():
    for name in torchvision.models.list_models(torchvision.models, include=["resne*", "wide_resnet*"]):
        with torch.device("meta"):
            theirs = torchvision.models.get_model(name, weights=None).state_dict()
            ours = timm.create_model(name, features_only=True).state_dict()
        expected = {key: tensor.shape for key, tensor in theirs.items() if not key.startswith("fc.")}
        assert {key: tensor.shape for key, tensor in ours.items()} == expected, name


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"backbone": "test_convnext"}, ["backbone='test_convnext' found", "resnet18", "resnet50"]),
        ({"backbone": "resnet10t"}, ["backbone='resnet10t' found", "expected a ResNet of torchvision"]),
        ({"backbone": "resnet18", "num_channels": 2}, ["num_channels=2 found", "1 or 3"]),
    ],
)
def test_torchvision_has_not_every_backbone(tmp_path: Path, values: dict[str, Any], parts: list[str]):
    source = saved(tmp_path / "source", MLVICXModel, **values)
    with pytest.raises(ValueError, match="found") as caught:
        export_torchvision(source, tmp_path / "out")
    assert all(part in str(caught.value) for part in parts)
    assert not (tmp_path / "out").exists()


# -- ONNX --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "values", "outputs"),
    [
        (MLVICXForPreTraining, {}, {"last_hidden_state": (96, 1, 1), "pooler_output": (96,)}),
        (MLVICXForImageClassification, {"backbone": "test_convnext"}, {"logits": (3,)}),
        (MLVICXForSemanticSegmentation, {}, {"logits": (2, 32, 32)}),
        (MLVICXBackbone, {"out_features": ["stem", "stage4"]}, {"stem": (32, 16, 16), "stage4": (96, 1, 1)}),
    ],
)
@torch.no_grad()
def test_onnx_equals_torch(
    tmp_path: Path,
    model_class: type[MLVICXPreTrainedModel],
    values: dict[str, Any],
    outputs: dict[str, tuple[int, ...]],
):
    onnx = pytest.importorskip("onnx", reason="the extra onnx needs a later torch than the package")
    onnxruntime = pytest.importorskip("onnxruntime")
    source = saved(tmp_path / "source", model_class, **values)
    difference = export_onnx(source, tmp_path / "onnx")
    assert {file.name for file in (tmp_path / "onnx").iterdir()} == {"model.onnx", "preprocessing.json"}
    about = json.loads((tmp_path / "onnx" / "preprocessing.json").read_text())
    assert about["num_channels"] == 1
    if model_class is MLVICXForImageClassification:
        assert about["labels"] == ["Edema", "Mass", "Nodule"]
        assert about["problem_type"] == "multi_label_classification"
        assert {"decision_thresholds", "calibration"} <= about.keys()
    assert str(tmp_path).encode() not in (tmp_path / "onnx" / "model.onnx").read_bytes()
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    (entry,) = session.get_inputs()
    assert entry.name == "pixel_values"
    assert entry.shape[1:] == [1, 32, 32]
    torch_class = MLVICXModel if model_class is MLVICXForPreTraining else model_class
    model = torch_class.from_pretrained(source).eval()
    largest = 0.0
    for batch in (1, 3, 7):
        x = noise(batch, 1, 32, 32, seed=batch)
        found = dict(zip(outputs, session.run(list(outputs), {"pixel_values": x.numpy()}), strict=True))
        expected = model(x)
        wanted = dict(zip(outputs, expected.feature_maps, strict=True)) if model_class is MLVICXBackbone else expected
        for name, shape in outputs.items():
            assert found[name].shape == (batch, *shape)
            same(torch.from_numpy(found[name]) / 10, wanted[name] / 10)
            if batch != 7:
                largest = max(largest, float((torch.from_numpy(found[name]) - wanted[name]).abs().max()))
    assert difference == pytest.approx(largest, rel=0.5, abs=1e-6)
    onnx.checker.check_model(tmp_path / "onnx" / "model.onnx")
    if model_class is MLVICXForImageClassification:
        model.classifier.bias += 1
        with pytest.raises(
            RuntimeError, match=r"logits of a batch of 1 differs by .* found; expected at most 0.0001 o"
        ):
            compare_onnx(Tensors(model), tmp_path / "onnx" / "model.onnx", (1, 32, 32))


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_without_its_packages(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch):
    for other in {"onnx", "onnxscript", "onnxruntime"} - {name}:
        pytest.importorskip(other, reason="of the extra onnx")
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'needs {name}: pip install "\.\[onnx\]"'):
        export_onnx(tmp_path / "no-source", tmp_path / "onnx")


# -- what all refuse ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [export_timm, export_torchvision, export_onnx])
def test_sources_and_outputs_that_do_not_fit(tmp_path: Path, write: Any):
    with pytest.raises(FileNotFoundError, match="absent' found; expected a folder"):
        write(tmp_path / "absent", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="full is there already"):
        write(tmp_path / "absent", tmp_path / "full")
    assert not (tmp_path / "out").exists()


# -- compiled, and in half precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_class", "backend"),
    [
        (MLVICXModel, "eager"),
        (MLVICXModel, "aot_eager"),
        (MLVICXForImageClassification, "eager"),
        (MLVICXForSemanticSegmentation, "eager"),
    ],
)
def test_compiled_in_one_graph(model_class: type[MLVICXPreTrainedModel], backend: str):
    torch.compiler.reset()
    model = build(model_class)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = noise(2, 1, 32, 32)
    for mode in (False, True):
        model.train(mode)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        expected = model(x)
        model.load_state_dict(state)
        found = compiled(x)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    found[next(iter(expected))].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("model_class", [MLVICXModel, MLVICXForImageClassification, MLVICXForSemanticSegmentation])
@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext"])
@torch.no_grad()
def test_bfloat16(tmp_path: Path, model_class: type[MLVICXPreTrainedModel], backbone: str):
    source = saved(tmp_path / "source", model_class, backbone=backbone, image_size=64)
    x = noise(3, 1, 64, 64, seed=3)
    expected = model_class.from_pretrained(source)(x)
    half = model_class.from_pretrained(source, dtype=torch.bfloat16)
    found = half(x.bfloat16())
    for name, tensor in expected.items():
        assert found[name].dtype == torch.bfloat16
        assert found[name].isfinite().all()
        assert (found[name].float() - tensor).norm() < 0.05 * tensor.norm()
