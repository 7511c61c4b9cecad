"""kNN and linear probe of a frozen encoder: by hand on small numbers, and on drawn images."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache, tiny_config
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch.utils.data import Subset

from mlvicx_hf import MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.encoders.features import encode, prepared_images
from mlvicx_hf.pretraining.probe import LIMITS, Probe
from mlvicx_hf.scoring.probes import knn_scores, linear_scores

NOT_SAME = torch.zeros(1, 3, dtype=torch.bool)


def rows(count: int = 90, **columns: Any) -> list[dict[str, Any]]:
    """Two images a patient, 40 % of them with discs, 60 % with stripes; some labels unknown."""
    generator = np.random.default_rng(0)
    table = []
    for number in range(count):
        truth = {"disc": bool(generator.random() < 0.4), "stripes": bool(generator.random() < 0.6)}
        split = ("train", "train", "train", "validation", "test")[number // 2 % 5]
        known = {name: "" if generator.random() < 0.1 else int(value) for name, value in truth.items()}
        table.append({"patient_id": f"p{number // 2}", "split": split, "_draw": truth} | known | columns)
    return table


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("probed"), rows(always=1))


@pytest.fixture(scope="module")
def processor() -> MLVICXImageProcessor:
    return MLVICXImageProcessor(image_size=32)


@pytest.fixture
def encoder() -> MLVICXModel:
    torch.manual_seed(0)
    return MLVICXModel(tiny_config()).train()


def test_features_are_those_of_single_images(cache: Path, encoder: MLVICXModel, processor: MLVICXImageProcessor):
    images = load_cache(cache).datasets["validation"]
    features = encode(encoder, prepared_images(images, processor), batch_size=5)["features"]
    encoder.eval()
    with torch.no_grad():
        alone = [encoder(processor(row["image"])["pixel_values"]).pooler_output for row in images]
    torch.testing.assert_close(features, torch.cat(alone), rtol=1e-4, atol=1e-6)


def test_features_do_not_depend_on_how_many_images_are_left(
    cache: Path, encoder: MLVICXModel, processor: MLVICXImageProcessor
):
    images = prepared_images(load_cache(cache).datasets["validation"], processor)
    shapes: list[int] = []
    encoder.register_forward_hook(lambda module, inputs, output: shapes.append(len(inputs[0])))
    everything = encode(encoder, images, batch_size=4)["features"]
    few = encode(encoder, Subset(images, [4, 1, 2]), batch_size=4)["features"]
    assert set(shapes) == {4}
    torch.testing.assert_close(few, everything[[4, 1, 2]], rtol=0, atol=0)


def test_what_else_the_images_give_comes_along(encoder: MLVICXModel):
    images: Any = [{"pixel_values": torch.zeros(1, 32, 32), "labels": torch.tensor(float(i))} for i in range(5)]
    encoded = encode(encoder, images, batch_size=2, show=False)
    assert encoded["labels"].tolist() == [0, 1, 2, 3, 4]
    assert encoded["features"].shape == (5, encoder.channels[-1])


def random_state() -> tuple[Any, ...]:
    """Of torch, Python and numpy."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002 - the global one


def test_probing_changes_nothing(cache: Path, encoder: MLVICXModel, processor: MLVICXImageProcessor):
    encoder.context.eval()  # a part in another mode stays in it
    modes = [part.training for part in encoder.modules()]
    weights = {key: value.clone() for key, value in encoder.state_dict().items()}
    probe = Probe(cache, processor)
    before = random_state()
    first = probe(encoder)
    assert random_state() == before
    assert [part.training for part in encoder.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())
    assert probe(encoder) == first == Probe(cache, processor)(encoder)


def test_scores_of_drawn_images(cache: Path, encoder: MLVICXModel, processor: MLVICXImageProcessor):
    found = Probe(cache, processor)(encoder)
    kinds = ("knn", "linear")
    names = {f"probe_{kind}_auroc/{name}" for kind in kinds for name in ("disc", "stripes")}
    assert set(found) == names | {f"probe_{kind}_auroc" for kind in kinds}  # `always` has no ROC curve
    for kind in kinds:
        assert found[f"probe_{kind}_auroc/stripes"] > 0.9  # random filters see stripes
        mean = (found[f"probe_{kind}_auroc/disc"] + found[f"probe_{kind}_auroc/stripes"]) / 2
        assert found[f"probe_{kind}_auroc"] == pytest.approx(mean)


def test_the_test_split_is_never_used(cache: Path, processor: MLVICXImageProcessor):
    probe = Probe(cache, processor)
    test = set(load_cache(cache).datasets["test"]["source"])
    assert set(probe.images) == {"train", "validation"}
    assert test
    assert not any(test & set(images["source"]) for images in probe.images.values())


def test_images_without_a_label_take_no_room(tmp_path: Path, processor: MLVICXImageProcessor):
    table = rows()
    table += [{"patient_id": f"u{number}", "split": "train", "disc": "", "stripes": ""} for number in range(9)]
    probe = Probe(make_cache(tmp_path, table), processor)
    assert not any(patient.startswith("u") for patient in probe.images["train"]["patient_id"])
    assert not np.isnan(probe.labels["train"]).all(axis=1).any()


def test_limits_take_whole_patients_by_their_hash(
    cache: Path, processor: MLVICXImageProcessor, monkeypatch: pytest.MonkeyPatch
):
    def limited(limit: int) -> Any:
        monkeypatch.setitem(LIMITS, "train", limit)
        return Probe(cache, processor).images["train"]

    whole, small, smaller = (limited(limit) for limit in (2000, 20, 8))
    assert (len(whole), len(small), len(smaller)) == (54, 20, 8)
    assert len(set(small["patient_id"])) == 10
    assert set(smaller["source"]) < set(small["source"]) < set(whole["source"])


def test_neighbours_by_hand():
    features = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])  # centred, of length one
    labels = np.array([[1, 0], [0, 1], [0, np.nan]])
    scores = knn_scores(features, labels, features[:1], NOT_SAME, neighbours=3)
    far = np.exp(-1.5 / 0.07)  # cosine -0.5
    np.testing.assert_allclose(scores, [[1 / (1 + 2 * far), far / (1 + far)]], rtol=1e-6)
    nearest = knn_scores(features, labels, features[:1], NOT_SAME, neighbours=1)
    np.testing.assert_allclose(nearest, [[1, 0]])


def test_a_patient_is_no_neighbour_of_their_own():
    features = torch.tensor([[1.0, 0.0], [-0.5, 0.75**0.5], [-0.5, -(0.75**0.5)]])
    labels = np.array([[1.0], [0.0], [1.0]])
    same = torch.tensor([[True, False, False]])
    np.testing.assert_allclose(knn_scores(features, labels, features[:1], same, neighbours=3), [[0.5]])
    np.testing.assert_allclose(knn_scores(features, labels, features[:1], torch.ones(1, 3, dtype=torch.bool)), [[0.0]])


def signal(count: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features of very different scales, one of them dead, and a label that leans on two of them."""
    generator = np.random.default_rng(seed)
    features = generator.normal(size=(count, 16)) * np.logspace(-2, 2, 16)
    features[:, 3] = 0.7
    target = features[:, 0] / 1e-2 - features[:, 15] / 1e2 + generator.normal(size=count)
    return torch.from_numpy(features.astype(np.float32)), (target > 0.5).astype(np.float64)


def test_the_linear_probe_orders_as_a_logistic_regression():
    (fit, labels), (asked, truth) = signal(500, 0), signal(400, 1)
    score = roc_auc_score(truth, linear_scores(fit, labels[:, None], asked)[:, 0])
    mean, deviation = fit.mean(0), fit.std(0).clamp(min=1e-3)
    logistic = LogisticRegression().fit((fit - mean) / deviation, labels)
    assert score == pytest.approx(
        roc_auc_score(truth, logistic.decision_function((asked - mean) / deviation)), abs=0.01
    )
    assert score > 0.85


@pytest.mark.parametrize("scores", ["knn", "linear"])
def test_unknown_labels_teach_nothing(scores: str):
    (fit, labels), (asked, truth) = signal(500, 0), signal(400, 1)
    same = torch.zeros(len(asked), len(fit), dtype=torch.bool)
    wrong, unknown = labels.copy(), labels.copy()
    wrong[150:], unknown[150:] = 1 - labels[150:], np.nan
    fit[:, 1:15] *= 1e-3  # leaves the two that matter to cosines
    fit[:, 0] *= 1e4
    asked = asked.clone()
    asked[:, 1:15] *= 1e-3
    asked[:, 0] *= 1e4
    table = np.stack([wrong, unknown], 1)
    found = linear_scores(fit, table, asked) if scores == "linear" else knn_scores(fit, table, asked, same)
    assert roc_auc_score(truth, found[:, 0]) < 0.3
    assert roc_auc_score(truth, found[:, 1]) > 0.8


def test_exclusive_classes_count_one_against_the_rest(
    tmp_path: Path, encoder: MLVICXModel, processor: MLVICXImageProcessor
):
    table = []
    for row in rows():
        kind = "stripes" if row["_draw"]["stripes"] else "disc" if row["_draw"]["disc"] else "plain"
        kept = {key: row[key] for key in ("patient_id", "split", "_draw")}
        table.append(kept | {"label": "" if len(table) % 11 == 0 else kind})
    path = make_cache(tmp_path, table)
    assert load_cache(path).exclusive
    found = Probe(path, processor)(encoder)
    names = {f"probe_{kind}_auroc/{name}" for kind in ("knn", "linear") for name in ("disc", "plain", "stripes")}
    assert names < set(found)
    assert found["probe_linear_auroc/stripes"] > 0.9


def test_what_cannot_be_probed_is_refused(tmp_path: Path, processor: MLVICXImageProcessor):
    bare = [{key: row[key] for key in ("patient_id", "split", "_draw")} for row in rows(20)]
    with pytest.raises(ValueError, match="has no labels"):
        Probe(make_cache(tmp_path, bare, name="bare"), processor)
    same = [row | {"disc": 1, "stripes": 0} for row in rows(20)]
    with pytest.raises(ValueError, match="no label has both values"):
        Probe(make_cache(tmp_path, same, name="same"), processor)
    whole = [row | {"split": "train"} for row in rows(20)]
    with pytest.raises(ValueError, match="validation"):
        Probe(make_cache(tmp_path, whole, name="whole"), processor)
    with pytest.raises(FileNotFoundError):
        Probe(tmp_path / "absent", processor)
