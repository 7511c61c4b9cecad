"""The segmentation head and the backbone class."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import run_code, tiny_config
from torch import nn
from transformers import (
    AutoBackbone,
    AutoModelForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from mlvicx_hf import (
    MLVICXBackbone,
    MLVICXConfig,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXModel,
)
from mlvicx_hf.models.configuration_mlvicx import backbone_levels
from mlvicx_hf.models.modeling_mlvicx import batch_norms

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def segmenter(labels: int = 1, **values: Any) -> MLVICXForSemanticSegmentation:
    torch.manual_seed(0)
    return MLVICXForSemanticSegmentation(tiny_config(id2label={i: f"class {i}" for i in range(labels)}, **values))


# -- torch.nn.DataParallel, which a user's Trainer takes on several GPUs -----------------------------------------------


@pytest.fixture
def replicas(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `nn.DataParallel` makes of a model, on the CPU: torch's own function, with differentiable copies."""
    module = importlib.import_module("torch.nn.parallel.replicate")

    def copies(tensors: Any, devices: Any, detach: bool = False) -> Any:
        return [[t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices]

    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, *_: device)
    return lambda model: module.replicate(model, [0, 1])


@pytest.mark.parametrize("model_class", [MLVICXForSemanticSegmentation, MLVICXForImageClassification])
def test_replicas_train_every_weight(replicas: Any, model_class: Any):
    model = model_class(tiny_config(num_labels=2)).train()
    images = torch.rand(4, 1, 32, 32)
    masks = model_class is MLVICXForSemanticSegmentation
    labels = torch.randint(0, 2, (4, 32, 32)) if masks else torch.ones(4, 2)
    parts = [copy(images[i::2], labels=labels[i::2]).loss for i, copy in enumerate(replicas(model))]
    torch.stack(parts).mean().backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None]


def test_replicas_that_would_be_wrong_are_refused(replicas: Any):
    images = torch.rand(4, 1, 32, 32)
    with pytest.raises(RuntimeError, match=r"DataParallel found; .* loss of its own: start one process a GPU"):
        replicas(MLVICXForPreTraining(tiny_config()))[0](images, images)
    with pytest.raises(RuntimeError, match=r"DataParallel found; .* context bottlenecks of the first GPU"):
        replicas(MLVICXModel(tiny_config(backbone="test_efficientnet")))[1](images)


# -- segmentation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (50, 77), (33, 64), (7, 9), (1, 1)])
@pytest.mark.parametrize("labels", [1, 3])
def test_logits_have_the_size_of_any_input(size: tuple[int, int], labels: int):
    model = segmenter(labels).eval()
    with torch.no_grad():
        output = model(torch.randn(2, 1, *size), output_hidden_states=True)
    assert output.logits.shape == (2, labels, *size)
    assert output.loss is None
    assert len(output.hidden_states) == 5
    as_tuple = model(torch.randn(1, 1, *size), return_dict=False)
    assert as_tuple[0].shape == (1, labels, *size)


@pytest.mark.parametrize("labels", [1, 2, 4])
def test_every_parameter_learns_from_the_mask(labels: int):
    model = segmenter(labels).double().train()
    pixels = torch.randn(3, 1, 32, 32, dtype=torch.float64)
    masks = torch.randint(0, max(2, labels), (3, 32, 32))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        output = model(pixels, labels=masks)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still


def test_the_finest_skip_is_the_input_itself():
    """A change of one pixel of the input reaches its logit through the decoder alone."""
    model = segmenter().eval()
    pixels = torch.randn(1, 1, 32, 32, requires_grad=True)
    with torch.no_grad():
        maps = model.mlvicx.refined_maps(pixels)
    model.decoder(maps, pixels)[0, 0, 16, 16].backward()
    reached = pixels.grad[0, 0].nonzero().tolist()
    assert [16, 16] in reached
    assert all(abs(y - 16) <= 2 and abs(x - 16) <= 2 for y, x in reached)


def test_freezing_leaves_the_decoder_to_learn():
    model = segmenter()
    model.freeze_backbone()
    model.train()
    assert not any(m.training for m in model.mlvicx.modules())
    assert all(m.training for m in model.decoder.modules())
    state = {k: v.clone() for k, v in model.mlvicx.state_dict().items()}
    model(torch.randn(2, 1, 32, 32), labels=torch.randint(0, 2, (2, 32, 32))).loss.backward()
    assert all(torch.equal(v, state[k]) for k, v in model.mlvicx.state_dict().items())
    assert all(p.grad is None for p in model.mlvicx.parameters())
    assert all(p.grad is not None for p in model.decoder.parameters())


@pytest.mark.parametrize("part", ["", "backbone"])
def test_frozen_batch_normalisation_stays_while_the_rest_learns(part: str):
    model = segmenter()
    model.freeze_batch_norm(part)
    model.eval().train()
    frozen = set(batch_norms(model.mlvicx.get_submodule(part)))
    assert frozen
    assert {norm for norm in batch_norms(model) if not norm.training} == frozen
    assert all(m.training for m in model.modules() if m not in frozen)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1).step(
        lambda: model(torch.randn(2, 1, 32, 32), labels=torch.randint(0, 2, (2, 32, 32))).loss.backward()
    )
    names = {name for name, module in model.named_modules() if module in frozen}
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert not [name for name in moved if name.rpartition(".")[0] in names]
    assert {name for name in state if "running_mean" in name and name.rpartition(".")[0] not in names} <= moved
    assert [name for name in moved if name.startswith("mlvicx.backbone.")]


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.zeros(2, 32, 31, dtype=torch.long), r"labels of shape \(2, 32, 31\) found; expected \(2, 32, 32\)"),
        (torch.zeros(2, 1, 32, 32, dtype=torch.long), r"labels of shape \(2, 1, 32, 32\) found"),
        (torch.full((2, 32, 32), 3), r"labels with the values \[3\] found; expected 0 to 2, or 255"),
        (torch.full((2, 32, 32), -1), r"labels with the values \[-1\] found"),
    ],
)
def test_masks_that_do_not_fit(masks: torch.Tensor, message: str):
    with pytest.raises(ValueError, match=message):
        segmenter(3)(torch.randn(2, 1, 32, 32), labels=masks)


def test_decoder_widths():
    assert segmenter().decoder.classifier.in_channels == 16
    model = segmenter(decoder_hidden_sizes=(12, 10, 8, 6, 4))
    assert [block[3].out_channels for block in model.decoder.blocks] == [12, 10, 8, 6, 4]
    assert model.config.decoder_hidden_sizes == [12, 10, 8, 6, 4]
    with pytest.raises(ValueError, match=r"decoder_hidden_sizes=\[8, 4\] found; test_resnet has 5 levels"):
        segmenter(decoder_hidden_sizes=[8, 4])
    assert segmenter(backbone="test_convnext").decoder.blocks[0][0].in_channels > 0  # four levels


def test_a_pretraining_checkpoint_becomes_a_segmenter(tmp_path: Path):
    torch.manual_seed(0)
    pretrained = MLVICXForPreTraining(tiny_config())
    pretrained.save_pretrained(tmp_path / "pretrained")
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "pretrained", num_labels=1)
    assert type(model) is MLVICXForSemanticSegmentation
    for key, value in pretrained.mlvicx.state_dict().items():
        assert torch.equal(model.mlvicx.state_dict()[key], value)
    model.eval()
    model.save_pretrained(tmp_path / "segmenter")
    pixels = torch.randn(1, 1, 40, 40)
    torch.save(pixels, tmp_path / "pixels.pt")
    with torch.no_grad():
        expected = model(pixels).logits
    code = (
        "import sys, torch, mlvicx_hf; from transformers import AutoModelForSemanticSegmentation as A; "
        "d = sys.argv[1]; m = A.from_pretrained(d + '/segmenter').eval(); "
        "torch.save(m(torch.load(d + '/pixels.pt')).logits.detach(), d + '/logits.pt')"
    )
    done = run_code(code, tmp_path)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected)


# -- backbone ----------------------------------------------------------------------------------------------------------


def test_levels_have_names():
    assert backbone_levels("resnet18").names == ("stem", *STAGES)
    assert MLVICXConfig(backbone="convnext_atto").stage_names == STAGES
    config = MLVICXConfig(out_indices=(1, 3))
    assert config.out_features == ["stage1", "stage3"]
    config.out_features = ["stem"]
    assert config.out_indices == [0]
    assert "stage_names" not in config.to_dict()
    with pytest.raises(ValueError, match=r"out_features must be a subset of stage_names.*stage9"):
        MLVICXConfig(out_features=["stage9"])


def test_autobackbone_gives_the_refined_maps_of_the_chosen_levels():
    torch.manual_seed(0)
    backbone = AutoBackbone.from_config(tiny_config(out_features=["stem", "stage3"])).eval()
    assert type(backbone) is MLVICXBackbone
    pixels = torch.randn(2, 1, 32, 32)
    maps = backbone.mlvicx.refined_maps(pixels)
    output = backbone(pixels, output_hidden_states=True)
    assert [m.shape[1] for m in output.feature_maps] == backbone.channels
    for found, level in zip(output.feature_maps, (0, 3), strict=True):
        assert torch.equal(found, maps[level])
    assert len(output.hidden_states) == 5
    assert backbone(pixels).hidden_states is None
    assert backbone(pixels, return_dict=False)[0][1].shape == maps[3].shape
    last = AutoBackbone.from_config(tiny_config())
    assert last.out_features == ["stage4"]


def test_the_backbone_loads_an_encoder(tmp_path: Path):
    encoder = MLVICXModel(tiny_config())
    encoder.save_pretrained(tmp_path)
    backbone = MLVICXBackbone.from_pretrained(tmp_path, out_indices=[1, 2])
    assert backbone.out_features == ["stage1", "stage2"]
    for key, value in encoder.state_dict().items():
        assert torch.equal(backbone.mlvicx.state_dict()[key], value)


def test_upernet_trains_on_it(tmp_path: Path):
    torch.manual_seed(0)
    config = UperNetConfig(
        backbone_config=tiny_config(out_features=STAGES), hidden_size=8, auxiliary_channels=8, num_labels=3
    )
    model = UperNetForSemanticSegmentation(config).train()
    assert type(model.backbone) is MLVICXBackbone
    first = nn.utils.parameters_to_vector(model.backbone.parameters()).detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pixels, masks = torch.randn(2, 1, 64, 64), torch.randint(0, 3, (2, 64, 64))
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        output = model(pixels, labels=masks)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert output.logits.shape == (2, 3, 64, 64)
    assert losses[-1] < losses[0]
    assert not torch.equal(nn.utils.parameters_to_vector(model.backbone.parameters()), first)
    model.eval().save_pretrained(tmp_path)
    loaded = UperNetForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert type(loaded.backbone) is MLVICXBackbone
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixels).logits, model(pixels).logits)


def test_shapes_are_found_without_computing():
    """As tools do that count operations or parameters."""
    with torch.device("meta"):
        models = MLVICXForImageClassification(tiny_config(num_labels=2)), MLVICXForPreTraining(tiny_config())
        x = torch.empty(4, 1, 32, 32)
        assert models[0](x, labels=torch.empty(4, 2)).logits.shape == (4, 2)
        assert models[1](x, x).loss.is_meta
