"""The pretraining loop: order, rate, optimiser, starting weights, files, resume, and what it refuses."""

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers import make_cache, tiny_config, unlabelled_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs import assert_same_bits, interrupted, lines, pretrain, start, weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining

from mlvicx_hf import MLVICXForPreTraining, MLVICXModel
from mlvicx_hf.commands.pretrain import parse_pretraining
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.reading.sampling import EpochBatches, PretrainingImages, image_of
from mlvicx_hf.pretraining.arguments import ModelArguments, PretrainingArguments
from mlvicx_hf.pretraining.checkpoints import Checkpoints
from mlvicx_hf.pretraining.curves import plot_curves
from mlvicx_hf.pretraining.loop import train
from mlvicx_hf.pretraining.model import create_objective
from mlvicx_hf.pretraining.optimizer import create_optimizer, learning_rate, set_learning_rate
from mlvicx_hf.pretraining.views import TwoViewAugmentation, view_draws

TINY = ModelArguments(backbone="test_resnet", image_size=32, expander_dims=[32, 32], aggregation_channels=16)


def create_model(arguments: ModelArguments) -> Any:
    return create_objective(arguments).model


# -- order -------------------------------------------------------------------------------------------------------------


def epoch_of(batches: EpochBatches, epoch: int, first_step: int = 0) -> list[list[int]]:
    batches.start_at(epoch, first_step)
    return list(batches)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 60), st.integers(0, 2**31), st.integers(0, 300))
def test_ranks_share_the_order_of_one_process(ranks: int, share: int, more: int, seed: int, epoch: int):
    batch = max(2, ranks * share)
    batch += -batch % ranks
    images = batch + more
    single = epoch_of(EpochBatches(images, batch, seed), epoch)
    parts = [epoch_of(EpochBatches(images, batch, seed, rank, ranks), epoch) for rank in range(ranks)]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == single
    seen = [index for step in single for index in step]
    assert len(seen) == len(set(seen)) == images // batch * batch
    assert set(seen) <= set(range(images))
    assert all(len(step) == batch for step in single)
    assert len(single) == len(EpochBatches(images, batch, seed))


def test_order_depends_on_seed_and_epoch_and_can_begin_anywhere():
    batches = EpochBatches(50, 8, seed=3)
    first = epoch_of(batches, 0)
    assert epoch_of(batches, 0) == first
    assert epoch_of(EpochBatches(50, 8, seed=3), 0) == first
    assert epoch_of(batches, 1) != first
    assert epoch_of(EpochBatches(50, 8, seed=4), 0) != first
    assert epoch_of(batches, 0, 4) == first[4:]
    counts = np.bincount([i for epoch in range(200) for step in epoch_of(batches, epoch) for i in step], minlength=50)
    assert counts.min() > 170  # of 192 expected: no image is left out for good


@pytest.mark.parametrize(
    ("images", "batch", "processes", "message"),
    [
        (7, 8, 1, "batch_size=8 found; expected at most 7"),
        (40, 9, 2, "batch_size=9 found; expected a multiple of the 2 processes"),
        (40, 1, 1, "batch_size=1 found; variance and covariance need at least 2"),
    ],
)
def test_batches_that_do_not_fit_are_refused(images: int, batch: int, processes: int, message: str):
    with pytest.raises(ValueError, match=message):
        EpochBatches(images, batch, 0, 0, processes)


def test_images_come_as_they_are_in_the_cache(cache: Path):
    split = load_cache(cache).datasets["train"]
    images = PretrainingImages(split)
    assert len(images) == 44
    pixels, index = images[5]
    assert (pixels.dtype, tuple(pixels.shape), index) == (torch.uint8, (1, 32, 32), 5)
    assert np.array_equal(pixels[0].numpy(), np.asarray(split[5]["image"]))


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([1, 2, 3, 4, 6]), st.integers(0, 5), st.integers(0, 9), st.booleans())
def test_processes_that_go_on_inside_an_epoch_share_the_order_of_one(
    ranks: int, first_step: int, epoch: int, balanced: bool
):
    patients = [f"p{number % 7}" for number in range(80)] if balanced else None
    whole = epoch_of(EpochBatches(80, 12, 3, patients=patients), epoch)
    parts = [epoch_of(EpochBatches(80, 12, 3, rank, ranks, patients), epoch, first_step) for rank in range(ranks)]
    assert [list(chain(*step)) for step in zip(*parts, strict=True)] == whole[first_step:]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_images_and_views_are_those_of_one_process(cache: Path, ranks: int, workers: int):
    """Of global batches of 8 from the third one on, whoever decodes the images and makes the views."""
    images = PretrainingImages(load_cache(cache).datasets["train"])

    def views(rank: int, ranks: int, workers: int, first_step: int) -> list[Tensor]:
        batches = EpochBatches(44, 8, 5, rank, ranks)
        batches.start_at(1, first_step)
        loader = DataLoader(images, batch_sampler=batches, num_workers=workers)
        augment = TwoViewAugmentation(image_size=32)
        return [torch.stack(augment(pixels, view_draws(5, 1, numbers.numpy()))) for pixels, numbers in loader]

    torch.set_num_threads(1)
    whole = views(0, 1, 0, 0)
    parts = [views(rank, ranks, workers, 2) for rank in range(ranks)]
    assert len(whole) == 5
    for expected, *found in zip(whole[2:], *parts, strict=True):
        assert torch.equal(torch.cat(found, 1), expected)


# -- rate and optimiser ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("warmup", "total"), [(10, 100), (0, 50), (1, 3), (5, 7)])
def test_the_rate_reaches_peak_and_floor_exactly(warmup: int, total: int):
    rates = [learning_rate(step, 0.8, warmup, total, 0.001) for step in range(total)]
    assert max(rates) == 0.8
    assert rates[warmup] == 0.8
    assert rates[-1] == pytest.approx(0.8 * 0.001, rel=1e-12)
    assert rates[:warmup] == pytest.approx([0.8 * (step + 1) / warmup for step in range(warmup)])
    assert all(a > b for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    middle = warmup + (total - 1 - warmup) / 2
    if middle == int(middle) and middle > warmup:
        assert rates[int(middle)] == pytest.approx(0.8 * 1.001 / 2)


def test_lars_equals_its_definition():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 3, bias=False)).double()
    nn.init.uniform_(model[1].bias)
    arguments = PretrainingArguments(output_dir="", weight_decay=0.01, momentum=0.8, trust_coefficient=0.02)
    optimizer = create_optimizer(model, arguments)
    matrices, vectors = (group["params"] for group in optimizer.param_groups)
    assert all(p.ndim > 1 for p in matrices)
    assert all(p.ndim == 1 for p in vectors)
    assert len(matrices) + len(vectors) == len(list(model.parameters()))
    expected = {p: p.detach().clone() for p in model.parameters()}
    momentum = {p: torch.zeros_like(p) for p in model.parameters()}
    for step in range(4):
        rate = 0.3 / (step + 1)
        set_learning_rate(optimizer, rate)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        for p, value in expected.items():
            gradient = p.grad.clone()
            if p.ndim > 1:
                gradient += 0.01 * value
                trust = 0.02 * value.norm() / (p.grad.norm() + 0.01 * value.norm())
                gradient *= trust
            momentum[p] = 0.8 * momentum[p] + gradient
            value -= rate * momentum[p]
        optimizer.step()
        for p, value in expected.items():
            torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-9)


def test_matrices_adapt_even_without_decay():
    model = nn.Linear(4, 4, bias=False)
    optimizer = create_optimizer(model, PretrainingArguments(output_dir="", weight_decay=0.0))
    set_learning_rate(optimizer, 1.0)
    before = model.weight.detach().clone()
    model.weight.grad = 1e3 * torch.randn(4, 4)
    optimizer.step()
    moved = (model.weight.detach() - before).norm() / before.norm()
    assert moved.item() == pytest.approx(0.001, rel=1e-3)  # the trust coefficient, whatever the gradient's size


# -- where the weights start -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def colour_weights() -> dict[str, Tensor]:
    torch.manual_seed(11)
    return timm.create_model("test_resnet", in_chans=3).state_dict()


def write(path: Path, state: dict[str, Tensor]) -> str:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("channels", [1, 3])
def test_start_from_a_file_of_timm_weights(tmp_path: Path, colour_weights: Any, suffix: str, channels: int):
    source = write(tmp_path / f"weights{suffix}", colour_weights)
    model = create_model(replace(TINY, num_channels=channels, init_from=source))
    state = model.mlvicx.backbone.state_dict()
    first = "conv1.0.weight"
    for name, tensor in state.items():
        expected = colour_weights[name]
        if name == first and channels == 1:
            expected = expected.sum(1, keepdim=True)  # a grey image through it is what its RGB copy was
            torch.testing.assert_close(tensor, expected)
        else:
            assert torch.equal(tensor, expected), name
    assert model(*torch.randn(2, 4, channels, 32, 32)).loss.isfinite()


def test_a_grey_image_through_folded_weights_is_its_colour_copy(tmp_path: Path, colour_weights: Any):
    source = write(tmp_path / "weights.safetensors", colour_weights)
    gray, colour = (create_model(replace(TINY, num_channels=c, init_from=source, use_context=False)) for c in (1, 3))
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        one = gray.mlvicx.eval()(x).pooler_output
        torch.testing.assert_close(one, colour.mlvicx.eval()(x.expand(-1, 3, -1, -1)).pooler_output)


@pytest.mark.parametrize("case", ["other_architecture", "a_layer_missing", "a_layer_more", "other_width"])
def test_a_file_of_weights_that_does_not_fit_is_an_error(tmp_path: Path, colour_weights: Any, case: str):
    state = {
        "other_architecture": lambda: timm.create_model("test_convnext").state_dict(),
        "a_layer_missing": lambda: {k: v for k, v in colour_weights.items() if not k.startswith("layer3.")},
        "a_layer_more": lambda: colour_weights | {"layer3.7.conv1.weight": torch.zeros(3)},
        "other_width": lambda: {
            k: torch.zeros(7, *v.shape[1:]) if k == "layer1.0.conv1.weight" else v for k, v in colour_weights.items()
        },
    }[case]()
    source = write(tmp_path / "weights.safetensors", state)
    with pytest.raises(ValueError, match=r"weights\.safetensors"):
        create_model(replace(TINY, init_from=source))


def test_a_file_of_weights_that_is_absent_is_an_error(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        create_model(replace(TINY, init_from=str(tmp_path / "absent.pth")))
    with pytest.raises(FileNotFoundError, match="expected a folder that exists"):
        create_model(replace(TINY, init_from=str(tmp_path / "absent")))


def test_start_from_an_earlier_run(finished: Path):
    model = create_model(replace(TINY, init_from=str(finished)))
    assert model.state_dict().keys() == weights(finished).keys()
    for name, tensor in weights(finished).items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_start_from_an_encoder_alone(tmp_path: Path):
    encoder = MLVICXModel(tiny_config())
    encoder.save_pretrained(tmp_path)
    model = create_model(replace(TINY, init_from=str(tmp_path)))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model.mlvicx.state_dict()[name], tensor), name
    assert model(*torch.randn(2, 4, 1, 32, 32)).loss.isfinite()


@pytest.mark.parametrize(
    ("then", "now", "note"),
    [
        ({}, {}, ""),
        (
            {"expander_final_norm": True},
            {"expander_final_norm": False},
            "; 10 weights of the earlier heads are left out",
        ),
        ({"expander_final_norm": False}, {"expander_final_norm": True}, "; 10 weights of its heads are new, such as "),
        ({"global_weight": 0.0}, {}, " weights of its heads are new, such as global_expander"),
        ({}, {"global_weight": 0.0}, " weights of the earlier heads are left out, such as global_expander"),
        ({"expander_dims": [16, 16, 16]}, {"expander_dims": [16, 16]}, " of the earlier heads are left out"),
    ],
)
def test_heads_that_are_new_or_left_out_are_said(
    tmp_path: Path,
    then: dict[str, Any],
    now: dict[str, Any],
    note: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    create_model(replace(TINY, **then)).save_pretrained(tmp_path)
    found = create_objective(replace(TINY, **now, init_from=str(tmp_path))).notes[0]
    assert found == f"started from {tmp_path}" if not note else note in found
    assert caplog.messages == []  # of transformers, which would list all layers


def test_an_aggregation_of_other_levels_is_not_taken_for_the_same(tmp_path: Path):
    create_model(replace(TINY, aggregation_levels=[0, 1])).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"aggregation_levels=\[1, 0\] found; expected \[0, 1\], as the heads of"):
        create_model(replace(TINY, aggregation_levels=[1, 0], init_from=str(tmp_path)))
    MLVICXModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "encoder")
    create_model(replace(TINY, aggregation_levels=[1, 0], init_from=str(tmp_path / "encoder")))


def test_a_shallower_earlier_model_is_not_enough(tmp_path: Path):
    MLVICXForPreTraining(tiny_config(backbone="resnet18")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 96 weights of this encoder, .*expected weights of a resnet34, or"):
        create_model(replace(TINY, init_from=str(tmp_path), backbone="resnet34"))


def test_a_deeper_earlier_model_is_not_cut(tmp_path: Path):
    MLVICXForPreTraining(tiny_config(backbone="resnet34")).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds 96 weights that this encoder lacks, .*expected weights of a resnet18"):
        create_model(replace(TINY, init_from=str(tmp_path), backbone="resnet18"))


@pytest.mark.parametrize(
    "change",
    [{"backbone": "resnet10t"}, {"num_channels": 3}, {"context_reduction": 2}],
)
def test_an_earlier_model_that_does_not_fit_is_an_error(tmp_path: Path, change: dict[str, Any]):
    MLVICXForPreTraining(tiny_config(aggregation_size=4)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init_from="):
        create_model(replace(TINY, init_from=str(tmp_path), **change))


def test_expanders_of_another_width_start_anew_and_the_run_says_so(tmp_path: Path):
    earlier = MLVICXForPreTraining(tiny_config())
    earlier.save_pretrained(tmp_path)
    objective = create_objective(replace(TINY, init_from=str(tmp_path), expander_dims=[48, 32]))
    (note,) = objective.notes
    assert re.fullmatch(rf"started from {tmp_path}; \d+ weights of its heads have another shape and start anew.*", note)
    for name, tensor in earlier.mlvicx.state_dict().items():
        assert torch.equal(objective.encoder.state_dict()[name], tensor), name


def test_a_start_in_half_precision_is_trained_in_whole(tmp_path: Path):
    MLVICXModel(tiny_config()).to(torch.bfloat16).save_pretrained(tmp_path)
    model = create_model(replace(TINY, init_from=str(tmp_path)))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model(*torch.randn(2, 4, 1, 32, 32)).loss.isfinite()


def test_a_file_of_a_saved_model_is_refused(finished: Path):
    """Its gates and the constants of its images would be lost."""
    with pytest.raises(UserError, match=r"a file of a saved model found; expected its folder, .*run"):
        create_objective(replace(TINY, init_from=str(finished / "model.safetensors")))


def test_tensors_beside_the_network_of_a_file_are_named(tmp_path: Path, colour_weights: Any):
    state = {f"backbone.{name}": tensor for name, tensor in colour_weights.items()}
    source = write(tmp_path / "weights.pth", state | {"projector.0.weight": torch.zeros(2)})
    (note,) = create_objective(replace(TINY, init_from=source)).notes
    assert "left out: " in note
    assert "projector.0.weight" in note


def test_an_encoder_without_context_gets_new_gates_and_the_run_says_so(tmp_path: Path):
    encoder = MLVICXModel(tiny_config(use_context=False))
    encoder.save_pretrained(tmp_path)
    objective = create_objective(replace(TINY, init_from=str(tmp_path)))
    assert objective.notes == [f"started from {tmp_path}, which has no context bottlenecks: they start anew"]
    state = objective.encoder.state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(state[name], tensor), name


def test_an_encoder_with_some_gates_alone_is_an_error(tmp_path: Path):
    MLVICXModel(tiny_config()).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if not k.startswith("context.0")}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks 2 weights of this encoder, such as mlvicx\.context"):
        create_model(replace(TINY, init_from=str(tmp_path)))


# -- a run and its files -----------------------------------------------------------------------------------------------


@pytest.mark.lowest
def test_a_run_ends_with_a_model_that_loads(finished: Path):
    names = {file.name for file in finished.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "run.json", "metrics.jsonl"} <= names
    assert not any(name.startswith(".") or name == "final" for name in names)
    encoder = AutoModel.from_pretrained(finished)
    processor = AutoImageProcessor.from_pretrained(finished)
    assert (processor.image_size, processor.num_channels, processor.fit) == (32, 1, "pad")
    pooled = encoder(**processor(np.zeros((50, 40), np.uint8))).pooler_output
    assert pooled.isfinite().all()
    pretraining = AutoModelForPreTraining.from_pretrained(finished)
    torch.manual_seed(0)  # of the smoke recipe
    start = create_model(TINY).state_dict()
    moved = [n for n, p in pretraining.named_parameters() if not torch.equal(p, start[n])]
    assert len(moved) == len(list(pretraining.parameters()))
    assert int(pretraining.state_dict()["mlvicx.backbone.conv1.1.num_batches_tracked"]) == 2 * 10  # two views a step


def test_metrics_of_a_run(finished: Path):
    rows = lines(finished)
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert [row["epoch"] for row in rows] == [0] * 5 + [1] * 5
    assert [row["images"] for row in rows] == [8 * step for step in range(1, 11)]
    peak = 1.6 * 8 / 256
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [learning_rate(step, peak, 5, 10, 0.001) for step in range(10)]
    )
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        for branch in ("global", "multi_level"):
            terms = 25 * row[f"{branch}_invariance"] + 25 * row[f"{branch}_variance"] + row[f"{branch}_covariance"]
            assert row[f"{branch}_loss"] == pytest.approx(terms, rel=1e-4)
            assert 1 <= row[f"{branch}_embeddings_rankme"] <= 8.01
        assert row["loss"] == pytest.approx(row["global_loss"] + row["multi_level_loss"], rel=1e-5)


def test_what_made_a_run_is_written_down(finished: Path, cache: Path):
    run = json.loads((finished / "run.json").read_text())
    manifest = load_cache(cache).manifest
    assert run["data"]["data_hash"] == manifest["data_hash"]
    assert run["data"]["images"] == 44
    assert run["model"]["backbone"] == "test_resnet"
    assert run["training"]["base_learning_rate"] == 1.6
    assert run["num_processes"] == 1
    assert run["synthetic"] is False
    assert run["code"]["torch"] == torch.__version__


def test_a_resumed_run_keeps_who_made_its_parts(finished: Path, cache: Path, tmp_path: Path):
    output = interrupted(finished, tmp_path / "run", 5)
    file = output / "run.json"
    first = json.loads((finished / "run.json").read_text())
    assert "earlier" not in first
    other = {"mlvicx_hf": "0.1.0", "commit": "1" * 40}
    file.write_text(json.dumps(first | {"code": other}))
    pretrain(cache, output, "--resume", "--checkpoint_steps", 1, "--save_total_limit", 20)
    found = json.loads(file.read_text())
    assert found["earlier"] == [{"until_step": 5, "code": other, "hardware": first["hardware"]}]
    assert found["code"] == first["code"]
    pretrain(cache, output, "--resume", "--checkpoint_steps", 1, "--save_total_limit", 20)
    assert json.loads(file.read_text())["earlier"] == found["earlier"]


def test_arguments_that_wait_for_another_one_are_named(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    words = [
        "--optimizer",
        "adamw",
        "--momentum",
        0.5,
        "--shuffle_buffer",
        7,
        "--image_size",
        48,
        "--use_context",
        "false",
    ]
    words += ["--torch_compile_mode", "max-autotune", "--context_gain", 2, "--context_placement", "taps"]
    words += ["--multi_level_weight", 0, "--aggregation_size", 2, "--aggregation_resize", 64, "--cache_size", 48]
    words += ["--jitter", 0, "--brightness", 0.9]
    pretrain(cache, tmp_path / "run", *words)
    said = capsys.readouterr().out
    for note in (
        "momentum: without effect, since it needs optimizer lars or sgd",
        "shuffle_buffer: without effect, since it needs streaming",
        "torch_compile_mode: without effect, since it needs torch_compile",
        "context_gain, context_placement: without effect, since it needs use_context",
        "aggregation_size, aggregation_channels, aggregation_resize: without effect, since it needs multi_level_weight",
        "cache_size: without effect, since it needs streaming of other data than a cache",
        "brightness: without effect, since it needs jitter",
        "views of 48 px are made of squares of 32 px: none is sharp",
    ):
        assert note in said


def test_memory_that_a_step_exceeds_is_an_error_with_a_way_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def estimate(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("mlvicx_hf.pretraining.memory.Trial.estimate", estimate)
    with pytest.raises(UserError, match=r"batch_size=8 in 1 micro-batch.*, or find_batch_size: CUDA out of memory"):
        start(cache, tmp_path / "run")


def test_checkpoints_are_limited_and_whole(finished: Path):
    assert {path.name for path in finished.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in range(2, 11)}
    for path in finished.glob("checkpoint-*"):
        names = {file.name for file in path.iterdir()}
        assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "optimizer.pt", "state.json"}
        assert json.loads((path / "state.json").read_text())["step"] == int(path.name.split("-")[1])
    file = "model.safetensors"
    assert (finished / file).read_bytes() == (finished / "checkpoint-10" / file).read_bytes()


def test_images_that_an_epoch_leaves_out_are_counted(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pretrain(cache, tmp_path / "some", "--epochs", 1, "--gradient_accumulation_steps", 1)
    said = "an epoch leaves out 4 of 44 images, other ones each time"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    pretrain(cache, tmp_path / "none", "--epochs", 1, "--batch_size", 22)
    assert "an epoch leaves out" not in capsys.readouterr().out


def test_another_precision_of_the_launcher_is_said(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    said = "mixed_precision is no; the launcher's bf16 is not used"
    for precision, count in (("no", 1), ("bf16", 0)):
        AcceleratorState._reset_state(reset_partial_state=True)
        words = ["--epochs", 1, "--batch_size", 44, "--mixed_precision", precision]
        pretrain(cache, tmp_path / precision, *words)
        assert capsys.readouterr().out.splitlines().count(said) == count
    AcceleratorState._reset_state(reset_partial_state=True)


def test_recomputed_maps_end_in_the_same_weights(cache: Path, tmp_path: Path):
    words = ["--epochs", 1, "--gradient_accumulation_steps", 1]
    files = []
    for name, more in (("kept", ()), ("recomputed", ("--gradient_checkpointing", "True"))):
        pretrain(cache, tmp_path / name, *words, *more)
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_warm_up_longer_than_the_run_is_said(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    steps = ["--epochs", 1, "--batch_size", 22]  # two steps
    pretrain(cache, tmp_path / "long", *steps, "--warmup_epochs", 4)
    said = "warm-up of 8 steps (warmup_epochs 4), but the run has 2: the rate only rises, to 25% of its peak"
    assert capsys.readouterr().out.splitlines().count(said) == 1
    pretrain(cache, tmp_path / "short", *steps, "--warmup_epochs", 0.5)
    assert "warm-up of" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["--torch_compile", "--compile"])
def test_two_names_of_compiling(cache: Path, name: str):
    words = ["--recipe", "smoke", "--dataset", str(cache), "--output_dir", "run"]
    assert parse_pretraining([*words, name])[2].torch_compile
    assert not parse_pretraining(words)[2].torch_compile


def test_compiling_is_refused_on_the_cpu(cache: Path, tmp_path: Path):
    with pytest.raises(UserError, match="torch_compile found on the CPU; expected a GPU"):
        start(cache, tmp_path / "run", "--compile")


def test_logging_every_few_steps_and_at_the_end(cache: Path, tmp_path: Path):
    pretrain(cache, tmp_path / "run", "--logging_steps", 4)
    assert [row["step"] for row in lines(tmp_path / "run")] == [4, 8, 10]


@pytest.mark.parametrize("workers", [2])
def test_the_number_of_workers_changes_no_bit(finished: Path, cache: Path, tmp_path: Path, workers: int):
    pretrain(cache, tmp_path / "run", "--num_workers", workers)
    assert_same_bits(tmp_path / "run", finished)


def test_another_seed_is_another_run(finished: Path, cache: Path, tmp_path: Path):
    pretrain(cache, tmp_path / "run", "--seed", 1)
    one, other = weights(tmp_path / "run"), weights(finished)
    assert not torch.equal(one["mlvicx.backbone.conv1.0.weight"], other["mlvicx.backbone.conv1.0.weight"])


def test_only_the_first_images(cache: Path, tmp_path: Path):
    run = start(cache, tmp_path / "run", "--max_train_samples", 17)
    assert run.total_steps == 2 * 2
    assert run.settings.description()["data"]["images"] == 17


@pytest.mark.parametrize("branch", ["global", "multi_level"])
def test_a_branch_can_be_left_out(cache: Path, tmp_path: Path, branch: str):
    output = pretrain(cache, tmp_path / "run", f"--{branch}_weight", 0, "--epochs", 1)
    assert not any(key.startswith(branch) for row in lines(output) for key in row)
    other = "multi_level" if branch == "global" else "global"
    assert all(f"{other}_embeddings_rankme" in row for row in lines(output))


def test_bfloat16(cache: Path, tmp_path: Path):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is fixed once a process
    try:
        output = pretrain(cache, tmp_path / "run", "--mixed_precision", "bf16", "--epochs", 1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights(output).values())
    assert len(lines(output)) == 5


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)  # the precision is fixed once a process
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
def test_float16_is_refused_on_the_cpu(cache: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="mixed_precision='fp16' found on the CPU; expected no or bf16 there"):
        start(cache, tmp_path / "run", "--mixed_precision", "fp16")
    assert not (tmp_path / "run").exists()


class Float16Accelerator(Accelerator):
    """What Accelerate does on GPUs, on the CPU: autocast to float16, and a scaler."""

    scale = 1024.0

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.state._mixed_precision, self.native_amp = "fp16", True
        self.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_float16_with_scaled_gradients(
    cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int
):
    monkeypatch.setattr("mlvicx_hf.pretraining.setup.Accelerator", Float16Accelerator)
    flags = ("--gradient_accumulation_steps", micro_batches, "--checkpoint_steps", 3, "--epochs", 1)
    run = start(cache, tmp_path / "run", *flags)
    output = train(run)
    assert run.accelerator.scaler.get_scale() == 1024  # no step overflowed
    losses = [row["loss"] for row in lines(output)]
    assert all(map(math.isfinite, losses))
    if micro_batches == 1:
        assert losses[0] == pytest.approx(lines(finished)[0]["loss"], rel=0.01)
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in weights(output).values())
    again = interrupted(output, tmp_path / "again", 3)
    AcceleratorState._reset_state(reset_partial_state=True)
    pretrain(cache, again, *flags, "--resume")
    assert_same_bits(again, output)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("micro_batches", [1, pytest.param(2, marks=pytest.mark.thorough)])
def test_a_step_whose_scaled_gradients_overflow_is_skipped_and_the_run_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, micro_batches: int
):
    monkeypatch.setattr(Float16Accelerator, "scale", 2.0**14)  # too much for float16
    monkeypatch.setattr("mlvicx_hf.pretraining.setup.Accelerator", Float16Accelerator)
    run = start(cache, tmp_path / "run", "--gradient_accumulation_steps", micro_batches, "--epochs", 1)
    before = {name: p.detach().clone() for name, p in run.objective.named_parameters()}
    skipped, scales, unmoved = [], [], []

    def look(step: int) -> None:
        skipped.append(run.accelerator.optimizer_step_was_skipped)
        scales.append(run.accelerator.scaler.get_scale())
        unmoved.append(sum(torch.equal(p, before[name]) for name, p in run.objective.named_parameters()))

    monkeypatch.setattr(run.objective, "update", look)
    output = train(run)
    assert all(math.isfinite(row["loss"]) for row in lines(output))
    assert (skipped[0], scales[0], unmoved[0]) == (True, 2.0**13, len(before))
    assert (skipped[-1], unmoved[-1]) == (False, 0)


# -- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [2, pytest.param(5, marks=pytest.mark.lowest), 9])
def test_resumed_is_the_same_run(finished: Path, cache: Path, tmp_path: Path, step: int):
    """Inside and between epochs: no line of metrics comes twice, none is lost."""
    output = interrupted(finished, tmp_path / "run", step)
    resumed = start(cache, output, "--resume", "--checkpoint_steps", 3)
    assert resumed.step == step
    train(resumed)
    assert_same_bits(output, finished)
    assert not (output / ".checkpoint-10.tmp").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_part_of_an_epoch_ends_the_run_and_is_resumed(cache: Path, tmp_path: Path, workers: int):
    words = ["--epochs", 1.6, "--num_workers", workers, "--checkpoint_steps", 6]
    whole = pretrain(cache, tmp_path / "whole", *words)
    assert [row["epoch"] for row in lines(whole)] == [0] * 5 + [1] * 3
    assert lines(whole)[-1]["learning_rate"] == pytest.approx(learning_rate(7, 1.6 * 8 / 256, 5, 8, 0.001))
    output = interrupted(whole, tmp_path / "run", 6)
    pretrain(cache, output, "--resume", *words)
    assert_same_bits(output, whole)
    pretrain(cache, output, "--resume", *words)
    assert_same_bits(output, whole)


def test_resuming_a_finished_run_changes_nothing(finished: Path, cache: Path, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    pretrain(cache, output, "--resume")
    assert_same_bits(output, finished)


@pytest.mark.parametrize("exists", [False, True])
def test_resume_where_there_is_nothing_starts_at_the_beginning(
    finished: Path, cache: Path, tmp_path: Path, exists: bool, caplog: pytest.LogCaptureFixture
):
    output = tmp_path / "run"
    if exists:
        output.mkdir()
    run = start(cache, output, "--resume")
    assert run.step == 0
    assert "no checkpoint: starting from the beginning" in caplog.text
    train(run)
    assert_same_bits(output, finished)


def test_resume_with_other_settings_is_refused_and_they_are_listed(finished: Path, cache: Path):
    flags = ("--base_learning_rate", 0.5, "--expander_dims", 16, 16, "--rotation", 3)
    with pytest.raises(ValueError, match="belongs to another run") as caught:
        start(cache, finished, "--resume", *flags)
    message = str(caught.value)
    assert "training.base_learning_rate was 1.6, now 0.5" in message
    assert "model.expander_dims was [32, 32], now [16, 16]" in message
    assert "data.rotation was 10.0, now 3.0" in message
    assert "batch_size" not in message


def test_resume_on_other_data_is_refused(finished: Path, tmp_path: Path):
    other = unlabelled_cache(tmp_path, 45)
    with pytest.raises(ValueError, match=r"data\.data_hash was .*; data\.images was 44, now 45"):
        start(other, finished, "--resume")


def test_resume_from_a_moved_cache_goes_on(finished: Path, cache: Path, tmp_path: Path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(cache, moved)
    output = interrupted(finished, tmp_path / "run", 9)
    pretrain(moved, output, "--resume", "--save_total_limit", 1)
    assert_same_bits(output, finished)


# -- watching, and micro-batches ---------------------------------------------------------------------------------------


def test_a_run_is_watched_and_the_best_checkpoint_kept(
    cache: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("mlvicx_hf.pretraining.reporting.plot_curves", plot_curves)
    rows = [
        {
            "patient_id": f"p{i}",
            "split": ("train", "validation", "test")[i % 3],
            "disc": i % 2,
            "_draw": {"disc": i % 2},
        }
        for i in range(60)
    ]
    probe = make_cache(tmp_path, rows, name="probe")
    output = tmp_path / "run"
    words = ("--checkpoint_steps", 2, "--probe_dataset", probe, "--probe_steps", 2, "--save_total_limit", 1)
    run = start(cache, output, *words)
    train(run)
    records = lines(output)
    probed = {record["step"]: record["probe_linear_auroc"] for record in records if "probe_linear_auroc" in record}
    assert set(probed) == {*range(2, run.total_steps, 2), run.total_steps}
    best = json.loads((output / "best.json").read_text())
    assert best["score"] == max(probed.values()) == probed[best["step"]]
    assert (output / f"checkpoint-{best['step']}").is_dir()
    assert (output / f"checkpoint-{run.total_steps}").is_dir()
    assert {"level_0_rankme", "level_2_deviation", "global_embeddings_correlation"} <= records[-1].keys()
    with Image.open(output / "curves.png") as picture:
        assert picture.size[0] > 500
    assert_same_weights(output, finished)  # who is watched is not changed
    words = ("--checkpoint_steps", 100, "--probe_dataset", probe, "--probe_steps", 2, "--save_total_limit", 1)
    seldom = pretrain(cache, tmp_path / "seldom", *words)  # a probe between checkpoints makes one
    assert json.loads((seldom / "best.json").read_text()) == best
    assert (seldom / f"checkpoint-{best['step']}").is_dir()
    other = start(cache, tmp_path / "other", *words)
    other.watcher = None  # as on every process but the main one: all save together, or they wait for each other
    saved: list[int] = []
    monkeypatch.setattr(other, "save_checkpoint", lambda score: saved.append(other.step))
    train(other)
    assert set(saved) == set(probed)


def assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_micro_batches_are_exact_but_for_batch_normalisation(cache: Path, tmp_path: Path):
    output = pretrain(cache, tmp_path / "run", "--gradient_accumulation_steps", 2)
    assert json.loads((output / "run.json").read_text())["training"]["gradient_accumulation_steps"] == 2
    assert all(value.isfinite().all() for value in weights(output).values())
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps=3 found for 8 images of a process"):
        pretrain(cache, tmp_path / "odd", "--gradient_accumulation_steps", 3)


# -- which images ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images, 8 of them lateral; half of them of one patient."""
    rows = [
        {"patient_id": "many" if i < 20 else f"p{i}", "view": "LATERAL" if i % 5 == 0 else "PA", "_draw": {}}
        for i in range(40)
    ]
    return make_cache(tmp_path_factory.mktemp("mixed"), rows)


def test_lateral_images_are_left_out_and_counted(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    frontal = start(mixed, tmp_path / "frontal")
    assert "8 lateral images are left out (--views all takes them)" in capsys.readouterr().out
    assert frontal.settings.images == 32
    everything = start(mixed, tmp_path / "all", "--views", "all")
    assert "left out" not in capsys.readouterr().out
    assert everything.settings.images == 40


def test_patients_are_drawn_equally_often(mixed: Path, tmp_path: Path):
    run = start(mixed, tmp_path / "run", "--patient_balanced")
    patients = load_cache(mixed).datasets["train"].filter(lambda row: row["view"] == "PA")["patient_id"]
    drawn = [patients[image_of(sample)] for batch in run.batches for sample in batch]
    assert len(drawn) == 32
    assert 1 <= drawn.count("many") <= 2  # of 16 images, and 17 patients
    train(run)
    plain = pretrain(mixed, tmp_path / "plain")
    assert (
        weights(plain)["mlvicx.backbone.conv1.0.weight"]
        .ne(weights(tmp_path / "run")["mlvicx.backbone.conv1.0.weight"])
        .any()
    )


def test_an_image_that_an_epoch_has_twice_gets_other_views(tmp_path: Path):
    """One patient has all images but one, which comes as often as all the others together."""
    rows = [{"patient_id": "alone" if i == 0 else "many", "split": "train", "_draw": {"disc": True}} for i in range(16)]
    run = start(make_cache(tmp_path, rows), tmp_path / "run", "--patient_balanced", "--positives", "same_patient")
    warps = torch.cat([batch.plans[0].warp for batch in run.loader])
    alone = [place for place, sample in enumerate(chain(*run.batches)) if image_of(sample) == 0]
    assert len(alone) == 8
    assert len(warps[alone].unique(dim=0)) == 8


# -- streams -----------------------------------------------------------------------------------------------------------


def test_a_streamed_cache_can_be_resumed_inside_an_epoch(mixed: Path, tmp_path: Path):
    flags = ("--streaming", "--shuffle_buffer", 8, "--checkpoint_steps", 1, "--save_total_limit", 20)
    whole = start(mixed, tmp_path / "whole", *flags)
    assert (whole.total_steps, whole.settings.description()["data"]["images"]) == (8, 32)
    assert whole.processor.fit == load_cache(mixed).manifest["fit"]
    train(whole)
    for step in (2, 4, 7):
        output = tmp_path / f"from-{step}"
        output.mkdir()
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", output / f"checkpoint-{step}")
        shutil.copy(tmp_path / "whole" / "metrics.jsonl", output)
        pretrain(mixed, output, *flags, "--resume")
        assert_same_bits(output, tmp_path / "whole")


def test_a_stream_goes_on_with_other_workers_but_not_in_another_order(mixed: Path, tmp_path: Path):
    flags = ("--streaming", "--epochs", 1)
    output = pretrain(mixed, tmp_path / "run", *flags)
    start(mixed, output, *flags, "--resume", "--num_workers", 1)
    with pytest.raises(ValueError, match=r"another run: data\.shuffle_buffer was 4096, now 9; expected"):
        start(mixed, output, *flags, "--resume", "--shuffle_buffer", 9)


def test_a_stream_whose_files_do_not_tell_their_rows_says_what_follows(
    mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "images").mkdir()
    for number in range(8):
        Image.new("L", (32, 32), 9 * number).save(tmp_path / "images" / f"{number}.png")
    said = "rows of each file not known: in an epoch some images come twice, and others wait"
    for dataset, count in ((tmp_path / "images", 1), (mixed, 0)):
        start(dataset, tmp_path / "run", "--streaming", "--num_images", 8, "--cache_size", 32)
        assert capsys.readouterr().out.splitlines().count(said) == count


@pytest.mark.parametrize("streaming", [False, True])
def test_checkpoints_from_before_streams_had_one_order(
    mixed: Path, tmp_path: Path, streaming: bool, caplog: pytest.LogCaptureFixture
):
    """They bind a run to its number of processes, and a stream to the order of that number and of its workers."""
    flags = ("--streaming", streaming, "--epochs", 1)
    output = pretrain(mixed, tmp_path / "run", *flags)
    checkpoints = Checkpoints(output, 2)
    newest = checkpoints.newest_whole()
    fixed = {k: v for k, v in newest.fixed.items() if k != "data.stream_order"} | {"run.num_processes": 2}
    fixed |= {"data.num_workers": 0} if streaming else {}
    machine = {k: v for k, v in newest.machine.items() if k != "processes"}
    newest.path.rename(tmp_path / "files")
    checkpoints.save(newest.step, fixed, machine, lambda path: copy_files(tmp_path / "files", path))
    if streaming:
        message = r"data\.stream_order was 'of processes and workers', now '16 lanes'; expected"
        with pytest.raises(ValueError, match=message):
            start(mixed, output, *flags, "--resume")
    else:
        start(mixed, output, *flags, "--resume")
        assert any("processes was 2, now 1" in message for message in caplog.messages)


def copy_files(source: Path, target: Path) -> None:
    for file in source.iterdir():
        if file.name != "state.json":
            shutil.copy(file, target)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_the_folder_of_another_run_is_refused(finished: Path, cache: Path):
    before = (finished / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds files of another run; .* or --resume"):
        start(cache, finished)
    assert (finished / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", 45], "batch_size=45 found; expected at most 44"),
        (["--split", "test"], "split='test' found; expected one of train"),
        (["--epochs", 0], r"epochs=0\.0 found; expected a number above 0"),
        (["--epochs", -1], r"epochs=-1\.0 found; expected a number above 0"),
        (["--epochs", 0.01], "epochs=0.01 found; expected a step at least"),
        (["--checkpoint_steps", 0], "checkpoint_steps=0 found"),
        (["--logging_steps", 0], "logging_steps=0 found"),
        (["--save_total_limit", 0], "save_total_limit=0 found"),
        (["--probe_steps", 0], "probe_steps=0 found"),
        (["--gradient_accumulation_steps", 0], "gradient_accumulation_steps=0 found"),
        (["--backbone_thaw_epochs", "-1"], "backbone_thaw_epochs=-1"),
        (["--crop_area", "0.5"], "crop_area"),
        (["--crop_area", "0.5", "0.2"], "crop_area"),
        (["--blur", "0.5"], "blur"),
        (["--max_train_samples", "-1"], "max_train_samples=-1 found"),
        (["--warmup_epochs", "-1"], "warmup_epochs=-1"),
        (["--num_images", 9], "num_images=9 found without streaming"),
        (["--image_column", "scan"], "image_column=scan found without streaming"),
        (["--streaming", "--patient_balanced"], "patient_balanced found with streaming"),
        (["--streaming", "--max_train_samples", 9], "max_train_samples=9 found with streaming"),
        (["--streaming", "--split", "test"], "split='test' found; expected one of train"),
        (["--seed", "-1"], "seed=-1"),
        (["--momentum", "1.5"], "momentum=1.5"),
        (["--final_learning_rate_ratio", "-3"], "final_learning_rate_ratio=-3"),
        (["--report_to", "paper"], "Unsupported logging capability: paper"),
        (["--report_to", "wandb"], "report_to=wandb found, which is not installed"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_before_anything_is_written(
    cache: Path, tmp_path: Path, flags: list[Any], message: str
):
    with pytest.raises(ValueError, match=message):
        start(cache, tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_compiling_by_accelerate_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="dynamo found in the configuration of `accelerate launch`"):
        start(cache, tmp_path / "run")


@pytest.mark.parametrize("words", [["--mixed_precision", "half"], ["--views", "side"], ["--mixed_precision", ""]])
def test_a_flag_that_knows_its_values_names_them(
    cache: Path, tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        start(cache, tmp_path / "run", *words)
    found = capsys.readouterr().err
    assert f"{words[0]}: invalid choice: '{words[1]}'" in found
    assert "bf16" in found or "frontal" in found


def test_no_cache_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no such folder; expected a prepared cache"):
        start(tmp_path / "absent", tmp_path / "run")


def test_a_loss_that_is_not_finite_stops_the_run(cache: Path, tmp_path: Path):
    output = tmp_path / "run"
    with pytest.raises(FloatingPointError) as caught:
        pretrain(cache, output, "--base_learning_rate", 1e30)
    message = str(caught.value)
    assert "at step 1 with learning rate 1.25e+28" in message  # 1e30 · 8/256 · 2/5
    assert "last good checkpoint: none yet" in message
    assert not (output / "model.safetensors").exists()
    assert [row["step"] for row in lines(output)] == [1]


def test_the_checkpoint_that_a_stopped_run_names_is_good(cache: Path, tmp_path: Path):
    output = tmp_path / "run"
    run = start(cache, output, "--base_learning_rate", 1e30, "--checkpoint_steps", 1)
    output.mkdir()
    run.save_checkpoint()  # checkpoint-0, before the rate blows the weights up
    with pytest.raises(FloatingPointError) as caught:
        train(run)
    named = str(caught.value).split("last good checkpoint: ")[1].split(". ")[0]
    model = MLVICXForPreTraining.from_pretrained(named).train()
    assert model(*torch.randn(2, 8, 1, 32, 32)).loss.isfinite()
