"""timm backbones of every form: levels, where they are refined, and that nothing of the trunk is changed."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import run_code
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from mlvicx_hf import MLVICXConfig, MLVICXForPreTraining, MLVICXForSemanticSegmentation, MLVICXModel
from mlvicx_hf.hub.exports import export_onnx, export_timm
from mlvicx_hf.models.backbones_mlvicx import create_backbone, find_taps, layout_of
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor

SIZE = 64
PLACEMENT = {  # one of each form
    "test_resnet": "between",  # list of layers
    "test_mambaout": "between",  # list of layers, [B, H, W, C]
    "test_efficientnet": "between",  # collects its maps
    "mobilenetv3_small_050": "between",
    "test_vit": "between",  # tokens with a class token
    "test_vit3": "between",  # tokens alone
    "hrnet_w18_small": "taps",  # levels made of several layers
}


def config(backbone: str, **options: Any) -> MLVICXConfig:
    small = {"image_size": SIZE, "expander_dims": [16, 16], "aggregation_channels": 8}
    return MLVICXConfig(**(small | options), backbone=backbone)


def timms_maps(model: MLVICXModel, x: Tensor) -> list[Tensor]:
    """What timm's own network with the model's weights gives, in [B, C, H, W]."""
    network = create_backbone(model.config).eval()
    network.load_state_dict(model.backbone.state_dict())
    maps = network(x)
    return [level.permute(0, 3, 1, 2) for level in maps] if layout_of(network) == "NHWC" else maps


@pytest.mark.parametrize("backbone", PLACEMENT)
@torch.no_grad()
def test_without_context_the_maps_are_timms(backbone: str):
    model = MLVICXModel(config(backbone, use_context=False)).eval()
    x = torch.randn(2, 1, SIZE, SIZE)
    maps = model.refined_maps(x)
    expected = timms_maps(model, x)
    assert [level.shape[1] for level in maps] == model.channels
    assert all(torch.equal(one, two) for one, two in zip(maps, expected, strict=True))


@pytest.mark.parametrize(("backbone", "placement"), PLACEMENT.items())
@torch.no_grad()
def test_layers_behind_a_refined_map_see_it(backbone: str, placement: str):
    model = MLVICXModel(config(backbone)).eval()
    assert model.refines_between is (placement == "between")
    assert model.config.context_placement == (None if model.is_plain else placement)
    x = torch.randn(2, 1, SIZE, SIZE)
    before = model.refined_maps(x)
    model.context[0].channel.weight.fill_(1.0)
    after = model.refined_maps(x)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[-1], after[-1]) is (placement == "taps")


@pytest.mark.parametrize("backbone", PLACEMENT)
@torch.no_grad()
def test_the_first_map_is_refined_once(backbone: str):
    """Gates of 1/2 each, and maps that are compared with timm's."""
    model = MLVICXModel(config(backbone, context_init_scale=1e-30)).eval()
    x = torch.randn(2, 1, SIZE, SIZE)
    plain = timms_maps(model, x)
    torch.testing.assert_close(model.refined_maps(x)[0], plain[0] / 4)


@pytest.mark.parametrize("backbone", PLACEMENT)
def test_a_step_reaches_all_gates_and_a_copy_has_its_own(backbone: str):
    model = MLVICXForPreTraining(config(backbone)).train()
    copied = copy.deepcopy(model)
    model(*torch.randn(2, 3, 1, SIZE, SIZE)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.mlvicx.context.parameters())
    assert all(p.grad is None for p in copied.parameters())
    with torch.no_grad():
        copied.mlvicx.context[0].channel.weight.fill_(1.0)
        x = torch.randn(2, 1, SIZE, SIZE)
        assert not torch.equal(copied.mlvicx.refined_maps(x)[0], model.mlvicx.refined_maps(x)[0])


@pytest.mark.parametrize("backbone", PLACEMENT)
@torch.no_grad()
def test_saved_and_loaded_and_inputs_that_are_not_square(backbone: str, tmp_path: Path):
    model = MLVICXForSemanticSegmentation(config(backbone, num_labels=2)).eval()
    model.save_pretrained(tmp_path)
    loaded = MLVICXForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert loaded.mlvicx.refines_between is (PLACEMENT[backbone] == "between")
    for shape in ((SIZE, SIZE), (SIZE, 2 * SIZE)):
        x = torch.randn(1, 1, *shape)
        found = model(x).logits
        assert found.shape == (1, 2, *shape)
        torch.testing.assert_close(found, loaded(x).logits)


def test_tokens_whose_order_is_not_known_are_left_alone():
    assert find_taps("hiera_tiny_224", 1, SIZE) is None


def test_levels_of_a_plain_transformer_lie_at_even_depths():
    taps = find_taps("vit_tiny_patch16_224", 1, SIZE)
    assert taps is not None
    assert [tap.name for tap in taps] == ["blocks.2", "blocks.5", "blocks.8", "blocks.11"]
    assert {(tap.layout, tap.prefix) for tap in taps} == {("tokens", 1)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "vit_tiny_patch16_224", "image_size": 70}, "image_size=70 .*divisible by patch size"),
        ({"backbone": "efficientformer_l1", "image_size": 64}, r"image_size=64 \(timm's size is 224\)"),
        ({"backbone": "hrnet_w18_small", "context_placement": "between"}, "'between' found; the levels of hrnet_w18"),
        ({"context_placement": "inside"}, "context_placement='inside' found; expected None, 'between' or 'taps'"),
        ({"backbone": "mlp_mixer"}, "backbone='mlp_mixer' found; expected a timm model"),
    ],
)
def test_what_does_not_fit_is_named(options: dict[str, Any], message: str):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MLVICXModel(MLVICXConfig(**options))


@torch.no_grad()
def test_a_network_made_for_a_size_is_made_for_ours():
    model = MLVICXModel(MLVICXConfig(backbone="efficientformerv2_s0", image_size=96)).eval()
    assert model(torch.zeros(1, 1, 96, 96)).last_hidden_state.shape[2:] == (3, 3)


@torch.no_grad()
def test_taps_leave_a_resnet_as_it_is():
    model = MLVICXModel(config("test_resnet", context_placement="taps", context_init_scale=1e-30)).eval()
    x = torch.randn(2, 1, SIZE, SIZE)
    plain = timms_maps(model, x)
    for refined, level in zip(model.refined_maps(x), plain, strict=True):
        torch.testing.assert_close(refined, level / 4)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_vit", "test_mambaout", "hrnet_w18_small"])
@torch.no_grad()
def test_timm_loads_the_trunk(backbone: str, tmp_path: Path):
    model = MLVICXModel(config(backbone)).eval()
    model.save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(SIZE, 1).save_pretrained(tmp_path / "model")
    export_timm(tmp_path / "model", tmp_path / "timm")
    trunk = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    own = {name.removeprefix("model."): tensor for name, tensor in model.backbone.state_dict().items()}
    theirs = {name.replace(".", "_"): tensor for name, tensor in trunk.state_dict().items()}
    assert all(torch.equal(tensor, theirs[name.replace(".", "_")]) for name, tensor in own.items())


def test_remote_code_loads_a_transformer(tmp_path: Path):
    model = MLVICXModel(config("test_vit")).eval()
    model.config.auto_map = {"AutoModel": "modeling_mlvicx.MLVICXModel"}
    model.save_pretrained(tmp_path)
    x = torch.linspace(-1, 1, SIZE * SIZE).reshape(1, 1, SIZE, SIZE)
    code = f"""
import sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True).eval()
assert "mlvicx_hf" not in sys.modules
with torch.no_grad():
    print(model(torch.linspace(-1, 1, {SIZE * SIZE}).reshape(1, 1, {SIZE}, {SIZE})).pooler_output.sum().item())
"""
    with torch.no_grad():
        assert float(run_code(code).stdout.splitlines()[-1]) == model(x).pooler_output.sum().item()


@pytest.mark.thorough
@pytest.mark.parametrize(
    "backbone", ["efficientnet_b0", "mobilenetv4_conv_small", "swin_tiny_patch4_window7_224", "vit_small_patch16_224"]
)
def test_onnx_computes_what_torch_does(backbone: str, tmp_path: Path):
    """One network of each form that collects its maps, with gates; HRNet's form has its own test."""
    torch.manual_seed(0)
    MLVICXModel(config(backbone, image_size=224)).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(image_size=224).save_pretrained(tmp_path / "model")
    assert export_onnx(tmp_path / "model", tmp_path / "onnx") < 1e-3


@pytest.mark.thorough
def test_onnx_computes_what_torch_does_where_levels_are_refined_at_the_taps(tmp_path: Path):
    MLVICXModel(config("hrnet_w18_small")).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(image_size=SIZE).save_pretrained(tmp_path / "model")
    assert export_onnx(tmp_path / "model", tmp_path / "onnx") < 1e-3
