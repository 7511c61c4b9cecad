"""Converted weights against the networks they come from: embeddings, losses and gradients in float64."""

import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
import torchvision
from official_reference import TERMS, OfficialReference, calibrate, converted_gradient, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from mlvicx_hf import MLVICXConfig, MLVICXForPreTraining, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.encoders.conversion import (
    convert_checkpoint,
    convert_official,
    convert_resnet,
    recognise,
)
from mlvicx_hf.encoders.weights import read_weights

EMBEDDINGS = ("global_embedding_1", "global_embedding_2", "multi_level_embedding_1", "multi_level_embedding_2")
SCALARS = (*(f"{branch}_{name}" for branch in ("global", "multi_level") for name in (*TERMS, "loss")), "loss")
DEPTHS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def relative(found: Tensor, expected: Tensor) -> float:
    assert found.numel() == expected.numel()
    return ((found - expected.reshape(found.shape)).norm() / expected.norm()).item()


def views(count: int = 4, size: int = 64, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return one, one.flip(-1) + 0.5 * torch.randn(one.shape, generator=generator, dtype=torch.float64)


def official_content(state: dict[str, Tensor], form: str) -> dict[str, Any]:
    """What the authors' training saves: the network alone, or the whole of a run."""
    if form == "online":
        return {"online": state}
    model = {f"encoder.{key}": value for key, value in state.items()}
    optimizer = {"state": {0: {"mu": torch.zeros(3)}}, "param_groups": [{"lr": 0.05, "params": [0]}]}
    config = {"model": {"backbone": {"type": "resnet18", "pretrained": True}}, "data": {"task": ["Edema"]}}
    return {"config": config, "epoch": 3, "steps": 170, "model": model, "optimizer": optimizer}


def our_outputs(model: MLVICXForPreTraining, view_1: Tensor, view_2: Tensor) -> dict[str, Tensor]:
    output = model(view_1, view_2)
    embeddings = (*output.global_embeddings, *output.multi_level_embeddings)
    return dict(zip(EMBEDDINGS, embeddings, strict=True)) | {name: output[name] for name in SCALARS}


def in_memory(convert: Callable[..., Any], model_class: Any, *arguments: Any) -> Any:
    config, weights = convert(*arguments)
    model = model_class(config)
    model.load_state_dict(weights)
    return model.double()


# -- the authors' checkpoints ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference() -> OfficialReference:
    torch.manual_seed(0)
    model = OfficialReference()
    randomise(model)
    calibrate(model, *views(seed=2))
    return model


@pytest.fixture(
    scope="module",
    params=[("online", torch.float32), ("training", torch.float32), ("online", torch.float64)],
    ids=["online", "training", "float64"],
)
def converted(request: pytest.FixtureRequest, reference: OfficialReference, tmp_path_factory: Any) -> Path:
    form, dtype = request.param
    folder = tmp_path_factory.mktemp(form)
    state = {k: v.to(dtype) if v.is_floating_point() else v.clone() for k, v in reference.state_dict().items()}
    torch.save(official_content(state, form), folder / "official.pth")
    line = convert_checkpoint(folder / "official.pth", folder / "ours")
    assert line == f"{folder / 'ours'}: MLVICXForPreTraining, resnet18, 3 channel(s)"
    assert {v.dtype for v in load_file(folder / "ours" / "model.safetensors").values()} == {dtype, torch.int64}
    return folder / "ours"


@pytest.fixture(scope="module")
def expected(reference: OfficialReference) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """Outputs in evaluation, in training, and in evaluation with the statistics that training left; gradients."""
    model, passes = copy.deepcopy(reference), []
    for training in (False, True, False):
        model.train(training)
        with torch.set_grad_enabled(training):
            passes.append(model(*views()))
    passes[1]["loss"].backward()
    assert min(output[name].item() for output in passes for name in SCALARS) > 1e-3  # each takes part
    return passes, {key: parameter.grad for key, parameter in model.named_parameters()}


def test_the_same_embeddings_and_losses(converted: Path, expected: tuple[list[dict[str, Tensor]], Any]):
    model = MLVICXForPreTraining.from_pretrained(converted).double()
    with torch.no_grad():
        for training, wanted in zip((False, True, False), expected[0], strict=True):
            found = our_outputs(model.train(training), *views())
            errors = {name: relative(found[name], wanted[name]) for name in wanted}
            assert errors.keys() == {*EMBEDDINGS, *SCALARS}
            assert max(errors.values()) < 1e-6, (training, errors)


def test_the_same_gradients(converted: Path, expected: tuple[Any, dict[str, Tensor]]):
    model = MLVICXForPreTraining.from_pretrained(converted).double().train()
    model(*views()).loss.backward()
    gradients = {key: (converted_gradient(model, key), wanted) for key, wanted in expected[1].items()}
    errors = {key: relative(found, wanted) for key, (found, wanted) in gradients.items() if found is not None}
    assert len(errors) == 60 + 15 + 5 + 16  # backbone, context, levels, expanders
    assert max(errors.values()) < 1e-6, errors
    cancelled = max(wanted.norm() for found, wanted in gradients.values() if found is None)
    assert cancelled < 1e-9 * min(wanted.norm() for found, wanted in gradients.values() if found is not None)


def test_the_folder_opens_by_the_auto_classes(converted: Path):
    model = AutoModelForPreTraining.from_pretrained(converted)
    assert type(model) is MLVICXForPreTraining
    expected = MLVICXConfig(
        num_channels=3,
        context_reduction=2,
        aggregation_resize=64,
        aggregation_channels=16,
        expander_dims=[8, 8, 8],
        expander_final_norm=True,
    ).to_diff_dict()
    found = model.config.to_diff_dict()
    assert {k: v for k, v in found.items() if k not in ("dtype", "architectures", "_name_or_path")} == expected
    fixed = {"invariance_weight": 25, "variance_weight": 25, "covariance_weight": 1, "multi_level_weight": 1}
    fixed |= {"variance_epsilon": 1e-4, "invariance_reduction": "mean", "aggregation_size": 4, "use_context": True}
    assert {name: getattr(model.config, name) for name in fixed} == fixed
    processor = AutoImageProcessor.from_pretrained(converted)
    assert type(processor) is MLVICXImageProcessor
    assert (processor.num_channels, processor.image_size, processor.fit) == (3, 224, "squash")
    assert (processor.image_mean, processor.image_std) == (0.449, 0.226)
    encoder = AutoModel.from_pretrained(converted).float()
    assert encoder(processor(torch.zeros(1, 40, 60))["pixel_values"]).pooler_output.shape == (1, 512)


@pytest.mark.parametrize("backbone", DEPTHS)
def test_sizes_are_read_off_the_tensors(backbone: str):
    with torch.device("meta"):
        state = OfficialReference(backbone, aggregation_channels=24, width=12).float().state_dict()
    state["encoder.0.weight"] = state["encoder.0.weight"][:, :2]
    config, weights = convert_official(state)
    assert (config.backbone, config.num_channels, config.context_reduction) == (backbone, 2, 2)
    assert (config.aggregation_channels, config.expander_dims, config.aggregation_size) == (24, [12, 12, 12], 4)
    with torch.device("meta"):
        model = MLVICXForPreTraining(config)
    model.load_state_dict(weights, assign=True)


def test_counters_may_be_absent(reference: OfficialReference):
    state = {k: v for k, v in reference.state_dict().items() if not k.endswith("num_batches_tracked")}
    _, weights = convert_official(state)
    counters = {key: value for key, value in weights.items() if key.endswith("num_batches_tracked")}
    assert len(counters) == 20 + 6
    assert all(value.item() == 0 and value.dtype == torch.int64 for value in counters.values())


def test_the_input_is_not_changed(reference: OfficialReference):
    state = reference.state_dict()
    before = {key: value.clone() for key, value in state.items()}
    _, weights = convert_official(state)
    for value in weights.values():
        value.zero_()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def official_state() -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(OfficialReference().float().state_dict())


def without(*prefixes: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {key: value for key, value in state.items() if not key.startswith(prefixes)}


def with_values(values: dict[str, tuple[int, ...]]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {key: torch.empty(shape, device="meta") for key, shape in values.items()}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (without("cbt3.sam"), ["1 missing (cbt3.sam.conv1.weight)", "resnet18"]),
        (without("cbt"), ["cbt1.cam.fc.0.weight"]),
        (without("cbt5"), ["3 missing", "cbt5.cam.fc.0.weight, cbt5.cam.fc.2.weight, cbt5.sam.conv1.weight"]),
        (without("resize_project.convs"), ["no resize_project.convs.0.weight found"]),
        (without("resize_project.convs.4.bias"), ["1 missing (resize_project.convs.4.bias)"]),
        (without("resize_project.conv_head"), ["no resize_project.conv_head.projection.2.weight found"]),
        (without("projetion"), ["no projetion.l1.0.weight found"]),
        (without("projetion.l2.0.bias"), ["1 missing (projetion.l2.0.bias)"]),
        (without("encoder.0"), ["no encoder.0.weight found"]),
        (without("encoder.7.1"), ["(2, 2, 2, 1) basic blocks found", "resnet18, resnet34"]),
        (without("encoder"), ["(0, 0, 0, 0) basic blocks found"]),
        (with_values({"fc.weight": (1000, 512)}), ["1 not expected (fc.weight)"]),
        (with_values({"encoder.1.bias": (63,)}), ["encoder.1.bias (63,), expected (64,)"]),
        (with_values({"encoder.0.weight": (64,)}), ["encoder.0.weight of shape (64,)", "expected 4 dimensions"]),
        (with_values({"cbt1.cam.fc.0.weight": (0, 64, 1, 1)}), ["cbt1.cam.fc.0.weight (0, 64, 1, 1)"]),
        (with_values({"cbt2.cam.fc.0.weight": (16, 64, 1, 1)}), ["cbt2.cam.fc.0.weight (16, 64, 1, 1), expected (32,"]),
        (
            with_values({"projetion.l3.0.weight": (9, 8)}),
            ["11 of another shape", "projetion.l3.1.weight (8,), expected (9,)"],
        ),
        (with_values({"resize_project.convs.2.weight": (16, 64, 1, 1)}), ["expected (16, 128, 1, 1)"]),
        (
            with_values({"resize_project.conv_head.projection.2.weight": (8, 250)}),
            ["resize_project.conv_head.projection.2.weight (8, 250), expected (8, 144)"],
        ),
    ],
)
def test_official_keys_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], parts: list[str]
):
    with pytest.raises(ValueError, match="found") as caught:
        convert_official(change(official_state()))
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({}, ["keys none found", "'online' or 'model'", "conv1.weight"]),
        ({"state_dict": {}, "epoch": 1}, ["keys state_dict, epoch found"]),
        ({"encoder.0.weight": torch.zeros(1)}, ["keys encoder.0.weight found", "'online' or 'model'"]),
        ({"online": [1, 2]}, ["list found in 'online'"]),
        ({"online": {"encoder.0.weight": "text"}}, ["encoder.0.weight (str) found in 'online'; expected tensors"]),
        ({"model": {"conv1.weight": torch.zeros(1)}}, ["conv1.weight found in 'model'", "encoder."]),
        ({"conv1.weight": torch.zeros(1), "epoch": 3}, ["epoch (int)", "expected tensors"]),
    ],
)
def test_other_content_is_refused(content: dict[str, Any], parts: list[str]):
    with pytest.raises(ValueError, match="expected") as caught:
        recognise(content)
    assert all(part in str(caught.value) for part in parts), caught.value


# -- files -------------------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, form: str):
    path, marker = tmp_path / "weights.pth", tmp_path / "marker"
    content = {"online": {"encoder.0.weight": torch.ones(2)}, "extra": Malicious(marker)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker), protocol=2))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(path, weights_only=False)
    assert marker.is_dir()  # so the file is dangerous
    marker.rmdir()
    with pytest.raises(ValueError, match=r"refused: .*mkdir found in it; expected tensors") as caught:
        convert_checkpoint(path, tmp_path / "ours")
    assert str(path) in str(caught.value)
    assert not marker.exists()
    assert not (tmp_path / "ours").exists()


def test_functions_in_the_authors_optimiser_are_neither_looked_up_nor_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Their state holds a static method of their trainer twice, which torch alone refuses to read."""
    package, module = ModuleType("trainer"), ModuleType("trainer.mlvicx_trainer")

    class MLVICXTrainer:
        @staticmethod
        def exclude(p: Tensor) -> bool:
            raise AssertionError

    MLVICXTrainer.__module__ = MLVICXTrainer.exclude.__module__ = module.__name__
    MLVICXTrainer.__qualname__, MLVICXTrainer.exclude.__qualname__ = "MLVICXTrainer", "MLVICXTrainer.exclude"
    module.MLVICXTrainer = MLVICXTrainer  # type: ignore[attr-defined]
    package.mlvicx_trainer = module  # type: ignore[attr-defined]
    content = official_content({"encoder.0.weight": torch.ones(2)}, "training")
    content["optimizer"]["param_groups"][0] |= {
        "weight_decay_filter": MLVICXTrainer.exclude,
        "lars_adaptation_filter": MLVICXTrainer.exclude,
    }
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "trainer", package)
        patch.setitem(sys.modules, "trainer.mlvicx_trainer", module)
        torch.save(content, tmp_path / "run.pth")
    with pytest.raises(pickle.UnpicklingError, match="getattr"):
        torch.load(tmp_path / "run.pth", weights_only=True)
    found = read_weights(tmp_path / "run.pth")
    assert "trainer.mlvicx_trainer" not in sys.modules
    assert found["optimizer"]["param_groups"][0]["weight_decay_filter"] is None
    kind, state = recognise(found)
    assert (kind, list(state)) == ("official", ["encoder.0.weight"])
    with pytest.raises(pickle.UnpicklingError, match="getattr"):  # the permission does not outlast the reading
        torch.load(tmp_path / "run.pth", weights_only=True)


def written(path: Path, form: str) -> bytes:
    state = {f"layer{i}.weight": torch.randn(5, 7) for i in range(4)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"online": state}, path, _use_new_zipfile_serialization=form == "zip")
    return path.read_bytes()


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("share", [0, 0.01, 0.1, 0.3, 0.5, 0.8, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, form: str, share: float):
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pth")
    whole = written(path, form)
    assert read_weights(path)
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"damaged .*; expected a whole \.pth or \.safetensors") as caught:
        convert_checkpoint(path, tmp_path / "ours")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_files_that_are_something_else(tmp_path: Path):
    (tmp_path / "notes.pth").write_text("hello, these are notes")
    with pytest.raises(ValueError, match=r"notes\.pth: a damaged file or none of weights"):
        read_weights(tmp_path / "notes.pth")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"list\.pth: list found; expected a dictionary"):
        read_weights(tmp_path / "list.pth")
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="expected a checkpoint, a file that exists") as caught:
            read_weights(path)
        assert str(path) in str(caught.value)


def test_an_output_that_holds_something_is_refused_and_kept(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    for output in (tmp_path / "full", tmp_path / "full" / "notes.txt"):
        with pytest.raises(FileExistsError, match="is there already; expected a new or an empty folder") as caught:
            convert_checkpoint(tmp_path / "absent.pth", output)  # before the file is read
        assert str(output) in str(caught.value)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")

    def full_disk(self: MLVICXImageProcessor, folder: Path) -> None:
        assert (Path(folder) / "model.safetensors").is_file()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MLVICXImageProcessor, "save_pretrained", full_disk)
        with pytest.raises(OSError, match="no space left"):
            convert_checkpoint(tmp_path / "resnet18.pth", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["resnet18.pth"]
    (tmp_path / "ours").mkdir()  # an empty folder will do
    convert_checkpoint(tmp_path / "resnet18.pth", tmp_path / "ours")
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in (tmp_path / "ours").iterdir()} == names


# -- plain ResNets -----------------------------------------------------------------------------------------------------


def levels(resnet: nn.Module, x: Tensor) -> list[Tensor]:
    """Stem and stages of a ResNet of torchvision or timm."""
    maps = [F.relu(resnet.bn1(resnet.conv1(x)))]
    y = resnet.maxpool(maps[0])
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        y = stage(y)
        maps.append(y)
    return maps


def assert_same_levels(model: MLVICXModel, resnet: nn.Module, pixels: Tensor, original: Tensor) -> None:
    with torch.no_grad():
        expected = levels(resnet.double().eval(), original)
        output = model.double().eval()(pixels, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    for found, wanted in zip(output.hidden_states, expected, strict=True):
        assert relative(found, wanted) < 1e-6
    assert relative(output.pooler_output, expected[-1].mean((2, 3))) < 1e-6


def create(library: str, name: str) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name, weights=None)
    randomise(model)
    return model


def grey(count: int = 2) -> Tensor:
    return torch.randn(count, 1, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_grey_image_through_one_channel_is_its_copy_through_three(tmp_path: Path, library: str, suffix: str):
    resnet = create(library, "resnet18")
    path, output = tmp_path / f"weights{suffix}", tmp_path / "ours"
    (save_file if suffix == ".safetensors" else torch.save)(resnet.state_dict(), path)
    line = convert_checkpoint(path, output)
    assert line == f"{output}: MLVICXModel, resnet18, 1 channel(s); left out: fc.weight, fc.bias"
    model = AutoModel.from_pretrained(output)
    assert type(model) is MLVICXModel
    assert (model.config.use_context, model.config.num_channels) == (False, 1)
    assert_same_levels(model, resnet, grey(), grey().expand(-1, 3, -1, -1))
    processor = AutoImageProcessor.from_pretrained(output)
    assert (processor.num_channels, processor.image_mean, processor.image_std) == (1, 0.449, 0.226)
    white = processor(torch.ones(1, 32, 32))["pixel_values"]
    torch.testing.assert_close(white, torch.full((1, 1, 224, 224), (1 - 0.449) / 0.226))


def test_three_channels_are_kept(tmp_path: Path):
    resnet = create("torchvision", "resnet18")
    state = {key: value for key, value in resnet.state_dict().items() if not key.startswith("fc.")}
    torch.save(state, tmp_path / "weights.pth")
    line = convert_checkpoint(tmp_path / "weights.pth", tmp_path / "ours", num_channels=3)
    assert line == f"{tmp_path / 'ours'}: MLVICXModel, resnet18, 3 channel(s)"
    assert AutoImageProcessor.from_pretrained(tmp_path / "ours").num_channels == 3
    colours = views(2)[0]
    assert_same_levels(MLVICXModel.from_pretrained(tmp_path / "ours"), resnet, colours, colours)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_bottlenecks_stride_alike(library: str):
    resnet = create(library, "resnet50")
    model = in_memory(convert_resnet, MLVICXModel, resnet.state_dict())
    assert_same_levels(model, resnet, grey(), grey().expand(-1, 3, -1, -1))


def plain_state(name: str = "resnet18", **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        return dict(timm.create_model(name, **options).state_dict())


@pytest.mark.parametrize("name", DEPTHS)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_the_depth_is_read_off_the_keys(library: str, name: str):
    with torch.device("meta"):
        model = timm.create_model(name) if library == "timm" else torchvision.models.get_model(name, weights=None)
        config, weights = convert_resnet(model.state_dict())
        ours = MLVICXModel(config)
    assert config.backbone == name
    ours.load_state_dict(weights, assign=True)


def test_grey_weights_stay_as_they_are():
    resnet = timm.create_model("resnet18", in_chans=1)
    _, weights = convert_resnet(resnet.state_dict())
    assert torch.equal(weights["backbone.conv1.weight"], resnet.conv1.weight)
    with pytest.raises(ValueError, match=r"num_channels=3 found; expected 1 or the 1 of conv1\.weight"):
        convert_resnet(resnet.state_dict(), num_channels=3)


@pytest.mark.parametrize(
    ("name", "change", "parts"),
    [
        ("resnet18", without("layer2.0.bn1.weight"), ["1 missing (layer2.0.bn1.weight)", "resnet18"]),
        ("resnet18", without("layer4"), ["(2, 2, 2, 0) basic blocks"]),
        ("resnet50", without("layer1.0.conv3"), ["1 missing (layer1.0.conv3.weight)", "resnet50"]),
        ("resnet18", with_values({"layer1.0.se.fc1.bias": (4,)}), ["1 not expected (layer1.0.se.fc1.bias)"]),
        ("resnet18", with_values({"fc.scale": (1,)}), ["1 not expected (fc.scale)"]),
        (
            "resnet18",
            with_values({"conv1.weight": (64, 3, 3, 3)}),
            ["conv1.weight (64, 3, 3, 3), expected (64, 3, 7, 7)"],
        ),
        ("wide_resnet50_2", without(), ["resnet50", "layer1.0.conv1.weight (128, 64, 1, 1), expected (64, 64, 1, 1)"]),
        ("resnet26", without(), ["(2, 2, 2, 2) bottleneck blocks", "resnet152"]),
    ],
)
def test_plain_keys_that_do_not_fit_are_named(name: str, change: Callable[..., Any], parts: list[str]):
    with pytest.raises(ValueError, match="found") as caught:
        convert_resnet(change(plain_state(name)))
    assert "\n" not in str(caught.value)
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("num_channels", [0, 2])
def test_channels_that_the_file_does_not_have(num_channels: int):
    with pytest.raises(ValueError, match=rf"num_channels={num_channels} found; expected 1 or the 3 of conv1\.weight"):
        convert_resnet(plain_state(), num_channels)


def test_an_official_checkpoint_says_its_own_channels(tmp_path: Path):
    torch.save({"online": {}}, tmp_path / "official.pth")
    with pytest.raises(ValueError, match=r"official\.pth: num_channels=1 found; an official checkpoint says its own"):
        convert_checkpoint(tmp_path / "official.pth", tmp_path / "ours", num_channels=1)


# -- golden values of the authors' code --------------------------------------------------------------------------------


def test_golden_values(tmp_path: Path):
    """Outputs of the authors' own code, from the folder MLVICX_GOLDEN; prints the worst relative errors (pytest -s)."""
    if not os.environ.get("MLVICX_GOLDEN"):
        pytest.skip("MLVICX_GOLDEN is not set")
    golden = Path(os.environ["MLVICX_GOLDEN"])
    expected = load_file(golden / "official_outputs.safetensors")
    convert_checkpoint(golden / "official_online.pth", tmp_path / "ours")
    ours = MLVICXForPreTraining.from_pretrained(tmp_path / "ours").double()
    oracle = OfficialReference(aggregation_channels=512, width=32)
    oracle.load_state_dict(read_weights(golden / "official_online.pth")["online"])
    pair = expected["view_1"].double(), expected["view_2"].double()
    errors: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        runs = {"eval": our_outputs(ours.eval(), *pair), "eval of the oracle": oracle.eval()(*pair)}
        runs["train of the oracle"] = oracle.train()(*pair)
    runs["train"] = our_outputs(ours.train(), *pair)
    runs["train"]["loss"].backward()
    for run, found in runs.items():
        mode = run.split()[0]
        errors[f"{run}: embeddings"] = {name: relative(found[name], expected[f"{mode}.{name}"]) for name in EMBEDDINGS}
        if mode == "train":
            errors[f"{run}: losses and terms"] = {
                name: relative(found[name], expected[f"train.{name}"]) for name in SCALARS
            }
    prefix = "train.grad.encoder."
    gradients = {key.removeprefix(prefix): value for key, value in expected.items() if key.startswith(prefix)}
    found = {key: converted_gradient(ours, key) for key in gradients}
    skipped = [key for key, gradient in found.items() if gradient is None]
    errors["train: gradients"] = {k: relative(v, gradients[k]) for k, v in found.items() if v is not None}
    assert len(errors["train: gradients"]) >= 7
    least = min(gradients[key].norm() for key in errors["train: gradients"])
    assert all(gradients[key].norm() < 1e-9 * least for key in skipped)
    print(f"\ngradients that have no counterpart: {', '.join(skipped) or 'none'}")
    for group, values in errors.items():
        worst = max(values, key=lambda name: values[name])
        print(f"{group}: worst of {len(values)} {values[worst]:.1e} ({worst})")
    assert max(error for values in errors.values() for error in values.values()) < 1e-6
