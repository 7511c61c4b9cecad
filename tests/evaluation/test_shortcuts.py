"""The shortcut audit finds what features give away, and does not find what they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache, tiny_config

from mlvicx_hf import MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.data.cache import load_cache
from mlvicx_hf.evaluation.shortcuts import audit
from mlvicx_hf.evaluation.suite import Cell
from mlvicx_hf.linear_probe import FeatureStore


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
    torch.manual_seed(0)
    MLVICXModel(tiny_config()).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return Cell("t", "classification", "", "model", 0, str(folder), None, "frozen", 1.0, 0)


def test_what_is_given_away_and_what_is_not(cell: Cell, tmp_path: Path):
    caches = [
        load_cache(make_cache(tmp_path, rows(0), name="one")),
        load_cache(make_cache(tmp_path, rows(1, brighter=True), name="two")),
    ]
    found = {(row["kind"], row["data"]): row for row in audit(cell, caches, ["view", "sex", "source"], FeatureStore())}
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


def test_what_is_unknown_or_rare_is_left_out(cell: Cell, tmp_path: Path):
    few = [row | {"sex": "F" if i < 9 else "M", "view": "UNKNOWN"} for i, row in enumerate(rows(2))]
    cache = load_cache(make_cache(tmp_path, few))
    assert audit(cell, [cache], ["view", "sex", "source"], FeatureStore()) == []
