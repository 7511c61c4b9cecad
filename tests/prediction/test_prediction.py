"""Saved models on real files, held against the models themselves."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from data.dicom_files import dicom
from helpers import draw, tiny_config
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ViTConfig, ViTImageProcessor

from mlvicx_hf import (
    MLVICXBackbone,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXImageProcessor,
    MLVICXModel,
)
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.images.pixels import read_gray
from mlvicx_hf.finetuning.arguments import ClassifierArguments
from mlvicx_hf.finetuning.classification import load_classifier
from mlvicx_hf.prediction.prediction import find_inputs, predict, read_batches

FINDINGS = ["Effusion", "Mass, left", "Nodule"]
THRESHOLDS = {
    "values": {"Effusion": 0.5, "Mass, left": None, "Nodule": 0.5},
    "split": "validation",
    "criterion": "youden",
    "split_hash": "ab",
    "data_hash": "cd",
}
KINDS = ("probability", "decision", "answer")  # of columns
ODD_NAME = 'größe, "1"\nzweite Zeile 像.png'
OPTIONS: dict[str, Any] = {"num_workers": 0, "device": "cpu", "progress": False}


def save(folder: Path, model: Any, fit: str = "pad") -> Path:
    config = model.config
    MLVICXImageProcessor(config.image_size, config.num_channels, fit=fit).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def labelled(names: list[str], **values: Any) -> Any:
    return tiny_config(id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **values)


def settled(model: Any, head: torch.nn.Module | None = None) -> Any:
    """Batch normalisation as after training, and a random last layer around which images lie on both sides."""
    drawn = [draw({"disc": i % 2 == 0, "stripes": i > 2}, seed=i) for i in range(5)]
    pixels = MLVICXImageProcessor(32)(drawn)["pixel_values"]
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1
    with torch.no_grad():
        (model.base_model if head is None else model).train()(pixels)
        if head is not None:
            torch.nn.init.normal_(head.weight)
            head.bias.zero_()
            logits = model.eval()(pixels).logits
            head.weight.div_(logits.std())
            head.bias.copy_(-logits.mean((0, *range(2, logits.ndim))) / logits.std())
    return model.eval()


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def model_input(folder: Path, image: Path) -> Tensor:
    return MLVICXImageProcessor.from_pretrained(folder)(read_gray(image))["pixel_values"]


def files_below(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine readable images of several kinds and sizes, three that are not, and what is no image or hidden."""
    folder = tmp_path_factory.mktemp("images") / "in"
    (folder / "sub" / "deep").mkdir(parents=True)
    for number in range(5):
        draw({"disc": number % 2 == 0, "stripes": number > 2}, seed=number).save(folder / f"{number}.png")
    draw({"disc": True}, seed=7).resize((70, 33)).save(folder / "sub" / "wide.JPG")
    draw({"stripes": True}, seed=8).resize((21, 64)).save(folder / "sub" / "deep" / "tall.tiff")
    deep = np.asarray(draw({"disc": True}, seed=9)).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "sub" / "sixteen.png")
    draw({"disc": True}, seed=10).save(folder / ODD_NAME)
    whole = (folder / "0.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    (folder / "scan.dcm").write_bytes(bytes(128) + b"DICM" + bytes(200))
    (folder / "notes.txt").write_text("not looked at")
    (folder / ".hidden.png").write_bytes(whole)
    (folder / ".trash").mkdir()
    (folder / ".trash" / "a.png").write_bytes(whole)
    return folder


READABLE = 9
ORDER = [
    "0.png", "1.png", "2.png", "3.png", "4.png", ODD_NAME, "scan.dcm", "text.png", "truncated.png",
    "sub/sixteen.png", "sub/wide.JPG", "sub/deep/tall.tiff",
]  # fmt: skip


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = MLVICXForImageClassification(labelled(FINDINGS, decision_thresholds=THRESHOLDS))
    return save(tmp_path_factory.mktemp("classifier"), settled(model, model.classifier))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    return save(tmp_path_factory.mktemp("encoder"), settled(MLVICXModel(tiny_config())))


def segmenter(folder: Path, names: list[str], fit: str = "pad") -> Path:
    torch.manual_seed(1)
    model = MLVICXForSemanticSegmentation(labelled(names))
    return save(folder, settled(model, model.decoder.classifier), fit)


@pytest.fixture(scope="module")
def chest_segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmenter(tmp_path_factory.mktemp("segmenter"), ["background", "lung", "heart"])


def test_a_multi_label_classifier_says_what_the_model_says(classifier: Path, images: Path, tmp_path: Path):
    record = predict(str(classifier), images, tmp_path / "out.csv", **OPTIONS)
    rows = read(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == [str(images / name) for name in ORDER]
    assert list(rows[0]) == ["file", "error", "note", *(f"{k}:{n}" for k in KINDS for n in FINDINGS)]
    model = MLVICXForImageClassification.from_pretrained(classifier).eval()
    decisions = []
    for row in rows:
        if row["error"]:
            assert set(row.values()) == {row["file"], row["error"], ""}
            continue
        with torch.no_grad():
            expected = model(model_input(classifier, Path(row["file"]))).logits[0].sigmoid()
        found = [row[f"probability:{name}"] for name in FINDINGS]
        assert all(len(cell.partition(".")[2]) == 6 for cell in found)
        np.testing.assert_allclose([float(cell) for cell in found], expected, rtol=0, atol=1e-5)
        assert row["decision:Mass, left"] == ""
        assert row["decision:Effusion"] == str(int(expected[0] >= 0.5))
        assert row["decision:Nodule"] == str(int(expected[2] >= 0.5))
        decisions += [row["decision:Effusion"], row["decision:Nodule"]]
    assert set(decisions) == {"0", "1"}  # else the test could not fail
    assert (record["images"], record["errors"]) == (12, 12 - READABLE)


@pytest.mark.parametrize("fit", ["pad", "crop"])
@pytest.mark.parametrize("model", ["random", "encoder"])
def test_files_are_seen_as_the_cache_of_training_showed_them(fit: str, model: str, encoder: Path, tmp_path: Path):
    """Otherwise thresholds and calibrated probabilities do not hold."""
    root = tmp_path / "images"
    root.mkdir()
    rng = np.random.default_rng(0)
    lines = ["file_name,patient_id,split,Edema"]
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (120 + 10 * number, 150), np.uint8)).save(root / f"{number}.png")
        lines.append(f"{number}.png,p{number},{('train', 'validation', 'test')[number % 3]},{number % 2}")
    (root / "metadata.csv").write_text("\n".join(lines))
    prepare(FolderCollection(root), tmp_path / "cache", size=24, fit=fit, num_workers=0, progress=False)
    cache = load_cache(tmp_path / "cache")
    given = {"architecture": str(encoder)} if model == "random" else {}
    arguments = ClassifierArguments(model if model == "random" else str(encoder), image_size=32, **given)
    trained, processor = load_classifier(arguments, cache)
    settled(trained, trained.classifier)
    trained.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    predict(str(tmp_path / "model"), root, tmp_path / "out.csv", **OPTIONS)
    found = {Path(row["file"]).name: float(row["probability:Edema"]) for row in read(tmp_path / "out.csv")}
    plain = MLVICXImageProcessor.from_dict(processor.to_dict() | {"prepared_size": None})
    near, far = [], []
    for row in (row for part in cache.datasets.values() for row in part):
        name = row["source"].removeprefix("folder:")
        inputs = processor(row["image"])["pixel_values"], plain(read_gray(root / name))["pixel_values"]
        with torch.no_grad():
            expected, sharper = (trained(pixels).logits.sigmoid().item() for pixels in inputs)
        near.append(abs(found[name] - expected))
        far.append(abs(sharper - expected))
    assert max(near) < max(far) / 5, (near, far)


def test_unreadable_files_are_rows_with_their_reason(classifier: Path, images: Path, tmp_path: Path):
    predict(str(classifier), images, tmp_path / "out.csv", **OPTIONS)
    reasons = {Path(row["file"]).name: row["error"] for row in read(tmp_path / "out.csv") if row["error"]}
    assert set(reasons) == {"truncated.png", "text.png", "scan.dcm"}
    assert "damaged" in reasons["truncated.png"]
    assert "content is none of PNG" in reasons["text.png"]
    assert "no PixelData found" in reasons["scan.dcm"]


def test_pictures_that_raise_doubt_are_rows_with_a_note(classifier: Path, images: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images / "0.png", folder / "a.png")
    Image.new("L", (40, 40), 200).save(folder / "flat.png")
    film = np.asarray(draw({"disc": True}, seed=1)).astype(np.uint16) * 16
    (folder / "film.dcm").write_bytes(dicom(film, BitsStored=12, WindowCenter=90_000, WindowWidth=10))
    record = predict(str(classifier), folder, tmp_path / "out.csv", **OPTIONS)
    notes = {Path(row["file"]).name: row["note"] for row in read(tmp_path / "out.csv")}
    assert (notes["a.png"], notes["flat.png"]) == ("", "no contrast or texture")
    assert notes["film.dcm"].startswith("window 1 makes 100.0 % of the pixels black or white")
    assert (record["errors"], record["noted"]) == (0, 2)


class DyingProcess(MLVICXImageProcessor):
    def __call__(self, image: Any, **values: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error_that_names_the_files(images: Path, tmp_path: Path):
    found = find_inputs([images])
    with pytest.raises(UserError, match=r"files 1 to 4 of 12, from .*0\.png to .*3\.png: .*fewer --num_workers"):
        list(read_batches(found, DyingProcess(), batch_size=2, num_workers=2))


def test_the_record_names_weights_thresholds_and_code(classifier: Path, images: Path, tmp_path: Path):
    record = predict(str(classifier), images, tmp_path / "out.csv", **OPTIONS)
    assert json.loads((tmp_path / "out.json").read_text()) == record
    weights = (classifier / "model.safetensors").read_bytes()
    assert record["weights_sha256"] == {"model.safetensors": sha256(weights).hexdigest()}
    assert record["model"] == str(classifier)
    assert record["revision"] is None
    assert record["architectures"] == ["MLVICXForImageClassification"]
    assert record["decision_thresholds"] == THRESHOLDS
    assert record["labels"] == FINDINGS
    assert set(record["code"]) == {"mlvicx_hf", "commit", "torch", "transformers"}
    assert "Not a medical device" in record["notice"]
    assert files_below(tmp_path) == {"out.csv", "out.json"}


def test_a_probability_on_its_threshold_is_present(classifier: Path, images: Path, tmp_path: Path):
    model = MLVICXForImageClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()  # every probability is 0.5
    values = {"Effusion": 0.5, "Mass, left": 0.5000001, "Nodule": 0.4999999}
    model.config.decision_thresholds = THRESHOLDS | {"values": values}
    source = save(tmp_path / "model", model)
    predict(str(source), images / "0.png", tmp_path / "out.csv", **OPTIONS)
    assert list(read(tmp_path / "out.csv")[0].values())[3:] == ["0.500000"] * 3 + ["1", "0", "1"] + [""] * 3


def test_without_thresholds_there_are_no_decisions(classifier: Path, images: Path, tmp_path: Path):
    model = MLVICXForImageClassification.from_pretrained(classifier)
    model.config.decision_thresholds = None
    source = save(tmp_path / "model", model)
    record = predict(str(source), images / "0.png", tmp_path / "out.csv", **OPTIONS)
    assert record["decision_thresholds"] is None
    row = read(tmp_path / "out.csv")[0]
    assert [row[f"decision:{name}"] for name in FINDINGS] == [""] * 3
    assert row["probability:Nodule"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"Effusion": 0.5, "Nodule": 0.5}, "expected values for Effusion, Mass, left, Nodule"),
        ({"Effusion": "high", "Mass, left": None, "Nodule": 0.5}, "'high' found for Effusion"),
    ],
)
def test_thresholds_that_do_not_fit_the_labels(
    classifier: Path, images: Path, tmp_path: Path, values: dict[str, Any], message: str
):
    source = Path(shutil.copytree(classifier, tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    config["decision_thresholds"] = {"values": values}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        predict(str(source), images, tmp_path / "out.csv", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_single_label_classifier_names_the_class(images: Path, tmp_path: Path):
    torch.manual_seed(4)
    names = ["normal", "bacterial", "viral"]
    model = MLVICXForImageClassification(labelled(names, problem_type="single_label_classification"))
    source = save(tmp_path / "model", settled(model, model.classifier))
    record = predict(str(source), images, tmp_path / "out.csv", **OPTIONS)
    rows = [row for row in read(tmp_path / "out.csv") if not row["error"]]
    assert list(rows[0]) == ["file", "error", "note", *(f"probability:{name}" for name in names), "class", "answer"]
    for row in rows:
        with torch.no_grad():
            expected = model(model_input(source, Path(row["file"]))).logits[0].softmax(0)
        np.testing.assert_allclose([float(row[f"probability:{name}"]) for name in names], expected, rtol=0, atol=1e-5)
        assert row["class"] == names[int(expected.argmax())]
        assert row["answer"] == ""  # this model has no bands
    assert len({row["class"] for row in rows}) > 1
    assert record["decision_thresholds"] is None


def calibration_of(names: list[str], **values: Any) -> dict[str, Any]:
    found = {"method": "platt", "values": dict.fromkeys(names), "bands": dict.fromkeys(names), "folded": True}
    return found | {"counts": {name: [20, 20] for name in names}, "level": 0.9, "split": "validation"} | values


def test_answers_by_the_bands_of_the_model(classifier: Path, images: Path, tmp_path: Path):
    model = MLVICXForImageClassification.from_pretrained(classifier)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.zero_()  # every probability is 0.5
    bands = {"Effusion": [0.1, 0.4999], "Mass, left": [0.5001, 0.6], "Nodule": [0.2, 0.5]}
    model.config.calibration = calibration_of(FINDINGS, bands=bands)
    record = predict(str(save(tmp_path / "a", model)), images / "0.png", tmp_path / "out.csv", **OPTIONS)
    row = read(tmp_path / "out.csv")[0]
    assert [row[f"answer:{name}"] for name in FINDINGS] == ["present", "absent", "unsure"]
    assert record["calibration"] == model.config.calibration
    classes = MLVICXForImageClassification(labelled(["a", "b"], problem_type="single_label_classification"))
    with torch.no_grad():
        classes.classifier.weight.zero_()
        classes.classifier.bias.copy_(torch.tensor([2.0, 0.0]))  # 0.88 and 0.12
    for lowest, answer in ((0.5, "a"), (0.9, "unsure"), (0.1, "unsure")):
        fitted = {"method": "temperature", "values": {"temperature": 1.5}, "bands": {"lowest": lowest}}
        classes.config.calibration = calibration_of(["a", "b"], **fitted)
        table = tmp_path / f"{lowest}.csv"
        predict(str(save(tmp_path / f"{lowest}", classes)), images / "0.png", table, **OPTIONS)
        assert read(table)[0]["answer"] == answer


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"counts": {"Effusion": [20, 20]}},
            r"calibration: counts=.* found; expected entries for Effusion, Mass, left",
        ),
        (
            {"bands": dict.fromkeys([*FINDINGS, "Gout"])},
            "calibration: bands=.*Gout.* found; expected entries for Effusion",
        ),
        ({"values": None}, "calibration: values=None found"),
        ({"method": "temperature"}, "calibration: method='temperature' found; expected 'platt'"),
        ({"bands": {name: [0.2, 1.5] for name in FINDINGS}}, "found for Effusion; expected probabilities or null"),
        ({"bands": {name: [0.2] for name in FINDINGS}}, "found for Effusion; expected probabilities or null"),
        ({"bands": dict.fromkeys(FINDINGS, 5)}, "bands: 5 found for Effusion; expected probabilities or null"),
    ],
)
def test_a_calibration_that_does_not_fit_the_labels(
    classifier: Path, images: Path, tmp_path: Path, values: dict[str, Any], message: str
):
    source = Path(shutil.copytree(classifier, tmp_path / "model"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"calibration": calibration_of(FINDINGS, **values)}))
    with pytest.raises(UserError, match=message):
        predict(str(source), images, tmp_path / "out.csv", **OPTIONS)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
def test_masks_have_the_geometry_of_the_files(images: Path, tmp_path: Path, fit: str):
    source = segmenter(tmp_path / "model", ["background", "lung", "heart"], fit)
    record = predict(str(source), images, tmp_path / "out.csv", masks=tmp_path / "masks", **OPTIONS)
    rows = [row for row in read(tmp_path / "out.csv") if not row["error"]]
    assert list(rows[0]) == ["file", "error", "note", "area:lung", "area:heart", "mask"]
    assert record["mask_values"] == {"lung": 1, "heart": 2}
    assert {row["mask"] for row in rows} == files_below(tmp_path / "masks")
    assert {"sub/deep/tall.tiff.mask.png", f"{ODD_NAME}.mask.png"} <= {row["mask"] for row in rows}
    model = MLVICXForSemanticSegmentation.from_pretrained(source).eval()
    processor = MLVICXImageProcessor.from_pretrained(source)
    seen = set()
    for row in rows:
        image = Image.open(row["file"])
        with torch.no_grad():
            output = model(model_input(source, Path(row["file"])))
        size = (image.height, image.width)
        expected = processor.post_process_semantic_segmentation(output, [size])[0].numpy()
        found = np.asarray(Image.open(tmp_path / "masks" / row["mask"]))
        assert found.dtype == np.uint8
        assert found.shape == size
        assert (found != expected).mean() < 0.002  # a tie at most
        assert float(row["area:lung"]) == pytest.approx((found == 1).mean(), abs=1e-6)
        assert float(row["area:heart"]) == pytest.approx((found == 2).mean(), abs=1e-6)
        seen |= set(np.unique(found))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize("names", [["lung"], ["background", "lung"]])
def test_one_structure_is_black_and_white(images: Path, tmp_path: Path, names: list[str]):
    source = segmenter(tmp_path / "model", names)
    record = predict(str(source), images / "0.png", tmp_path / "out.csv", masks=tmp_path / "masks", **OPTIONS)
    (row,) = read(tmp_path / "out.csv")
    mask = np.asarray(Image.open(tmp_path / "masks" / row["mask"]))
    assert set(np.unique(mask)) == {0, 255}
    assert float(row["area:lung"]) == pytest.approx((mask == 255).mean(), abs=1e-6)
    assert record["mask_values"] == {"lung": 255}


def test_areas_without_masks_are_the_same(chest_segmenter: Path, images: Path, tmp_path: Path):
    predict(str(chest_segmenter), images, tmp_path / "a.csv", masks=tmp_path / "masks", **OPTIONS)
    predict(str(chest_segmenter), images, tmp_path / "b.csv", **OPTIONS)
    with_masks, without = read(tmp_path / "a.csv"), read(tmp_path / "b.csv")
    assert [{k: v for k, v in row.items() if k != "mask"} for row in with_masks] == without


def test_masks_are_upright_as_exif_says(chest_segmenter: Path, images: Path, tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    Image.open(images / "sub" / "wide.JPG").save(tmp_path / "turned.jpg", exif=exif)
    predict(str(chest_segmenter), tmp_path / "turned.jpg", tmp_path / "out.csv", masks=tmp_path / "masks", **OPTIONS)
    assert Image.open(tmp_path / "masks" / "turned.jpg.mask.png").size == (33, 70)


def test_same_names_in_different_folders_do_not_collide(chest_segmenter: Path, images: Path, tmp_path: Path):
    inputs = []
    for number, name in enumerate(["a/x.png", "b/x.png", "b/c/x.png", "a/x.png.mask.png"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images / f"{number}.png", tmp_path / name)
        inputs.append(tmp_path / name)
    files = [inputs[0], tmp_path / "b", inputs[3], tmp_path / "a" / ".." / "a" / "x.png"]  # the last one again
    predict(str(chest_segmenter), files, tmp_path / "out.csv", masks=tmp_path / "masks", **OPTIONS)
    rows = read(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == [str(inputs[i]) for i in (0, 1, 2, 3)]
    names = ["a/x.png.mask.png", "b/x.png.mask.png", "b/c/x.png.mask.png", "a/x.png.mask.png.mask.png"]
    assert [row["mask"] for row in rows] == names
    assert files_below(tmp_path / "masks") == set(names)
    assert len({(tmp_path / "masks" / name).read_bytes() for name in names}) == 4


def test_a_file_named_as_anothers_mask_folder_is_refused(chest_segmenter: Path, images: Path, tmp_path: Path):
    folder = tmp_path / "in"
    (folder / "a.png.mask.png").mkdir(parents=True)
    shutil.copy(images / "0.png", folder / "a.png")
    shutil.copy(images / "0.png", folder / "a.png.mask.png" / "b.png")
    with pytest.raises(ValueError, match="lies in a folder that is called as another mask"):
        predict(str(chest_segmenter), folder, tmp_path / "out.csv", masks=tmp_path / "masks", **OPTIONS)


@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("kind", ["encoder", "pretraining", "backbone", "classifier", "chest_segmenter"])
def test_embeddings_are_the_pooled_output(
    request: pytest.FixtureRequest, images: Path, tmp_path: Path, kind: str, suffix: str
):
    if kind in ("pretraining", "backbone"):
        torch.manual_seed(5)
        model_class = MLVICXForPreTraining if kind == "pretraining" else MLVICXBackbone
        source = save(tmp_path / "model", settled(model_class(tiny_config())))
    else:
        source = request.getfixturevalue(kind)
    path = tmp_path / f"vectors{suffix}"
    record = predict(str(source), images, tmp_path / "out.csv", embeddings=path, batch_size=4, **OPTIONS)
    files = [row["file"] for row in read(tmp_path / "out.csv") if not row["error"]]
    if suffix == ".safetensors":
        vectors = load_file(path)["embeddings"]
        with safe_open(path, "pt") as opened:
            assert json.loads(opened.metadata()["files"]) == files
    else:
        table = pyarrow.parquet.read_table(path)
        assert [str(field.type) for field in table.schema] in (
            ["string", "list<element: float>"],
            ["string", "list<item: float>"],
        )
        assert table["file"].to_pylist() == files
        vectors = torch.tensor(table["embedding"].to_pylist())
    assert vectors.dtype == torch.float32
    model = MLVICXModel.from_pretrained(source).eval()
    with torch.no_grad():
        expected = torch.cat([model(model_input(source, Path(file))).pooler_output for file in files])
    torch.testing.assert_close(vectors, expected, rtol=1e-4, atol=1e-5)
    assert expected.std(0).max() > 0.01  # images differ
    assert record["embeddings"] == str(path)
    if kind in ("encoder", "pretraining", "backbone"):
        assert list(read(tmp_path / "out.csv")[0]) == ["file", "error", "note"]
        assert record["labels"] == []


def test_batches_and_workers_do_not_matter(classifier: Path, chest_segmenter: Path, images: Path, tmp_path: Path):
    for source in (classifier, chest_segmenter):
        found = []
        for number, (batch_size, num_workers) in enumerate([(1, 0), (5, 2), (64, 1)]):
            path = tmp_path / f"{source.name}-{number}.csv"
            vectors = path.with_suffix(".safetensors")
            options = OPTIONS | {"batch_size": batch_size, "num_workers": num_workers}
            predict(str(source), images, path, embeddings=vectors, **options)
            found.append((read(path), load_file(vectors)["embeddings"]))
        for rows, vectors in found[1:]:
            torch.testing.assert_close(vectors, found[0][1], rtol=1e-4, atol=1e-5)
            for row, expected in zip(rows, found[0][0], strict=True):
                assert list(row) == list(expected)
                for name, cell in row.items():
                    number = name.startswith(("probability", "area")) and cell
                    tolerance = 2e-3 if name.startswith("area") else 1e-5  # a pixel may be a tie
                    assert (
                        float(cell) == pytest.approx(float(expected[name]), abs=tolerance)
                        if number
                        else (cell == expected[name])
                    )


def test_half_precision_weights_are_used_in_float32(classifier: Path, images: Path, tmp_path: Path):
    model = MLVICXForImageClassification.from_pretrained(classifier).to(torch.bfloat16)
    source = save(tmp_path / "model", model)
    assert load_file(source / "model.safetensors")["classifier.weight"].dtype == torch.bfloat16
    predict(str(source), images / "0.png", tmp_path / "out.csv", embeddings=tmp_path / "e.safetensors", **OPTIONS)
    expected = MLVICXModel.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        pooled = expected(model_input(source, images / "0.png")).pooler_output
    torch.testing.assert_close(load_file(tmp_path / "e.safetensors")["embeddings"], pooled, rtol=1e-4, atol=1e-5)


def test_files_are_taken_whatever_they_are_called(classifier: Path, images: Path, tmp_path: Path):
    shutil.copy(images / "0.png", tmp_path / "no_suffix")
    shutil.copy(images / "1.png", tmp_path / ".hidden")
    inputs = [tmp_path / "no_suffix", tmp_path / ".hidden"]
    record = predict(str(classifier), inputs, tmp_path / "out.csv", **OPTIONS)
    assert record["errors"] == 0
    assert [row["file"] for row in read(tmp_path / "out.csv")] == [str(path) for path in inputs]


def test_names_that_are_not_utf8_are_escaped(chest_segmenter: Path, images: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images / "0.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    outputs = {"masks": tmp_path / "masks", "embeddings": tmp_path / "e.parquet"}
    predict(str(chest_segmenter), folder, tmp_path / "out.csv", **outputs, **OPTIONS)
    (row,) = read(tmp_path / "out.csv")
    assert row["file"] == f"{folder}/caf\\xe9.png"
    assert row["mask"] == "caf\\xe9.png.mask.png"
    assert pyarrow.parquet.read_table(tmp_path / "e.parquet")["file"].to_pylist() == [row["file"]]
    assert os.listdir(os.fsencode(tmp_path / "masks")) == [b"caf\xe9.png.mask.png"]


def test_broken_links_are_rows(classifier: Path, images: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    shutil.copy(images / "0.png", folder / "a.png")
    (folder / "b.png").symlink_to(tmp_path / "absent.png")
    record = predict(str(classifier), folder, tmp_path / "out.csv", **OPTIONS)
    assert record["errors"] == 1
    assert "cannot be read: No such file" in read(tmp_path / "out.csv")[1]["error"]


def test_when_nothing_can_be_read_the_reasons_are_still_written(classifier: Path, images: Path, tmp_path: Path):
    inputs = [images / "text.png", images / "truncated.png"]
    vectors = tmp_path / "e.parquet"
    with pytest.raises(ValueError, match=r"none of 2 images could be read.*out\.csv"):
        predict(str(classifier), inputs, tmp_path / "out.csv", embeddings=vectors, **OPTIONS)
    assert [bool(row["error"]) for row in read(tmp_path / "out.csv")] == [True, True]
    assert json.loads((tmp_path / "out.json").read_text())["errors"] == 2
    assert len(pyarrow.parquet.read_table(vectors)) == 0


def test_outputs_are_replaced_only_when_asked(chest_segmenter: Path, images: Path, tmp_path: Path):
    output, masks, vectors = tmp_path / "out.csv", tmp_path / "masks", tmp_path / "e.safetensors"
    first = {"masks": masks, "embeddings": vectors}
    predict(str(chest_segmenter), images / "0.png", output, **first, **OPTIONS)
    before = {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    for others in ({}, {"output": tmp_path / "b.csv", "embeddings": vectors}, {"output": tmp_path / "b.csv"} | first):
        arguments = {"output": output} | others
        with pytest.raises(FileExistsError, match="--overwrite"):
            predict(str(chest_segmenter), images, **arguments, **OPTIONS)
    output.rename(tmp_path / "moved.csv")
    with pytest.raises(FileExistsError, match=r"out\.json exists"):
        predict(str(chest_segmenter), images, output, **OPTIONS)
    (tmp_path / "moved.csv").rename(output)
    assert {name: (tmp_path / name).read_bytes() for name in files_below(tmp_path)} == before
    predict(str(chest_segmenter), images / "1.png", output, **first, overwrite=True, **OPTIONS)
    assert [Path(row["file"]).name for row in read(output)] == ["1.png"]
    assert files_below(tmp_path) == {"out.csv", "out.json", "e.safetensors", "masks/1.png.mask.png"}


def test_a_mask_folder_with_other_files_is_never_replaced(chest_segmenter: Path, images: Path, tmp_path: Path):
    masks = tmp_path / "masks"
    masks.mkdir()
    (masks / "precious.png").write_bytes(b"1")
    for overwrite, message in ((False, "holds files"), (True, r"holds precious\.png, which is no mask")):
        with pytest.raises(FileExistsError, match=message):
            predict(str(chest_segmenter), images, tmp_path / "out.csv", masks=masks, overwrite=overwrite, **OPTIONS)
    assert files_below(tmp_path) == {"masks/precious.png"}


def test_the_working_folder_is_no_mask_folder(
    chest_segmenter: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileExistsError, match=r"mask folder \. is the working folder; expected another one"):
        predict(str(chest_segmenter), images, tmp_path / "out.csv", masks=Path("."), **OPTIONS)


def test_what_comes_into_the_mask_folder_meanwhile_stays(
    chest_segmenter: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    masks = tmp_path / "masks"
    masks.mkdir()

    class Arriving(io.StringIO):  # the first line that the progress bar writes
        def write(self, text: str) -> int:
            (masks / "precious.png").write_bytes(b"1")
            return super().write(text)

    monkeypatch.setattr("sys.stderr", Arriving())
    with pytest.raises(FileExistsError, match="holds files"):
        predict(str(chest_segmenter), images, tmp_path / "out.csv", masks=masks, **(OPTIONS | {"progress": True}))
    assert files_below(tmp_path) == {"masks/precious.png"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output": "out.tsv"}, r"out\.tsv found; expected a name that ends in \.csv"),
        ({"embeddings": "e.npy"}, r"e\.npy found; expected a \.safetensors or \.parquet file"),
        ({"masks": "."}, "lies in the mask folder"),
        ({"masks": "masks", "embeddings": "masks/e.parquet"}, "lies in the mask folder"),
        ({"masks": "{images}/masks"}, "lies in the input"),
        ({"inputs": ["absent.png"]}, r"'absent\.png' does not exist"),
        ({"inputs": ["empty"]}, r"no images found in empty; expected .*PNG, JPEG"),
        ({"inputs": []}, "no images found in no inputs"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"device": "tpu7"}, "device='tpu7' found"),
        ({"device": "meta"}, "device='meta' found"),
        ({"device": "cuda:99"}, "device='cuda:99' found; this machine has"),
        ({"revision": "v1"}, "only models on the Hub have revisions"),
        ({"model_source": "./absent"}, "'./absent' found; expected a folder"),
        ({"model_source": __file__}, "a file found; expected the folder of a saved model"),
        ({"model_source": "my model"}, "my model"),
    ],
)
def test_arguments_that_do_not_fit(
    chest_segmenter: Path, images: Path, tmp_path: Path, arguments: dict[str, Any], message: str
):
    given = {"model_source": str(chest_segmenter), "inputs": images, "output": "out.csv"} | OPTIONS | arguments
    if "masks" in arguments:
        given["masks"] = arguments["masks"].format(images=images)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        Path("empty").mkdir()
        with pytest.raises((ValueError, OSError), match=message):
            predict(**given)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_tasks_that_the_model_cannot_do(classifier: Path, encoder: Path, images: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"--masks .*MLVICXForImageClassification.*expected a MLVICXForSemantic"):
        predict(str(classifier), images, tmp_path / "out.csv", masks=tmp_path / "masks", **OPTIONS)
    with pytest.raises(ValueError, match="has no head, so it gives embeddings only; expected --embeddings"):
        predict(str(encoder), images, tmp_path / "out.csv", **OPTIONS)
    assert files_below(tmp_path) == set()


def test_models_that_cannot_be_used(classifier: Path, images: Path, tmp_path: Path):
    def broken(name: str) -> Path:
        return Path(shutil.copytree(classifier, tmp_path / name))

    vit = tmp_path / "vit"
    ViTConfig().save_pretrained(vit)
    save_file({"a": torch.zeros(1)}, vit / "model.safetensors")
    truncated = broken("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-1000])
    (broken("no_processor") / "preprocessor_config.json").unlink()
    ViTImageProcessor().save_pretrained(broken("other_processor"))
    (broken("no_weights") / "model.safetensors").unlink()
    weights = load_file(broken("headless") / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("classifier")}
    save_file(kept, tmp_path / "headless" / "model.safetensors", metadata={"format": "pt"})
    nan = broken("diverged") / "model.safetensors"
    save_file(weights | {"classifier.bias": torch.full((3,), torch.nan)}, nan, metadata={"format": "pt"})
    for name, config in {
        "unknown": {"architectures": ["Other"]},
        "repeats": {"id2label": dict.fromkeys("012", "a")},
    }.items():
        path = broken(name) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    messages = {
        "vit": "'vit'.*'mlvicx'",
        "truncated": "truncated.*damaged",
        "no_processor": "no preprocessor_config.json",
        "other_processor": "ViTImageProcessor.*MLVICXImageProcessor",
        "no_weights": r"holds no model\*\.safetensors",
        "headless": "classifier.*MLVICXForImageClassification",
        "diverged": "not finite",
        "unknown": r"architectures=\['Other'\]",
        "repeats": "labels a, a, a found",
    }
    for name, message in messages.items():
        with pytest.raises((ValueError, OSError, FloatingPointError), match=message) as caught:
            predict(str(tmp_path / name), images, tmp_path / "out.csv", **OPTIONS)
        assert name in str(caught.value)
        assert not any(path.name.startswith(("out", ".out")) for path in tmp_path.iterdir())
