"""The models: interface, equations, aggregation, initialisation, gradients, heads, saving and loading."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import torch
from helpers import run_python, tiny_config
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mlvicx_hf import MLVICXForImageClassification, MLVICXForPreTraining, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.models.layers_mlvicx import (
    ContextBottleneck,
    Expander,
    GateConv2d,
    MultiLevelAggregator,
)
from mlvicx_hf.models.loss_mlvicx import multi_label_loss, variance_covariance_loss
from mlvicx_hf.pretraining.arguments import ModelArguments, PretrainingArguments
from mlvicx_hf.pretraining.model import create_objective
from mlvicx_hf.pretraining.optimizer import create_optimizer

CHANNELS = [32, 32, 48, 192, 96]  # of test_resnet, stem first


def pixels(count: int = 4, channels: int = 1, size: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


# -- interface ---------------------------------------------------------------------------------------------------------


def test_outputs_of_the_encoder():
    model = MLVICXModel(tiny_config()).eval()
    output = model(pixels())
    assert output.last_hidden_state.shape == (4, 96, 2, 2)
    assert output.pooler_output.shape == (4, 96)
    assert output.hidden_states is None
    torch.testing.assert_close(output.pooler_output, output.last_hidden_state.mean((2, 3)))
    maps = model(pixels(), output_hidden_states=True).hidden_states
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 32, 32), (32, 16, 16), (48, 8, 8), (192, 4, 4), (96, 2, 2)]
    assert torch.equal(maps[-1], output.last_hidden_state)
    plain = model(pixels(), return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], output.last_hidden_state)
    assert torch.equal(plain[1], output.pooler_output)
    assert len(plain) == 2
    assert len(model(pixels(), output_hidden_states=True, return_dict=False)) == 3
    assert MLVICXModel(tiny_config(output_hidden_states=True))(pixels()).hidden_states is not None


@pytest.mark.lowest
def test_all_levels_are_pooled_on_request(tmp_path: Path):
    torch.manual_seed(0)
    model = MLVICXForImageClassification(tiny_config(pooled_levels="all", num_labels=3)).eval()
    output = model.mlvicx(pixels(), output_hidden_states=True)
    assert output.pooler_output.shape == (4, sum(CHANNELS))
    expected = torch.cat([level.mean((2, 3)) for level in output.hidden_states], 1)
    torch.testing.assert_close(output.pooler_output, expected)
    assert model.classifier.in_features == sum(CHANNELS)
    model.save_pretrained(tmp_path)
    loaded = MLVICXForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(pixels()).logits, model(pixels()).logits)


def test_outputs_of_pretraining():
    model = MLVICXForPreTraining(tiny_config(multi_level_weight=0.5))
    output = model(view_1=pixels(), view_2=pixels(seed=1))
    for z in (*output.global_embeddings, *output.multi_level_embeddings):
        assert z.shape == (4, 32)
    expected = variance_covariance_loss(*output.global_embeddings)
    assert output.global_loss == expected.loss
    assert output.global_invariance == expected.invariance
    assert output.global_variance == expected.variance
    assert output.global_covariance == expected.covariance
    local = variance_covariance_loss(*output.multi_level_embeddings)
    assert output.multi_level_loss == local.loss
    assert output.multi_level_invariance == local.invariance
    assert output.multi_level_variance == local.variance
    assert output.multi_level_covariance == local.covariance
    torch.testing.assert_close(output.loss, expected.loss + 0.5 * local.loss)


def test_the_output_of_pretraining_has_its_declared_order():
    """Exporters name results by the order of the keys."""
    model = MLVICXForPreTraining(tiny_config(output_hidden_states=True))
    one, other = pixels(), pixels(seed=1)
    output = model(one, other)
    declared = [field.name for field in dataclasses.fields(output)]
    assert list(output) == declared
    assert output[0] is output.loss
    assert model(one, other, return_dict=False)[0].shape == ()
    assert len(model(one, other, return_dict=False)) == len(declared)
    assert [len(level) for level in output.hidden_states] == [4] * 10
    torch.testing.assert_close(model(other, one).hidden_states[5:], output.hidden_states[:5])
    assert model(one, other, output_hidden_states=False).hidden_states is None
    assert list(model(one, other, return_loss=False)) == declared[-3:]
    assert model(one, other, return_loss=None).loss == output.loss
    model.config.return_loss = False
    assert model(one, other, return_loss=None).loss is None
    assert model.eval()(one[:1], other[:1], return_loss=False).global_embeddings[0].shape == (1, 32)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("weight", [0, 1])
def test_an_export_of_pretraining_has_its_right_names(strict: bool, weight: int):
    torch.manual_seed(0)
    model = MLVICXForPreTraining(tiny_config(multi_level_weight=weight)).eval()
    views = {"view_1": pixels(), "view_2": pixels(seed=1)}
    program = torch.export.export(model, (), views, strict=strict)
    found, expected = program.module()(**views), model(**views)
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=name)


def test_the_loss_takes_the_weights_of_the_configuration():
    values = {
        "invariance_weight": 2.0,
        "variance_weight": 3.0,
        "covariance_weight": 0.25,
        "variance_target": 2.0,
        "variance_epsilon": 1e-2,
        "invariance_reduction": "sum",
    }
    model = MLVICXForPreTraining(tiny_config(**values))
    output = model(pixels(), pixels(seed=1))
    assert output.global_loss == variance_covariance_loss(*output.global_embeddings, **values).loss
    assert output.multi_level_loss == variance_covariance_loss(*output.multi_level_embeddings, **values).loss


def test_each_view_has_its_own_pass():
    torch.manual_seed(0)
    model = MLVICXForPreTraining(tiny_config()).train()
    one, other = pixels(), 5 * pixels(seed=1) + 2
    z_1 = model(one, other).global_embeddings[0]
    z_again = model(one, one).global_embeddings[0]
    assert torch.equal(z_1, z_again)  # the batch statistics of view 2 play no part in view 1


def test_outputs_of_classification():
    model = MLVICXForImageClassification(tiny_config(num_labels=3)).eval()
    output = model(pixels(), output_hidden_states=True)
    assert output.loss is None
    assert output.logits.shape == (4, 3)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(output.logits, model.classifier(model.mlvicx(pixels()).pooler_output))
    loss, logits = model(pixels(), labels=torch.ones(4, 3), return_dict=False)
    assert torch.equal(logits, output.logits)
    assert loss.ndim == 0


@pytest.mark.parametrize("model_class", [MLVICXModel, MLVICXForImageClassification])
@pytest.mark.parametrize(("expected", "found"), [(1, 3), (3, 1)])
def test_other_channels_are_an_error_that_names_both(model_class: Any, expected: int, found: int):
    model = model_class(tiny_config(num_channels=expected))
    with pytest.raises(ValueError, match=rf"{found} channels found; expected .*{expected} channel") as caught:
        model(pixels(channels=found))
    assert f"num_channels={expected}" in str(caught.value)
    with pytest.raises(ValueError, match="3 dimensions found"):
        model(torch.zeros(1, 64, 64))


def test_pretraining_refuses_a_batch_of_one_and_unequal_views():
    model = MLVICXForPreTraining(tiny_config())
    with pytest.raises(ValueError, match=r"a batch of 1 found; .* at least 2 images"):
        model(pixels(1), pixels(1))
    with pytest.raises(ValueError, match=r"\(4, 1, 64, 64\) and \(3, 1, 64, 64\) found; expected equal shapes"):
        model(pixels(4), pixels(3))


@pytest.mark.parametrize(
    ("backbone", "parts"),
    [
        ("crossvit_9_240", ["crossvit_9_240", "timm's size is 240"]),
        ("resnet1x", ["resnet1x", "timm model such as ", "resnet"]),
        ("nothing_like_it", ["nothing_like_it", "resnet18"]),
    ],
)
def test_backbones_that_do_not_work_are_named_with_some_that_do(backbone: str, parts: list[str]):
    with pytest.raises(ValueError, match=r"found; expected|does not take") as caught:
        MLVICXModel(tiny_config(backbone=backbone))
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("backbone", ["resnet10t", "densenet121", "regnety_002", "test_convnext"])
def test_other_backbones(backbone: str):
    model = MLVICXForPreTraining(tiny_config(backbone=backbone))
    assert model(pixels(2), pixels(2, seed=1)).loss.isfinite()


# -- the context bottleneck --------------------------------------------------------------------------------------------


def naive_context(block: ContextBottleneck, x: Tensor) -> Tensor:
    """Eqs. 1 and 2 with loops over channels and positions."""
    _, channels, height, width = x.shape

    def gate(pooled: Tensor) -> Tensor:  # [C]
        if isinstance(block.channel, nn.Conv2d):
            return torch.einsum("oc,c->o", block.channel.weight[:, :, 0, 0], pooled)
        first, last = block.channel[0].weight[:, :, 0, 0], block.channel[2].weight[:, :, 0, 0]
        return torch.einsum("oh,h->o", last, torch.einsum("hc,c->h", first, pooled).clamp(min=0))

    refined = torch.empty_like(x)
    for b, image in enumerate(x):
        average = torch.stack([sum(image[c].flatten()) / (height * width) for c in range(channels)])  # type: ignore[arg-type]
        maximum = torch.stack([max(image[c].flatten()) for c in range(channels)])
        attention = 1 / (1 + torch.exp(-(gate(average) + gate(maximum))))
        k = attention[:, None, None] * image
        planes = [k.sum(0) / channels, k.max(0).values]
        kernel = block.spatial.weight[0]  # [2, 7, 7]
        for i in range(height):
            for j in range(width):
                total = torch.zeros((), dtype=x.dtype)
                for plane in range(2):
                    for di in range(7):
                        for dj in range(7):
                            y, z = i + di - 3, j + dj - 3
                            if 0 <= y < height and 0 <= z < width:
                                total = total + kernel[plane, di, dj] * planes[plane][y, z]
                refined[b, :, i, j] = k[:, i, j] / (1 + torch.exp(-total))
    return refined


@pytest.mark.parametrize("reduction", [None, 2, 16])
@torch.no_grad()
def test_context_equals_equations_1_and_2(reduction: int | None):
    torch.manual_seed(1)
    block = ContextBottleneck(6, reduction).double()
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    torch.testing.assert_close(block(x), naive_context(block, x), rtol=1e-10, atol=1e-12)
    shapes = [tuple(p.shape) for p in block.parameters()]
    hidden = None if reduction is None else max(1, 6 // reduction)
    channel = [(6, 6, 1, 1)] if hidden is None else [(hidden, 6, 1, 1), (6, hidden, 1, 1)]
    assert shapes == [*channel, (1, 2, 7, 7)]  # no biases


def test_the_gain_is_a_factor_of_each_gate_and_2_lets_maps_through():
    torch.manual_seed(1)
    plain, gained = ContextBottleneck(6).double(), ContextBottleneck(6, gain=2.0).double()
    gained.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    once = x * 2 * plain.channel_gate(x.mean((2, 3), True), x.amax((2, 3), True))
    expected = once * 2 * plain.spatial_gate(torch.cat([once.mean(1, True), once.amax(1, True)], 1))
    torch.testing.assert_close(gained(x), expected)
    inputs = [x.clone().requires_grad_(), *gained.parameters()]
    found = torch.autograd.grad(gained(inputs[0]).sin().sum(), inputs)
    with torch.no_grad():
        step = 1e-6 * torch.randn_like(x)
        slope = (gained(x + step).sin().sum() - gained(x - step).sin().sum()) / 2
        torch.testing.assert_close((found[0] * step).sum(), slope, rtol=1e-6, atol=1e-12)
        for parameter in gained.parameters():
            parameter.zero_()
        torch.testing.assert_close(gained(x), x)


@pytest.mark.parametrize("reduction", [None, 2])
def test_the_scale_of_the_first_gates_is_a_factor_of_their_weights_alone(tmp_path: Path, reduction: int | None):
    models = []
    for scale in (1.0, 0.01):
        torch.manual_seed(3)
        config = tiny_config(context_reduction=reduction, context_init_scale=scale)
        models.append(MLVICXForPreTraining(config))
    plain, small = (model.state_dict() for model in models)
    gates = [name for name in plain if ".context." in name]
    assert len(gates) == 5 * (2 if reduction is None else 3)
    for name in plain:
        torch.testing.assert_close(small[name], 0.01 * plain[name] if name in gates else plain[name])
    models[1].save_pretrained(tmp_path)
    loaded = MLVICXModel.from_pretrained(tmp_path).state_dict()  # not scaled again
    assert all(torch.equal(value, small[f"mlvicx.{name}"]) for name, value in loaded.items())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("reduction", [None, 2])
def test_gradients_of_context_equal_those_of_equations_1_and_2(reduction: int | None, layout: torch.memory_format):
    torch.manual_seed(1)
    block = ContextBottleneck(6, reduction).double()
    x = torch.randn(2, 6, 5, 9, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    slope = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    inputs = [x, *block.parameters()]
    refined = block(x)
    found, again = (torch.autograd.grad(refined, inputs, slope, retain_graph=True) for _ in range(2))
    expected = torch.autograd.grad(naive_context(block, x), inputs, slope)
    assert refined.is_contiguous(memory_format=layout)
    for one, two, wanted in zip(found, again, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(two, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("fixed", ["input", "channel", "spatial"])
def test_gradients_of_context_when_a_part_is_fixed(fixed: str):
    torch.manual_seed(1)
    block = ContextBottleneck(6)
    x = torch.randn(2, 6, 5, 9, requires_grad=True)
    inputs = {"input": x, "channel": block.channel.weight, "spatial": block.spatial.weight}
    expected = torch.autograd.grad(block(x).square().sum(), [v for k, v in inputs.items() if k != fixed])
    inputs.pop(fixed).requires_grad_(False)
    found = torch.autograd.grad(block(x).square().sum(), list(inputs.values()))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_context_under_autocast(dtype: torch.dtype):
    """Batch normalisation may hand on either type."""
    torch.manual_seed(1)
    block = ContextBottleneck(6)
    x = torch.randn(2, 6, 5, 9)
    results = []
    for half in (False, True):
        leaf = x.to(dtype if half else torch.float32).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            refined = block(leaf)
        assert refined.dtype == leaf.dtype
        results.append(torch.autograd.grad(refined.float().square().sum(), [leaf, *block.parameters()]))
    for found, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.05 * wanted.abs().max().item())


def test_context_keeps_no_memory_behind_a_step():
    """What autograd holds in a circle is seen by no garbage collector: a long run once grew to 19 GB."""
    block = ContextBottleneck(2)
    x = torch.randn(8, 2, 128, 128, requires_grad=True)  # the gates keep 1.5 MB of it

    def grow(steps: int) -> int:
        before = psutil.Process().memory_info().rss
        for _ in range(steps):
            block(x).sum().backward()
        return psutil.Process().memory_info().rss - before

    grow(20)
    assert grow(100) < 40 * 2**20


def test_of_equal_maxima_one_takes_the_gradient_of_context():
    """The sum over them is the same as that of autograd, which shares it out."""
    torch.manual_seed(1)
    block = ContextBottleneck(3).double()
    x = torch.full((1, 3, 4, 4), 2.0, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(block(x).sum(), x)
    block.requires_grad_(False)  # which takes the other way
    (expected,) = torch.autograd.grad(block(x).sum(), x)
    torch.testing.assert_close(found.sum((2, 3)), expected.sum((2, 3)))


@torch.no_grad()
def test_refined_maps_feed_the_following_layers():
    model = MLVICXModel(tiny_config()).eval()
    plain = MLVICXModel(tiny_config(use_context=False)).eval()
    plain.backbone.load_state_dict(model.backbone.state_dict())
    x = pixels()
    features, maps = plain.backbone(x), model(x, output_hidden_states=True).hidden_states
    torch.testing.assert_close(maps[0], model.context[0](features[0]))
    ratio = (maps[1] - model.context[1](features[1])).norm() / maps[1].norm()
    assert ratio > 0.1  # level 1 saw the refined level 0


@pytest.mark.parametrize("backbone", ["test_resnet", "resnet18", "densenet121", "regnety_002"])
@torch.no_grad()
def test_without_context_it_is_the_bare_backbone(backbone: str):
    model = MLVICXModel(tiny_config(backbone=backbone, use_context=False, num_channels=3)).eval()
    assert all(isinstance(block, nn.Identity) for block in model.context)
    bare = timm.create_model(backbone, features_only=True).eval()
    bare.load_state_dict(model.backbone.state_dict())
    x = pixels(2, channels=3)
    for ours, theirs in zip(model(x, output_hidden_states=True).hidden_states, bare(x), strict=True):
        assert torch.equal(ours, theirs)


# -- aggregation and expanders -----------------------------------------------------------------------------------------


def random_maps() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    sides = [32, 16, 8, 4, 2]
    return tuple(
        torch.randn(2, c, s, s, dtype=torch.float64, generator=generator) for c, s in zip(CHANNELS, sides, strict=True)
    )


def per_level(aggregator: MultiLevelAggregator) -> list[Tensor]:
    """The one convolution's weights, level by level."""
    return list(aggregator.projection.weight.split(CHANNELS, 1))


@torch.no_grad()
def test_aggregation_equals_the_authors_order():
    aggregator = MultiLevelAggregator(tiny_config(aggregation_resize=64, aggregation_size=4), CHANNELS).double()
    maps = random_maps()
    total = torch.zeros(2, 16, 64, 64, dtype=torch.float64)
    for level, weight in zip(maps, per_level(aggregator), strict=True):
        total += F.conv2d(F.interpolate(level, size=(64, 64), mode="bilinear", align_corners=False), weight)
    torch.testing.assert_close(aggregator(maps), F.adaptive_avg_pool2d(total, 4), rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_pooling_and_concatenation_commute_with_the_projection():
    aggregator = MultiLevelAggregator(tiny_config(aggregation_size=2), CHANNELS).double()
    assert aggregator.projection.bias is None
    maps = random_maps()
    summed = sum(
        F.adaptive_avg_pool2d(F.conv2d(level, weight), 2)
        for level, weight in zip(maps, per_level(aggregator), strict=True)
    )
    u = aggregator(maps)
    assert u.shape == (2, 16, 2, 2)
    torch.testing.assert_close(u, summed, rtol=1e-10, atol=1e-12)


@torch.no_grad()
def test_some_levels_only():
    aggregator = MultiLevelAggregator(tiny_config(aggregation_levels=[1, 4]), CHANNELS).double()
    maps = random_maps()
    assert aggregator.projection.weight.shape == (16, 32 + 96, 1, 1)
    changed = tuple(torch.zeros_like(m) if i in (0, 2, 3) else m for i, m in enumerate(maps))
    assert torch.equal(aggregator(maps), aggregator(changed))
    with pytest.raises(ValueError, match=r"\[0, 5\] found; test_resnet has levels 0 to 4"):
        MLVICXForPreTraining(tiny_config(aggregation_levels=[0, 5]))


@pytest.mark.parametrize("final_norm", [False, True])
def test_structure_of_the_expanders(final_norm: bool):
    layers = list(Expander(10, [20, 30, 40], final_norm))
    expected: list[type] = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in layers] == expected + [nn.BatchNorm1d] * final_norm
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [(10, 20), (20, 30), (30, 40)]
    assert all(layer.bias is None for layer in linear)
    model = MLVICXForPreTraining(tiny_config(expander_final_norm=final_norm, expander_dims=[24, 40]))
    assert model.global_expander[0].in_features == 96
    assert model.multi_level_expander[0].in_features == 16 * 2 * 2
    assert isinstance(model.global_expander[-1], nn.BatchNorm1d) == final_norm
    assert isinstance(model.multi_level_expander[-1], nn.BatchNorm1d) == final_norm


@torch.no_grad()
def test_embeddings_are_made_of_pooled_features_and_of_the_aggregate():
    model = MLVICXForPreTraining(tiny_config()).eval()
    x = pixels()
    z, m = model.embed(x)
    output = model.mlvicx(x, output_hidden_states=True)
    torch.testing.assert_close(z, model.global_expander(output.pooler_output))
    torch.testing.assert_close(m, model.multi_level_expander(model.aggregator(output.hidden_states).flatten(1)))


@pytest.mark.parametrize(("weights", "absent"), [((1, 0), "multi_level"), ((0, 1), "global")])
def test_a_branch_of_weight_zero_is_not_built(weights: tuple[int, int], absent: str):
    model = MLVICXForPreTraining(tiny_config(global_weight=weights[0], multi_level_weight=weights[1]))
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    expected = {"global_expander"} if weights[0] else {"multi_level_expander", "aggregator"}
    assert names == {"mlvicx"} | expected
    output = model(pixels(), pixels(seed=1))
    present = "global" if weights[0] else "multi_level"
    assert output[f"{present}_loss"] == output.loss
    assert all(key == "loss" or key.startswith(present) for key in output)
    assert getattr(output, f"{absent}_loss") is None
    output.loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# -- every parameter exists, gets a gradient and moves ----------------------------------------------------------------


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"context_reduction": 2, "aggregation_resize": 64, "expander_final_norm": True},
        {"use_context": False, "backbone": "resnet10t"},
    ],
)
def test_every_parameter_exists_at_once_gets_a_gradient_and_moves(values: dict[str, Any]):
    torch.manual_seed(0)
    arguments = ModelArguments(
        **(
            {"backbone": "test_resnet", "image_size": 64, "expander_dims": [32, 32], "aggregation_channels": 16}
            | values
        )
    )
    model = create_objective(arguments).model.double().train()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    keys, identities = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    optimizer = create_optimizer(model, PretrainingArguments(output_dir="unused"))
    in_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert in_optimizer == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.3
        optimizer.zero_grad()
        model(pixels(8, seed=2 * step).double(), pixels(8, seed=2 * step + 1).double()).loss.backward()
        optimizer.step()
    assert list(model.state_dict()) == keys
    assert [id(parameter) for parameter in model.parameters()] == identities
    assert all(parameter.requires_grad for parameter in model.parameters())
    if values.get("expander_final_norm"):  # the loss is blind to these: kept for converted weights, not trained
        shifts = {"global_expander.4.bias", "multi_level_expander.4.bias"}
        assert shifts < set(keys)
        assert not shifts & set(before)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # Of a parameter that cancels, rounding leaves some 1e-15.
        assert parameter.grad.norm() > 1e-8, (name, parameter.grad.norm())
        moved = (parameter.detach() - before[name]).norm()
        # Weight decay alone (1e-6) would move by less than 1e-8 of the norm.
        assert moved > 1e-6 * before[name].norm().clamp(min=1e-3), (name, moved)


# -- initialisation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_class", [MLVICXModel, MLVICXForPreTraining, MLVICXForImageClassification])
@pytest.mark.parametrize("backbone", ["resnet18", "regnety_002"])
def test_a_fresh_backbone_keeps_timms_initialisation(model_class: Any, backbone: str):
    config = tiny_config(backbone=backbone)
    torch.manual_seed(5)
    model = model_class(config)
    torch.manual_seed(5)
    bare = timm.create_model(backbone, features_only=True, in_chans=1)
    ours = model.base_model.backbone.state_dict()
    assert ours.keys() == bare.state_dict().keys()
    for name, expected in bare.state_dict().items():
        assert torch.equal(ours[name], expected), name
    if backbone == "resnet18":
        assert (ours["layer1.0.bn2.weight"] == 0).all()  # timm starts residual branches at zero


def assert_fresh(layer: nn.Module) -> None:
    """Torch's own scale: uniform within one over the root of the inputs; a hundredth of it for gates."""
    weight = layer.weight.detach()
    bound = (0.01 if isinstance(layer, GateConv2d) else 1) / weight[0].numel() ** 0.5
    assert weight.isfinite().all()
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.25)


@pytest.mark.parametrize("dims", [[64, 32]])
def test_heads_that_a_checkpoint_lacks_are_initialised(tmp_path: Path, dims: list[int]):
    config = tiny_config(expander_dims=dims)
    encoder = MLVICXModel(config)
    encoder.save_pretrained(tmp_path)
    model, report = MLVICXForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert all(not key.startswith("mlvicx.") for key in report["missing_keys"])
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.mlvicx.state_dict()[name], tensor), name
    for expander in (model.global_expander, model.multi_level_expander):
        assert_fresh(expander[0])
        assert_fresh(expander[-1])
        assert (expander[1].weight == 1).all()
        assert (expander[1].bias == 0).all()
        assert (expander[1].running_mean == 0).all()
        assert (expander[1].running_var == 1).all()
    assert_fresh(model.aggregator.projection)
    classifier = MLVICXForImageClassification.from_pretrained(tmp_path, num_labels=5)
    assert classifier.classifier.weight.shape == (5, 96)
    assert_fresh(classifier.classifier)
    assert classifier.classifier.bias.isfinite().all()
    assert classifier.classifier.bias.abs().max() <= 96**-0.5


@pytest.mark.lowest
def test_context_that_a_checkpoint_lacks_is_initialised_and_reported(tmp_path: Path):
    MLVICXModel(tiny_config(use_context=False)).save_pretrained(tmp_path)
    model, report = MLVICXModel.from_pretrained(tmp_path, config=tiny_config(), output_loading_info=True)
    assert {key.split(".")[0] for key in report["missing_keys"]} == {"context"}
    for block in model.context:
        assert_fresh(block.channel)
        assert_fresh(block.spatial)


def test_a_backbone_that_a_checkpoint_lacks_is_initialised(tmp_path: Path):
    model = MLVICXModel(tiny_config())
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in weights.items() if k != "backbone.conv1.0.weight"}
    assert len(kept) == len(weights) - 1
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    loaded, report = MLVICXModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {"backbone.conv1.0.weight"}
    bound = timm.create_model("test_resnet", features_only=True, in_chans=1).state_dict()["conv1.0.weight"].std()
    assert loaded.state_dict()["backbone.conv1.0.weight"].std() == pytest.approx(bound, rel=0.25)


# -- losses of the classifier ------------------------------------------------------------------------------------------


def test_multi_label_loss_leaves_unknown_labels_out():
    nan = float("nan")
    logits = torch.tensor([[0.3, -2.0, 1.0], [4.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1.0, nan, 0.0], [nan, 1.0, 0.0]])
    weights = [2.0, 0.5, 3.0]

    def expected(positive: list[float]) -> float:
        terms = []
        for row_logits, row_labels in zip(logits.tolist(), labels.tolist(), strict=True):
            for logit, label, weight in zip(row_logits, row_labels, positive, strict=True):
                p = 1 / (1 + torch.exp(torch.tensor(-logit, dtype=torch.float64)).item())
                if label == label:
                    log = torch.tensor([p, 1 - p], dtype=torch.float64).log().tolist()
                    terms.append(-weight * log[0] if label else -log[1])
        return sum(terms) / len(terms)

    loss = multi_label_loss(logits, labels)
    assert loss.item() == pytest.approx(expected([1, 1, 1]), rel=1e-9)
    assert multi_label_loss(logits, labels, weights).item() == pytest.approx(expected(weights), rel=1e-9)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad == 0, labels.isnan())


def test_multi_label_loss_without_any_known_label():
    logits = torch.randn(3, 2, requires_grad=True)
    loss = multi_label_loss(logits, torch.full((3, 2), float("nan")), [1.0, 5.0])
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert (logits.grad == 0).all()


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\) found; expected \(3, 2\), as the logits"):
        multi_label_loss(torch.zeros(3, 2), torch.zeros(3))


@pytest.mark.parametrize("num_labels", [1, 4])
def test_multi_label_is_the_default_of_the_head(num_labels: int):
    model = MLVICXForImageClassification(tiny_config(num_labels=num_labels))
    assert model.config.problem_type == "multi_label_classification"
    labels = torch.randint(0, 2, (4, num_labels))
    output = model(pixels(), labels=labels)
    expected = F.binary_cross_entropy_with_logits(output.logits, labels.float())
    torch.testing.assert_close(output.loss, expected)
    assert output.loss.dtype == torch.float32


def test_single_label_is_cross_entropy():
    model = MLVICXForImageClassification(tiny_config(num_labels=3, problem_type="single_label_classification"))
    labels = torch.tensor([0, 2, 1, 2])
    output = model(pixels(), labels=labels)
    expected = -output.logits.log_softmax(1)[range(4), labels].mean()
    torch.testing.assert_close(output.loss, expected)


def test_positive_weights_of_the_configuration():
    model = MLVICXForImageClassification(tiny_config(num_labels=2, positive_weights=[3.0, 0.5]))
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    output = model(pixels(), labels=labels)
    torch.testing.assert_close(output.loss, multi_label_loss(output.logits, labels, [3.0, 0.5]))
    with pytest.raises(ValueError, match="1 positive_weights found; expected 2, one a label"):
        MLVICXForImageClassification(tiny_config(num_labels=2, positive_weights=[3.0]))


def test_the_loss_is_float32_under_half_precision():
    model = MLVICXForImageClassification(tiny_config(num_labels=2)).bfloat16()
    output = model(pixels().bfloat16(), labels=torch.ones(4, 2))
    assert output.logits.dtype == torch.bfloat16
    assert output.loss.dtype == torch.float32


# -- freezing ----------------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_does_not_move():
    torch.manual_seed(0)
    model = MLVICXForImageClassification(tiny_config(num_labels=2))
    model.freeze_backbone()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for step in range(3):
        model.train()
        assert model.training
        assert not any(part.training for part in torch.nn.Sequential(model.mlvicx).train()[0].modules())
        optimizer.zero_grad()
        model(3 * pixels(seed=step) + 1, labels=torch.ones(4, 2)).loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():  # with the statistics of batch normalisation
        assert torch.equal(tensor, before[name]) == name.startswith("mlvicx."), name
    assert all(p.grad is None for p in model.mlvicx.parameters())


def test_an_unfrozen_backbone_moves():
    model = MLVICXForImageClassification(tiny_config(num_labels=2)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    assert before
    model(3 * pixels() + 1, labels=torch.ones(4, 2)).loss.backward()
    assert all(not torch.equal(dict(model.named_buffers())[name], buffer) for name, buffer in before.items())
    assert all(p.grad is not None for p in model.parameters())


# -- saving and loading ------------------------------------------------------------------------------------------------

CHILD = """
import sys, numpy as np, torch
import mlvicx_hf
from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForPreTraining)
from safetensors.torch import load_file
run, labelled = sys.argv[1], sys.argv[2]
want = load_file(run + "/../expected.safetensors")
config = AutoConfig.from_pretrained(run)
assert type(config).__name__ == "MLVICXConfig" and config.expander_dims == [32, 32], config
processor = AutoImageProcessor.from_pretrained(run)
assert type(processor).__name__ == "MLVICXImageProcessor"
x = processor([image for image in want["images"].numpy()])["pixel_values"]
assert torch.equal(x, want["pixel_values"]), "image processor"
x = x.double()  # kernels may round by where a tensor lies in memory: in float64 that is far below any fault


def close(a, b):
    return torch.allclose(a, b, rtol=1e-10, atol=1e-12)


with torch.no_grad():
    encoder = AutoModel.from_pretrained(run).double()
    assert type(encoder).__name__ == "MLVICXModel" and not encoder.training
    assert close(encoder(x).pooler_output, want["pooled"]), "AutoModel"
    weights = load_file(run + "/model.safetensors")
    pretraining = AutoModelForPreTraining.from_pretrained(run).double()
    assert type(pretraining).__name__ == "MLVICXForPreTraining"
    assert all(torch.equal(weights[name].to(t), t) for name, t in pretraining.state_dict().items()), "weights"
    output = pretraining(x, x.flip(-1))
    assert close(output.loss, want["loss"]), "AutoModelForPreTraining"
    assert close(output.multi_level_embeddings[1], want["multi_level"])
    fresh = AutoModelForImageClassification.from_pretrained(run, num_labels=3).double()
    assert close(fresh.mlvicx(x).pooler_output, want["pooled"]), "AutoModelForImageClassification"
    assert fresh(x).logits.shape == (3, 3) and fresh(x).logits.isfinite().all()
    classifier = AutoModelForImageClassification.from_pretrained(labelled).double()
    assert classifier.config.id2label == {0: "Edema", 1: "Mass"}
    assert close(classifier(x).logits, want["logits"]), "a classifier's own folder"
print("equal")
"""


def test_loaded_in_a_fresh_process(tmp_path: Path):
    torch.manual_seed(0)
    run, labelled = tmp_path / "run", tmp_path / "labelled"
    model = MLVICXForPreTraining(tiny_config()).train()
    for seed in range(2):
        model(pixels(8, seed=seed), pixels(8, seed=seed + 9))  # gives the normalisations statistics of their own
    model.eval().save_pretrained(run)
    processor = MLVICXImageProcessor(image_size=32, fit="crop", image_mean=0.45)
    processor.save_pretrained(run)
    names = {0: "Edema", 1: "Mass"}
    classifier = MLVICXForImageClassification.from_pretrained(run, id2label=names, label2id={"Edema": 0, "Mass": 1})
    classifier.save_pretrained(labelled)
    weights = load_file(run / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    model, classifier = model.double(), classifier.double().eval()
    images = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8)
    x = processor(list(images.numpy()))["pixel_values"]
    with torch.no_grad():
        output = model(x.double(), x.double().flip(-1))
        expected = {
            "images": images,
            "pixel_values": x,
            "pooled": model.mlvicx(x.double()).pooler_output,
            "loss": output.loss,
            "multi_level": output.multi_level_embeddings[1],
            "logits": classifier(x.double()).logits,
        }
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "expected.safetensors")
    for folder in (run, labelled):
        files = {file.name for file in folder.iterdir()}
        assert files - {"preprocessor_config.json"} == {"config.json", "model.safetensors"}  # no pickle
    assert json.loads((run / "config.json").read_text())["architectures"] == ["MLVICXForPreTraining"]
    done = run_python("-c", CHILD, run, labelled)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("change", [{"expander_dims": [48, 32]}, {"aggregation_channels": 8}])
def test_a_checkpoint_of_another_shape_is_an_error(tmp_path: Path, change: dict[str, Any]):
    MLVICXForPreTraining(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        MLVICXForPreTraining.from_pretrained(tmp_path, config=tiny_config(**change))


# -- deterministic algorithms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(8, 8), (7, 7), (14, 14), (7, 14), (30, 17), (2, 3)])
@pytest.mark.parametrize("size", [1, 4])
def test_deterministic_pooling_gives_the_same_averages_and_gradients(
    size: int, shape: tuple[int, int], layout: torch.memory_format
):
    aggregator = MultiLevelAggregator(tiny_config(aggregation_size=size), [6])
    torch.manual_seed(0)
    x = torch.randn(3, 6, *shape).contiguous(memory_format=layout).requires_grad_()
    expected = aggregator._pool(x)
    slope = torch.rand_like(expected)
    (expected_gradient,) = torch.autograd.grad(expected, x, slope)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        found = aggregator._pool(x)
        (gradient,) = torch.autograd.grad(found, x, slope)
    finally:
        torch.use_deterministic_algorithms(before)
    assert "AdaptiveAvgPool2D" not in type(found.grad_fn).__name__
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-6)
