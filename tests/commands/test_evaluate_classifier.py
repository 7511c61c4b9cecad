"""`mlvicx transfer`."""

import csv
import json
import sys
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, assert_users_error, make_cache, mlvicx, tiny_config
from sklearn.metrics import roc_auc_score

from mlvicx_hf import MLVICXForPreTraining, MLVICXImageProcessor

SPLITS = ("test", "validation", "train", "train", "train")


def rows(effusion: str, thickening: str, other: bool = False) -> list[dict[str, Any]]:
    """Images whose labels have these names; the other ones differ in everything but the noise."""
    drawn = np.random.default_rng(0).random((120, 2)) < 0.5
    if other:
        drawn = np.stack([~drawn[:, 0], drawn[:, 0] & ~drawn[:, 1]], 1)
    return [
        {
            "patient_id": f"p{number}",
            "split": SPLITS[number % 5],
            effusion: int(disc),
            thickening: int(stripes),
            "_draw": {"disc": bool(disc), "stripes": bool(stripes)},
        }
        for number, (disc, stripes) in enumerate(drawn)
    ]


@pytest.mark.slow
def test_train_on_one_collection_and_test_on_another(tmp_path: Path):
    torch.manual_seed(0)
    MLVICXForPreTraining(tiny_config()).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(image_size=32).save_pretrained(tmp_path / "model")
    home = make_cache(tmp_path, rows("Effusion", "Pleural_Thickening"), name="home")
    there = make_cache(tmp_path, rows("pleural effusion", "Pleural thickening", other=True), name="there")
    run = tmp_path / "run"
    words = ("--model", tmp_path / "model", "--dataset", home, "--output_dir", run, "--use_cpu", "true")
    words += ("--allow_leak", "true")  # the stripes of two drawings are the same
    trained = mlvicx("classify", *words, "--freeze_backbone", "--num_train_epochs", 3)
    assert trained.returncode == 0, trained.stderr

    def test_on(cache: Path, name: str) -> dict[str, Any]:
        output = tmp_path / name / "results.json"
        done = mlvicx("transfer", "--model", run, "--dataset", cache, "--output", output)
        assert done.returncode == 0, done.stderr
        assert f"test AUROC macro {'':18s} {json.loads(output.read_text())['test']['auroc_macro']:.4f}" in done.stdout
        assert "Pleural effusion: Effusion of the model" in done.stdout
        return json.loads(output.read_text())

    found = test_on(there, "abroad")
    with (tmp_path / "abroad" / "test_predictions.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == found["counts"]["test"]["images"] == 24
    for name in ("Pleural effusion", "Pleural thickening"):
        labels, scores = ([float(entry[f"{kind}:{name}"]) for entry in table] for kind in ("label", "probability"))
        assert found["test"]["auroc"][name] == pytest.approx(roc_auc_score(labels, scores), abs=1e-9)

    own, expected = test_on(home, "own")["test"], json.loads((run / "results.json").read_text())["test"]
    assert own["auroc_macro"] == pytest.approx(expected["auroc_macro"], abs=1e-6)
    assert own["auroc"]["Pleural effusion"] == pytest.approx(expected["auroc"]["Effusion"], abs=1e-6)


def test_a_users_error(tmp_path: Path):
    words = ("--model", tmp_path, "--dataset", tmp_path / "absent", "--output", tmp_path / "out.json")
    assert_users_error(mlvicx("transfer", *words), "absent: no such folder; expected a prepared cache")
    assert list(tmp_path.iterdir()) == []


def test_no_script_hides_a_package():
    """The folder of a running script is searched first: scripts/evaluate.py would be everybody's `import evaluate`."""
    names = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    assert "evaluate_classifier" in names
    assert names & ({*packages_distributions()} | sys.stdlib_module_names) == set()
