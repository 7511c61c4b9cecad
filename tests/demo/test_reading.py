"""What the page says of a radiograph, held against the models themselves."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache
from PIL import Image

from mlvicx_hf import MLVICXForImageClassification
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import read_gray
from mlvicx_hf.demo import reading
from mlvicx_hf.demo.reading import Reader
from mlvicx_hf.encoders.inference import load
from mlvicx_hf.prediction.indexing import build_index

NAMES = ["Edema", "Mass <b>left</b>", "No Finding"]


def test_findings_are_those_of_the_model(classifier: Path, radiograph: bytes, tmp_path: Path):
    file = tmp_path / "a.png"
    file.write_bytes(radiograph)
    loaded = load(str(classifier))
    with torch.no_grad():
        logits = loaded.model(loaded.processor(read_gray(file))["pixel_values"]).logits[0]
    expected = dict(zip(NAMES, logits.double().sigmoid().tolist(), strict=True))
    found = Reader(str(classifier)).read(radiograph)
    assert {each.name: each.probability for each in found.findings} == pytest.approx(expected, rel=1e-6)
    assert [each.probability for each in found.findings] == sorted(expected.values(), reverse=True)
    by_name = {each.name: each for each in found.findings}
    assert [by_name[name].threshold for name in NAMES] == [0.25, None, 0.75]
    assert [by_name[name].answer for name in NAMES] == ["unsure", "present", ""]
    assert found.answer == ""
    assert found.gray.shape == (48, 64)
    assert (found.outlines, found.neighbours, found.unlike) == ({}, [], None)


def test_a_finding_that_was_not_calibrated_stands_last_without_a_probability(
    classifier: Path, radiograph: bytes, tmp_path: Path
):
    model = MLVICXForImageClassification.from_pretrained(classifier)
    first = Reader(str(classifier)).read(radiograph).findings[0].name
    model.config.calibration["values"][first] = model.config.calibration["bands"][first] = None
    model.save_pretrained(tmp_path)
    load(str(classifier)).processor.save_pretrained(tmp_path)
    found = Reader(str(tmp_path)).read(radiograph)
    assert [each.name for each in found.findings][-1] == first
    assert [each.probability is None for each in found.findings] == [False, False, True]
    pytest.importorskip("gradio", reason="gradio of the extra demo is not installed")
    from mlvicx_hf.demo.page import _table

    page = _table(found)
    assert page.count("not calibrated") == 1
    assert page.index("not calibrated") > page.index("%")


def test_exclusive_classes_have_one_answer(classifier: Path, radiograph: bytes, tmp_path: Path):
    model = MLVICXForImageClassification.from_pretrained(classifier)
    model.config.problem_type, model.config.decision_thresholds = "single_label_classification", None
    counts = {name: [30, 60] for name in NAMES}
    values = {"method": "temperature", "values": {"temperature": 1.0}, "counts": counts}
    for lowest, answer in ((0.9, "unsure"), (0.0, "unsure")):  # none, then all of them
        model.config.calibration = values | {"bands": {"lowest": lowest}}
        model.save_pretrained(tmp_path)
        load(str(classifier)).processor.save_pretrained(tmp_path)
        found = Reader(str(tmp_path)).read(radiograph)
        assert found.answer == answer
        assert sum(each.probability for each in found.findings) == pytest.approx(1)
        assert all(each.answer == "" for each in found.findings)


def test_a_heat_map_lies_on_the_image(classifier: Path, radiograph: bytes):
    reader = Reader(str(classifier))
    read = reader.read(radiograph)
    heat = reader.heat_map(read, NAMES[1])
    assert heat.shape == read.gray.shape
    assert heat.min() >= 0
    assert heat.max() in (0, 1)
    assert reader.heat_map(read, NAMES[1]) is heat


def test_outlines_are_borders_of_the_mask(classifier: Path, segmenter: Path, radiograph: bytes):
    reader = Reader(str(classifier), str(segmenter))
    assert reader.segmenter is not None
    read = reader.read(radiograph)
    (border,) = read.outlines.values()
    assert border.shape == read.gray.shape
    image = Image.open(io.BytesIO(radiograph))
    logits = reader.segmenter.model(reader.segmenter.processor(image)["pixel_values"])
    mask = reader.segmenter.processor.post_process_semantic_segmentation(logits, [(48, 64)])[0].numpy() == 1
    assert mask.any()
    assert not (border & ~mask).any()
    inner = np.ones((5, 5))
    padded = np.pad(mask, 2)
    deep = np.array([[(padded[y : y + 5, x : x + 5] * inner).all() for x in range(64)] for y in range(48)])
    assert not (border & deep).any()


def test_several_people_at_once_get_their_own_heat_maps(classifier: Path, radiograph: bytes, deep_radiograph: bytes):
    reader = Reader(str(classifier))
    contents = [radiograph, deep_radiograph] * 4
    alone = [reader.heat_map(reader.read(content), NAMES[0]) for content in contents[:2]]
    together: dict[int, np.ndarray] = {}

    def work(number: int) -> None:
        together[number] = reader.heat_map(reader.read(contents[number]), NAMES[0])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(len(contents)):
        np.testing.assert_allclose(together[number], alone[number % 2], atol=1e-6)


# -- how well heat maps point ------------------------------------------------------------------------------------------


def explanations(folder: Path, weights: dict[str, str], level: int = 4, tolerance: float = 0) -> Path:
    """Of a cache that calls the first finding otherwise."""
    score = {"pointing": {"mean": 0.04, "low": 0.0, "high": 0.1, "chance": 0.09}}
    about = {"images": 50, "located": 43, "scores": {"ours": score}, "labels": {"ours": NAMES[0]}}
    content = {"findings": {"Another name": about, NAMES[1]: {"images": 2, "located": 0}}}
    content |= {"models": {"ours": {"weights_sha256": weights, "level": level}}}
    content |= {"data": {"split": "test"}, "settings": {"tolerance": tolerance}}
    file = folder / "explanations.json"
    file.write_text(json.dumps(content))
    return file


def test_the_models_own_score_is_told(classifier: Path, radiograph: bytes, tmp_path: Path):
    file = explanations(tmp_path, load(str(classifier)).weights)
    found = {each.name: each for each in Reader(str(classifier), explanations=file).read(radiograph).findings}
    assert found[NAMES[0]].pointing == "points at the finding in 4% of 43 test images (chance 9%)"
    assert found[NAMES[1]].pointing == ""
    wider = Reader(str(classifier), explanations=explanations(tmp_path, load(str(classifier)).weights, tolerance=30))
    assert "43 test images, within 30 pixels (chance 9%)" in wider.pointing[NAMES[0]]


def test_scores_of_another_level_are_refused(classifier: Path, tmp_path: Path):
    file = explanations(tmp_path, load(str(classifier)).weights, level=2)
    with pytest.raises(UserError, match=r"explanations.json is about maps of level 2; expected the last one, 4"):
        Reader(str(classifier), explanations=file)


def test_scores_of_another_model_are_refused(classifier: Path, tmp_path: Path):
    file = explanations(tmp_path, {"model.safetensors": "0"})
    with pytest.raises(UserError, match=r"explanations.json is about ours; expected heat maps of .*classifier"):
        Reader(str(classifier), explanations=file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("{}", "no field 'models' found; expected what `mlvicx explain --score` wrote"),
        ('{"models": {"ours": {}}, "findings": {}}', "no field 'weights_sha256' found"),
    ],
)
def test_files_that_are_no_explanations_are_named(classifier: Path, tmp_path: Path, content: str, message: str):
    (tmp_path / "explanations.json").write_text(content)
    with pytest.raises(UserError, match=f"explanations.json: .*{message}"):
        Reader(str(classifier), explanations=tmp_path / "explanations.json")


# -- similar images ----------------------------------------------------------------------------------------------------


def test_an_indexed_image_is_its_own_nearest(classifier: Path, tmp_path: Path):
    splits = ["train"] * 6 + ["validation"] * 3 + ["test"] * 3
    rows = [
        {"patient_id": f"p{i}", "split": split, "_draw": {"disc": i % 2 == 0}, "disc": int(i % 2 == 0)}
        for i, split in enumerate(splits)
    ]
    cache = make_cache(tmp_path, rows, size=48)
    build_index(str(classifier), cache, tmp_path / "index", progress=False)
    reader = Reader(str(classifier), index=tmp_path / "index", top=3)
    assert reader.index is not None
    picture = reader.index.picture(4)
    assert picture is not None
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    found = reader.read(buffer.getvalue())
    assert len(found.neighbours) == 3
    assert found.neighbours[0].cosine == pytest.approx(1, abs=1e-4)
    assert found.neighbours[0].row == 4
    known = reader.index.items["label:disc"].tolist()
    assert [each.findings for each in found.neighbours] == [
        "disc" if known[each.row] == 1 else "none of its labels" for each in found.neighbours
    ]
    assert found.unlike is False
    reader.index.unlike_threshold = 1.1
    assert reader.read(buffer.getvalue()).unlike is True


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"just text", "content is none of PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "content is none of PNG"),
        (b"<html><body onload=alert(1)></html>", "content is none of PNG"),
        (b"PK\3\4" + bytes(200), "content is none of PNG"),
    ],
)
def test_files_that_are_no_images_are_named(classifier: Path, content: bytes, reason: str):
    with pytest.raises(UnreadableImageError) as error:
        Reader(str(classifier)).read(content)
    assert error.value.reason.startswith(reason)


def test_a_truncated_image_is_named(classifier: Path, radiograph: bytes):
    with pytest.raises(UnreadableImageError, match="damaged"):
        Reader(str(classifier)).read(radiograph[:-300])


def test_a_file_over_the_limit_is_refused_unread(classifier: Path, radiograph: bytes, monkeypatch: Any):
    monkeypatch.setattr(reading, "MAX_UPLOAD", len(radiograph) - 1)
    with pytest.raises(UnreadableImageError, match="larger than 0 MB"):
        Reader(str(classifier)).read(radiograph)


def test_models_of_other_kinds_are_refused(classifier: Path, segmenter: Path):
    with pytest.raises(UserError, match="MLVICXForSemanticSegmentation found; expected a MLVICXForImageClassification"):
        Reader(str(segmenter))
    with pytest.raises(UserError, match="MLVICXForImageClassification found; expected a MLVICXForSemanticSegmentation"):
        Reader(str(classifier), str(classifier))
