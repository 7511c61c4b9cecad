"""`mlvicx explain` on masks."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_users_error, make_cache, mlvicx, tiny_config

from mlvicx_hf import MLVICXForImageClassification, MLVICXImageProcessor
from mlvicx_hf.data.cache.cache import load_cache

pytest.importorskip("captum")


def save_classifier(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    config = tiny_config(id2label={0: "disc", 1: "stripes"}, label2id={"disc": 0, "stripes": 1})
    MLVICXForImageClassification(config).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


def test_two_models_on_a_cache_with_masks(tmp_path: Path):
    rows = [
        {
            "patient_id": f"p{number // 2}",
            "split": ("train", "test")[number // 2 % 2],
            "disc": int(number % 2 == 0),
            "stripes": int(number % 4 == 1),
            "_draw": {"disc": number % 2 == 0, "stripes": number % 4 == 1},
        }
        for number in range(24)
    ]
    cache = make_cache(tmp_path, rows, mask_names=("disc",))
    models = [f"{name}={save_classifier(tmp_path / name, seed)}" for seed, name in enumerate(("a", "b"))]
    words = ("--models", *models, "--dataset", cache, "--output", tmp_path / "out" / "maps", "--device", "cpu")
    options = ("--findings", "disc", "--level", "last", "--max_images", 3, "--score", "--tolerance", 2)
    done = mlvicx("explain", *words, *options)
    assert done.returncode == 0, done.stderr
    assert "disc: 6 images, 6 with a known region" in done.stdout
    assert "  a over b: pointing " in done.stdout
    assert "12/12" in done.stderr

    output = tmp_path / "out" / "maps"
    found = json.loads((output / "explanations.json").read_text())
    disc = found["findings"]["disc"]
    shown = [source.removeprefix("folder:") for source in disc["pictures"]]
    assert shown == ["0002.png", "0006.png", "0010.png"]
    assert {path.name for path in (output / "disc").iterdir()} == {f"{s}_{name}.png" for s in shown for name in "ab"}
    assert {path.name for path in output.iterdir()} == {"disc", "grid_disc.png", "explanations.json"}
    assert set(disc["scores"]["a"]) == {"pointing", "energy", "iou"}
    assert found["data"]["split_hash"] == load_cache(cache).manifest["split_hash"]
    assert found["models"]["b"]["model"] == str(tmp_path / "b")


def test_two_models_of_one_name(tmp_path: Path):
    words = ("--models", "a=x", "a=y", "--dataset", tmp_path, "--output", tmp_path / "out")
    assert_users_error(mlvicx("explain", *words), "--models a=x and a=y found; expected each name once")
