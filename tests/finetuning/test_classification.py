"""Classification: frozen and fine-tuned, what is written, label fractions, and what cannot be done."""

import csv
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections import Counter
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from helpers import make_cache, tiny_config, unlabelled_cache
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

from mlvicx_hf import MLVICXForImageClassification, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.common.arguments import from_values
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.split_files import read_split_file
from mlvicx_hf.encoders.features import encode
from mlvicx_hf.encoders.loading import load_image_processor
from mlvicx_hf.finetuning import training
from mlvicx_hf.finetuning.arguments import (
    CLASSIFICATION_SECTIONS,
    ClassificationArguments,
    ClassifierArguments,
    LabelledDataArguments,
)
from mlvicx_hf.finetuning.classification import (
    Classification,
    balanced_weights,
    finetune_classifier,
    load_classifier,
    load_labelled_cache,
)
from mlvicx_hf.finetuning.data import LabelledImages, select_training, with_splits
from mlvicx_hf.finetuning.linear_probe import FeatureStore, LinearProbe
from mlvicx_hf.finetuning.training import BalancedTrainer, trainer_settings

FROZEN: dict[str, Any] = {"freeze_backbone": True, "num_train_epochs": 8, "learning_rate": 1e-2}
HOW = {
    "fast": FROZEN | {"fast_probe": True},
    "frozen": FROZEN,
    "tuned": {"positive_weights": "balanced", "learning_rate": 1e-3},
}
SPLIT_OF = {0: "test", 1: "validation"}


def split_of(patient: int) -> str:
    return SPLIT_OF.get(patient % 5, "train")


def labelled_rows(count: int = 120, unknown: bool = False) -> list[dict[str, Any]]:
    """Discs and stripes, two images a patient; some labels unknown."""
    rows: list[dict[str, Any]] = []
    generator = np.random.default_rng(0)
    for number in range(count):
        truth = {"disc": bool(generator.random() < 0.5), "stripes": bool(generator.random() < 0.4)}
        row: dict[str, Any] = {"patient_id": f"p{number // 2}", "split": split_of(number // 2), "_draw": truth}
        for name, value in truth.items():
            row[name] = "" if unknown and generator.random() < 0.2 else int(value)
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("labelled"), labelled_rows(unknown=True))


def run(output: Path, model: object, dataset: Path, **values: Any) -> dict[str, Any]:
    usual = {"output_dir": output, "model": str(model), "dataset": str(dataset), "num_train_epochs": 3, "use_cpu": True}
    return finetune_classifier(*from_values(CLASSIFICATION_SECTIONS, usual | values))


def rows_of(output: Path) -> list[dict[str, str]]:
    with (output / "test_predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(cache: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for kind, values in HOW.items():
        run(folder / kind, pretrained, cache, **values)
    return {kind: folder / kind for kind in HOW}


@pytest.fixture(scope="module")
def frozen(runs: dict[str, Path]) -> Path:
    return runs["frozen"]


@pytest.fixture(scope="module")
def tuned(runs: dict[str, Path]) -> Path:
    return runs["tuned"]


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(HOW))
def test_results_say_what_was_measured_on_what(kind: str, cache: Path, pretrained: Path, runs: dict[str, Path]):
    output = runs[kind]
    results = json.loads((output / "results.json").read_text())
    loaded = load_cache(cache)
    assert results["task"] == "classification"
    assert results["protocol"] == ("finetuned" if kind == "tuned" else "frozen")
    assert results["model"] == str(pretrained)
    assert results["seed"] == 0
    assert results["labels"] == ["disc", "stripes"]
    assert results["counts"] == {  # without 4 images of which no label is known
        "train": {"images": 70, "patients": 36},
        "validation": {"images": 24, "patients": 12},
        "test": {"images": 22, "patients": 12},
    }
    assert results["data"]["data_hash"] == loaded.manifest["data_hash"]
    assert results["data"]["split_hash"] == loaded.manifest["split_hash"]
    assert results["data"]["label_hash"] == loaded.manifest["label_hash"]
    assert results["data"]["synthetic"] is False
    assert results["max_train_samples"] is None
    assert results["code"]["commit"]
    assert results["hyperparameters"]["fast_probe"] is (kind == "fast")
    assert results["hyperparameters"]["learning_rate"] == (1e-3 if kind == "tuned" else 1e-2)
    assert 1 <= results["best_epoch"] <= results["epochs_trained"]
    for split in ("validation", "test"):
        scores = results[split]["auroc"]
        assert set(scores) == {"disc", "stripes"}
        assert results[split]["auroc_macro"] == pytest.approx(np.mean(list(scores.values())))
        assert 0 <= results[split]["accuracy"] <= 1
    assert {file.name for file in output.iterdir()} == {
        *("config.json", "model.safetensors", "preprocessor_config.json"),
        *("results.json", "splits.csv", "test_predictions.csv"),
    }


@pytest.mark.parametrize("kind", list(HOW))
def test_the_saved_model_gives_the_predictions_and_these_the_score(kind: str, cache: Path, runs: dict[str, Path]):
    output = runs[kind]
    test = load_labelled_cache(str(cache)).datasets["test"]
    rows = rows_of(output)
    assert [row["source"] for row in rows] == test["source"]  # every image once, in order
    assert [row["patient_id"] for row in rows] == test["patient_id"]
    model = AutoModelForImageClassification.from_pretrained(output).eval()
    assert model.config.id2label == {0: "disc", 1: "stripes"}
    assert model.config.problem_type == "multi_label_classification"
    processor = AutoImageProcessor.from_pretrained(output)
    with torch.no_grad():
        probabilities = model(**processor(list(test["image"]))).logits.sigmoid().numpy()
    written = np.array([[float(row[f"probability:{name}"]) for name in ("disc", "stripes")] for row in rows])
    np.testing.assert_allclose(written, probabilities, atol=2e-5)
    scores = json.loads((output / "results.json").read_text())["test"]["auroc"]
    for column, name in enumerate(("disc", "stripes")):
        truth = [row[f"label:{name}"] for row in rows]
        assert truth == ["" if math.isnan(labels[column]) else str(int(labels[column])) for labels in test["labels"]]
        known = [i for i, value in enumerate(truth) if value]
        assert 0 < len(known) < len(rows)
        expected = roc_auc_score([int(truth[i]) for i in known], written[known, column])
        assert scores[name] == pytest.approx(expected, abs=2e-3)  # six decimals may make ties


def test_the_task_is_learned(frozen: Path):
    assert json.loads((frozen / "results.json").read_text())["test"]["auroc"]["stripes"] > 0.9


# -- the frozen protocol -----------------------------------------------------------------------------------------------


def test_frozen_leaves_the_encoder_bit_for_bit(frozen: Path, pretrained: Path):
    ours, source = load_file(frozen / "model.safetensors"), load_file(pretrained / "model.safetensors")
    encoder = [name for name in source if name.startswith("mlvicx.")]
    assert {name for name in ours if name.startswith("mlvicx.")} == set(encoder)
    assert all(torch.equal(ours[name], source[name]) for name in encoder)


def test_finetuning_moves_the_encoder(tuned: Path, pretrained: Path):
    ours, source = load_file(tuned / "model.safetensors"), load_file(pretrained / "model.safetensors")
    moved = [name for name in source if name.startswith("mlvicx.") and not torch.equal(ours[name], source[name])]
    assert "mlvicx.backbone.conv1.0.weight" in moved
    assert "mlvicx.context.0.channel.weight" in moved
    assert len(json.loads((tuned / "config.json").read_text())["positive_weights"]) == 2


def test_cached_features_change_nothing(frozen: Path, cache: Path, pretrained: Path, tmp_path: Path):
    run(tmp_path / "run", pretrained, cache, **FROZEN, cache_features=False)
    one, other = (json.loads((p / "results.json").read_text()) for p in (frozen, tmp_path / "run"))
    assert one["hyperparameters"]["cache_features"]
    assert not other["hyperparameters"]["cache_features"]
    assert one["test"]["auroc"] == pytest.approx(other["test"]["auroc"], abs=1e-3)
    for row, again in zip(rows_of(frozen), rows_of(tmp_path / "run"), strict=True):
        for name in ("probability:disc", "probability:stripes"):
            assert float(row[name]) == pytest.approx(float(again[name]), abs=1e-4)


def test_the_fast_probe_learns_as_the_trainer_does(cache: Path, pretrained: Path, tmp_path: Path):
    """The same optimiser, batches and stopping rule: the same epochs and scores but for rounding."""
    how = FROZEN | {"num_train_epochs": 60, "patience": 4, "seed": 3, "weight_decay": 0.01}
    how |= {"per_device_train_batch_size": 16}
    slow, fast = (run(tmp_path / str(flag), pretrained, cache, **how, fast_probe=flag) for flag in (False, True))
    assert fast["test"]["auroc_macro"] == pytest.approx(slow["test"]["auroc_macro"], abs=0.005)
    assert (fast["epochs_trained"], fast["best_epoch"]) == (slow["epochs_trained"], slow["best_epoch"])
    for one, other in zip(rows_of(tmp_path / "True"), rows_of(tmp_path / "False"), strict=True):
        for name in ("disc", "stripes"):
            key = f"probability:{name}"
            assert float(one[key]) == pytest.approx(float(other[key]), abs=1e-3)
    assert fast["test"]["auroc"]["stripes"] > 0.9
    assert fast["epochs_trained"] == fast["best_epoch"] + 4 < 60  # the patience


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze_backbone": False}, "fast_probe found; expected freeze_backbone as well"),
        ({"cache_features": False}, "fast_probe found"),
        ({"augment": True}, "augment found with features that are computed once; expected cache_features=false"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2 found with fast_probe; expected 1"),
        ({"report_to": "tensorboard"}, "report_to=.*tensorboard.* found with fast_probe"),
        ({"trainer_options": {"eval_on_start": True}}, "eval_on_start=True found with fast_probe; expected False"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type=reduce_lr_on_plateau found with fast_probe"),
    ],
)
def test_what_the_fast_probe_refuses(
    values: dict[str, Any], message: str, cache: Path, pretrained: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", pretrained, cache, **HOW["fast"] | values)


def test_labels_with_a_single_value_are_named(
    cache: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    rows = [row | {"stripes": 1} if row["split"] == "train" else row for row in labelled_rows(unknown=True)]
    path = make_cache(tmp_path, rows)
    with caplog.at_level(logging.WARNING):
        run(tmp_path / "run", pretrained, path, **HOW["fast"])
    assert "labels with a single value in train, so no classifier can learn them: stripes" in caplog.text
    assert "in test" not in caplog.text
    rows = [row | {"disc": 0} if row["split"] == "train" else row for row in rows]
    path = make_cache(tmp_path, rows, name="constant")
    with pytest.raises(UserError, match="no label has both values in the 72 training images that were chosen"):
        run(tmp_path / "other", pretrained, path, **HOW["fast"])
    assert not (tmp_path / "other").exists()


def test_images_are_moved_and_norms_frozen_as_asked(cache: Path, pretrained: Path, tmp_path: Path):
    how = FROZEN | {"cache_features": False, "num_train_epochs": 1, "learning_rate": 1e-2}
    still, moved = (run(tmp_path / str(flag), pretrained, cache, **how, augment=flag) for flag in (None, True))
    assert (still["hyperparameters"]["augment"], moved["hyperparameters"]["augment"]) == (False, True)
    assert still["test"]["auroc_macro"] != moved["test"]["auroc_macro"]
    for asked, frozen in ((None, False), (True, True)):
        how = {"architecture": str(pretrained), "freeze_batch_norm": asked, "num_train_epochs": 1}
        results = run(tmp_path / f"random {asked}", "random", cache, **how)
        assert (results["hyperparameters"]["freeze_batch_norm"], results["batch_norm_frozen"]) == (True, frozen)
        steps = load_file(tmp_path / f"random {asked}" / "model.safetensors")
        assert all((value == 0) == frozen for name, value in steps.items() if name.endswith("num_batches_tracked"))


@pytest.mark.parametrize("kind", ["frozen", "fast"])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type=cosine_with_min_lr, .* which do not fit: "),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "which do not fit: .*num_decay_steps"),
        ({"trainer_options": {"adam_beta1": 2.0}}, "which do not fit: Invalid beta"),
        ({"trainer_options": {"run_name": date(2024, 5, 1)}}, r"run_name=datetime.date\(2024, 5, 1\) found; expected"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_work(
    kind: str, values: dict[str, Any], message: str, cache: Path, pretrained: Path, tmp_path: Path
):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", pretrained, cache, **HOW[kind] | values)
    assert list(tmp_path.iterdir()) == []


def test_results_that_cannot_be_written_leave_no_half_run(
    cache: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patched:
        patched.setattr(training, "describe_run", lambda *rest: {"hyperparameters": {}, "when": date(2024, 5, 1)})
        with pytest.raises(TypeError, match="not JSON serializable"):
            run(tmp_path / "run", pretrained, cache, **HOW["fast"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".unfinished"]
    run(tmp_path / "run", pretrained, cache, **HOW["fast"], max_train_samples=20)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["max_train_samples"], results["counts"]["train"]["images"]) == (20, 20)


def test_a_store_encodes_every_image_once(cache: Path, pretrained: Path):
    counts: list[int] = []
    store = FeatureStore()
    images = load_cache(cache)
    arguments = ClassifierArguments(str(pretrained))
    model, processor = load_classifier(arguments, images)
    model.mlvicx.register_forward_hook(lambda module, inputs, output: counts.append(len(inputs[0])))
    validation = LabelledImages(images.datasets["validation"], processor, False, "hash")
    few = validation.rows(range(3))
    device = torch.device("cpu")
    some = store.encode(model.mlvicx, few, 2, device)
    everything = store.encode(model.mlvicx, validation, 64, device)
    assert counts == [2, 2, 64]  # 3 images in batches of 2, and in one of 64 those that were lacking
    torch.testing.assert_close(everything["features"][:3], some["features"], rtol=0, atol=0)
    plain = encode(model.mlvicx, validation)
    torch.testing.assert_close(everything["features"], plain["features"])
    torch.testing.assert_close(everything["labels"], plain["labels"], equal_nan=True)
    store.encode(
        model.mlvicx, LabelledImages(images.datasets["validation"], processor, False, "other data"), 64, device
    )
    assert counts[3:] == [64, 64]  # plain, and the other data
    with torch.no_grad():
        next(model.mlvicx.parameters()).mul_(1.5)  # another encoder
    store.encode(model.mlvicx, few, 64, device)
    assert len(counts) == 6
    for placement in ("taps", "between"):  # the same weights, used otherwise
        model.mlvicx.config.context_placement = placement
        store.encode(model.mlvicx, few, 64, device)
    assert len(counts) == 8


def test_other_squares_of_the_same_images_have_features_of_their_own(pretrained: Path, tmp_path: Path):
    rows = [{"patient_id": f"p{i}", "split": "train", "disc": i % 2, "_draw": {"disc": i % 2 == 1}} for i in range(6)]
    caches = [load_cache(make_cache(tmp_path, rows, size=size, name=f"{size}")) for size in (32, 24)]
    assert caches[0].manifest["data_hash"] == caches[1].manifest["data_hash"]
    model, processor = load_classifier(ClassifierArguments(str(pretrained)), caches[0])
    sets = [LabelledImages(cache.datasets["train"], processor, cache.exclusive, cache.digest) for cache in caches]
    store = FeatureStore()
    for images in sets:
        found = store.encode(model.mlvicx, images, 8, torch.device("cpu"))["features"]
        torch.testing.assert_close(found, encode(model.mlvicx, images, 8)["features"], rtol=0, atol=0)


def test_a_store_keeps_all_levels_whatever_the_model_pools(cache: Path, pretrained: Path):
    images, store = load_cache(cache), FeatureStore()
    for levels in ("last", "all"):
        model, processor = load_classifier(ClassifierArguments(str(pretrained), pooled_levels=levels), images)
        few = LabelledImages(images.datasets["validation"], processor, False).rows(range(3))
        found = store.encode(model.mlvicx, few, 4, torch.device("cpu"))["features"]
        torch.testing.assert_close(found, encode(model.mlvicx, few, 4)["features"], rtol=0, atol=0)
        assert model.config.pooled_levels == levels
    assert len(store.encoders) == 1


def test_folding_keeps_the_logits():
    torch.manual_seed(0)
    model = MLVICXForImageClassification(tiny_config(num_labels=3)).eval()
    x = torch.randn(6, 1, 32, 32)
    with torch.no_grad():
        features = model.mlvicx(x).pooler_output
        probe = LinearProbe(model, features, encode=False)
        before = probe(features=features)["logits"]
        probe.fold()
        torch.testing.assert_close(model(x).logits, before, rtol=1e-4, atol=1e-5)
    assert not any(p.requires_grad for p in model.mlvicx.parameters())


def test_the_probe_works_on_a_feature_that_never_varies():
    model = MLVICXForImageClassification(tiny_config(num_labels=1))
    features = torch.randn(8, 96)
    features[:, 3] = 5.0
    probe = LinearProbe(model, features, encode=False)
    assert probe(features=features)["logits"].isfinite().all()


class Reached(Exception):
    """The Trainer would begin."""


def test_training_images_move_and_others_stay(
    cache: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    reached: list[dict[str, Any]] = []

    def begin(model: object, splits: dict[str, Any], *args: object, **options: object) -> None:
        reached.append(splits)
        raise Reached

    monkeypatch.setattr("mlvicx_hf.finetuning.classification.train_with_trainer", begin)
    for how in ({}, {"augment": False}, FROZEN):
        with pytest.raises(Reached):
            run(tmp_path / str(len(reached)), pretrained, cache, **how)
    moved, still, features = reached
    first, again = (moved["train"][0] for _ in range(2))
    assert not torch.equal(first["pixel_values"], again["pixel_values"])
    assert torch.equal(first["labels"], still["train"][0]["labels"])
    assert torch.equal(still["train"][0]["pixel_values"], still["train"][0]["pixel_values"])
    assert torch.equal(moved["validation"][0]["pixel_values"], still["validation"][0]["pixel_values"])
    assert set(features["train"][0]) == {"features", "labels"}


def test_fine_tuning_keeps_the_statistics_of_pretrained_weights(cache: Path, pretrained: Path, tmp_path: Path):
    before = AutoModel.from_pretrained(pretrained).state_dict()
    for number, (model, flag, kept) in enumerate(
        [(pretrained, True, True), (pretrained, False, False), ("random", True, False)]
    ):
        given = {"architecture": str(pretrained)} if model == "random" else {}
        how = {"freeze_batch_norm": flag, "num_train_epochs": 1, "learning_rate": 1e-2}
        results = run(tmp_path / str(number), model, cache, **how, **given)
        assert results["hyperparameters"]["freeze_batch_norm"] is flag
        found = AutoModel.from_pretrained(tmp_path / str(number)).state_dict()
        same = {torch.equal(found[name], before[name]) for name in before if "running_mean" in name}
        assert same == {kept}
        assert [name for name in before if name.endswith("weight") and not torch.equal(found[name], before[name])]


# -- repeatable, and with few labels -----------------------------------------------------------------------------------


def test_another_seed_gives_another_result(frozen: Path, cache: Path, pretrained: Path, tmp_path: Path):
    """That the same seed gives the same result is shown by `test_test_labels_choose_nothing`."""
    run(tmp_path / "run", pretrained, cache, **FROZEN, seed=1)
    assert rows_of(tmp_path / "run") != rows_of(frozen)


def test_label_fractions_are_nested_shares_of_the_training_patients(cache: Path):
    chosen, whole = {}, load_cache(cache)
    for fraction in (0.1, 0.3, 0.6, 1.0):
        loaded = select_training(whole, LabelledDataArguments(str(cache), label_fraction=fraction), seed=4)
        chosen[fraction] = set(loaded.datasets["train"]["patient_id"])
        assert len(loaded.datasets["test"]) == len(loaded.datasets["validation"]) == 24
        assert len(loaded.datasets["train"]) == 2 * len(chosen[fraction])
    assert len(whole.datasets["train"]) == 72
    assert chosen[0.1] < chosen[0.3] < chosen[0.6] < chosen[1.0]
    assert [len(patients) for patients in chosen.values()] == pytest.approx([4, 11, 22, 36], abs=1)


def test_a_run_lists_the_images_that_it_used(frozen: Path, cache: Path, pretrained: Path, tmp_path: Path):
    results = run(tmp_path / "run", pretrained, cache, **HOW["fast"], label_fraction=0.3)
    assert results["label_fraction"] == 0.3
    assert results["counts"]["train"]["patients"] == pytest.approx(11, abs=1)
    assert results["counts"]["test"] == {"images": 22, "patients": 12}
    content = (tmp_path / "run" / "splits.csv").read_bytes()
    assert hashlib.sha256(content).hexdigest() == results["data"]["used_hash"]
    used = read_split_file(tmp_path / "run" / "splits.csv")
    assert Counter(used.values()) == {split: counts["images"] for split, counts in results["counts"].items()}
    everything = json.loads((frozen / "results.json").read_text())["data"]
    assert len({everything["used_hash"], everything["split_hash"], results["data"]["used_hash"]}) == 3
    assert read_split_file(frozen / "splits.csv").items() >= used.items()


def test_the_precision_of_a_launcher_is_not_used_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    settings = trainer_settings(ClassificationArguments(output_dir=str(tmp_path)), 1e-3, tmp_path / "trainer")
    trainer = transformers.Trainer(torch.nn.Linear(1, 1), settings, eval_dataset=[{}])
    assert trainer.accelerator.mixed_precision == "no"
    assert "the launcher's mixed precision bf16 is not used" in caplog.text
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(UserError, match="dynamo found in the configuration of `accelerate launch`"):
        trainer_settings(ClassificationArguments(output_dir=str(tmp_path)), 1e-3, tmp_path / "trainer")


def test_patients_are_drawn_equally_often_on_request(cache: Path, frozen: Path, pretrained: Path, tmp_path: Path):
    patients = ["many"] * 20 + [f"p{i}" for i in range(20)]
    arguments = ClassificationArguments(output_dir=str(tmp_path), per_device_train_batch_size=8)
    settings = trainer_settings(arguments, 1e-3, tmp_path / "trainer")
    rows = [{"x": torch.tensor(i)} for i in range(40)]
    data = {"train_dataset": rows, "eval_dataset": rows}
    trainer = BalancedTrainer(torch.nn.Linear(1, 1), settings, **data, patients=patients)
    drawn = Counter(patients[i] for batch in trainer.get_train_dataloader() for i in batch["x"].tolist())
    assert (drawn.total(), set(drawn.values()), len(drawn)) == (40, {1, 2}, 21)

    results = run(tmp_path / "run", pretrained, cache, **FROZEN, patient_balanced=True)
    assert results["hyperparameters"]["patient_balanced"]
    assert not json.loads((frozen / "results.json").read_text())["hyperparameters"]["patient_balanced"]
    assert rows_of(tmp_path / "run") != rows_of(frozen)  # another order of the images


@pytest.mark.parametrize("how", list(HOW))
def test_test_labels_choose_nothing(
    how: str,
    cache: Path,
    pretrained: Path,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """With other test labels all but the test scores is the same; a planted leak would show.

    The test images are read once, after all others.
    """

    def flip(path: str, *words: Any) -> Cache:
        found = load_labelled_cache(path, *words)
        test = found.datasets["test"]
        flipped = [[1 - value for value in labels] for labels in test["labels"]]
        return with_splits(found, {"test": test.remove_columns("labels").add_column("labels", flipped)})

    def leak(path: str, *words: Any) -> Cache:
        found = flip(path, *words)
        return with_splits(found, {"validation": found.datasets["test"]})

    reads: list[str] = []
    original = LabelledImages.__getitem__

    def read(self: LabelledImages, index: int) -> Any:
        reads.append(self.images[index]["source"])
        return original(self, index)

    monkeypatch.setattr(LabelledImages, "__getitem__", read)
    monkeypatch.setattr("mlvicx_hf.finetuning.classification.load_labelled_cache", flip)
    honest = json.loads((runs[how] / "results.json").read_text())
    flipped = run(tmp_path / "flipped", pretrained, cache, **HOW[how])
    test = load_labelled_cache(str(cache)).datasets["test"]["source"][:]
    assert reads[-len(test) :] == test
    assert not set(reads[: -len(test)]) & set(test)
    assert flipped["test"]["auroc"]["disc"] == pytest.approx(1 - honest["test"]["auroc"]["disc"])
    for key in ("validation", "thresholds", "best_epoch", "epochs_trained"):
        assert flipped[key] == honest[key]
    one, other = ((folder / "model.safetensors").read_bytes() for folder in (runs[how], tmp_path / "flipped"))
    assert one == other
    if how == "fast":
        monkeypatch.setattr("mlvicx_hf.finetuning.classification.load_labelled_cache", leak)
        leaky = run(tmp_path / "leaky", pretrained, cache, **HOW[how])
        assert leaky["thresholds"] != honest["thresholds"]


def test_subgroups_decisions_and_precision_are_written(frozen: Path):
    results = json.loads((frozen / "results.json").read_text())
    assert set(results["test"]["auprc"]) == {"disc", "stripes"}
    rows = rows_of(frozen)
    for name, found in results["test"]["decisions"].items():
        threshold = results["thresholds"]["values"][name]
        positive = [row for row in rows if row[f"label:{name}"] == "1"]
        hits = [float(row[f"probability:{name}"]) >= threshold for row in positive]
        assert found["sensitivity"] == pytest.approx(np.mean(hits))
    assert list(rows[0])[:5] == ["source", "patient_id", "view", "sex", "age"]


def test_imagenet_weights_from_a_file(cache: Path, pretrained: Path, tmp_path: Path):
    """timm's weights fill the backbone, and there are no context blocks."""
    torch.manual_seed(5)
    backbone = timm.create_model("test_resnet", in_chans=3)
    save_file(backbone.state_dict(), tmp_path / "weights.safetensors")
    how = HOW["fast"] | {"architecture": str(pretrained)}
    results = run(tmp_path / "run", tmp_path / "weights.safetensors", cache, **how)
    assert results["model"].endswith("weights.safetensors")
    loaded = MLVICXForImageClassification.from_pretrained(tmp_path / "run")
    assert not loaded.config.use_context
    given = backbone.state_dict()["layer2.0.conv1.weight"]
    assert torch.equal(loaded.mlvicx.backbone["layer2"][0].conv1.weight, given)


def test_context_can_be_dropped_at_transfer(cache: Path, pretrained: Path, tmp_path: Path):
    results = run(tmp_path / "run", pretrained, cache, **HOW["fast"], drop_context=True)
    assert results["drop_context"]
    loaded = MLVICXForImageClassification.from_pretrained(tmp_path / "run")
    assert not loaded.config.use_context
    kept = load_file(pretrained / "model.safetensors")
    for name, tensor in loaded.mlvicx.backbone.state_dict().items():
        assert torch.equal(kept[f"mlvicx.backbone.{name}"], tensor)


def test_early_stopping_restores_the_best_epoch(cache: Path, pretrained: Path, tmp_path: Path):
    results = run(tmp_path / "run", pretrained, cache, freeze_backbone=True, num_train_epochs=60, patience=2)
    assert results["epochs_trained"] < 60
    assert results["epochs_trained"] == results["best_epoch"] + 2


def test_without_pretraining(cache: Path, pretrained: Path, tmp_path: Path):
    results = run(tmp_path / "run", "random", cache, **HOW["fast"], architecture=str(pretrained))
    assert results["model"] == "random"
    assert results["architecture"] == str(pretrained)
    ours, source = load_file(tmp_path / "run" / "model.safetensors"), load_file(pretrained / "model.safetensors")
    name = "mlvicx.backbone.conv1.0.weight"
    assert ours[name].shape == source[name].shape
    assert not torch.equal(ours[name], source[name])


def test_balanced_weights_leave_unknown_labels_out():
    labels = np.array([[1, 0, np.nan], [0, 0, 1], [0, np.nan, 1], [0, 0, np.nan]])
    assert balanced_weights(labels) == [3.0, 1.0, 1.0]


# -- exclusive classes -------------------------------------------------------------------------------------------------


def exclusive_rows(unknown: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number in range(90):
        label = ("disc", "normal", "stripes")[number % 3]
        rows.append(
            {
                "patient_id": f"p{number}",
                "split": split_of(number),
                "label": "" if unknown and number % 7 == 0 else label,
                "_draw": {label: True},
            }
        )
    return rows


@pytest.fixture(scope="module")
def exclusive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("exclusive"), exclusive_rows())


@pytest.mark.parametrize("frozen", [True, False])
def test_exclusive_classes(exclusive: Path, pretrained: Path, tmp_path: Path, frozen: bool):
    how = FROZEN if frozen else {"learning_rate": 1e-3, "num_train_epochs": 6}
    results = run(tmp_path / "run", pretrained, exclusive, **how)
    assert results["labels"] == ["disc", "normal", "stripes"]
    assert results["test"]["accuracy"] > 0.5
    assert set(results["test"]["auroc"]) == {"disc", "normal", "stripes"}
    rows = rows_of(tmp_path / "run")
    for row in rows:
        assert sum(float(v) for k, v in row.items() if k.startswith("probability:")) == pytest.approx(1, abs=1e-5)
        assert sum(int(v) for k, v in row.items() if k.startswith("label:")) == 1
    right = [max(("disc", "normal", "stripes"), key=lambda name: float(row[f"probability:{name}"])) for row in rows]
    accuracy = np.mean([row[f"label:{name}"] == "1" for row, name in zip(rows, right, strict=True)])
    assert results["test"]["accuracy"] == pytest.approx(accuracy)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert model.config.problem_type == "single_label_classification"


def test_images_of_unknown_class_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = make_cache(tmp_path, exclusive_rows(unknown=True))
    loaded = load_labelled_cache(str(path))
    for split, images in load_cache(path).datasets.items():
        known = [i for i, labels in enumerate(images["labels"]) if not math.isnan(labels[0])]
        assert len(known) < len(images)
        assert loaded.datasets[split]["source"][:] == images.select(known)["source"][:]
        assert f"{len(images) - len(known)} images of {split} have no known class and are left out" in caplog.text


# -- what cannot be scored, or done ------------------------------------------------------------------------------------


def test_labels_that_are_unknown_or_have_one_value(pretrained: Path, tmp_path: Path):
    """A label with one value in test is not scored, and an image without any known label is left out."""
    rows = labelled_rows(80)
    for row in rows:
        if row["split"] == "test":
            row["disc"] = 0
    for row in rows[::9]:
        row["disc"] = row["stripes"] = ""
    results = run(tmp_path / "run", pretrained, make_cache(tmp_path, rows), num_train_epochs=1)
    assert sum(counts["images"] for counts in results["counts"].values()) == len(rows) - len(rows[::9])
    assert results["test"]["auroc"]["disc"] == "n/a"
    assert results["test"]["num_scored_labels"] == 1
    assert results["test"]["auroc_macro"] == results["test"]["auroc"]["stripes"]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["test"]["auroc"]["disc"] == "n/a"
    assert math.isfinite(results["test"]["auroc_macro"])
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / "model.safetensors").values())


def test_a_last_batch_of_one_image(pretrained: Path, tmp_path: Path):
    cache, model = make_cache(tmp_path, labelled_rows(60)), tmp_path / "model"
    shutil.copytree(pretrained, model)
    MLVICXImageProcessor(image_size=64).save_pretrained(model)  # 2×2 maps: one value has no variance to normalise by
    few = {"max_train_samples": 17, "num_train_epochs": 1, "per_device_train_batch_size": 16}  # 16 and 1
    results = run(tmp_path / "run", model, cache, **few)
    assert results["counts"]["train"]["images"] == 17


@pytest.mark.parametrize(
    ("kept", "message"),
    [(("train", "validation"), "expected test as well"), (("train", "test"), "expected validation as well")],
)
def test_a_missing_split_is_an_error(pretrained: Path, tmp_path: Path, kept: tuple[str, ...], message: str):
    cache = make_cache(tmp_path, [row for row in labelled_rows(40) if row["split"] in kept])
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", pretrained, cache)
    assert not (tmp_path / "run").exists()


def test_a_validation_split_that_scores_nothing_is_an_error(pretrained: Path, tmp_path: Path):
    rows = labelled_rows(40)
    for row in rows:
        if row["split"] == "validation":
            row["disc"], row["stripes"] = 0, ""
    with pytest.raises(ValueError, match="no label has both values in the validation split"):
        run(tmp_path / "run", pretrained, make_cache(tmp_path, rows))


def test_checkpointing_that_a_backbone_does_not_have_is_refused(cache: Path, tmp_path: Path):
    MLVICXModel(tiny_config(backbone="efficientnet_lite0")).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(32).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="gradient checkpointing of backbone='efficientnet_lite0' found; expected a"):
        run(tmp_path / "run", tmp_path / "model", cache, gradient_checkpointing=True)


def test_images_with_one_class_alone_are_an_error(pretrained: Path, tmp_path: Path):
    rows = [row | {"disc": 1, "stripes": ""} for row in labelled_rows(40)]
    with pytest.raises(UserError, match="all images have the same value of disc where it is known"):
        run(tmp_path / "run", pretrained, make_cache(tmp_path, rows))


def test_no_labels_are_an_error(pretrained: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="has no labels; expected some"):
        run(tmp_path / "run", pretrained, unlabelled_cache(tmp_path, 12))


def test_what_an_interrupted_run_left_is_done_again(cache: Path, pretrained: Path, tmp_path: Path):
    (tmp_path / "out" / ".unfinished" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "out" / "..unfinished.writing").touch()
    run(tmp_path / "out", pretrained, cache, freeze_backbone=True, num_train_epochs=1)
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "model.safetensors", "splits.csv"} <= left
    assert not left & {".unfinished", "..unfinished.writing", "final"}


def test_what_a_run_left_that_was_killed_at_its_end_is_done_again(cache: Path, pretrained: Path, tmp_path: Path):
    """Some files had their place already."""
    (tmp_path / "out" / ".unfinished" / "final").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    run(tmp_path / "out", pretrained, cache, freeze_backbone=True, num_train_epochs=1)
    assert (tmp_path / "out" / "results.json").is_file()
    assert "labels" not in (tmp_path / "out" / "config.json").read_text()[:2]


def test_a_run_that_ended_meanwhile_is_not_written_over(
    cache: Path, pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Both runs found an empty folder; the second one waited while it loaded its model."""
    load = Classification._load_model

    def slowly(self: Any) -> Any:
        monkeypatch.setattr(Classification, "_load_model", load)
        run(tmp_path / "out", pretrained, cache, freeze_backbone=True, num_train_epochs=1)
        return load(self)

    monkeypatch.setattr(Classification, "_load_model", slowly)
    with pytest.raises(FileExistsError, match="out is there already"):
        run(tmp_path / "out", pretrained, cache, freeze_backbone=True, num_train_epochs=1, seed=3)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["seed"] == 0


def test_a_rate_that_is_too_high_is_told(cache: Path, pretrained: Path, tmp_path: Path):
    with pytest.raises(FloatingPointError, match="not finite found; expected a lower learning_rate"):
        run(tmp_path / "out", pretrained, cache, **HOW["fast"] | {"learning_rate": 1e38, "num_train_epochs": 2})


def test_balanced_weights_are_refused_for_exclusive_classes(exclusive: Path, pretrained: Path, tmp_path: Path):
    with pytest.raises(UserError, match="positive_weights='balanced' found for exclusive classes"):
        run(tmp_path / "out", pretrained, exclusive, positive_weights="balanced")


def test_a_head_is_new_even_where_an_earlier_one_would_fit(frozen: Path, cache: Path):
    """Otherwise the seed would draw nothing, and the weights would be of other features and labels."""
    images = load_cache(cache)
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model, _ = load_classifier(ClassifierArguments(str(frozen)), images)
        heads.append(model.classifier.weight.detach())
    trained = load_file(frozen / "model.safetensors")
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], trained["classifier.weight"])
    encoder = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("mlvicx.")}
    assert all(torch.equal(tensor, trained[name]) for name, tensor in encoder.items())


def test_a_start_in_half_precision_is_trained_in_whole(cache: Path, pretrained: Path, tmp_path: Path):
    model = AutoModel.from_pretrained(pretrained).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    MLVICXImageProcessor.from_pretrained(pretrained).save_pretrained(tmp_path / "half")
    results = run(tmp_path / "out", tmp_path / "half", cache, **HOW["fast"] | {"num_train_epochs": 1})
    assert results["test"]["auroc_macro"] > 0.5


def test_a_folder_in_use_is_refused(cache: Path, frozen: Path, pretrained: Path):
    before = (frozen / "results.json").read_bytes()
    with pytest.raises(FileExistsError, match="is there already; expected a new or an empty"):
        run(frozen, pretrained, cache)
    assert (frozen / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("label_fraction", 0, "fraction=0"),
        ("label_fraction", 1.5, "fraction=1.5"),
        ("positive_weights", "some", "positive_weights='some' found; expected one of none, balanced"),
        ("max_train_samples", 0, "max_train_samples=0"),
        ("metric_for_best_model", "accuracy", "metric_for_best_model='accuracy' found; expected auroc_macro: the mean"),
        ("eval_strategy", "steps", "eval_strategy='steps' found; expected epoch: every epoch is scored"),
        ("load_best_model_at_end", "false", "load_best_model_at_end='false' found; expected true: every epoch is"),
        ("save_total_limit", 3, "save_total_limit=3 found; expected 1: only the best epoch"),
        ("epochs", "1", "epochs found, which does not exist; did you mean num_train_epochs?"),
        ("lerning_rate", "1", "lerning_rate found, which does not exist; did you mean learning_rate"),
        ("adam_epsilon", "small", "argument --adam_epsilon.*small"),
        ("lr_scheduler_type", "zigzag", "zigzag is not a valid SchedulerType"),
        ("dataloader_drop_last", "true", "dataloader_drop_last='true' found; expected false: every image is scored"),
        ("resume_from_checkpoint", "there", "resume_from_checkpoint='there' found; expected none: an interrupted run"),
        ("max_steps", 0, "max_steps=0 found; expected 1 or more, or -1"),
        ("architecture", "other", "architecture='other' found with model=.*, which has its own"),
    ],
)
def test_arguments_that_do_not_fit(
    cache: Path, pretrained: Path, tmp_path: Path, flag: str, value: object, message: str
):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", pretrained, cache, **{flag: value})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["bf16_full_eval", "eval_delay", "train_sampling_strategy", "group_by_length"])
def test_what_would_break_the_protocol_is_refused_before_training(name: str, tmp_path: Path):
    value = {"eval_delay": "5", "train_sampling_strategy": "group_by_length"}.get(name, "true")
    with pytest.raises(UserError, match=rf"{name}='{value}' found; expected "):
        ClassificationArguments(str(tmp_path), trainer_options={name: value})


def test_patients_are_drawn_in_the_order_of_the_data_seed(cache: Path, pretrained: Path, tmp_path: Path):
    found = {}
    for kind in ("fast", "frozen"):
        for seed in (None, 7):
            how = HOW[kind] | {"patient_balanced": True, "trainer_options": {"data_seed": seed} if seed else {}}
            run(tmp_path / f"{kind}{seed}", pretrained, cache, **how)
            rows = rows_of(tmp_path / f"{kind}{seed}")
            found[kind, seed] = [float(row["probability:disc"]) for row in rows]
    assert found["fast", None] != pytest.approx(found["fast", 7], abs=1e-4)
    for seed in (None, 7):
        assert found["fast", seed] == pytest.approx(found["frozen", seed], abs=1e-5)


def test_results_name_the_weights_they_began_with(frozen: Path, pretrained: Path):
    results = json.loads((frozen / "results.json").read_text())
    weights = (pretrained / "model.safetensors").read_bytes()
    assert results["weights_sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}


def test_other_arguments_of_the_trainer_are_taken(tmp_path: Path):
    """Words of the command line get their types, and what the protocol asks for anyway may be given."""
    given = {"adam_epsilon": "1e-6", "optim": "sgd", "full_determinism": "false", "eval_strategy": "epoch"}
    arguments = ClassificationArguments(str(tmp_path), weight_decay=0.1, trainer_options={**given, "adam_beta1": 0.8})
    settings = trainer_settings(arguments, 1e-3, tmp_path / "trainer")
    assert (settings.adam_epsilon, settings.adam_beta1, settings.optim) == (1e-6, 0.8, "sgd")
    assert settings.full_determinism is False
    assert (settings.dataloader_drop_last, settings.label_smoothing_factor) == (False, 0)
    assert (settings.bf16_full_eval, settings.eval_delay, settings.eval_do_concat_batches) == (False, 0, True)
    assert (settings.learning_rate, settings.weight_decay) == (1e-3, 0.1)
    assert (settings.eval_strategy, settings.load_best_model_at_end, settings.save_total_limit) == ("epoch", True, 1)


@pytest.mark.parametrize("case", ["absent", "empty", "other_kind", "other_width", "no_context", "no_weights"])
def test_a_model_that_does_not_fit_is_an_error(cache: Path, pretrained: Path, tmp_path: Path, case: str):
    source = tmp_path / "model"
    if case == "empty":
        source.mkdir()
    elif case != "absent":
        shutil.copytree(pretrained, source)
        config = json.loads((source / "config.json").read_text())
        changed = {
            "other_kind": {"model_type": "resnet"},
            "other_width": {"backbone": "test_resnet", "context_reduction": 2},
            "no_context": {"backbone": "resnet10t"},
            "no_weights": {},
        }[case]
        (source / "config.json").write_text(json.dumps(config | changed))
        if case == "no_weights":
            (source / "model.safetensors").unlink()
    messages = {
        "absent": "expected a folder that exists",
        "empty": "holds no config.json",
        "other_kind": "holds a resnet model; expected one of mlvicx",
        "other_width": "does not fit: .* weights of the encoder differ",
        "no_context": "does not fit: .* weights of the encoder differ",
        "no_weights": "model.safetensors",
    }
    with pytest.raises((ValueError, OSError), match=messages[case]):
        run(tmp_path / "run", source, cache)
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_nowhere_is_in_the_error(cache: Path, tmp_path: Path):
    with pytest.raises(OSError, match=r"^nothere: not found here, nor on the Hub: "):
        run(tmp_path / "run", "nothere", cache)
    with pytest.raises(OSError, match=r"^nothere: not found here, nor on the Hub: "):
        load_image_processor("nothere", tiny_config())
    assert not (tmp_path / "run").exists()


def test_a_class_with_the_name_of_an_answer_is_refused(exclusive: Path, pretrained: Path):
    cache = load_cache(exclusive)
    named = dataclasses.replace(cache, label_names=(*cache.label_names[:-1], "unsure"))
    with pytest.raises(UserError, match=rf"class 'unsure' found in {exclusive}; expected another name"):
        load_classifier(ClassifierArguments(str(pretrained)), named)


def test_a_classifier_of_other_labels_lends_its_encoder(frozen: Path, exclusive: Path):
    model, _ = load_classifier(ClassifierArguments(str(frozen)), load_cache(exclusive))
    assert model.classifier.weight.shape == (3, 96)
    assert model.classifier.weight.isfinite().all()
    source = load_file(frozen / "model.safetensors")
    assert all(torch.equal(t, source[f"mlvicx.{n}"]) for n, t in model.mlvicx.state_dict().items())
