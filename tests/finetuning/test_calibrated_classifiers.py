"""Classifiers calibrated on validation: what is saved is what was scored, and everything that loads it agrees."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache
from scipy.special import expit, logit, softmax
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

from mlvicx_hf.common.arguments import from_values
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.finetuning.arguments import CLASSIFICATION_SECTIONS, ClassifierArguments
from mlvicx_hf.finetuning.calibration import calibrate
from mlvicx_hf.finetuning.classification import finetune_classifier, load_classifier
from mlvicx_hf.prediction.answers import Answers
from mlvicx_hf.prediction.prediction import predict
from mlvicx_hf.scoring.labels import score_decisions, youden_thresholds

HASHES = {"split_hash": "a", "data_hash": "b"}
FINDINGS = ["disc", "rare", "stripes"]  # in the order of the cache
CLASSES = ["disc", "normal", "stripes"]
SPLITS = ("train", "train", "validation", "test")  # of every fourth patient
HOW: dict[str, Any] = {"freeze_backbone": True, "fast_probe": True, "num_train_epochs": 6, "learning_rate": 1e-2}
HOW |= {"band_level": 0.8, "use_cpu": True, "allow_leak": True}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Findings with wrong labels in places, so that no threshold separates them; exclusive classes likewise."""
    folder, rng = tmp_path_factory.mktemp("caches"), np.random.default_rng(0)
    findings: list[dict[str, Any]] = []
    classes: list[dict[str, Any]] = []
    for number in range(400):
        row = {"patient_id": f"p{number}", "split": SPLITS[number % 4]}
        drawn = {"disc": bool(rng.random() < 0.5), "stripes": bool(rng.random() < 0.35)}
        labels: dict[str, Any] = {name: int(value != (rng.random() < 0.15)) for name, value in drawn.items()}
        labels["disc"] = "" if rng.random() < 0.1 else labels["disc"]
        labels = {"disc": labels["disc"], "rare": int(rng.random() < 0.1), "stripes": labels["stripes"]}
        findings.append(row | labels | {"_draw": drawn})
        shown = CLASSES[rng.integers(3)]
        classes.append(row | {"label": CLASSES[rng.integers(3)] if rng.random() < 0.3 else shown})
        classes[-1]["_draw"] = {shown: True}
    return {"findings": make_cache(folder, findings, name="findings"), "classes": make_cache(folder, classes)}


@pytest.fixture(scope="module")
def runs(caches: dict[str, Path], pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run on the findings, one on the classes, and one that fine-tunes the encoder."""
    folder = tmp_path_factory.mktemp("runs")
    how: dict[str, dict[str, Any]] = {"findings": HOW | {"positive_weights": "balanced"}, "classes": HOW}
    how["tuned"] = how["findings"] | {
        "freeze_backbone": False,
        "fast_probe": False,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
    }
    for kind, values in how.items():
        cache = caches["classes" if kind == "classes" else "findings"]
        given = {"output_dir": folder / kind, "model": str(pretrained), "dataset": str(cache)}
        finetune_classifier(*from_values(CLASSIFICATION_SECTIONS, given | values))
    return {kind: folder / kind for kind in how}


def results_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def table_of(file: Path, kind: str, names: list[str]) -> np.ndarray:
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    return np.array([[float(row[f"{kind}:{name}"] or "nan") for name in names] for row in rows])


@pytest.fixture(scope="module")
def predicted(
    caches: dict[str, Path], runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What `predict` says of the files of the test images, in their order."""
    found = {}
    for kind, run in runs.items():
        folder = tmp_path_factory.mktemp(kind)
        images = load_cache(caches["classes" if kind == "classes" else "findings"]).datasets["test"]["image"]
        files = [folder / f"{number:03}.png" for number in range(len(images))]
        for file, image in zip(files, images, strict=True):
            image.save(file)
        found[kind] = folder / "out.csv"
        predict(str(run), files, found[kind], num_workers=0, device="cpu", progress=False)
    return found


@pytest.mark.parametrize("kind", ["findings", "tuned"])
def test_the_saved_findings_are_those_that_were_scored(kind: str, runs: dict[str, Path], predicted: dict[str, Path]):
    results, file = results_of(runs[kind]), runs[kind] / "test_predictions.csv"
    written, labels = table_of(file, "probability", FINDINGS), table_of(file, "label", FINDINGS)
    given = table_of(predicted[kind], "probability", FINDINGS)
    np.testing.assert_allclose(given, written, atol=2e-5)
    # results.json before and after: the second is of the saved model, the first of its logits without the fit
    calibration, scored = results["calibration"], results["test"]["calibration"]
    for i, name in enumerate(FINDINGS):
        known, fit = ~np.isnan(labels[:, i]), calibration["values"][name]
        after, truth = written[known, i], labels[known, i]
        scale, shift = (1, 0) if fit is None else (fit["scale"], fit["shift"])
        logits = (logit(after) - shift) / scale  # some are so large that probabilities would be equal
        before = expit(logits)
        assert scored["after"]["brier"][name] == pytest.approx(np.mean((after - truth) ** 2))
        assert scored["before"]["brier"][name] == pytest.approx(np.mean((before - truth) ** 2), abs=1e-6)
        assert roc_auc_score(truth, logits) == pytest.approx(results["test"]["auroc"][name])
    assert scored["after"]["brier_macro"] != scored["before"]["brier_macro"]
    decided = table_of(predicted[kind], "decision", FINDINGS)
    found = score_decisions(decided, labels, dict.fromkeys(FINDINGS, 1))
    assert found == results["test"]["decisions"]


@pytest.mark.parametrize("kind", ["findings", "tuned"])
def test_answers_are_those_that_were_scored(kind: str, runs: dict[str, Path], predicted: dict[str, Path]):
    results = results_of(runs[kind])
    labels = table_of(runs[kind] / "test_predictions.csv", "label", FINDINGS)
    with predicted[kind].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[-3:] == [f"answer:{name}" for name in FINDINGS]
    assert set(results["test"]["answers"]["labels"]) == set(results["calibration"]["values"]) - {"rare"}
    for name, scores in results["test"]["answers"]["labels"].items():
        truth = labels[:, FINDINGS.index(name)]
        answers = np.array([row[f"answer:{name}"] for row in rows])
        assert set(answers) >= {"absent", "present"}
        assert scores["unsure"] == pytest.approx(np.mean(answers[~np.isnan(truth)] == "unsure"))
        assert scores["error_positives"] == pytest.approx(np.mean(answers[truth == 1] == "absent"))
        assert scores["error_negatives"] == pytest.approx(np.mean(answers[truth == 0] == "present"))
    low, high = results["calibration"]["bands"]["disc"]
    for row in rows:
        value = float(row["probability:disc"])
        assert row["answer:disc"] == ("absent" if value < low else "present" if value > high else "unsure")


def test_a_rare_finding_is_left_alone_and_said(
    runs: dict[str, Path], predicted: dict[str, Path], caches: dict[str, Path]
):
    results = results_of(runs["findings"])
    calibration, config = results["calibration"], json.loads((runs["findings"] / "config.json").read_text())
    labels = np.array(load_cache(caches["findings"]).datasets["validation"]["labels"])
    counts = {name: [int((labels[:, i] == value).sum()) for value in (1, 0)] for i, name in enumerate(FINDINGS)}
    assert calibration["counts"] == counts
    few, many = counts["rare"]
    assert few < 20 <= min(counts["disc"])
    assert calibration["values"]["rare"] is None
    assert calibration["bands"]["rare"] is None
    reason = f"{few} positives and {many} negatives in the validation split; expected 20 of each at least"
    assert calibration.pop("not_fitted") == {"rare": reason}
    assert config["calibration"] == calibration
    assert (calibration["method"], calibration["folded"]) == ("platt", True)
    assert (calibration["level"], calibration["split"]) == (0.8, "validation")
    assert calibration["split_hash"] == results["data"]["split_hash"]
    assert calibration["data_hash"] == results["data"]["data_hash"]
    with predicted["findings"].open(newline="") as file:
        assert {row["answer:rare"] for row in csv.DictReader(file)} == {""}
    both = [results["test"]["calibration"][when] for when in ("before", "after")]
    assert both[0]["brier"]["rare"] == both[1]["brier"]["rare"]


def test_exclusive_classes_have_one_temperature(runs: dict[str, Path], predicted: dict[str, Path]):
    results, file = results_of(runs["classes"]), runs["classes"] / "test_predictions.csv"
    written, labels = table_of(file, "probability", CLASSES), table_of(file, "label", CLASSES)
    np.testing.assert_allclose(table_of(predicted["classes"], "probability", CLASSES), written, atol=2e-5)
    calibration, scored = results["calibration"], results["test"]["calibration"]
    assert (calibration["method"], calibration["not_fitted"]) == ("temperature", {})
    temperature = calibration["values"]["temperature"]
    assert temperature != pytest.approx(1, abs=1e-3)
    before = softmax(np.log(written) * temperature, axis=1)
    for when, values in {"before": before, "after": written}.items():
        assert scored[when]["brier_macro"] == pytest.approx(np.mean((values - labels) ** 2), abs=1e-6)
    with predicted["classes"].open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0])[-2:] == ["class", "answer"]
    answers, truth = np.array([row["answer"] for row in rows]), np.array(CLASSES)[labels.argmax(1)]
    for row, values in zip(rows, written, strict=True):
        possible = [
            name for name, value in zip(CLASSES, values, strict=True) if value >= calibration["bands"]["lowest"]
        ]
        assert row["answer"] == (possible[0] if len(possible) == 1 else "unsure")
    found, answered = results["test"]["answers"], answers != "unsure"
    assert 0 < answered.sum() < len(rows)
    assert found["unsure"] == pytest.approx(np.mean(~answered))
    assert found["error"] == pytest.approx(np.mean((answers != truth)[answered]))
    normal = found["labels"]["normal"]["error_positives"]
    assert normal == pytest.approx(np.mean(answered[truth == "normal"] & (answers != truth)[truth == "normal"]))


@pytest.mark.parametrize("kind", ["findings", "classes"])
def test_pipeline_and_auto_model_give_the_calibrated_probabilities(
    kind: str, runs: dict[str, Path], predicted: dict[str, Path]
):
    names = CLASSES if kind == "classes" else FINDINGS
    given = table_of(predicted[kind], "probability", names)[:4]
    files = sorted(predicted[kind].parent.glob("*.png"))[:4]
    found = pipeline("image-classification", model=str(runs[kind]), device="cpu")(list(map(str, files)), top_k=None)
    for row, scores in zip(given, found, strict=True):
        by_name = {score["label"]: score["score"] for score in scores}
        assert [by_name[name] for name in names] == pytest.approx(row.tolist(), abs=2e-5)
    model = AutoModelForImageClassification.from_pretrained(runs[kind])
    AutoImageProcessor.from_pretrained(runs[kind])
    assert model.config.calibration == json.loads((runs[kind] / "config.json").read_text())["calibration"]


@pytest.mark.parametrize("kind", ["findings", "classes"])
def test_a_calibrated_classifier_as_start_brings_no_calibration(
    kind: str, runs: dict[str, Path], caches: dict[str, Path]
):
    model, _ = load_classifier(ClassifierArguments(str(runs[kind])), load_cache(caches["findings"]))
    assert model.config.calibration is None


def test_folding_gives_the_calibrated_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (200, 2))
    labels = (rng.random((200, 2)) < expit(logits / 3 - 1)).astype(float)
    found = calibrate(logits, labels, ["a", "b"], 0.9, HASHES)
    assert found.not_fitted == {}
    layer = nn.Linear(5, 2).double()
    features = torch.randn(7, 5, dtype=torch.float64)
    with torch.no_grad():
        before = layer(features).numpy()
        found.fold(layer)
        np.testing.assert_allclose(layer(features).numpy(), found.apply(before), rtol=1e-12)
    values = found.record["values"]
    np.testing.assert_allclose(found.apply(logits)[:, 1], values["b"]["scale"] * logits[:, 1] + values["b"]["shift"])
    calibrated = expit(found.apply(logits))
    thresholds = youden_thresholds(calibrated, labels, ["a", "b"])
    before_it = youden_thresholds(expit(logits), labels, ["a", "b"])
    for i, name in enumerate("ab"):  # the same images are present by both
        np.testing.assert_array_equal(calibrated[:, i] >= thresholds[name], expit(logits)[:, i] >= before_it[name])


def test_what_would_turn_the_ranking_round_is_not_fitted():
    rng = np.random.default_rng(0)
    labels = np.stack([rng.random(100) < 0.4, rng.random(100) < 0.4], 1).astype(float)
    labels[:60, 1] = np.nan
    logits = np.stack([-labels[:, 0] + rng.normal(0, 1, 100), rng.normal(0, 1, 100)], 1)
    found = calibrate(logits, labels, ["a", "b"], 0.9, HASHES)
    assert "which would turn the ranking round" in found.not_fitted["a"]
    assert "in the validation split; expected 20" in found.not_fitted["b"]  # of 40 known labels
    assert found.record["values"] == found.record["bands"] == {"a": None, "b": None}
    np.testing.assert_array_equal(found.apply(logits), logits)


def test_exclusive_classes_with_few_images_have_no_temperature():
    logits, classes = np.random.default_rng(0).normal(0, 1, (60, 3)), np.repeat([0, 1, 2], [21, 20, 19])
    found = calibrate(logits, classes, ["a", "b", "c"], 0.9, HASHES)
    assert found.not_fitted == {
        "a": "too few images of c",  # the one temperature is of all classes
        "b": "too few images of c",
        "c": "19 images in the validation split; expected 20 of each at least",
    }
    assert (found.record["values"], found.record["bands"]) == ({"temperature": None}, None)
    assert found.record["counts"] == {"a": [21, 39], "b": [20, 40], "c": [19, 41]}
    assert found.score_answers(softmax(logits, axis=1), np.eye(3)[classes], ["a", "b", "c"])["unsure"] == "n/a"


def test_classes_that_are_all_right_have_no_temperature_and_none_is_calibrated():
    classes = np.repeat([0, 1], 25)
    found = calibrate(np.eye(2)[classes] * 9, classes, ["a", "b"], 0.9, HASHES)
    assert found.record["values"] == {"temperature": None}
    assert set(found.not_fitted) == {"a", "b"}
    assert Answers(["a", "b"], found.record, exclusive=True).uncalibrated == ["a", "b"]


@pytest.mark.parametrize("level", [0.5, 1.0, -1.0])
def test_a_level_outside_its_range(level: float, caches: dict[str, Path], pretrained: Path, tmp_path: Path):
    given = {"output_dir": tmp_path / "run", "model": str(pretrained), "dataset": str(caches["findings"])}
    with pytest.raises(UserError, match=rf"band_level={level} found; expected a number above 0\.5 and below 1"):
        finetune_classifier(*from_values(CLASSIFICATION_SECTIONS, given | {"band_level": level}))
