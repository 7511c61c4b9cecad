"""A grid of runs: what it does, what it does not do twice, what it reports."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from helpers import make_cache, run_script, tiny_config

from mlvicx_hf import MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.evaluation.suite import read_suite, run_suite, summarise

OPTIONS = {"num_train_epochs": 2, "report_to": "none", "use_cpu": True}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A suite of two tasks and two models, one of them with two sets of weights."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [
        {
            "patient_id": f"p{i // 2}",
            "split": ("test", "validation", "train", "train", "train")[i // 2 % 5],
            "_draw": {"disc": i % 3 == 0, "stripes": i % 4 < 2},
            "disc": int(i % 3 == 0),
            "stripes": int(i % 4 < 2),
        }
        for i in range(40)
    ]
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(str(folder / f"model-{seed}"))
        MLVICXModel(tiny_config()).save_pretrained(models[-1])
        MLVICXImageProcessor(image_size=32).save_pretrained(models[-1])
    masked = [row | {"disc": "", "stripes": ""} for row in rows]
    return {
        "tasks": {
            "findings": {"kind": "classification", "dataset": str(make_cache(folder, rows))},
            "discs": {
                "kind": "segmentation",
                "dataset": str(make_cache(folder, masked, name="masked", mask_names=("disc",))),
                "image_size": 32,
            },
        },
        "models": {"pretrained": models, "random": {"random": models[0]}},
        "protocols": ["frozen"],
        "label_fractions": [0.5, 1],
        "classification": OPTIONS,
        "segmentation": OPTIONS | {"num_train_epochs": 1, "augment": False},
    }


def write(folder: Path, suite: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def test_a_grid_is_run_once(parts: dict[str, Any], tmp_path: Path):
    cells = read_suite(write(tmp_path, parts))
    assert len(cells) == 2 * 3 * 1 * 2
    output = tmp_path / "out"
    assert run_suite(cells[:5], output) == []
    times = {file: os.stat(file).st_mtime_ns for file in output.rglob("*.json")}
    assert run_suite(cells, output) == []
    assert all(os.stat(file).st_mtime_ns == time for file, time in times.items())
    table = summarise(cells, output)
    assert len(table) == len(cells)
    assert not table["test"].isna().any()
    first = json.loads((output / cells[0].path / "results.json").read_text())
    assert first["hyperparameters"]["fast_probe"]
    assert first["label_fraction"] == 0.5
    assert table["test"][0] == first["test"]["auroc_macro"]
    assert not list(output.rglob("*.safetensors"))
    again = tmp_path / "again"
    assert run_suite(cells[:2], again) == []
    pd.testing.assert_frame_equal(summarise(cells[:2], again), table[:2])


def test_a_cell_that_fails_is_reported_and_the_others_go_on(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    suite["models"] = {"absent": str(tmp_path / "absent"), **parts["models"]}
    done = run_script("evaluate_suite.py", write(tmp_path, suite), "--output", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    assert "3 of 4 cells finished, 1 failed" in done.stdout
    error = tmp_path / "out/cells/findings/absent/0/frozen/1/0.error.txt"
    assert "absent" in error.read_text()
    assert str(error) in done.stderr
    suite["models"]["absent"] = parts["models"]["pretrained"][0]
    done = run_script("evaluate_suite.py", write(tmp_path, suite), "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not error.exists()
    assert len(pd.read_csv(tmp_path / "out/summary.csv")) == 4


def test_other_settings_are_refused(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    suite["models"] = {"pretrained": parts["models"]["pretrained"][0]}
    run_suite(read_suite(write(tmp_path, suite)), tmp_path / "out")
    suite["classification"] = OPTIONS | {"num_train_epochs": 3}
    with pytest.raises(ValueError, match=r"made with other settings \(options: .*2.*then.*3.*now\)"):
        run_suite(read_suite(write(tmp_path, suite)), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": [1]}, "has the key(s) fractions; expected some of tasks"),
        ({"protocols": ["linear"]}, "protocols ['linear'] found; expected some of frozen, finetuned"),
        ({"tasks": {"a": {"kind": "detection", "dataset": "x"}}}, "task a"),
        ({"models": {"a": {"architecture": "x"}}}, "model a {'architecture': 'x'} found"),
    ],
)
def test_suites_that_are_wrong(change: dict[str, Any], message: str, parts: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_suite(write(tmp_path, parts | change))
