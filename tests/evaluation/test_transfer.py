"""A saved classifier on another collection, on its own, and on images that it has seen."""

import csv
import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from helpers import draw, make_cache, tiny_config, unlabelled_cache
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import accuracy_score, roc_auc_score

from mlvicx_hf import MLVICXForImageClassification, MLVICXForPreTraining, MLVICXImageProcessor
from mlvicx_hf.commands.classify import parse_classification
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.copies.duplicates import perceptual_hash
from mlvicx_hf.data.vocabulary import match
from mlvicx_hf.encoders.inference import load
from mlvicx_hf.evaluation import transfer
from mlvicx_hf.evaluation.overlap import Training, check_overlap, read_training
from mlvicx_hf.evaluation.statistics import compare_runs
from mlvicx_hf.evaluation.transfer import combine_labels, combine_logits, evaluate
from mlvicx_hf.finetuning.classification import finetune_classifier

SPLITS = ("test", "validation", "train", "train", "train")


def draw_findings(count: int, seed: int) -> list[dict[str, bool]]:
    generator = np.random.default_rng(seed)
    return [{"disc": bool(d), "stripes": bool(s)} for d, s in generator.random((count, 2)) < 0.5]


def row(number: int, drawn: dict[str, bool], **labels: Any) -> dict[str, Any]:
    patient = number // 2
    view = "PA" if number % 2 else "AP"
    return {"patient_id": f"p{patient}", "split": SPLITS[patient % 5], "view": view, "_draw": drawn} | labels


def home_rows(count: int = 100) -> list[dict[str, Any]]:
    """Labels as NIH spells them, some unknown; the mass is where disc and stripes are."""
    return [
        row(
            number,
            drawn,
            Effusion="" if number % 11 == 0 else int(drawn["disc"]),
            Nodule=int(drawn["stripes"]),
            Mass=int(drawn["disc"] and drawn["stripes"]),
            Hernia=int(number % 3 == 0),
        )
        for number, drawn in enumerate(draw_findings(count, 0))
    ]


def redraw(drawn: dict[str, bool]) -> dict[str, bool]:
    """Something else on the same noise; never disc and stripes together, which are too alike to be told apart."""
    return {"disc": not drawn["disc"], "stripes": drawn["disc"] and not drawn["stripes"]}


def away_rows(count: int = 60) -> list[dict[str, Any]]:
    """Other images, labelled as VinBigData does."""
    drawn = [redraw(found) for found in draw_findings(count, 0)]
    return [
        row(
            number,
            found,
            **{
                "Lung Opacity": int(number % 4 == 0),
                "Nodule/Mass": int(found["stripes"]),
                "Pleural effusion": "" if number % 7 == 0 else int(found["disc"]),
            },
        )
        for number, found in enumerate(drawn)
    ]


def train(cache: Path, pretrained: Path, output: Path, *words: object) -> Path:
    given = ("--model", pretrained, "--dataset", cache, "--output_dir", output, "--use_cpu", "--num_train_epochs", 3)
    finetune_classifier(*parse_classification([str(word) for word in (*given, *words)]))
    return output


def evaluate_on(model: Path, cache: Path, folder: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"num_workers": 0, "progress": False, "device": "cpu"}
    return evaluate(str(model), cache, folder / "results.json", **(defaults | options))


def read_table(folder: Path) -> list[dict[str, str]]:
    with (folder / "test_predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def columns(rows: list[dict[str, str]], name: str) -> tuple[list[int], list[float]]:
    """Known labels of a finding and their probabilities."""
    known = [row for row in rows if row[f"label:{name}"] != ""]
    return [int(row[f"label:{name}"]) for row in known], [float(row[f"probability:{name}"]) for row in known]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("home"), home_rows())


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("away"), away_rows())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(123)
    model, processor = MLVICXForPreTraining(tiny_config()).train(), MLVICXImageProcessor(image_size=32)
    with torch.no_grad():  # statistics for the batch normalisation
        for step in range(30):
            images = processor([draw(found, step * 8 + i) for i, found in enumerate(draw_findings(8, step))])
            model(images["pixel_values"], images["pixel_values"].flip(-1))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def frozen(home: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(home, pretrained, tmp_path_factory.mktemp("frozen") / "run", "--freeze_backbone")


@pytest.fixture(scope="module")
def tuned(home: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(home, pretrained, tmp_path_factory.mktemp("tuned") / "run", "--learning_rate", 1e-3)


@pytest.fixture(scope="module")
def lost(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tuned model without its results.json, as from a repository."""
    folder = tmp_path_factory.mktemp("lost") / "model"
    shutil.copytree(tuned, folder, ignore=shutil.ignore_patterns("results.json"))
    return folder


def save_classifier(folder: Path, labels: list[str], **values: Any) -> Path:
    """A random classifier that does not say what it was trained on."""
    torch.manual_seed(1)
    names = dict(enumerate(labels))
    config = tiny_config(id2label=names, label2id={name: i for i, name in names.items()}, **values)
    MLVICXForImageClassification(config).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


def model_probabilities(model: Path, cache: Path, split: str = "test") -> np.ndarray:
    """Image by image, by the model's own classes."""
    network = MLVICXForImageClassification.from_pretrained(model).eval()
    processor = MLVICXImageProcessor.from_pretrained(model)
    exclusive = network.config.problem_type == "single_label_classification"
    with torch.no_grad():
        logits = torch.cat(
            [
                network(**processor(image, return_tensors="pt")).logits
                for image in load_cache(cache).datasets[split]["image"]
            ]
        )
    return (logits.softmax(1) if exclusive else logits.sigmoid()).numpy()


# -- its own collection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["frozen", "tuned"])
def test_the_training_run_is_reproduced(kind: str, home: Path, tmp_path: Path, request: Any):
    model = request.getfixturevalue(kind)
    expected = json.loads((model / "results.json").read_text())["test"]
    found = evaluate_on(model, home, tmp_path)
    names = {"Effusion": "Pleural effusion"}
    assert found["labels"] == ["Pleural effusion", "Nodule", "Mass", "Hernia"]
    for ours, theirs in (
        (found["test"], expected),
        *((found["test"]["subgroups"]["view"][v], expected["subgroups"]["view"][v]) for v in ("AP", "PA")),
    ):
        assert ours["auroc"] == {names.get(k, k): pytest.approx(v, abs=1e-6) for k, v in theirs["auroc"].items()}
        assert ours["auroc_macro"] == pytest.approx(theirs["auroc_macro"], abs=1e-6)
        assert ours["accuracy"] == pytest.approx(theirs["accuracy"], abs=1e-6)
        assert ours["num_scored_labels"] == theirs["num_scored_labels"]
    for ours, theirs in zip(read_table(tmp_path), read_table(model), strict=True):
        assert list(ours.values())[:6] == list(theirs.values())[:6]
        assert [float(v) for v in list(ours.values())[6:]] == pytest.approx(
            [float(v) for v in list(theirs.values())[6:]], abs=2e-6
        )
    assert found["overlap"] == {
        "compared": "the training's own division into splits", "images": 0, "patients": 0, "warnings": [],
    }  # fmt: skip
    assert all(entry["lost"] == [] for entry in found["matching"]["matched"].values())


def test_copies_of_training_images_in_test_are_counted_though_the_cache_is_the_trainings_own(
    tuned: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    leaky = tmp_path / "leaky"
    shutil.copytree(home, leaky)
    manifest = json.loads((leaky / "cache.json").read_text())
    manifest["duplicates"]["across_splits"] = 3  # as after `classify --allow_leak`
    (leaky / "cache.json").write_text(json.dumps(manifest))
    found = evaluate_on(tuned, leaky, tmp_path / "none")["overlap"]
    assert (found["images"], found["warnings"]) == (0, [])  # this copy of the cache has none in truth
    monkeypatch.setattr("mlvicx_hf.evaluation.overlap._count_seen", lambda *_: (2, 0))
    found = evaluate_on(tuned, leaky, tmp_path / "some")["overlap"]
    assert "2 image(s) found that have copies in training or validation (3 pairs)" in found["warnings"][0]


@pytest.mark.parametrize(
    ("split", "message"), [("train", "was trained on these"), ("validation", "were chosen on these")]
)
def test_a_split_that_the_model_has_seen_is_said_loudly(
    tuned: Path, home: Path, tmp_path: Path, split: str, message: str, caplog: pytest.LogCaptureFixture
):
    found = evaluate_on(tuned, home, tmp_path, split=split)
    assert message in caplog.text
    assert message in found["overlap"]["warnings"][0]
    assert list(found["counts"]) == [split]
    assert len(read_table(tmp_path)) == found["counts"][split]["images"] == len(load_cache(home).datasets[split])


# -- another collection ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def abroad(tuned: Path, away: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the tuned model on the other collection."""
    folder = tmp_path_factory.mktemp("abroad")
    evaluate_on(tuned, away, folder)
    return folder


def test_scores_are_those_of_the_predictions(abroad: Path, away: Path):
    results, rows = json.loads((abroad / "results.json").read_text()), read_table(abroad)
    test = results["test"]
    assert results["labels"] == ["Nodule or mass", "Pleural effusion"]
    assert [row["source"] for row in rows] == load_cache(away).datasets["test"]["source"]
    by_hand = {name: roc_auc_score(*columns(rows, name)) for name in results["labels"]}
    assert test["auroc"] == pytest.approx(by_hand, abs=1e-9)
    assert test["auroc_macro"] == pytest.approx(np.mean(list(by_hand.values())))
    assert test["num_scored_labels"] == 2
    labels, scores = (np.concatenate(parts) for parts in zip(*(columns(rows, n) for n in by_hand), strict=True))
    assert test["accuracy"] == pytest.approx(accuracy_score(labels, scores > 0.5))
    assert sum(view["images"] for view in test["subgroups"]["view"].values()) == len(rows)


def test_labels_and_probabilities_are_those_of_the_matched_columns(abroad: Path, tuned: Path, away: Path):
    rows, truth = read_table(abroad), np.array(load_cache(away).datasets["test"]["labels"])
    scores = model_probabilities(tuned, away)  # Effusion, Nodule, Mass, Hernia
    written = {
        name: [float(row[f"probability:{name}"]) for row in rows] for name in ("Pleural effusion", "Nodule or mass")
    }
    assert written["Pleural effusion"] == pytest.approx(scores[:, 0].tolist(), abs=2e-6)
    assert written["Nodule or mass"] == pytest.approx(scores[:, 1:3].max(1).tolist(), abs=2e-6)
    labels = [[row["label:Nodule or mass"], row["label:Pleural effusion"]] for row in rows]
    assert labels == [["" if np.isnan(v) else str(int(v)) for v in values[1:]] for values in truth]


def test_results_say_what_was_tested_on_what(abroad: Path, tuned: Path, home: Path, away: Path):
    results = json.loads((abroad / "results.json").read_text())
    manifest, training = (load_cache(cache).manifest for cache in (away, home))
    assert results["task"] == "classification"
    assert results["model"] == str(tuned)
    assert results["revision"] is None
    assert list(results["weights_sha256"]) == ["model.safetensors"]
    assert results["training"] == {
        "collection": "folder", "cache": str(home), "data_hash": training["data_hash"],
        "split_hash": training["split_hash"],
    }  # fmt: skip
    assert results["data"]["cache"] == str(away)
    assert results["data"]["split"] == "test"
    for name in ("collection", "policy", "synthetic", "data_hash", "split_hash", "fit", "size"):
        assert results["data"][name] == manifest[name]
    assert results["counts"] == {"test": {"images": 12, "patients": 6}}
    assert results["hardware"]["device"] == "cpu"
    assert results["code"]["commit"]
    assert results["matching"]["matched"] == {
        "Nodule or mass": {
            "model": ["Nodule", "Mass"], "data": ["Nodule/Mass"],
            "lost": ["Nodule or mass is Nodule or Mass of the model"],
        },
        "Pleural effusion": {"model": ["Effusion"], "data": ["Pleural effusion"], "lost": []},
    }  # fmt: skip
    assert set(results["matching"]["model_only"]) == {"Hernia"}
    assert set(results["matching"]["data_only"]) == {"Lung Opacity"}
    assert results["overlap"]["compared"] == f"training and validation images of {home}"
    assert (results["overlap"]["images"], results["overlap"]["patients"]) == (0, None)
    (warning,) = results["overlap"]["warnings"]
    assert "patients are not compared, since folder here and folder in training may number them differently" in warning
    alike = {p for s in ("train", "validation") for p in load_cache(home).datasets[s]["patient_id"]}
    alike &= set(load_cache(away).datasets["test"]["patient_id"])
    assert (f"{len(alike)} have the same name in both" if alike else "no two have one name") in warning


def test_two_models_are_compared_on_another_collection(abroad: Path, frozen: Path, away: Path, tmp_path: Path):
    other = evaluate_on(frozen, away, tmp_path)["test"]["auroc_macro"]
    first = json.loads((abroad / "results.json").read_text())["test"]["auroc_macro"]
    found = compare_runs([abroad], [tmp_path], samples=20)
    assert found["difference"] == pytest.approx(first - other, abs=1e-6)
    assert found["patients_known"] is load_cache(away).manifest["patients_known"]


def test_the_batch_size_and_workers_do_not_matter(abroad: Path, tuned: Path, away: Path, tmp_path: Path):
    found = evaluate_on(tuned, away, tmp_path, batch_size=5, num_workers=2)
    expected = json.loads((abroad / "results.json").read_text())["test"]
    assert found["test"]["auroc"] == pytest.approx(expected["auroc"], abs=1e-9)
    assert [list(row.values())[:4] for row in read_table(tmp_path)] == [
        list(r.values())[:4] for r in read_table(abroad)
    ]


def test_chosen_findings_alone(abroad: Path, tuned: Path, away: Path, tmp_path: Path):
    found = evaluate_on(tuned, away, tmp_path, findings=["pleural_effusion"])
    expected = json.loads((abroad / "results.json").read_text())["test"]["auroc"]["Pleural effusion"]
    assert found["test"]["auroc"] == {"Pleural effusion": expected}
    with pytest.raises(ValueError, match=r"findings Hernia found; expected some of Nodule or mass, Pleural effusion"):
        evaluate_on(tuned, away, tmp_path / "other", findings=["Hernia"])


def test_a_finding_that_the_images_divide(away: Path, home: Path, tmp_path: Path):
    model = save_classifier(tmp_path / "model", ["Nodule/Mass", "Pleural effusion"])
    found = evaluate_on(model, home, tmp_path)
    truth = np.array(load_cache(home).datasets["test"]["labels"])  # Effusion, Nodule, Mass, Hernia
    labels, _ = columns(read_table(tmp_path), "Nodule or mass")
    assert labels == truth[:, 1:3].max(1).astype(int).tolist()
    expected = roc_auc_score(labels, model_probabilities(model, home)[:, 0])
    assert found["test"]["auroc"]["Nodule or mass"] == pytest.approx(expected, abs=1e-9)
    assert "Nodule or mass is Nodule or Mass of the images" in found["matching"]["matched"]["Nodule or mass"]["lost"]


@pytest.mark.parametrize("kind", ["multi_label_classification", "single_label_classification"])
def test_a_union_of_outputs_is_the_highest_or_of_exclusive_classes_the_sum(kind: str, tmp_path: Path):
    labels = ["Nodule", "Edema", "Mass", "Hernia"]
    loaded = load(str(save_classifier(tmp_path, labels, problem_type=kind)))
    matching = match("nih14", labels, "vinbigdata", ["Edema", "Nodule/Mass"])
    logits = np.random.default_rng(0).normal(0, 3, (20, 4))
    found = combine_logits(loaded, logits, matching, exclusive=False)  # [20, 2]
    for values, (edema, union) in zip(logits, found, strict=True):
        if kind == "multi_label_classification":
            assert (edema, union) == (values[1], max(values[0], values[2]))
        else:
            e = np.exp(values)
            assert edema == pytest.approx(np.log(e[1] / (e.sum() - e[1])))
            assert union == pytest.approx(np.log((e[0] + e[2]) / (e[1] + e[3])))


@given(arrays.arrays(np.float64, (6, 3), elements=st.sampled_from([0.0, 1.0, np.nan])))
def test_a_union_of_labels_is_known_where_its_value_is(labels: np.ndarray):
    for found, values in zip(combine_labels(labels, [0, 2]), labels[:, [0, 2]].tolist(), strict=True):
        possible = {float(a or b) for a in completions(values[0]) for b in completions(values[1])}
        assert possible == {found} if not np.isnan(found) else possible == {0.0, 1.0}


def completions(value: float) -> list[bool]:
    return [False, True] if np.isnan(value) else [bool(value)]


def test_the_collection_says_what_a_label_means(tmp_path: Path):
    rows = [row(n, drawn, Pneumonia=int(drawn["disc"])) for n, drawn in enumerate(draw_findings(20, 3))]
    cache, model = make_cache(tmp_path, rows), save_classifier(tmp_path / "model", ["Lung Opacity", "Edema"])
    with pytest.raises(
        ValueError, match=r"no label in common: .*collection unknown.* has Lung Opacity, Edema; .*Pneumonia"
    ):
        evaluate_on(model, cache, tmp_path / "unknown")
    found = evaluate_on(model, cache, tmp_path / "rsna", collection="rsna")
    assert found["labels"] == ["Pneumonia"]
    assert found["matching"]["model_collection"] == "rsna"
    assert "suspicious for pneumonia" in found["matching"]["matched"]["Pneumonia"]["lost"][0]


def test_what_cannot_be_scored_is_not(tmp_path: Path):
    rows = [row(n, drawn, Edema=0, Mass="") for n, drawn in enumerate(draw_findings(20, 3))]
    rows[-1] |= {"Edema": 1, "Mass": 1, "split": "train"}
    cache = make_cache(tmp_path, rows)
    found = evaluate_on(save_classifier(tmp_path / "model", ["Edema", "Mass"]), cache, tmp_path)
    assert found["test"]["auroc"] == {"Edema": "n/a", "Mass": "n/a"}
    assert found["test"]["auroc_macro"] == "n/a"


# -- exclusive classes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One class an image, some unknown."""
    rows = [
        row(n, {}, label="" if n % 9 == 0 else ("Edema", "Mass", "Nodule")[n * 7 % 3]) | {"_draw": {"disc": n % 3 == 1}}
        for n in range(60)
    ]
    return make_cache(tmp_path_factory.mktemp("classes"), rows)


def test_the_same_exclusive_classes(classes: Path, pretrained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = train(classes, pretrained, tmp_path / "run", "--freeze_backbone")
    expected = json.loads((model / "results.json").read_text())
    found = evaluate_on(model, classes, tmp_path)
    assert found["test"]["auroc"] == pytest.approx(expected["test"]["auroc"], abs=1e-6)
    assert found["test"]["accuracy"] == pytest.approx(expected["test"]["accuracy"])
    assert found["counts"]["test"] == expected["counts"]["test"]
    assert "images of test have no known class and are left out" in caplog.text
    for entry in read_table(tmp_path):
        assert sum(float(entry[f"probability:{name}"]) for name in found["labels"]) == pytest.approx(1, abs=1e-5)


def test_a_model_of_exclusive_classes_on_other_labels(away: Path, tmp_path: Path):
    labels = ["Nodule", "Normal", "Effusion", "Mass"]
    model = save_classifier(tmp_path / "model", labels, problem_type="single_label_classification")
    found = evaluate_on(model, away, tmp_path)
    scores, rows = model_probabilities(model, away), read_table(tmp_path)
    assert [float(row["probability:Pleural effusion"]) for row in rows] == pytest.approx(
        scores[:, 2].tolist(), abs=2e-6
    )
    together = (scores[:, 0] + scores[:, 3]).tolist()
    assert [float(row["probability:Nodule or mass"]) for row in rows] == pytest.approx(together, abs=2e-6)
    assert found["test"]["accuracy"] == "n/a"
    assert found["test"]["subgroups"]["view"]["PA"]["accuracy"] == "n/a"
    truth = [int(row["label:Nodule or mass"]) for row in rows]
    assert found["test"]["auroc"]["Nodule or mass"] == pytest.approx(roc_auc_score(truth, together), abs=1e-9)
    assert "exclude each other" in found["settings"]["scores"]


def test_exclusive_classes_are_findings_for_a_model_of_several(classes: Path, tmp_path: Path):
    model = save_classifier(tmp_path / "model", ["Mass", "Edema", "Hernia"])
    found = evaluate_on(model, classes, tmp_path)
    assert found["labels"] == ["Edema", "Mass"]
    rows, scores = read_table(tmp_path), model_probabilities(model, classes)
    assert len(rows) == 12
    known = np.array([row["label:Mass"] != "" for row in rows])
    assert 0 < known.sum() < len(rows)
    truth = [int(row["label:Mass"]) for row in rows if row["label:Mass"]]
    assert found["test"]["auroc"]["Mass"] == pytest.approx(roc_auc_score(truth, scores[known, 0]), abs=1e-9)


# -- images that the model has seen ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training's images in other splits."""
    rows = [found | {"split": SPLITS[(i // 2 + 2) % 5]} for i, found in enumerate(home_rows())]
    return make_cache(tmp_path_factory.mktemp("shuffled"), rows)


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A test split of which some images are the training's."""
    rows = [
        found if i < 20 else other
        for i, (found, other) in enumerate(zip(home_rows(60), away_like_home(60), strict=True))
    ]
    return make_cache(tmp_path_factory.mktemp("partly"), [found | {"split": "test"} for found in rows])


def away_like_home(count: int) -> list[dict[str, Any]]:
    return [found | {"_draw": redraw(found["_draw"])} for found in home_rows(count)]


def test_images_of_the_training_are_refused(tuned: Path, shuffled: Path, home: Path, tmp_path: Path):
    seen = {f for split in ("train", "validation") for f in load_cache(home).datasets[split]["sha256"]}
    count = sum(file in seen for file in load_cache(shuffled).datasets["test"]["sha256"])
    assert count > 10
    with pytest.raises(ValueError, match=rf"shuffled.*test: {count} image\(s\) found that the model was trained on"):
        evaluate_on(tuned, shuffled, tmp_path)
    assert not list(tmp_path.iterdir())


def test_some_of_them_are_refused_too_unless_the_user_says_so(
    tuned: Path, partly: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with pytest.raises(ValueError, match=r"16 image\(s\) found that .* \(--allow_overlap goes on"):
        evaluate_on(tuned, partly, tmp_path)
    found = evaluate_on(tuned, partly, tmp_path, allow_overlap=True)
    assert found["overlap"]["images"] == 16  # of the first twenty images four are in the training's test split
    assert found["overlap"]["patients"] is None
    assert "16 image(s)" in caplog.text
    assert "16 image(s)" in found["overlap"]["warnings"][0]


def test_the_record_of_the_thresholds_says_it_as_well(lost: Path, shuffled: Path, away: Path, tmp_path: Path):
    assert read_training(load(str(lost))).data_hash == load_cache(shuffled).manifest["data_hash"]
    with pytest.raises(ValueError, match="of the model's training found, divided otherwise; expected unseen"):
        evaluate_on(lost, shuffled, tmp_path)
    warnings = evaluate_on(lost, away, tmp_path)["overlap"]["warnings"]
    assert [warning.partition(": ")[2] for warning in warnings] == [
        "the model does not say whether it was trained on these images"
    ]


def test_a_model_from_the_hub_brings_its_results(
    tuned: Path, away: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """As the Hub's client keeps a repository that it has fetched."""
    commit, repository = "c" * 40, tmp_path / "hub" / "models--org--model"
    shutil.copytree(tuned, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = evaluate("org/model", away, tmp_path / "results.json", num_workers=0, progress=False, device="cpu")
    assert found["revision"] == commit
    assert found["training"] == vars(read_training(load(str(tuned))))
    assert found["training"]["cache"] == str(home)


def test_a_cache_in_the_training_caches_place_is_not_taken_for_it(tuned: Path, home: Path, away: Path):
    training = read_training(load(str(tuned)))
    cache = load_cache(away)
    assert check_overlap(training, cache, "test")["compared"] == f"training and validation images of {home}"
    assert check_overlap(replace(training, cache=str(away)), cache, "test")["compared"] == "nothing"
    found = check_overlap(replace(training, cache="gone"), cache, "test")
    assert found["compared"] == "nothing"
    assert "gone is not there to be compared with: the model may have been trained on some" in found["warnings"][0]


def test_a_copy_in_another_file_is_found(tuned: Path, home: Path, tmp_path: Path):
    """Brighter and saved again: another SHA-256, and another hash by a few bits."""
    rows = [found | {"split": "test"} for found in away_like_home(20)]
    cache = make_cache(tmp_path, rows)
    seen, images = load_cache(home).datasets["train"], load_cache(cache).datasets["test"]
    copies = [seen[row]["image"].point(lambda value: min(255, round(value * 1.1))) for row in range(3)]
    changed = images.to_list()
    for row, copy in enumerate(copies):
        changed[row] |= {"image": copy, "phash": perceptual_hash(copy)}
    altered = datasets.DatasetDict({"test": datasets.Dataset.from_list(changed, features=images.features)})
    training = read_training(load(str(tuned)))
    found = check_overlap(training, replace(load_cache(cache), datasets=altered), "test", allow=True)
    assert found["images"] == 3
    assert check_overlap(training, load_cache(cache), "test")["images"] == 0


@pytest.mark.parametrize(
    ("trained", "tested", "doubt"),
    [
        ("nih14", "rsna", True), ("siim", "nih14", True), ("vindr", "vinbigdata", True), ("nih14", "nih14", True),
        ("nih14", "vindr", False), ("folder", "folder", True), ("chexpert", "nih14", False),
    ],
)  # fmt: skip
def test_collections_that_share_images_are_named(away: Path, trained: str, tested: str, doubt: bool):
    loaded = load_cache(away)
    cache = replace(loaded, manifest=loaded.manifest | {"collection": tested})
    warnings = check_overlap(Training(trained, "gone", "0" * 64, "1" * 64), cache, "test")["warnings"]
    assert len(warnings) == doubt
    known = "" if tested == "folder" else f"{tested} and {trained} share images, and "
    assert all(f"test: {known}gone is not there to be compared with" in warning for warning in warnings)


def test_patients_are_compared_where_they_are_numbered_alike(tuned: Path, home: Path, away: Path, tmp_path: Path):
    ours = tmp_path / "home"
    shutil.copytree(home, ours)
    manifest = json.loads((ours / "cache.json").read_text())
    (ours / "cache.json").write_text(json.dumps(manifest | {"patient_source": "nih14"}))
    training, loaded = replace(read_training(load(str(tuned))), cache=str(ours)), load_cache(away)
    cache = replace(loaded, manifest=loaded.manifest | {"patient_source": "nih14"})
    seen = {p for split in ("train", "validation") for p in load_cache(ours).datasets[split]["patient_id"]}
    assert not seen & set(cache.datasets["test"]["patient_id"])
    assert check_overlap(training, cache, "test")["patients"] == 0
    count = len(set(cache.datasets["train"]["patient_id"]) & seen)
    with pytest.raises(ValueError, match=rf"0 image\(s\) and {count} patient\(s\) found"):
        check_overlap(training, cache, "train")


# -- what cannot be done -----------------------------------------------------------------------------------------------


def test_no_label_in_common_names_both_lists(away: Path, tmp_path: Path):
    model = save_classifier(tmp_path / "model", ["Hernia", "disc"])
    with pytest.raises(ValueError, match=r"has Hernia, disc; .* has Lung Opacity, Nodule/Mass, Pleural effusion"):
        evaluate_on(model, away, tmp_path)


def test_a_model_that_is_no_classifier(pretrained: Path, away: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="MLVICXModel found; expected a MLVICXForImageClassification"):
        evaluate_on(pretrained, away, tmp_path)


def test_a_cache_without_labels_or_split(tuned: Path, tmp_path: Path):
    cache = unlabelled_cache(tmp_path, 12)
    with pytest.raises(ValueError, match="expected test as well"):
        evaluate_on(tuned, cache, tmp_path)
    with pytest.raises(ValueError, match="has no labels; expected some"):
        evaluate_on(tuned, cache, tmp_path, split="train")


def test_a_results_file_that_no_fine_tuning_wrote(tuned: Path, away: Path, tmp_path: Path):
    model = tmp_path / "model"
    shutil.copytree(tuned, model)
    (model / "results.json").write_text('{"data": {"collection": "nih14"}}')
    with pytest.raises(ValueError, match=r"model/results\.json: no field 'data\.cache' found"):
        evaluate_on(model, away, tmp_path)


def test_a_full_disk_leaves_nothing_half_written(
    tuned: Path, away: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(transfer, "write_json", fail)
        with pytest.raises(OSError, match="No space left"):
            evaluate_on(tuned, away, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["results.json", "test_predictions.csv"])
def test_what_another_run_wrote_meanwhile_stays(
    tuned: Path, away: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    score = transfer._score

    def slow(*arguments: Any, **options: Any) -> dict[str, Any]:
        (tmp_path / name).write_text("of another run")
        return score(*arguments, **options)

    monkeypatch.setattr(transfer, "_score", slow)
    with pytest.raises(FileExistsError, match=f"{name} is there already"):
        evaluate_on(tuned, away, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: "of another run"}


@pytest.mark.parametrize("name", ["results.json", "test_predictions.csv"])
def test_nothing_is_written_over(tuned: Path, away: Path, tmp_path: Path, name: str):
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} is there already"):
        evaluate_on(tuned, away, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 found"),
        ({"num_workers": -1}, "num_workers=-1 found"),
        ({"collection": "nih"}, "collection='nih' found; expected one of nih14, vinbigdata"),
        ({"device": "tpu"}, "device='tpu' found"),
        ({"revision": "v1"}, "only models on the Hub have revisions"),
    ],
)
def test_arguments_that_do_not_fit(tuned: Path, away: Path, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        evaluate_on(tuned, away, tmp_path, **options)


def test_an_output_that_is_no_json(tuned: Path, away: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"results\.csv' found; expected a \.json file"):
        evaluate(str(tuned), away, tmp_path / "results.csv")
