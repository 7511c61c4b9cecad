"""The shortcut audit finds what features give away, and does not find what they do not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache, save_encoders

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.evaluation.suite import analysis, shortcuts
from mlvicx_hf.evaluation.suite.grid import Cell, Suite
from mlvicx_hf.evaluation.suite.shortcuts import audit_shortcuts, probe_shortcuts, read_audits
from mlvicx_hf.finetuning.linear_probe import FeatureStore


def rows(seed: int, brighter: bool = False) -> list[dict[str, Any]]:
    """Women's images have stripes; the view is drawn by lot."""
    generator = np.random.default_rng(seed)
    found = []
    for i in range(120):
        woman = bool(generator.random() < 0.5)
        found.append(
            {
                "patient_id": f"s{seed}p{i}",
                "split": ("test", "train", "train")[i % 3],
                "sex": "F" if woman else "M",
                "view": "AP" if generator.random() < 0.5 else "PA",
                "_draw": {"stripes": woman, "disc": brighter},
                "finding": int(generator.random() < 0.5),
            }
        )
    return found


@pytest.fixture(scope="module")
def cell(tmp_path_factory: pytest.TempPathFactory) -> Cell:
    folder = tmp_path_factory.mktemp("model")
    return Cell("t", "classification", "", "model", 0, *save_encoders(folder, 1), None, "frozen", 1.0, 0)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two caches, the second of brighter images."""
    folder = tmp_path_factory.mktemp("caches")
    return [make_cache(folder, rows(i, brighter=i == 1), name=name) for i, name in enumerate(("one", "two"))]


def test_what_is_given_away_and_what_is_not(cell: Cell, paths: list[Path]):
    caches = [load_cache(path) for path in paths]
    found = {
        (row["kind"], row["data"]): row
        for row in probe_shortcuts(cell, caches, ["view", "sex", "source"], FeatureStore())
    }
    assert set(found) == {(k, d) for k in ("view", "sex") for d in ("one", "two")} | {("source", "one, two")}
    for data in ("one", "two"):
        sex, view = found["sex", data], found["view", data]
        assert sex["classes"] == ["F", "M"]
        assert sex["images"] == 40
        assert sex["low"] > 0.6
        assert sex["auroc"] > 0.85
        assert view["low"] < 0.6
        assert view["low"] <= view["auroc"] <= view["high"]
    assert found["source", "one, two"]["auroc"] > 0.9
    assert found["source", "one, two"]["images"] == 80


def test_caches_of_one_name_are_told_apart(cell: Cell, tmp_path: Path):
    caches = [load_cache(make_cache(tmp_path / str(i), rows(i, i == 1), name="A")) for i in range(2)]
    found = probe_shortcuts(cell, caches, ["sex", "source", "search"], FeatureStore())
    alone = [str(cache.path) for cache in caches]
    assert [row["data"] for row in found] == [*alone, ", ".join(alone), *alone]


def test_an_audit_is_made_anew_when_there_are_other_data(cell: Cell, paths: list[Path], tmp_path: Path):
    cells = [replace(cell, dataset=str(path)) for path in paths]
    suite = Suite("", tmp_path, "", tuple(cells), {}, {}, (), (), ("sex", "source"))
    file = tmp_path / "out/shortcuts/model/0.json"
    audit_shortcuts(suite, cells[:1], tmp_path / "out", FeatureStore())
    [[few]] = read_audits(suite, tmp_path / "out").values()
    made = file.stat().st_mtime_ns
    audit_shortcuts(suite, cells[:1], tmp_path / "out", FeatureStore())
    assert file.stat().st_mtime_ns == made
    audit_shortcuts(suite, cells, tmp_path / "out", FeatureStore())
    [[more]] = read_audits(suite, tmp_path / "out").values()
    assert {row["kind"] for row in few} == {"sex"}
    assert {row["kind"] for row in more} == {"sex", "source"}


def test_an_audit_is_made_anew_for_other_weights_and_settings(
    cell: Cell, paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made: list[Cell] = []
    monkeypatch.setattr(shortcuts, "probe_shortcuts", lambda cell, *_: made.append(cell) or [])
    first = replace(cell, dataset=str(paths[0]))

    def run(*planned: Cell, finished: int = 0, kinds: tuple[str, ...] = ("sex",)) -> int:
        suite = Suite("", tmp_path, "", planned, {}, {}, (), (), kinds)
        made.clear()
        audit_shortcuts(suite, planned[finished:], tmp_path / "out", FeatureStore())
        return len(made)

    assert run(first) == 1
    assert run(first, replace(first, seed=1), finished=1) == 0  # the seed of a model is the first that is planned
    assert run(replace(first, seed=1)) == 1
    assert run(replace(first, options={"drop_context": True})) == 1
    assert run(replace(first, architecture=first.weights)) == 1
    assert run(replace(first, options={"num_train_epochs": 3})) == 1
    assert run(replace(first, options={"num_train_epochs": 4})) == 0  # features do not depend on it
    suite = Suite("", tmp_path, "", (first,), {}, {}, (), (), ())
    assert read_audits(suite, tmp_path / "out") == {}


def test_what_is_unknown_or_rare_is_left_out(cell: Cell, tmp_path: Path):
    few = [row | {"sex": "F" if i < 9 else "M", "view": "UNKNOWN"} for i, row in enumerate(rows(2))]
    cache = load_cache(make_cache(tmp_path, few))
    assert probe_shortcuts(cell, [cache], ["view", "sex", "source"], FeatureStore()) == []


def test_a_single_test_patient_gives_no_interval(cell: Cell, paths: list[Path], tmp_path: Path):
    alone = [row | ({"patient_id": "one"} if row["split"] == "test" else {}) for row in rows(3)]
    cache = load_cache(make_cache(tmp_path, alone))
    (found,) = probe_shortcuts(cell, [cache], ["sex"], FeatureStore())
    assert (found["low"], found["high"]) == ("n/a", "n/a")
    assert found["auroc"] > 0.8
    (other,) = probe_shortcuts(cell, [load_cache(paths[0])], ["sex"], FeatureStore())
    averaged = [
        analysis._shortcuts({"model": audits})[0]
        for audits in ([[found]], [[found], [other | {"data": found["data"]}]])
    ]
    assert [(row["low"], row["high"]) for row in averaged] == [("n/a", "n/a"), (other["low"], other["high"])]


def test_caches_of_other_sizes_do_not_change_the_figures(cell: Cell, paths: list[Path], tmp_path: Path):
    large = make_cache(tmp_path, rows(4), size=80, name="large")
    caches = [load_cache(path) for path in (paths[0], large)]
    alone = [probe_shortcuts(cell, [cache], ["sex", "search"], FeatureStore()) for cache in caches]
    both = probe_shortcuts(cell, caches, ["sex", "search"], FeatureStore())
    assert sorted(both, key=str) == sorted([*alone[0], *alone[1]], key=str)


def test_the_source_of_caches_that_share_images_is_not_asked(cell: Cell, paths: list[Path]):
    one = load_cache(paths[0])
    caches = [one, replace(one, path=one.path.with_name("two"))]
    found = probe_shortcuts(cell, caches, ["sex", "source"], FeatureStore())
    assert {(row["kind"], row["data"]) for row in found} == {("sex", "one"), ("sex", "two")}


def test_search_precision_is_that_of_brute_force(cell: Cell, paths: list[Path]):
    cache, store = load_cache(paths[0]), FeatureStore()
    (found,) = probe_shortcuts(cell, [cache], ["search"], store)
    encoder, processor = shortcuts._encoder(cell, cache)
    known, asked = (
        shortcuts._encode(encoder, processor, cache, "one", split, store, torch.device("cpu")).features.double().numpy()
        for split in ("train", "test")
    )
    values, wanted = (np.array(cache.datasets[split]["labels"])[:, 0] for split in ("train", "test"))
    cosines = (asked / np.linalg.norm(asked, axis=1)[:, None]) @ (known / np.linalg.norm(known, axis=1)[:, None]).T
    nearest = np.argsort(-cosines, axis=1)[:, :5]
    assert found["precision"] == pytest.approx(values[nearest[wanted == 1]].mean())
    assert found["chance"] == pytest.approx(values.mean())
    assert found["labels"]["finding"]["queries"] == (wanted == 1).sum()
    assert (found["kind"], found["data"]) == ("search", "one")
