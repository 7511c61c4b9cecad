"""Every method: training, resume, export, exact accumulation, momentum, queues, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import tiny_config, unlabelled_cache
from methods import FLAGS, SMALL, method_of, small_objective, small_views
from runs import assert_same_bits, lines, start, weights
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from mlvicx_hf import MLVICXModel
from mlvicx_hf.objectives import OBJECTIVES
from mlvicx_hf.objectives.parts import KeyQueue, follow, momentum_copy, scale_momentum
from mlvicx_hf.pretraining.accumulation import accumulate
from mlvicx_hf.pretraining.loop import train

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# By method: embeddings through which no gradient goes.
STOPPED = {"simsiam": {"projections"}, "byol": {"targets"}, "pcrl_v2": {"embeddings"}}
STOPPED["pcrl_v1"] = {"keys", "mixed_keys", "mixtures"}
STOPPED |= {key: {"keys"} for key in ("moco_v2", "inter_moco", "caid")}
# What may stay: shifts of all embeddings, which a batch normalisation cancels, so that rounding alone moves them; and
# the restoration of the scale that seed 0 does not draw in four steps.
STAYING = {"byol": ("projector.3.bias", "target_projector.3.bias"), "pcrl_v2": ("scale_restorations.1.",)}
EXACT = [name for name in SMALL if not OBJECTIVES[method_of(name)].inexact_accumulation]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unlabelled_cache(tmp_path_factory.mktemp("methods"), 32, size=40)


def flags(name: str, **options: Any) -> list[object]:
    values = {key: ",".join(map(str, v)) if isinstance(v, list) else v for key, v in (SMALL[name] | options).items()}
    words = [f"{key}={value}" for key, value in values.items()]
    given = ["--objective_options", *words] if words else []
    return ["--objective", method_of(name), "--epochs", 1, *FLAGS.get(name, []), *given]


def test_every_method_has_small_options():
    assert {method_of(name) for name in SMALL} == set(OBJECTIVES) - {"mlvicx"}


@pytest.mark.parametrize("name", SMALL)
def test_a_method_trains_and_resumes_to_the_same_bits(name: str, cache: Path, tmp_path: Path):
    words = [*flags(name), "--checkpoint_steps", 2, "--save_total_limit", 9]
    whole = start(cache, tmp_path / "whole", *words)
    before = {key: value.clone() for key, value in whole.objective.named_parameters()}
    train(whole)
    unmoved = {key for key, value in whole.objective.named_parameters() if torch.equal(value, before[key])}
    assert not [key for key in unmoved if not key.startswith(STAYING.get(name, ()))]
    assert len(lines(tmp_path / "whole")) == 4
    after = whole.objective.state_dict()

    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", tmp_path / "killed")
    resumed = start(cache, tmp_path / "killed", *words, "--resume")
    assert resumed.step == 2
    train(resumed)
    assert_same_bits(tmp_path / "killed", tmp_path / "whole")
    for key, value in resumed.objective.state_dict().items():
        assert torch.equal(value, after[key]), key

    model = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(model) is MLVICXModel
    assert not model.config.use_context
    saved = set(load_file(tmp_path / "whole" / "model.safetensors"))
    assert saved == {key.removeprefix("model.") for key in after if key.startswith("model.")}
    if type(whole.objective.model) is MLVICXModel:
        assert saved == set(model.state_dict())


def test_vicreg_is_mlvicx_without_context_and_levels(cache: Path, tmp_path: Path):
    train(start(cache, tmp_path / "vicreg", "--objective", "vicreg", "--epochs", 1))
    train(start(cache, tmp_path / "part", "--use_context", False, "--multi_level_weight", 0, "--epochs", 1))
    assert_same_bits(tmp_path / "vicreg", tmp_path / "part", "config.json")
    assert not [key for key in weights(tmp_path / "vicreg") if "multi_level" in key]


@pytest.mark.parametrize("name", SMALL)
def test_no_gradient_goes_where_it_is_stopped(name: str):
    objective = small_objective(name).double()
    views = small_views(name)
    made = objective(*views, return_loss=False)
    leaves = [{key: value.detach().requires_grad_() for key, value in side.items()} for side in made]
    loss = objective.loss(*leaves).loss
    places = [(side, key) for side in (0, 1) for key in leaves[side]]
    slopes = torch.autograd.grad(loss, [leaves[side][key] for side, key in places], allow_unused=True)
    for (_, key), slope in zip(places, slopes, strict=True):
        assert (slope is None) == (key in STOPPED.get(method_of(name), set())), key
    objective(*views).loss.backward()
    for key, value in objective.named_parameters():
        assert (value.grad is not None) == value.requires_grad, key
        assert value.grad is None or value.grad.isfinite().all()


@pytest.mark.thorough
@pytest.mark.parametrize("name", SMALL)
def test_traced_steps_equal_eager_ones(name: str):
    """What `--compile` traces on a GPU, run here without its code generation: three steps with momentum and queue."""
    torch.compiler.reset()
    eager, traced = small_objective(name).double(), small_objective(name).double()
    traced.compile(backend="aot_eager")
    for step in range(3):
        for objective in (eager, traced):
            objective.start_step(step)
            objective.zero_grad()
            objective(*small_views(name)).loss.backward()
            with torch.no_grad():
                for parameter in objective.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
            objective.update(step + 1)
    for (key, found), wanted in zip(traced.state_dict().items(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", EXACT)
def test_micro_batches_give_the_gradient_of_the_batch(name: str):
    """In evaluation mode, where batch normalisation does not depend on the batch."""
    whole, parts = small_objective(name).double().eval(), small_objective(name).double().eval()
    expected = whole(*small_views(name))
    expected.loss.backward()
    output = accumulate(Accelerator(cpu=True), parts, small_views(name), 2)
    torch.testing.assert_close(output.loss, expected.loss.detach(), rtol=1e-10, atol=1e-12)
    for (key, found), wanted in zip(parts.named_parameters(), whole.parameters(), strict=True):
        assert (found.grad is None) == (wanted.grad is None), key
        if wanted.grad is not None:
            torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-8, atol=1e-12, msg=key)


# -- momentum and queue ------------------------------------------------------------------------------------------------


def test_a_momentum_copy_after_three_steps():
    network = torch.nn.Linear(3, 2).double()
    start_weights = network.weight.detach().clone()
    copied = momentum_copy(network)
    moved: list[Tensor] = []
    for step in range(3):
        with torch.no_grad():
            network.weight.add_(step + 1)
        moved.append(network.weight.detach().clone())
        follow(copied, network, 0.9)
    expected = 0.9**3 * start_weights + 0.1 * (0.81 * moved[0] + 0.9 * moved[1] + moved[2])
    torch.testing.assert_close(copied.weight, expected, rtol=1e-14, atol=1e-14)
    assert not copied.weight.requires_grad


def test_a_momentum_copy_refines_its_maps_by_its_own_gates():
    """Also where hooks do it, of a backbone that is no list of layers."""
    torch.manual_seed(0)
    model = MLVICXModel(tiny_config(backbone="test_efficientnet", image_size=64, context_init_scale=1)).eval()
    copied, view = momentum_copy(model), torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        before = model.refined_maps(view)
        for one, other in zip(before, copied.refined_maps(view), strict=True):
            assert torch.equal(one, other)
        for weight in copied.context.parameters():
            weight.fill_(3)
        for one, now, other in zip(before, model.refined_maps(view), copied.refined_maps(view), strict=True):
            assert torch.equal(one, now)
            assert not torch.allclose(one, other)


def test_the_momentum_is_scaled_to_the_batch():
    assert scale_momentum(0.999, 64, 256) == pytest.approx(0.99975, abs=1e-7)
    scaled, published = small_objective("moco_v2"), small_objective("moco_v2", scale_momentum=False)
    assert (scaled.momentum, published.momentum) == (pytest.approx(0.9**0.5), 0.9)  # a batch of 8 for one of 16
    byol = small_objective("byol", scale_momentum=False, target_momentum=0.9)
    assert [byol.momentum(step) for step in (0, 2, 4)] == pytest.approx([0.9, 0.95, 1.0])
    assert small_objective("byol", target_momentum=0.9).momentum(2) == pytest.approx(0.95 ** (8 / 64))


@pytest.mark.parametrize(("name", "option"), [("moco_v2", "key_momentum"), ("byol", "target_momentum")])
def test_a_momentum_too_high_for_a_short_run_is_named(name: str, option: str):
    """Of four steps."""
    (note,) = small_objective(name, **{option: 0.9}, scale_momentum=False).notes
    assert note.startswith("the momentum copy forgets after 10 steps, but the run has 4, so it stays near its start")
    assert f"a lower {option} or" in note
    assert not small_objective(name, **{option: 0.7}, scale_momentum=False).notes


def test_a_queue_holds_the_newest_keys():
    queue = KeyQueue(8, 2)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(8))
    batches = [torch.full((4, 2), float(number)) for number in range(3)]
    for number, keys in enumerate(batches):
        queue.push(keys, number)
    assert torch.equal(queue.keys, torch.cat([batches[2], batches[1]]))


def test_keys_of_a_step_are_the_negatives_of_the_next():
    objective = small_objective("moco_v2", queue_size=16).double()
    before = objective.queue.keys.clone()
    keys = objective(*small_views("moco_v2"), return_loss=False)[1]["keys"]
    objective(*small_views("moco_v2"))
    assert torch.equal(objective.queue.keys, before)
    objective.update(2)
    found = objective.queue.keys
    assert torch.equal(found[:8], before[:8])  # the second batch of keys lies behind the first
    torch.testing.assert_close(found[8:], torch.nn.functional.normalize(keys, dim=1))
    assert not objective.new_keys


def test_key_networks_normalise_small_groups():
    whole, grouped = (small_objective("moco_v2", key_images=images).double() for images in (0, 3))
    view = small_views("moco_v2")[1]
    keys = grouped.make_keys(view)[0]
    assert not torch.allclose(keys, whole.make_keys(view)[0])
    expected = [small_objective("moco_v2", key_images=0).double().make_keys(part)[0] for part in view.tensor_split(3)]
    torch.testing.assert_close(keys, torch.cat(expected))


@pytest.mark.parametrize(
    ("images", "size", "groups"),
    [(64, 16, [16] * 4), (16, 16, [8, 8]), (8, 16, [4, 4]), (4, 16, [2, 2]), (3, 16, [3]), (16, 0, [16])],
)
def test_keys_never_share_the_statistics_of_all_queries_unless_asked(
    images: int, size: int, groups: list[int], monkeypatch: pytest.MonkeyPatch
):
    objective = small_objective("moco_v2", key_images=size)
    seen: list[int] = []
    refined = objective.key_model.refined_maps
    monkeypatch.setattr(objective.key_model, "refined_maps", lambda view: (seen.append(len(view)), refined(view))[1])
    objective.make_keys(torch.randn(images, 1, 32, 32))
    assert seen == groups


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queue_size": 12}, "queue_size=12 found with batch_size=8; expected a multiple of the batch"),
        ({"queue_size": 16}, "queue_size=16 found with 32 images; expected 8 or less"),
    ],
)
def test_queues_that_do_not_fit_are_refused_before_training(
    options: dict[str, int], message: str, cache: Path, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        start(cache, tmp_path / "run", *flags("moco_v2", **options))
    assert not (tmp_path / "run").exists()


# -- what is refused, and what is said ---------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--gradient_accumulation_steps", 2], ["--find_batch_size"]])
def test_micro_batches_that_would_train_another_method_are_refused(words: list[object], cache: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"found with objective=pcrl_v1; expected neither: it mixes the images"):
        start(cache, tmp_path / "run", *flags("pcrl_v1"), *words)


def test_small_views_larger_than_the_images_are_refused(cache: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="local_size=41 found with images of 40 pixels; expected 40 or less"):
        start(cache, tmp_path / "run", *flags("pcrl_v2", local_size=41))


def test_crops_are_refused_where_maps_must_lie_on_each_other(cache: Path, tmp_path: Path):
    crop = ["--crop_area", 0.2, 1]
    with pytest.raises(
        ValueError, match=r"crop_area=\(0.2, 1.0\) and flip=0 found; .*expected --crop_area 1 1 --flip 0"
    ):
        start(cache, tmp_path / "run", *flags("inter_moco"), *crop)
    start(cache, tmp_path / "run", *flags("inter_moco", aligned="false"), *crop)


def test_a_run_keeps_all_options_and_refuses_to_go_on_with_others(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run", *flags("simclr"))
    assert run.settings.model.objective_options == {"temperature": 0.5, "projection_size": 16}
    train(run)
    start(cache, tmp_path / "run", *flags("simclr", temperature="0.50"), "--resume")
    with pytest.raises(ValueError, match=r"model.objective_options was \{'temperature': 0.5.*now \{'temperature': 0.4"):
        start(cache, tmp_path / "run", *flags("simclr", temperature=0.4), "--resume")


def test_arguments_that_change_nothing_are_named(cache: Path, tmp_path: Path):
    noted = start(cache, tmp_path / "run", *flags("simclr")).notes
    assert "objective=simclr does not use expander_dims, aggregation_channels" in noted  # of the recipe smoke
    noted = start(cache, tmp_path / "run", *flags("vicreg"), "--multi_level_weight", 2).notes
    assert "objective=vicreg does not use multi_level_weight, aggregation_channels" in noted


# -- rates -------------------------------------------------------------------------------------------------------------


def rates(run: Any) -> dict[str, set[float]]:
    """Rates of the last step by the first part of a parameter's name, vectors apart."""
    names = {id(value): key for key, value in run.objective.named_parameters()}
    found: dict[str, set[float]] = {}
    for group in run.optimizer.param_groups:
        for value in group["params"]:
            kind = "vector" if value.ndim == 1 else "matrix"
            found.setdefault(f"{names[id(value)].split('.')[0]} {kind}", set()).add(group["lr"])
    return found


def test_the_predictor_of_simsiam_has_a_constant_rate(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run", *flags("simsiam"), "--optimizer", "sgd", "--warmup_epochs", 0)
    train(run)
    found, last = rates(run), run.learning_rate(3)
    assert last < run.peak_rate / 100
    assert found["predictor matrix"] == found["predictor vector"] == {run.peak_rate}
    assert found["model matrix"] == found["projector vector"] == {last}


def test_vectors_of_barlow_twins_have_a_smaller_rate(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run", *flags("barlow_twins"))
    train(run)
    found = rates(run)
    assert found["model matrix"] == found["projector matrix"] == {run.learning_rate(3)}
    assert found["model vector"] == found["projector vector"] == {0.024 * run.learning_rate(3)}
