"""`mlvicx segment` on synthetic pneumothorax."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_users_error, mlvicx, tiny_config, unlabelled_cache

from mlvicx_hf import MLVICXForPreTraining, MLVICXImageProcessor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MLVICXForPreTraining(tiny_config()).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


@pytest.mark.lowest
@pytest.mark.slow
def test_phantom_pneumothorax(model: Path, tmp_path: Path):
    words = ("--collection", "phantom", "--mask_names", "Pneumothorax", "--num_patients", 40, "--size", 32)
    done = mlvicx("prepare", *words, "--images_per_patient", 1, "--output", tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "Pneumothorax in" in done.stdout
    words = ("--model", model, "--freeze_backbone", "--dataset", tmp_path / "cache", "--output_dir", tmp_path / "run")
    done = mlvicx("segment", *words, "--num_train_epochs", 2, "--use_cpu", "true")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["data"]["synthetic"] is True
    assert results["labels"] == ["Pneumothorax"]
    test = results["test"]
    assert f"test macro: dice {test['dice']:.4f}" in done.stdout
    assert "Pneumothorax: dice" in done.stdout
    assert 0 <= test["dice"] <= 1
    assert "{'" not in done.stdout + done.stderr  # no dictionaries of the Trainer


def test_no_masks_are_a_users_error(model: Path, tmp_path: Path):
    words = ("--model", model, "--dataset", unlabelled_cache(tmp_path, 12), "--output_dir", tmp_path / "run")
    assert_users_error(mlvicx("segment", *words), "has no masks; expected some")
    assert not (tmp_path / "run").exists()
