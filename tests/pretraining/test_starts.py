"""Good weights at the start: the optimisers, the backbone's own rate, its thaw, and frozen batch normalisation."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_config
from methods import SMALL, small_objective
from runs import assert_same_bits, interrupted, pretrain, start, weights

from mlvicx_hf import MLVICXForPreTraining, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.pretraining.arguments import DataArguments, ModelArguments, PretrainingArguments
from mlvicx_hf.pretraining.loop import train
from mlvicx_hf.pretraining.model import create_objective
from mlvicx_hf.pretraining.optimizer import create_optimizer, set_learning_rate
from mlvicx_hf.pretraining.settings import BEFORE, of_early_checkpoints

OURS = ("--optimizer", "adamw", "--backbone_learning_rate_ratio", "0.5", "--backbone_thaw_epochs", "1")

CHECKPOINTS = ("--checkpoint_steps", 3, "--save_total_limit", 9)


def arguments(**values: object) -> PretrainingArguments:
    return PretrainingArguments(output_dir="", **values)


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_every_weight_is_in_one_group_and_vectors_have_no_decay(name: str):
    model = MLVICXForPreTraining(tiny_config())
    optimizer = create_optimizer(model, arguments(optimizer=name, weight_decay=0.1), model.mlvicx.backbone)
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trained)
    assert set(grouped) == set(trained)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_the_backbone_has_its_rate_and_the_rest_has_its_own():
    model = MLVICXForPreTraining(tiny_config())
    optimizer = create_optimizer(model, arguments(optimizer="sgd", momentum=0.0), model.mlvicx.backbone)
    set_learning_rate(optimizer, 0.5, backbone_ratio=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(*torch.randn(2, 4, 1, 32, 32)).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name.startswith("mlvicx.backbone") or not p.requires_grad), name
    set_learning_rate(optimizer, 0.5, backbone_ratio=0.1)
    assert {group["lr"] for group in optimizer.param_groups if group.get("of_backbone")} == {0.05}


def test_adamw_takes_one_step_as_torch_defines_it():
    model = torch.nn.Linear(3, 2)
    optimizer = create_optimizer(model, arguments(optimizer="adamw", weight_decay=0.1))
    set_learning_rate(optimizer, 0.01)
    weight = model.weight.detach().clone()
    model(torch.randn(5, 3)).sum().backward()
    assert model.weight.grad is not None
    optimizer.step()
    # The first step of Adam is the rate times the sign of the gradient; decay shrinks the weight before.
    torch.testing.assert_close(model.weight, weight * (1 - 0.01 * 0.1) - 0.01 * model.weight.grad.sign())


def test_the_backbones_rate_rises_over_the_thaw(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run", *OURS, "--epochs", 3)
    steps = len(run.batches)
    ratios = [run.backbone_ratio(step) for step in range(3 * steps)]
    assert ratios == [pytest.approx(0.5 * min(1, step / steps)) for step in range(3 * steps)]
    assert ratios[0] == 0


def test_a_run_with_adamw_and_a_thaw_resumes_to_the_bit(cache: Path, tmp_path: Path):
    whole = pretrain(cache, tmp_path / "whole", *OURS, *CHECKPOINTS)
    cut = interrupted(whole, tmp_path / "cut", 3)
    assert_same_bits(pretrain(cache, cut, *OURS, *CHECKPOINTS, "--resume"), whole)


def test_frozen_batch_normalisation_stays_as_it_starts(cache: Path, tmp_path: Path):
    encoder = MLVICXModel(tiny_config(use_context=False))
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if ".bn" in name and tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    encoder.save_pretrained(tmp_path / "start")
    MLVICXImageProcessor(32).save_pretrained(tmp_path / "start")
    flags = ("--init_from", tmp_path / "start", "--use_context", False, "--freeze_batch_norm", True)
    whole = pretrain(cache, tmp_path / "run", *flags, *CHECKPOINTS)
    found = weights(whole)
    moved = 0
    for name, tensor in encoder.state_dict().items():
        norm = any(part in name for part in (".bn", "running_", "num_batches"))
        same = torch.equal(found[f"mlvicx.{name}"], tensor)
        assert same or not norm, name
        moved += not same
    assert moved > 3  # the kernels have learned
    cut = interrupted(whole, tmp_path / "cut", 3)
    assert_same_bits(pretrain(cache, cut, *flags, *CHECKPOINTS, "--resume"), whole)


@pytest.mark.parametrize(("name", "copied"), [("byol", "target_model"), ("moco_v2", "key_model")])
def test_frozen_batch_normalisation_is_frozen_in_a_momentum_copy_as_well(
    name: str, copied: str, cache: Path, tmp_path: Path
):
    options = [f"{key}={value}" for key, value in SMALL[name].items()]
    flags = ("--objective", name, "--objective_options", *options, "--freeze_batch_norm")
    with pytest.raises(UserError, match="freeze_batch_norm found without init_from; expected weights to start from"):
        start(cache, tmp_path / "run", *flags)
    MLVICXModel(tiny_config(use_context=False)).save_pretrained(tmp_path / "start")
    MLVICXImageProcessor(32).save_pretrained(tmp_path / "start")
    run = start(cache, tmp_path / "run", *flags, "--init_from", tmp_path / "start")
    train(run)
    found = {key: value.any().item() for key, value in run.objective.state_dict().items() if "running_mean" in key}
    assert {key for key, moved in found.items() if not moved} == {key for key in found if "backbone" in key}
    assert any(key.startswith(copied) for key in found)


def test_the_run_says_where_it_started(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    MLVICXModel(tiny_config(use_context=False)).save_pretrained(tmp_path / "start")
    MLVICXImageProcessor(32, 1, 0.4, 0.3).save_pretrained(tmp_path / "start")
    output = pretrain(cache, tmp_path / "run", "--init_from", tmp_path / "start")
    assert "start, which has no context bottlenecks: they start anew" in capsys.readouterr().out
    saved = json.loads((output / "preprocessor_config.json").read_text())
    assert (saved["image_mean"], saved["image_std"]) == (0.4, 0.3)


def test_a_run_resumes_although_its_start_is_gone(cache: Path, tmp_path: Path):
    MLVICXModel(tiny_config()).save_pretrained(tmp_path / "start")
    MLVICXImageProcessor(32, 1, 0.4, 0.3).save_pretrained(tmp_path / "start")
    flags = ("--init_from", tmp_path / "start", *CHECKPOINTS)
    whole = pretrain(cache, tmp_path / "whole", *flags)
    cut = interrupted(whole, tmp_path / "cut", 3)
    shutil.rmtree(tmp_path / "start")
    assert_same_bits(pretrain(cache, cut, *flags, "--resume"), whole)


def test_a_checkpoint_from_before_these_options_still_resumes():
    """Options that came later have as default what every run did before."""
    sections = {"model": ModelArguments(), "data": DataArguments(dataset=""), "training": arguments()}
    for name, before in BEFORE.items():
        section, _, field = name.partition(".")
        assert getattr(sections[section], field) == before, name
    assert of_early_checkpoints({}, {}) == (BEFORE, {})
    assert of_early_checkpoints({"model.context_placement": "taps"}, {})[0]["model.context_placement"] == "taps"


def test_gates_go_on_with_the_settings_that_they_were_trained_with(cache: Path, tmp_path: Path):
    MLVICXModel(tiny_config(context_gain=2.0)).save_pretrained(tmp_path / "start")
    MLVICXImageProcessor(32).save_pretrained(tmp_path / "start")
    earlier = ("--init_from", tmp_path / "start")
    with pytest.raises(ValueError, match=r"context_gain=1\.0 found; expected 2\.0, as the gates of init_from="):
        start(cache, tmp_path / "run", *earlier)
    with pytest.raises(ValueError, match="context_placement=taps found; expected between, as the gates"):
        start(cache, tmp_path / "run", *earlier, "--context_gain", 2, "--context_placement", "taps")
    assert not (tmp_path / "run").exists()
    start(cache, tmp_path / "run", *earlier, "--context_gain", 2)
    plain = start(cache, tmp_path / "plain", *earlier, "--use_context", False)
    assert any("start, without its context bottlenecks (" in note for note in plain.notes)


def test_gates_behind_the_levels_go_on_where_the_backbone_allows_no_others(tmp_path: Path):
    arguments = ModelArguments(backbone="hrnet_w18_small", image_size=32, expander_dims=[8], aggregation_size=1)
    earlier = create_objective(arguments).model
    assert earlier.config.context_placement == "taps"
    earlier.save_pretrained(tmp_path / "start")
    again = create_objective(replace(arguments, init_from=str(tmp_path / "start"))).model.state_dict()
    assert all(torch.equal(weight, again[name]) for name, weight in earlier.state_dict().items() if "mlvicx." in name)


def test_no_weight_is_left_without_a_gradient(cache: Path, tmp_path: Path):
    message = r"\d+ weights without a gradient found, such as model\..*; expected a loss that reaches all of them"
    with pytest.raises(ValueError, match=message):
        start(cache, tmp_path / "run", "--global_weight", 0, "--aggregation_levels", 0, 1)
    with pytest.raises(ValueError, match=message):
        start(cache, tmp_path / "run", "--objective", "vicreg", "--use_context", "--context_placement", "taps")
    assert not (tmp_path / "run").exists()


def test_nothing_in_a_backbone_draws_by_chance(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run", "--backbone", "test_vit_relpos", "--image_size", 32)
    assert any("dropout and stochastic depth of 9 layers are off" in note for note in run.notes)
    view = torch.randn(4, 1, 32, 32)
    one, two = (run.objective.train().embed(view) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_only_lars_lets_the_vectors_of_barlow_twins_learn_slowly():
    objective = small_objective("barlow_twins")
    for name, ratios in (("lars", {1.0, objective.options.vector_rate_ratio}), ("adamw", {1.0})):
        optimizer = create_optimizer(objective, arguments(optimizer=name), own_rates=objective.own_rates())
        assert {group.get("rate_ratio", 1.0) for group in optimizer.param_groups if group["params"]} == ratios


def test_a_last_step_that_breaks_the_weights_saves_nothing(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run")
    with torch.no_grad():
        next(run.objective.model.parameters()).view(-1)[0] = torch.nan
    with pytest.raises(FloatingPointError, match="is not finite after step 0; expected finite weights"):
        run.save_checkpoint()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
