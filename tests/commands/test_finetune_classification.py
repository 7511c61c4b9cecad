"""`mlvicx classify`."""

import json
from pathlib import Path

import pytest
import torch
from helpers import assert_users_error, make_cache, mlvicx, run_script, tiny_config, unlabelled_cache

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
def test_the_command(model: Path, tmp_path: Path):
    rows = [
        {
            "patient_id": f"p{i}",
            "split": {0: "test", 1: "validation"}.get(i % 5, "train"),
            "stripes": int(i % 3 == 0),
            "Mass": "" if i % 4 == 0 else int(i % 7 == 0 and i % 5 > 0),  # never in the test split
            "_draw": {"stripes": i % 3 == 0},
        }
        for i in range(80)
    ]
    cache, output = make_cache(tmp_path, rows), tmp_path / "run"
    words = ("--model", model, "--freeze_backbone", "--dataset", cache, "--output_dir", output)
    done = run_script("finetune_classification.py", *words, "--num_train_epochs", 5, "--use_cpu", "true")
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "results.json").read_text())
    printed = {line.split()[2]: line.split()[3] for line in done.stdout.splitlines() if line.startswith("test AUROC")}
    assert printed["macro"] == f"{results['test']['auroc_macro']:.4f}"
    assert printed["stripes"] == f"{results['test']['auroc']['stripes']:.4f}"
    assert printed["Mass"] == results["test"]["auroc"]["Mass"] == "n/a"
    assert "{'" not in done.stdout + done.stderr  # no dictionaries of the Trainer
    assert "LOAD REPORT" not in done.stderr  # that the head is new is no news
    predicted = mlvicx(
        "predict", "--model", output, "--input", tmp_path / "cache-images", "--output", tmp_path / "p.csv"
    )
    assert "no finding is calibrated: validation knew too few" in predicted.stdout
    again = mlvicx("classify", *words)
    assert_users_error(again, "is there already; expected a new or an empty")


def test_no_labels_are_a_users_error(model: Path, tmp_path: Path):
    cache = unlabelled_cache(tmp_path, 12)
    words = ("--model", model, "--dataset", cache, "--output_dir", tmp_path / "run")
    done = mlvicx("classify", *words)
    assert_users_error(done, "has no labels; expected some")
    assert not (tmp_path / "run").exists()
