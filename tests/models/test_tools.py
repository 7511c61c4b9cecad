"""What people put on the models: other heads, adapters, quantisation, tracers, torch.func, gradient checkpointing."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import infer_auto_device_map
from helpers import tiny_config
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mlvicx_hf import (
    MLVICXBackbone,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXModel,
)
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.layers_mlvicx import ContextBottleneck, GateConv2d

LABELS = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1]])


def pixels(count: int = 4, size: int = 32) -> Tensor:
    return torch.randn(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def classifier(**values: Any) -> MLVICXForImageClassification:
    torch.manual_seed(0)
    return MLVICXForImageClassification(tiny_config(**({"num_labels": 3, "context_init_scale": 1} | values)))


# -- heads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        nn.Sequential(nn.Dropout(0.1), nn.Linear(96, 3)),
        nn.Sequential(nn.Linear(96, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
        nn.Linear(96, 3, bias=False),
        nn.Linear(96, 3).double(),
    ],
)
def test_another_head(head: nn.Module):
    model = classifier()
    model.classifier = head
    output = model(pixels(), labels=LABELS)
    assert output.logits.shape == (4, 3)
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert output.logits.dtype == next(head.parameters()).dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert model(pixels()).logits.dtype == output.logits.dtype


def test_no_head():
    model = classifier()
    model.classifier = nn.Identity()
    assert torch.equal(model.eval()(pixels()).logits, model.mlvicx(pixels()).pooler_output)
    assert model.bfloat16()(pixels().bfloat16()).logits.dtype == torch.bfloat16


def test_no_labels(tmp_path: Path):
    model = classifier(num_labels=0).eval()
    assert isinstance(model.classifier, nn.Identity)
    assert model(pixels()).logits.shape == (4, 96)
    model.save_pretrained(tmp_path)
    loaded = MLVICXForImageClassification.from_pretrained(tmp_path)
    assert loaded.num_labels == 0
    torch.testing.assert_close(loaded(pixels()).logits, model(pixels()).logits)
    with pytest.raises(ValueError, match="labels found; expected none, since the model was made with num_labels=0"):
        model(pixels(), labels=torch.zeros(4, 96))
    with pytest.raises(ValueError, match="num_labels=0 found; expected 1 for binary masks"):
        MLVICXForSemanticSegmentation(tiny_config(num_labels=0))


def test_dynamic_quantisation():
    model = classifier().eval()
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert not list(quantised.classifier.parameters())
    expected = model(pixels()).logits
    torch.testing.assert_close(quantised(pixels()).logits, expected, rtol=0.05, atol=0.05)
    pretraining = MLVICXForPreTraining(tiny_config()).eval()
    quantised = torch.ao.quantization.quantize_dynamic(pretraining, {nn.Linear}, dtype=torch.qint8)
    assert quantised(pixels(), pixels().flip(0)).loss.isfinite()


def test_adapters_make_layers_of_the_type_that_they_find():
    """As LoRA does: `type(layer)(in, rank, kernel, stride, padding, bias=False)`."""
    model = classifier()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d):
            shape = (layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding)
            type(layer)(*shape, bias=False)
            assert type(layer)(layer.in_channels, 4, 1, 1, 0).bias is not None, name
    assert model.mlvicx.context[0].channel.bias is None
    assert isinstance(model.mlvicx.context[0].spatial, GateConv2d)


class Adapted(nn.Module):
    """A convolution with a low-rank addition, as LoRA puts in the place of one."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        down = (layer.in_channels, 2, layer.kernel_size, layer.stride, layer.padding)
        self.down, self.up = type(layer)(*down, bias=False), type(layer)(2, layer.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("reduction", [None, 2])
def test_adapted_gates_learn(reduction: int | None):
    model = classifier(context_reduction=reduction)
    for block in model.mlvicx.context:
        block.spatial = Adapted(block.spatial)
        if reduction is None:
            block.channel = Adapted(block.channel)
        else:
            block.channel[0] = Adapted(block.channel[0])
    model(pixels(), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (".base." in name), name


def test_checkpointing_of_a_backbone_without_a_list_of_layers_is_refused():
    model = MLVICXForImageClassification(tiny_config(backbone="efficientnet_lite0", num_labels=2))
    with pytest.raises(ValueError, match="backbone='efficientnet_lite0' found; expected a backbone that is a list of"):
        model.gradient_checkpointing_enable()


@pytest.mark.skipif(
    not hasattr(MLVICXForImageClassification, "activation_checkpointing_enable"), reason="an earlier transformers"
)
def test_checkpointing_by_its_new_name_warns_of_no_old_one(recwarn: pytest.WarningsRecorder):
    model = classifier()
    model.activation_checkpointing_enable()
    assert model.is_gradient_checkpointing
    assert not [warning for warning in recwarn if "gradient_checkpointing_enable" in str(warning.message)]
    other = MLVICXForImageClassification(tiny_config(backbone="efficientnet_lite0", num_labels=2))
    with pytest.raises(ValueError, match="backbone='efficientnet_lite0' found; expected a backbone that is a list of"):
        other.activation_checkpointing_enable()


def test_weights_of_a_head_that_is_not_loaded_are_named(tmp_path: Path):
    model = classifier()
    model.classifier = torch.nn.Sequential(torch.nn.Dropout(0.1), model.classifier)
    model.save_pretrained(tmp_path)
    _, report = MLVICXForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"classifier.1.weight", "classifier.1.bias"}


# -- tracers and transformations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_tracing_outside_of_no_grad(training: bool):
    model = classifier(return_dict=False).train(training)
    traced = torch.jit.trace(model, (pixels(),), check_trace=not training)  # dropout and statistics differ in training
    state = copy.deepcopy(model.state_dict())
    expected = model(pixels(3))[0]
    model.load_state_dict(state)  # the running statistics of training
    torch.testing.assert_close(traced(pixels(3))[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_the_older_onnx_exporter_outside_of_no_grad(tmp_path: Path):
    model = classifier(return_dict=False).eval()
    onnxruntime = pytest.importorskip("onnxruntime", reason="of the extra onnx")
    torch.onnx.export(model, (pixels(),), tmp_path / "model.onnx", dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: pixels().numpy()})
    np.testing.assert_allclose(found, model(pixels())[0].detach().numpy(), rtol=1e-3, atol=1e-5)


def test_gradients_of_torch_func_are_those_of_autograd():
    model = classifier().double().eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    x, labels = pixels().double(), LABELS

    def loss(weights: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return functional_call(model, weights, (x,), {"labels": labels}).loss

    found = grad(loss)(weights, x, labels)
    model(x, labels=labels).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)
    each = vmap(grad(loss), (None, 0, 0))(weights, x[:, None], labels[:, None])
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].mean(0), parameter.grad, msg=name)


@pytest.mark.parametrize("kind", ["single_label", "segmentation"])
def test_gradients_of_every_image_of_other_heads(kind: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ContextBottleneck, "_can_fuse", lambda *_: False)  # which chooses among equal maxima
    x: Tensor = pixels().double()
    model: Any
    if kind == "segmentation":
        torch.manual_seed(0)
        model, labels = MLVICXForSemanticSegmentation(tiny_config(num_labels=3)), (pixels()[:, 0] > 0).long()
    else:
        model, labels = classifier(problem_type="single_label_classification"), torch.tensor([0, 2, 1, 1])
    model = model.double().eval()
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor, labels: Tensor) -> Tensor:
        return functional_call(model, weights, (x[None],), {"labels": labels[None]}).loss

    each = vmap(grad(loss), (None, 0, 0))(weights, x, labels)
    for image in range(4):
        model.zero_grad()
        model(x[image : image + 1], labels=labels[image : image + 1]).loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(each[name][image], parameter.grad, msg=name)


@pytest.mark.parametrize("reduction", [None, 2])
def test_gradients_of_gradients_of_context(reduction: int | None):
    torch.manual_seed(1)
    block = ContextBottleneck(4, reduction).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    weights = tuple(block.parameters())
    names = [name for name, _ in block.named_parameters()]

    def refine(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(block, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(refine, (x, *weights))
    assert torch.autograd.gradgradcheck(refine, (x, *weights))
    assert torch.autograd.gradcheck(refine, (x, *weights), check_batched_grad=True, check_forward_ad=True)


def test_steps_in_the_weights_can_be_differentiated():
    """As in meta-learning: a step through `functional_call`, then the gradient of what it led to."""
    model = classifier().double().eval()
    weights = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, weights, (pixels().double(),), {"labels": LABELS}).loss

    def after_a_step(weights: dict[str, Tensor]) -> Tensor:
        slopes = torch.autograd.grad(loss(weights), list(weights.values()), create_graph=True)
        return loss({name: w - 0.1 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)})

    found = torch.autograd.grad(after_a_step(weights), list(weights.values()))
    direction = {name: 1e-8 * torch.randn_like(w) for name, w in weights.items()}
    ends = [
        after_a_step({n: (w + s * direction[n]).detach().requires_grad_() for n, w in weights.items()}) for s in (1, -1)
    ]
    slope = sum((g * d).sum() for g, d in zip(found, direction.values(), strict=True))
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / 2, rtol=1e-3, atol=0)


# -- gradient checkpointing --------------------------------------------------------------------------------------------

CLASSES: list[Any] = [MLVICXModel, MLVICXForPreTraining, MLVICXForImageClassification, MLVICXForSemanticSegmentation]


def trained(model: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Gradients of one training step, and the state that it leaves."""
    model.train()
    if isinstance(model, MLVICXForPreTraining):
        loss = model(pixels().double(), pixels().flip(0).double()).loss
    elif isinstance(model, MLVICXModel):
        loss = model(pixels().double()).pooler_output.square().sum()
    else:
        labels = LABELS if isinstance(model, MLVICXForImageClassification) else (pixels()[:, 0] > 0).long()
        loss = model(pixels().double(), labels=labels).loss
    loss.backward()
    return [p.grad for p in model.parameters()], model.state_dict()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("backbone", ["test_resnet", "regnety_002"])
@pytest.mark.parametrize("model_class", CLASSES)
def test_gradient_checkpointing_changes_nothing_but_memory(model_class: Any, backbone: str, reentrant: bool):
    torch.manual_seed(0)
    model = model_class(tiny_config(backbone=backbone, num_labels=3)).double()
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert other.is_gradient_checkpointing
    calls = []
    gates = other.base_model.context[1].spatial
    gates.register_forward_hook(lambda *_: calls.append(1))
    (gradients, state), (expected, expected_state) = trained(other), trained(model)
    assert len(calls) == 2 * (2 if model_class is MLVICXForPreTraining else 1)  # every stage ran again
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for name, wanted in expected_state.items():  # the running statistics moved once
        torch.testing.assert_close(state[name], wanted, msg=name)
    other.gradient_checkpointing_disable()
    assert not other.is_gradient_checkpointing


def test_timms_own_switch_works():
    torch.manual_seed(0)
    model = MLVICXModel(tiny_config()).double()
    other = copy.deepcopy(model)
    other.backbone.set_grad_checkpointing(True)
    calls = []
    other.context[0].spatial.register_forward_hook(lambda *_: calls.append(1))
    (gradients, state), (expected, expected_state) = trained(other), trained(model)
    assert len(calls) == 2
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted)
    for name, wanted in expected_state.items():
        torch.testing.assert_close(state[name], wanted, msg=name)


# -- device maps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "model_class"),
    [
        *((name, CLASSES[0]) for name in ("resnet18", "densenet121", "regnety_002", "test_convnext")),
        *(("test_convnext", each) for each in (*CLASSES[1:], MLVICXBackbone)),
    ],
)
def test_no_block_is_split_between_devices(backbone: str, model_class: Any):
    with torch.device("meta"):
        model = model_class(tiny_config(backbone=backbone, num_labels=3))
    blocks = {type(b).__name__ for b in timm.create_model(backbone, features_only=True).modules()}
    blocks &= {"BasicBlock", "DenseBlock", "RegStage", "ConvNeXtStage"}
    assert blocks
    assert {*blocks, "ContextBottleneck", "MultiLevelAggregator", "UNetDecoder"} <= set(model._no_split_modules)
    size = sum(p.numel() * 4 for p in model.parameters())
    plans = []
    for share in (0.2, 0.4, 0.6, 0.8, 0.95):
        plan = infer_auto_device_map(
            model, {0: int(share * size), "cpu": size * 4}, no_split_module_classes=list(model._no_split_modules)
        )
        plans.append(set(plan.values()))
        for name, module in model.named_modules():
            if type(module).__name__ in model._no_split_modules:
                inside = {device for key, device in plan.items() if key.startswith(f"{name}.")}
                assert not inside, name
    assert {0, "cpu"} in plans


# -- initialisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "regnety_002", "densenet121"])
def test_weights_that_a_checkpoint_lacks_are_initialised_as_timm_does(backbone: str, tmp_path: Path):
    config = tiny_config(backbone=backbone)
    torch.manual_seed(5)
    bare = timm.create_model(backbone, features_only=True, in_chans=1).state_dict()
    with torch.device("meta"):
        model = MLVICXModel(config)
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.init_weights()
    # A folder without any weight of the backbone.
    MLVICXModel(config).save_pretrained(tmp_path)
    context = {name: tensor for name, tensor in MLVICXModel(config).state_dict().items() if name.startswith("context")}
    torch.manual_seed(5)
    loaded = MLVICXModel.from_pretrained(None, config=config, state_dict=context)
    for found in (model, loaded):
        state = found.backbone.state_dict()
        assert state.keys() == bare.keys()
        for name, wanted in bare.items():
            torch.testing.assert_close(state[name], wanted, msg=name)


def test_the_configuration_of_the_caller_is_not_changed_by_a_backbone():
    config = MLVICXConfig(backbone="test_resnet")
    before = config.to_dict()
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    backbone = MLVICXBackbone(config)
    assert config.to_dict() == before
    assert (backbone.out_features, backbone.out_indices, backbone.channels) == (["stage4"], [4], [96])
    backbone.out_indices = [0, 1]
    assert backbone(pixels()).feature_maps[1].shape == (4, 32, 8, 8)
