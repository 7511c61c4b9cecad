"""Model cards: every figure has a source, and what does not belong together stays apart."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, tiny_config
from huggingface_hub import ModelCard
from PIL import Image

from mlvicx_hf import (
    MLVICXConfig,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXImageProcessor,
)
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import sha256
from mlvicx_hf.hub.cards.rendering import render_card

LABELS = ["Edema", "Effusion"]
STRUCTURES = ["lungs", "heart"]
HARDWARE = {"device": "cpu", "name": "Some CPU 7", "cores": 8, "processes": 1}
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CODE = {"mlvicx_hf": "0.1.0", "commit": COMMIT, "torch": "2.15.0", "transformers": "5.23.0"}
TEMPLATES = {
    name: ROOT / "src" / "mlvicx_hf" / "hub" / "cards" / "templates" / f"{name}.md"
    for name in ("backbone", "classifier", "segmenter")
}
Render = Callable[..., ModelCard]


def write(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def change(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Set fields by their names with dots; None removes one."""
    content = copy.deepcopy(content)
    for name, value in changes.items():
        *places, last = name.split(".")
        inner = content
        for place in places:
            inner = inner[place]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
    return content


def write_run(folder: Path, **changes: Any) -> Path:
    """`run.json` of a pretraining run of `tiny_config`, in the newer form."""
    config = tiny_config()
    names = ("backbone", "num_channels", "image_size", "use_context", "expander_dims", "invariance_weight")
    names += ("variance_weight", "covariance_weight", "global_weight", "multi_level_weight", "invariance_reduction")
    views = {"crop_area": [0.2, 1.0], "rotation": 10.0, "brightness": 0.4, "contrast": 0.4}
    views |= {"blur": [1.0, 0.1], "solarize": [0.0, 0.2]}
    training = {"epochs": 3, "batch_size": 64, "base_learning_rate": 1.6, "weight_decay": 1e-6, "momentum": 0.9}
    content: dict[str, Any] = {
        "model": {name: getattr(config, name) for name in names} | {"init_from": None},
        "data": {"dataset": "/data/caches/pool", "split": "train", "images": 1003, "data_hash": "f" * 64} | views,
        "training": training | {"output_dir": str(folder), "warmup_epochs": 1, "seed": 0, "mixed_precision": "no"},
        "hardware": HARDWARE,
        "synthetic": False,
        "code": CODE,
    }
    return write(folder / "run.json", change(content, changes))


def result(seed: int = 0, model: str = "/data/runs/mine", score: float | None = None, **changes: Any) -> dict[str, Any]:
    """A `results.json` of classification."""
    value = 0.7 + 0.0137 * seed if score is None else score
    splits = {"train": (597, 411), "validation": (165, 103), "test": (239, 170)}
    content: dict[str, Any] = {
        "task": "classification",
        "protocol": "frozen",
        "labels": LABELS,
        "test": {
            "auroc_macro": value,
            "auroc": {"Edema": value + 0.021, "Effusion": value - 0.021},
            "accuracy": value - 0.1,
            "num_scored_labels": 2,
        },
        "model": model,
        "architecture": "/data/runs/mine" if model == "random" else None,
        "label_fraction": 1.0,
        "seed": seed,
        "counts": {split: {"images": images, "patients": patients} for split, (images, patients) in splits.items()},
        "data": {
            "cache": "/data/caches/A",
            "collection": "folder",
            "synthetic": False,
            "data_hash": "a" * 64,
            "split_hash": "b" * 64,
        },
        "hyperparameters": {"learning_rate": 0.001, "batch_size": 64},
        "epochs_trained": 17.0,
        "best_epoch": 7.0,
        "hardware": HARDWARE,
        "code": CODE,
    }
    return change(content, changes)


def segmentation(seed: int = 0, **changes: Any) -> dict[str, Any]:
    """A `results.json` of segmentation."""
    scores = {"dice": 0.8123, "dice_positive": "n/a", "iou": 0.7011, "iou_positive": 0.6977, "images": 239}
    scores |= {"dice_per_class": {"lungs": 0.9, "heart": "n/a"}, "images_positive": {"lungs": 230, "heart": 0}}
    scores["empty_mask_convention"] = "of an image: 1 when both masks are empty"
    content = result(seed) | {"task": "segmentation", "labels": STRUCTURES, "test": scores}
    return change(content, changes)


def write_model(model: Path, folder: Path, results: dict[str, Any] | None = None, **config: Any) -> Path:
    """The files of a model that a card reads, in another folder, with other results or settings."""
    for file in ("config.json", "preprocessor_config.json"):
        changes = config if file == "config.json" else {}
        write(folder / file, json.loads((model / file).read_text()) | changes)
    if results is not None:
        write(folder / "results.json", results)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny saved model of every kind."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    kinds = {
        "backbone": (MLVICXForPreTraining, []),
        "classifier": (MLVICXForImageClassification, LABELS),
        "segmenter": (MLVICXForSemanticSegmentation, ["background", *STRUCTURES]),
    }
    for name, (model_class, labels) in kinds.items():
        names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        model_class(tiny_config(**(names if labels else {}))).save_pretrained(folder / name / "mine")
        MLVICXImageProcessor(image_size=32).save_pretrained(folder / name / "mine")
    write_run(folder / "backbone" / "mine")
    write(folder / "classifier" / "mine" / "results.json", result())
    write(folder / "segmenter" / "mine" / "results.json", segmentation())
    return {name: folder / name / "mine" for name in kinds}


@pytest.fixture
def render(saved: dict[str, Path], tmp_path: Path) -> Render:
    """Render a card from results that are written first, one folder each."""

    def call(kind: str, *contents: dict[str, Any], **options: Any) -> ModelCard:
        folders = (tmp_path / f"run-{number}" for number in range(len(contents)))
        files = [write(folder / "results.json", c) for folder, c in zip(folders, contents, strict=True)]
        return render_card(TEMPLATES[kind], saved[kind], files, repo_id="org/tiny", **options)

    return call


def section(card: ModelCard, title: str) -> str:
    return re.split(r"\n## ", card.text.split(f"\n## {title}\n")[1])[0]


def table_rows(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]


def figures(text: str) -> set[str]:
    """Numbers of a text that stand outside of `code`."""
    return {n.rstrip(".,") for n in re.findall(r"(?<![\w.])[\d][\d,.]*", re.sub(r"`[^`]*`", "", text))}


def leaves(content: Any) -> list[Any]:
    if isinstance(content, (dict, list)):
        inner = content.values() if isinstance(content, dict) else content
        return [leaf for value in inner for leaf in leaves(value)]
    return [content]


# -- figures -----------------------------------------------------------------------------------------------------------


def test_every_number_of_an_evaluation_is_in_the_files(render: Render):
    ours = [result(seed) for seed in range(3)]
    theirs = [result(seed, "random", 0.6 + 0.009 * seed) for seed in range(3)]
    few = result(0, label_fraction=0.1, score=0.55, **{"counts.train.images": 61})
    contents = [*ours, *theirs, few]
    text = section(render("backbone", *contents), "Evaluation")
    known = {f"{v:{form}}" for v in leaves(contents) if isinstance(v, (int, float)) for form in (".3f", ",")}
    known |= {"10", "3"}  # per cent of the labels (0.1 in the file), number of seeds
    for name in ("auroc_macro", "accuracy"):
        for group in (ours, theirs):
            values = [c["test"][name] for c in group]
            known |= {f"{fmean(values):.3f}", f"{stdev(values):.3f}"}
        known.add(f"{fmean(a['test'][name] - b['test'][name] for a, b in zip(ours, theirs, strict=True)):.3f}")
    for label in LABELS:
        for group in (ours, theirs):
            values = [c["test"]["auroc"][label] for c in group]
            known |= {f"{fmean(values):.3f}", f"{stdev(values):.3f}"}
    assert figures(text) <= known
    assert "| pretrained, frozen encoder | 597 | 0, 1, 2 (n = 3) | 0.714 (SD 0.014) | 0.614 (SD 0.014) |" in text
    assert "| random weights, frozen encoder | 597 | 0, 1, 2 (n = 3) | 0.609 (SD 0.009) | 0.509 (SD 0.009) |" in text
    assert "| pretrained, frozen encoder, 10 % of the labels | 61 | 0 | 0.550 | 0.450 |" in text
    assert (
        "random weights (frozen encoder): macro AUROC +0.105, accuracy +0.105; mean over the seeds 0, 1, 2 (n = 3)."
        in text
    )
    assert "239 images of 170 patients" in text


def test_a_difference_needs_the_same_seeds_and_the_same_architecture(render: Render):
    other_seeds = render("backbone", result(0), result(1), result(0, "random", 0.6)).text
    assert (
        "no difference is given, because the seeds do not match or occur twice: 0, 1 (n = 2) against 0." in other_seeds
    )
    assert "+0." not in other_seeds
    elsewhere = render("backbone", result(0), result(0, "random", 0.6, architecture="/data/runs/large")).text
    assert "random weights of `large`, frozen encoder" in elsewhere
    assert "minus random" not in elsewhere
    twice = render("backbone", result(0), result(0, score=0.9), result(0, "random", 0.6)).text
    assert "no difference is given, because the seeds do not match or occur twice: 0 and 0 against 0." in twice
    assert "+0." not in twice
    alike = render("backbone", result(0), result(0, "random", 0.65)).text
    assert "macro AUROC +0.050, accuracy +0.050; seed 0." in alike


@pytest.mark.parametrize("field", ["data_hash", "split_hash", "label_hash"])
def test_results_of_different_data_are_never_averaged(render: Render, field: str):
    text = section(render("backbone", result(0), result(1, **{f"data.{field}": "c" * 64})), "Evaluation")
    assert text.count("\n### Classification, `A`\n") == 2
    assert "| 0 | 0.700 |" in text
    assert "| 1 | 0.714 |" in text
    assert "SD" not in text
    assert "n = " not in text


def test_a_seed_that_occurs_twice_is_listed_run_by_run(render: Render):
    text = section(render("backbone", result(0), result(1), result(1, score=0.9)), "Evaluation")
    for run, seed, score in (("run-0", 0, "0.700"), ("run-1", 1, "0.714"), ("run-2", 1, "0.900")):
        assert f"| pretrained, frozen encoder, run `{run}` | 597 | {seed} | {score} |" in text
    assert "SD" not in text
    card = render("backbone", result(0), result(0), result(1))  # the same result, copied
    assert "| 0, 1 (n = 2) |" in section(card, "Evaluation")


def test_runs_of_other_settings_are_rows_of_their_own(render: Render):
    faster = {"hyperparameters.learning_rate": 0.01}
    text = section(render("backbone", result(0), result(1, **faster), result(2, protocol="finetuned")), "Evaluation")
    assert "| pretrained, frozen encoder, `learning_rate=0.001` | 597 | 0 | 0.700 |" in text
    assert "| pretrained, frozen encoder, `learning_rate=0.01` | 597 | 1 | 0.714 |" in text
    assert "| pretrained, fine-tuned | 597 | 2 | 0.727 |" in text


def test_runs_without_context_blocks_or_at_another_size_are_never_averaged_with_others(render: Render):
    text = section(render("backbone", result(0), result(1, drop_context=True), result(2, image_size=64)), "Evaluation")
    assert "n = " not in text
    assert "| pretrained without context blocks, frozen encoder | 597 | 1 | 0.714 |" in text


def test_runs_of_other_weights_or_fewer_images_are_never_averaged_with_others(render: Render):
    other = [result(seed, weights_sha256={"model.safetensors": f"{seed}"}) for seed in (0, 1)]
    text = section(render("backbone", *other), "Evaluation")
    assert "n = " not in text
    fewer = [result(1, max_train_samples=24), result(0, "random", 0.6), result(1, "random", 0.6)]
    text = section(render("backbone", result(0), *fewer), "Evaluation")
    assert "pretrained, frozen encoder, at most 24 images |" in text
    assert "minus random" not in text


def test_scores_of_weights_that_were_replaced_are_refused(render: Render, saved: dict[str, Path], tmp_path: Path):
    folder = Path(shutil.copytree(saved["backbone"], tmp_path / "mine"))
    then = {"model.safetensors": sha256(folder / "model.safetensors")}
    render("backbone", result(0, str(folder), weights_sha256=then))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"trained again")
    with pytest.raises(UserError, match=r"scores of other weights than .*mine has now"):
        render("backbone", result(0, str(folder), weights_sha256=then))


def test_pretraining_data_and_recipe(render: Render, saved: dict[str, Path], tmp_path: Path):
    card = render("backbone")
    assert "| steps, images seen | 45, 2,880 |" in card.text  # 3 epochs of 15 whole batches of 64
    assert "| peak learning rate | 0.4 |" in card.text
    assert "Some CPU 7 (cpu), 8 CPU cores, 1 process. Code: mlvicx_hf 0.1.0, commit `0123456789ab`" in card.text
    assert "The run did not record collection and number of patients." in card.text
    assert "Not measured: no results were given" in section(card, "Evaluation")
    assert card.data.eval_results is None
    manifest = {"collection": "nih14", "data_hash": "f" * 64, "split_hash": "d" * 64}
    manifest |= {"splits": {"train": {"images": 1003, "patients": 777}, "test": {"images": 9, "patients": 5}}}
    cache = write(tmp_path / "pool" / "cache.json", manifest)
    text = section(render("backbone", cache=cache.parent), "Training data")
    assert "Collection `nih14`, split `dddddddddddd`.\nThey show 777 patients." in text
    assert "| test | 9 | 5 |" in text
    write(cache, manifest | {"data_hash": "e" * 64})
    with pytest.raises(
        ValueError, match=rf"{cache}: data_hash eeeeeeeeeeee… found; expected ffffffffffff…, as of .*run"
    ):
        render("backbone", cache=cache)
    write(cache, change(manifest, {"splits.train.images": 2000}))
    assert "a part of that split, which shows 777 patients" in render("backbone", cache=cache).text


def test_a_card_names_method_and_optimiser_of_its_run(render: Render, tmp_path: Path):
    changes = {"model.objective": "simclr", "training.optimizer": "adamw", "training.epochs": 1.5}
    text = render("backbone", pretraining=write_run(tmp_path / "mine", **changes)).text
    assert "pretrained without labels by **SimCLR**" in text
    assert "| optimiser | AdamW |" in text
    assert "| steps, images seen | 22, 1,408 |" in text  # 1.5 epochs of 15 steps: 22.5, rounded to the even number
    assert "expanders" not in text
    assert "Differences from the paper" not in section(render("backbone", pretraining=tmp_path / "mine"), "Citation")
    plain = render("backbone").text
    assert "| optimiser | LARS, momentum 0.9 |" in plain
    assert "pretrained without labels by **MLVICX**" in plain


def test_what_a_run_left_to_the_model_is_no_contradiction(tmp_path: Path):
    """A backbone that is no list of stages chooses the place of its context bottlenecks."""
    asked = MLVICXConfig(backbone="mobilenetv3_small_050", expander_dims=[8, 8], image_size=32)
    assert asked.context_placement is None
    run = json.loads(write_run(tmp_path / "mine").read_text())
    run["model"] = {name: getattr(asked, name) for name in (*run["model"], "context_placement") if name != "init_from"}
    write(tmp_path / "mine" / "run.json", run | {"model": run["model"] | {"init_from": None}})
    model = MLVICXForPreTraining(asked)
    assert model.config.context_placement == "between"
    model.save_pretrained(tmp_path / "mine")
    MLVICXImageProcessor(32).save_pretrained(tmp_path / "mine")
    assert "mobilenetv3_small_050" in str(render_card(TEMPLATES["backbone"], tmp_path / "mine", []))


def test_files_of_older_runs_say_less_about_the_machine(render: Render, saved: dict[str, Path], tmp_path: Path):
    run = json.loads(write_run(tmp_path / "mine", hardware=None).read_text())
    older = write(tmp_path / "mine" / "run.json", run | {"device": "cpu", "num_processes": 2})
    text = render("backbone", pretraining=older).text
    assert "Hardware: cpu, 2 processes; the make of the machine was not recorded." in text
    head = write_model(saved["classifier"], tmp_path / "head", result(hardware=None))
    assert "Hardware: not recorded." in render_card(TEMPLATES["classifier"], head, []).text


# -- heads -------------------------------------------------------------------------------------------------------------


def test_a_head_shows_its_own_figures_before_the_mean_of_its_seeds(render: Render):
    card = render("classifier", result(1), result(0, "random", 0.6), base_model="org/encoder", datasets=["org/data"])
    text = section(card, "Evaluation")
    rows = table_rows(text)
    assert rows[1].startswith("| **this model** (`mine`, frozen encoder) | 597 | 0 | 0.700 |")
    assert rows[2].startswith("| `mine`, frozen encoder | 597 | 0, 1 (n = 2) | 0.707 (SD 0.010) |")
    assert rows[3].startswith("| random weights, frozen encoder | 597 | 0 | 0.600 |")
    assert "None were chosen for this model" in text
    assert [(e.metric_type, e.metric_value) for e in card.data.eval_results or []] == [
        ("roc_auc", 0.7),
        ("accuracy", 0.6),
    ]
    assert card.data.base_model == "org/encoder"
    assert card.data.datasets == ["org/data"]
    assert "what it was pretrained on is for its own card to say" in card.text


def test_thresholds_name_the_split_on_which_they_were_chosen(saved: dict[str, Path], tmp_path: Path):
    values = {"Edema": 0.31234, "Effusion": None, "left|right": 0.5}
    thresholds = {"values": values, "criterion": "youden", "split": "validation"}
    model = write_model(
        saved["classifier"],
        tmp_path / "mine",
        result() | {"thresholds": thresholds},
        decision_thresholds=thresholds,
    )
    text = section(render_card(TEMPLATES["classifier"], model, []), "Evaluation")
    assert "Chosen on the split `validation` (criterion: youden)" in text
    assert "| Edema | 0.312 |\n| Effusion | none: one value only |\n| left\\|right | 0.500 |" in text
    write(model / "results.json", result() | {"thresholds": thresholds | {"split": "train"}})
    with pytest.raises(
        ValueError, match=r"config\.json: decision_thresholds found that differ from thresholds of .*res"
    ):
        render_card(TEMPLATES["classifier"], model, [])


def test_copies_in_two_splits_are_said_beside_the_scores(render: Render, saved: dict[str, Path], tmp_path: Path):
    content = result(data=result()["data"] | {"copies_across_splits": 1018})
    warning = "**Copies of an image are in two splits, 1,018 pairs: scores may be too good.**"
    card = render_card(TEMPLATES["classifier"], write_model(saved["classifier"], tmp_path / "mine", content), [])
    assert warning in section(card, "Training data")
    assert warning in section(card, "Evaluation")
    assert warning in section(render("backbone", content), "Evaluation")
    assert "Copies of an image" not in render("backbone", result()).text


def test_an_encoder_in_a_folder_called_random_is_not_random(render: Render, saved: dict[str, Path], tmp_path: Path):
    model = write_model(saved["classifier"], tmp_path / "mine", result(model="runs/random"))
    card = render_card(TEMPLATES["classifier"], model, [])
    assert "random weights" not in card.text
    assert "The encoder is `random`; what it was pretrained on" in card.text
    with pytest.raises(UserError, match="model 'random' found; expected 'random' or this one"):
        render("backbone", result(model="runs/random"))


def test_calibration_and_what_was_not_calibrated(saved: dict[str, Path], tmp_path: Path):
    record = {"method": "platt", "split": "validation", "level": 0.9, "folded": True, "bands": {}, "counts": {}}
    scores = {"ece": {"Edema": 0.2004, "Effusion": 0.1}, "brier": {"Edema": 0.31, "Effusion": "n/a"}}
    after = {"ece": {"Edema": 0.0502, "Effusion": 0.1}, "brier": {"Edema": 0.22, "Effusion": "n/a"}}
    changes: dict[str, Any] = {"test.calibration": {"bins": 15, "before": scores, "after": after}}
    changes |= {"test.answers": {"labels": {"Edema": {"unsure": 0.25, "error": "n/a"}}}}
    changes |= {"calibration": record | {"not_fitted": {"Effusion": "3 positives and 160 negatives"}}}
    model = write_model(saved["classifier"], tmp_path / "mine", result(**changes), calibration=record)
    text = section(render_card(TEMPLATES["classifier"], model, []), "Evaluation")
    assert "| Edema | 0.200 → 0.050 | 0.310 → 0.220 | 0.250 | n/a |" in text
    assert "| Effusion | 0.100 → 0.100 | n/a → n/a | no band | no band |" in text
    assert "- Not calibrated: Effusion: 3 positives and 160 negatives.\n" in text
    assert "at most\n10 % of the\npositives are answered absent, and of the negatives present." in text
    assert "gives calibrated probabilities, but for the findings named below. ECE is" in text
    assert "Calibration" not in render_card(TEMPLATES["classifier"], saved["classifier"], []).text
    reasons = changes["calibration"]["not_fitted"] | {"Edema": "2 positives"}
    nothing = result(**changes | {"calibration": record | {"not_fitted": reasons}})
    other = write_model(saved["classifier"], tmp_path / "other", nothing, calibration=record)
    text = section(render_card(TEMPLATES["classifier"], other, []), "Evaluation")
    assert "**No probability of this model is calibrated**" in text
    assert "gives calibrated" not in text
    assert "The promise holds" not in text
    write_model(saved["classifier"], model, result(**changes), calibration=record | {"level": 0.8})
    with pytest.raises(ValueError, match=r"config\.json: calibration found that differ from calibration of .*res"):
        render_card(TEMPLATES["classifier"], model, [])


def test_unknown_patients_are_said_not_to_be_kept_apart(render: Render, saved: dict[str, Path], tmp_path: Path):
    old = render_card(TEMPLATES["classifier"], saved["classifier"], [])
    assert "if the patients were known, which was not recorded." in section(old, "Training data")
    content = result(data=result()["data"] | {"patients_known": True})
    known = render_card(TEMPLATES["classifier"], write_model(saved["classifier"], tmp_path / "known", content), [])
    assert "No patient is in two splits.\n" in section(known, "Training data")
    content = result(data=result()["data"] | {"patients_known": False})
    model = write_model(saved["classifier"], tmp_path / "mine", content)
    card = render_card(TEMPLATES["classifier"], model, [])
    text = section(card, "Training data")
    assert "**one patient may be in two splits**" in text
    assert "No patient is in two splits" not in text
    assert re.search(r"\| test \| [\d,]+ \| unknown \|", text)
    assert "Test split: 239 images of an unknown number of patients;" in card.text
    assert all("patients" not in found.dataset_args for found in card.data.eval_results)


def test_a_card_says_what_the_views_and_the_rates_of_pretraining_were(render: Render, tmp_path: Path):
    folder = tmp_path / "run"
    write_run(folder)
    run = json.loads((folder / "run.json").read_text())
    run["data"] |= {"positives": "same_patient", "flip": 0.0, "jitter": 0.7, "patient_balanced": True}
    run["training"] |= {"backbone_learning_rate_ratio": 0.1, "backbone_thaw_epochs": 2.0, "freeze_batch_norm": True}
    write(folder / "run.json", run)
    card = render("backbone", result(), pretraining=folder)
    assert "Two random views of\ntwo images of a patient\npass" in card.text
    text = section(card, "Training recipe")
    assert "| views: of | same_patient |" in text
    assert "| views: chance of a flip, of other brightness and contrast | 0, 0.7 |" in text
    assert "| batch normalisation of the backbone | frozen |" in text
    assert "| sampling | every patient alike |" in text
    whole = float(re.search(r"\| peak learning rate \| ([\d.e-]+) \|", text)[1])
    assert f"| of the backbone | {whole / 10:g}, reached in 2 epochs |" in text


def test_subgroups_are_shown_and_the_others_said_not_to_be_measured(render: Render):
    views = {"AP": {"images": 100, "patients": 80, "auroc_macro": "n/a", "macro_labels": ["Edema"]}}
    views["PA"] = {"images": 139, "patients": 90, "auroc_macro": 0.71}
    first = result(0, **{"test.subgroups": {"view": views}})
    second = result(1, **{"test.subgroups": {"view": {"PA": {"images": 139, "patients": 90, "auroc_macro": 0.73}}}})
    text = section(render("backbone", first, second, result(2)), "Limits and subgroups")
    assert "| PA | pretrained, frozen encoder | 0, 1 (n = 2) | 139 | 90 | 0.720 (SD 0.014) |" in text
    assert "| AP | pretrained, frozen encoder | 0, 1 (n = 2) | 100 | 80 | n/a |" in text
    assert "Mean over what every group can score: Edema." in text
    assert "- Scores by sex, age: not measured." in text
    assert "- Scores by view, sex, age: not measured." in render("backbone", result(0)).text


def test_a_segmenter(render: Render):
    card = render("segmenter", segmentation(1))
    text = section(card, "Evaluation")
    assert "| **this model** (`mine`, frozen encoder) | 597 | 0 | 0.812 | n/a | 0.701 | 0.698 |" in text
    assert "| lungs | 230 | 0.900 | 0.900 (SD 0.000) |" in text
    assert "| heart | 0 | n/a | n/a |" in text
    assert "Dice and IoU are of an image: 1 when both masks are empty." in text
    assert "lungs, heart." in card.text
    assert [(e.task_type, e.metric_type, e.metric_value) for e in card.data.eval_results or []] == [
        ("image-segmentation", "dice", 0.8123),
        ("image-segmentation", "mean_iou", 0.7011),
    ]
    scores = {"lungs": {"dice": 0.9, "images_positive": 230}, "heart": {"dice": "n/a", "images_positive": 0}}
    other = segmentation(
        2, **{"test.images_positive": None, "test.empty_mask_convention": None, "test.per_label": scores}
    )
    other["empty_mask_convention"] = "as said at the top"
    assert "| lungs | 230 |" in render("segmenter", other).text


# -- the card as a whole -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_a_card_loads_as_one_and_holds_no_path(kind: str, render: Render, saved: dict[str, Path], tmp_path: Path):
    contents = [segmentation(1)] if kind == "segmenter" else [result(1), result(0, "random")]
    card = render(kind, *contents, pretraining=saved["backbone"], code_url="https://example.org/code")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    tags = {"backbone": "feature-extraction", "classifier": "classification", "segmenter": "segmentation"}
    assert loaded.data.pipeline_tag == f"image-{tags[kind]}"
    assert loaded.data.license == "apache-2.0"
    assert loaded.data.library_name == "transformers"
    assert "not-a-medical-device" in (loaded.data.tags or [])
    assert loaded.data.eval_results == card.data.eval_results
    for evaluated in loaded.data.eval_results or []:
        assert (evaluated.dataset_name, evaluated.dataset_split) == ("A", "test")
        assert evaluated.dataset_revision == "a" * 64
        assert isinstance(evaluated.metric_value, float)
        assert evaluated.source_url == "https://huggingface.co/org/tiny"
    text = tmp_path.joinpath("README.md").read_text()
    assert not re.findall(r"(?<![\w.:/<])/[\w.-]+", text)
    assert "{{" not in text.replace("{{MLVICX}", "")
    assert "> **Research use only. Not a medical device; not for clinical decisions.**" in text
    assert "https://arxiv.org/abs/2403.11504" in text
    assert "[repository](https://example.org/code)" in text
    titles = ["Intended use", "How to load it", "Training data", "Training recipe", "Evaluation"]
    titles += ["Limits and subgroups", "Differences from the paper", "Citation"]
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == titles
    assert not re.search(r"\n\n\n", text)


@pytest.mark.parametrize("kind", list(TEMPLATES))
def test_the_code_of_a_card_runs(kind: str, render: Render, saved: dict[str, Path], tmp_path: Path):
    scan = tmp_path / "scan.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 4096, (40, 30)).astype(np.uint16)).save(scan)
    code = re.findall(r"```python\n(.*?)```", render(kind).text, re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code.replace('"org/tiny"', repr(str(saved[kind]))).replace('"scan.png"', repr(str(scan))), names)
    if kind == "backbone":
        assert names["output"].pooler_output.shape[0] == 1
        assert len(names["output"].hidden_states) > 1
    elif kind == "classifier":
        assert names["probabilities"].shape == (1, 2)
        assert names["names"] == LABELS
    else:
        assert names["classes"].shape == (40, 30)


def test_synthetic_images_are_said_in_bold(render: Render, tmp_path: Path):
    plain = render("backbone", result(0))
    assert "ynthetic" not in plain.content
    card = render("backbone", result(0, **{"data.synthetic": True}))
    assert "**These images are synthetic: drawn by a program" in section(card, "Evaluation")
    assert "synthetic" not in section(card, "Training data")
    assert "**Synthetic data are involved" in card.text
    assert "synthetic-data" in (card.data.tags or [])
    run = write_run(tmp_path / "drawn" / "mine", synthetic=True)
    text = section(render("classifier", pretraining=run), "Training data")
    assert "**The images of pretraining are synthetic" in text


def test_only_a_network_with_context_blocks_warns_of_plain_exports(
    render: Render, saved: dict[str, Path], tmp_path: Path
):
    warning = "drop the context blocks: they are another network, and their outputs\n  differ** from this model's"
    assert warning in render("backbone").text
    plain = write_model(saved["backbone"], tmp_path / "mine", use_context=False)
    write_run(plain, **{"model.use_context": False})
    assert "context blocks" not in render_card(TEMPLATES["backbone"], plain, []).text


@pytest.mark.parametrize(("weight", "loss"), [("multi_level_weight", "L_G"), ("global_weight", "L_L")])
def test_a_loss_alone_is_said(render: Render, saved: dict[str, Path], tmp_path: Path, weight: str, loss: str):
    assert " alone" not in section(render("backbone"), "Differences from the paper")
    model = write_model(saved["backbone"], tmp_path / "mine", **{weight: 0})
    write_run(model, **{f"model.{weight}": 0})
    said = section(render_card(TEMPLATES["backbone"], model, []), "Differences from the paper")
    assert re.search(rf"loss {loss} alone[,;]", said)


def test_a_classifier_without_context_blocks_is_not_said_to_keep_them(saved: dict[str, Path], tmp_path: Path):
    for use, name in ((True, "with"), (False, "without")):
        model = write_model(saved["classifier"], tmp_path / name, result(), use_context=use)
        card = render_card(TEMPLATES["classifier"], model, [model / "results.json"], repo_id="org/tiny")
        assert ("keeps its context blocks" in card.text) == use


# -- errors ------------------------------------------------------------------------------------------------------------


def test_a_placeholder_without_a_source_is_an_error(render: Render, saved: dict[str, Path], tmp_path: Path):
    template = tmp_path / "backbone.md"
    template.write_text("# {{ name }}\n\nSensitivity {{ pretraining.training.sensitivity }} of {{ name }}\n")
    with pytest.raises(ValueError, match="sensitivity") as caught:
        render_card(template, saved["backbone"], [])
    message = str(caught.value)
    assert "\n" not in message
    assert f"{template}, line 3, 'Sensitivity {{{{ pretraining.training.sensitivity }}}} of" in message
    for file in ("config.json", "preprocessor_config.json", "run.json"):
        assert str(saved["backbone"] / file) in message
    template.write_text("{{ unheard_of }}")
    with pytest.raises(ValueError, match=r"line 1, '{{ unheard_of }}': 'unheard_of' is undefined; looked at"):
        render_card(template, saved["backbone"], [])
    template.write_text("{% if %}")
    with pytest.raises(ValueError, match=rf"{template}, line 1: "):
        render_card(template, saved["backbone"], [])
    template.write_text('# {{ name }}\n{% include "parts/data.md" %}\n')  # which a backbone has no figures for
    with pytest.raises(ValueError, match=r"templates/parts/data\.md, line 1, .*'training' is undefined; looked at"):
        render_card(template, saved["backbone"], [])


def test_a_figure_missing_from_the_files_is_an_error(render: Render, saved: dict[str, Path], tmp_path: Path):
    run = write_run(tmp_path / "mine", **{"training.momentum": None})
    with pytest.raises(ValueError, match=rf"backbone\.md, line \d+, .*momentum.*looked at .*{run}"):
        render("backbone", pretraining=run)
    run = write_run(tmp_path / "mine", **{"training.momentum": "much"})
    with pytest.raises(ValueError, match=r"backbone\.md, line \d+, .*momentum.*Unknown format code.*looked at"):
        render("backbone", pretraining=run)
    run = write_run(tmp_path / "mine", **{"data.images": None})
    with pytest.raises(
        ValueError, match=rf"{run}: no field 'data.images' found; expected the run.json of a pretraining"
    ):
        render("backbone", pretraining=run)
    alone = write_model(saved["backbone"], tmp_path / "alone")
    with pytest.raises(FileNotFoundError, match=rf"{alone}/run\.json: no such file; expected .*or a card of your own"):
        render_card(TEMPLATES["backbone"], alone, [])
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file; expected the run\.json"):
        render("backbone", pretraining=tmp_path / "nowhere")
    headless = write_model(saved["classifier"], tmp_path / "headless")
    with pytest.raises(FileNotFoundError, match=r"headless/results\.json: no such file"):
        render_card(TEMPLATES["classifier"], headless, [])


def test_a_run_that_recorded_its_patients_needs_no_cache(render: Render, tmp_path: Path):
    splits = {"train": {"images": 4321, "patients": 1234}, "test": {"images": 99, "patients": 77}}
    source = {"collection": "nih14", "split_hash": "5" * 64, "splits": splits}
    text = str(render("backbone", pretraining=write_run(tmp_path / "mine", source=source)))
    assert "1,234" in text
    assert "nih14" in text
    assert "did not record" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "retrieval"}, "task='retrieval' found; expected classification or segmentation"),
        ({"protocol": "half"}, "protocol='half' found; expected frozen or finetuned"),
        ({"test": None}, "no field 'test' found; expected the results.json of a fine-tuning"),
        ({"seed": None}, "no field 'seed' found"),
        ({"seed": True}, "seed=True found; expected int"),
        ({"data.split_hash": None}, "no field 'data.split_hash' found"),
        ({"code.commit": None}, "no field 'code.commit' found"),
        ({"counts.test.patients": None}, "no field 'counts.test.patients' found"),
        ({"test.accuracy": None}, "no field 'test.accuracy' found"),
        ({"test.auroc_macro": "good"}, "test.auroc_macro='good' found; expected a number or 'n/a'"),
        ({"test.auroc.Edema": float("nan")}, "test.auroc.Edema=nan found; expected a number or 'n/a'"),
        ({"test.auroc.Edema": [1]}, "test.auroc.Edema=[1] found; expected a number"),
        ({"test.auroc.Edema": None}, "test.auroc of Effusion found; expected Edema, Effusion, the labels"),
        ({"test.subgroups": {"view": {"PA": {"images": 3}}}}, "no field 'test.subgroups.view.PA.patients' found"),
        ({"model": "/data/runs/other"}, "model 'other' found; expected 'random' or this one (mine, tiny)"),
    ],
)
def test_results_of_another_kind_are_refused(render: Render, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'run-1' / 'results.json'}: {message}")):
        render("backbone", result(1), change(result(0), changes))


def test_files_that_do_not_fit_one_another_are_refused(render: Render, saved: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"run\.json: no field 'task' found"):
        render_card(TEMPLATES["backbone"], saved["backbone"], [saved["backbone"] / "run.json"])
    with pytest.raises(ValueError, match=r"task 'segmentation' found; expected 'classification' for classifier\.md"):
        render("classifier", segmentation())
    with pytest.raises(ValueError, match="labels Mass, Nodule found; expected Edema, Effusion, the model's"):
        render("classifier", result(1, labels=["Mass", "Nodule"], **{"test.auroc": {"Mass": 0.5, "Nodule": 0.5}}))
    with pytest.raises(ValueError, match=r"architectures \['MLVICXForPreTraining'\] found; expected MLVICXForImageCl"):
        render_card(TEMPLATES["classifier"], saved["backbone"], [])
    with pytest.raises(ValueError, match=r"template .*card\.md found; expected one named backbone\.md, classifier\.md"):
        render_card(tmp_path / "card.md", saved["backbone"], [])
    run = write_run(tmp_path / "mine", **{"model.image_size": 64})
    with pytest.raises(ValueError, match=rf"config\.json: image_size=32 found; expected 64, as of {run}"):
        render("backbone", pretraining=run)
    run = write_run(tmp_path / "stranger")
    with pytest.raises(ValueError, match=r"results\.json: model 'mine' found; expected 'stranger', as of"):
        render_card(
            TEMPLATES["classifier"], write_model(saved["classifier"], tmp_path / "head", result()), [], pretraining=run
        )
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json: .*; expected JSON"):
        render_card(TEMPLATES["backbone"], saved["backbone"], [tmp_path / "broken.json"])
    with pytest.raises(ValueError, match="Repo id"):
        render("backbone", base_model="not a name")
