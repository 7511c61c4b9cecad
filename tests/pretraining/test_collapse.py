"""A healthy run is left in peace, a collapse is named where it happens, and watching changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import draw, make_cache, tiny_config
from PIL import Image

from mlvicx_hf import MLVICXForPreTraining, MLVICXImageProcessor
from mlvicx_hf.objectives import OBJECTIVES, Objective
from mlvicx_hf.pretraining.arguments import PretrainingArguments
from mlvicx_hf.pretraining.collapse import Watcher
from mlvicx_hf.pretraining.curves import plot_curves
from mlvicx_hf.pretraining.optimizer import create_optimizer, learning_rate, set_learning_rate
from mlvicx_hf.pretraining.views import TwoViewAugmentation, view_draws
from mlvicx_hf.scoring.embeddings import describe_embeddings

BATCH = 32


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """128 drawn images, uint8 [N, 1, H, W]."""
    drawn = [draw({"disc": i % 2 == 0, "stripes": i % 3 == 0}, i) for i in range(128)]
    return torch.from_numpy(np.stack([np.asarray(image) for image in drawn]))[:, None]


def watch(model: Objective, **options: Any) -> Watcher:
    return Watcher(model, MLVICXImageProcessor(image_size=32), **options)


def create(**values: Any) -> Objective:
    torch.manual_seed(0)
    return OBJECTIVES["mlvicx"](MLVICXForPreTraining(tiny_config(**values))).train()


def shapes(*names: str, dimension: int = 32) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    embeddings = torch.empty(BATCH, dimension)
    return dict.fromkeys(names, (embeddings, embeddings))


def train(
    images: torch.Tensor, steps: int, every: int = 5, rate: float = 0.2, **values: Any
) -> tuple[list[dict[str, float]], list[tuple[int, str]]]:
    """The figures and the warnings, by step, of a short run with the optimiser and rates of pretraining."""
    model = create(**values)
    watcher, augment = watch(model), TwoViewAugmentation(image_size=32)
    optimizer = create_optimizer(model, PretrainingArguments(output_dir=""))
    order = np.random.default_rng(0)
    figures, warnings = [], []
    for step in range(1, steps + 1):
        chosen = order.permutation(len(images))[:BATCH]
        view_1, view_2 = augment(images[chosen], view_draws(0, step, chosen))
        output = model(view_1, view_2)
        set_learning_rate(optimizer, learning_rate(step - 1, rate, 5, steps, 0.001))
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % every == 0:
            figures.append({"step": step} | watcher.scalars(output.embeddings, view_1))
            warnings += [(step, text) for text in watcher.check(figures[-1], output.embeddings)]
    return figures, warnings


@pytest.mark.parametrize("values", [{}, {"rate": 1.0}, {"expander_final_norm": True, "global_weight": 0.0}])
def test_a_healthy_run_is_not_warned_of(images: torch.Tensor, values: dict[str, Any]):
    figures, warnings = train(images, 30, **values)
    assert len(figures) == 6
    assert not warnings


def test_a_collapse_is_named_within_a_few_dozen_steps(images: torch.Tensor):
    _, warnings = train(images, 80, variance_weight=0.0, covariance_weight=0.0)
    for name in ("global", "multi_level"):
        found = [(step, text) for step, text in warnings if text.startswith(f"{name}_embeddings collapse to a point")]
        assert len(found) == 1  # once, however often it is seen
        step, text = found[0]
        assert step <= 30
        assert "variance_weight (now 0)" in text
        assert "base_learning_rate" in text
    directions = [text for _, text in warnings if "collapse to few directions" in text]
    assert len(directions) == 2
    assert all("covariance_weight (now 0)" in text for text in directions)


def test_a_collapse_to_a_line_is_none_to_a_point():
    watcher = watch(create())
    line = torch.randn(BATCH, 1) @ torch.randn(1, 32)
    healthy = torch.randn(BATCH, 32)
    embeddings = {"healthy": (healthy, healthy), "multi_level_embeddings": (line, line)}
    (warning,) = watcher.check(watcher.scalars(embeddings, torch.randn(4, 1, 32, 32)), embeddings)
    assert warning.startswith("multi_level_embeddings collapse to few directions: RankMe is 1.00 of at most 32")


def test_a_warning_comes_again_only_after_a_recovery():
    watcher = watch(create())
    seen = []
    for spread in (0.5, 0.05, 0.15, 0.05, 0.5, 0.05):  # limit 0.1, recovered above 0.2
        scalars = {"embeddings_rankme": 9.0, "embeddings_deviation": spread}
        seen.append(len(watcher.check(scalars, shapes("embeddings"))))
    assert seen == [0, 1, 0, 0, 0, 1]


def test_a_closed_gate_is_found_at_its_level(images: torch.Tensor):
    model = create()
    watcher = watch(model)
    view = TwoViewAugmentation(image_size=32)(images[:BATCH], view_draws(0, 0, np.arange(BATCH)))[0]

    def check() -> list[str]:
        return watcher.check(watcher.scalars({}, view), {})

    for _ in range(3):
        assert check() == []
    gate = model.encoder.context[2].channel.weight
    opened = gate.detach().clone()
    gate.data.fill_(-1e4)
    closed = check()
    assert closed[0].startswith("level 2 of the encoder gives nearly the same for all images")
    assert "mlvicx.context.2" in closed[0]
    assert not any("level 0" in text or "level 1" in text for text in closed)
    assert check() == []
    gate.data.copy_(opened)
    assert check() == []
    gate.data.fill_(-1e4)
    assert check() == closed


def test_a_resumed_run_knows_how_its_levels_started(tmp_path: Path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"step": i, "level_1_deviation": 2.0}) + "\n" for i in range(5)))
    fallen = {"level_1_rankme": 5.0, "level_1_deviation": 0.01}
    assert watch(create()).check(fallen, {}) == []  # as far as this one knows, it has always been so
    resumed = watch(create())
    resumed.resume(metrics)
    (warning,) = resumed.check(fallen, {})
    assert "is 0.01, at the start 2" in warning


def test_watching_changes_nothing(images: torch.Tensor):
    model = create()
    model.encoder.context.eval()
    view = torch.randn(80, 1, 32, 32)
    output = model(view, view.flip(-1))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes, random = [part.training for part in model.modules()], torch.get_rng_state()
    found = watch(model).scalars(output.embeddings, view)
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    output.loss.backward()  # the graph is whole
    with torch.no_grad():
        maps = model.eval().encoder.refined_maps(view[:64])
    expected = describe_embeddings("global_embeddings", output.embeddings["global_embeddings"][0].detach())
    expected |= describe_embeddings("multi_level_embeddings", output.embeddings["multi_level_embeddings"][0].detach())
    for level, values in enumerate(maps):
        expected |= describe_embeddings(f"level_{level}", values.mean((2, 3)), centre=True)
    assert found == pytest.approx(expected, rel=1e-3)


def test_probes_come_every_so_many_steps_and_at_the_end(tmp_path: Path):
    rows = [
        {"patient_id": str(i), "split": "validation" if i % 3 else "train", "disc": i // 3 % 2, "_draw": {}}
        for i in range(24)
    ]
    watcher = watch(create(), probe_dataset=make_cache(tmp_path, rows), probe_steps=4)
    assert [step for step in range(1, 10) if watcher.probe(step, last=step == 9)] == [4, 8, 9]
    assert 0 <= watcher.probe(4)["probe_knn_auroc"] <= 1
    assert watch(create()).probe(1000, last=True) == {}


def test_curves_of_whole_and_of_meagre_runs(tmp_path: Path):
    whole = {"learning_rate": 0.1, "loss": 3.0, "global_loss": 2.0, "multi_level_loss": 1.0}
    whole |= {f"global_{term}": 1.0 for term in ("invariance", "variance", "covariance")}
    whole |= {f"{name}_{k}": 1.0 for name in ("global_embeddings", "level_0") for k in ("rankme", "deviation")}
    sizes = []
    for keys in (("loss",), ("loss", "global_loss", "global_embeddings_rankme"), tuple(whole)):
        lines = [{"step": step} | {key: whole[key] * step for key in keys} for step in (1, 2, 3)]
        lines[1]["probe_knn_auroc"] = 0.7
        metrics = tmp_path / "metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
        plot_curves(metrics, tmp_path / "curves.png", "a title")
        with Image.open(tmp_path / "curves.png") as picture:
            sizes.append(picture.size)
    columns, heights = zip(*[(round(w / 528), round(h / 372)) for w, h in sizes], strict=True)
    assert columns == (2, 3, 3)  # panels: loss and probe; and RankMe; eight
    assert heights == (1, 1, 3)
    metrics.write_text("")
    with pytest.raises(ValueError, match="0 lines"):
        plot_curves(metrics, tmp_path / "none.png")
