"""Heat maps against a naive Grad-CAM, their scores against constructed ones, and all of it on small caches."""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache, tiny_config, unlabelled_cache
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mlvicx_hf import MLVICXForImageClassification, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.commands.explain import parse_models
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import sha256
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.base import Box, Collection, Drawing, Listing, Record
from mlvicx_hf.evaluation.explanation.explaining import explain, file_name, grad_cam, picture_name
from mlvicx_hf.evaluation.explanation.localization import (
    Subject,
    chance,
    find_subject,
    localize,
    summarize,
    usual_place,
)
from mlvicx_hf.evaluation.explanation.overlays import Panel, draw_grid, draw_overlay

pytest.importorskip("captum")

SIDE = 64  # pixels of the planted images
RADIUS = 10


def make_classifier(labels: Sequence[str] = ("disc", "stripes"), **values: Any) -> MLVICXForImageClassification:
    """A random classifier in which no weight is zero or one."""
    torch.manual_seed(0)
    names = dict(enumerate(labels))
    config = tiny_config(id2label=names, label2id={name: i for i, name in names.items()}, **values)
    model = MLVICXForImageClassification(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def save_classifier(folder: Path, labels: Sequence[str] = ("disc", "stripes"), **values: Any) -> Path:
    make_classifier(labels, **values).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


# -- heat maps ---------------------------------------------------------------------------------------------------------


def naive_grad_cam(model: MLVICXForImageClassification, pixels: Tensor, target: int, size: int, level: int) -> Tensor:
    """Equations 1 and 2 of arXiv 1610.02391, image by image and channel by channel."""
    heats = []
    for image in pixels:
        output = model(image[None].clone().requires_grad_(), output_hidden_states=True)
        features = output.hidden_states[level]  # [1, C, h, w]
        (gradient,) = torch.autograd.grad(output.logits[0, target], features)
        heat = torch.zeros_like(features[0, 0])
        for k in range(features.shape[1]):
            heat = heat + gradient[0, k].mean() * features[0, k]
        heats.append(F.relu(heat))
    return F.interpolate(torch.stack(heats)[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0].detach()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("level", [4, 2, 0])
@pytest.mark.parametrize("use_context", [True, False])
def test_heat_maps_are_those_of_the_equations(use_context: bool, level: int, frozen: bool):
    model = make_classifier("abcdef", use_context=use_context).double()
    if frozen:
        model.requires_grad_(False)
    pixels = torch.randn(3, 1, 64, 64, dtype=torch.float64)
    found = [grad_cam(model, pixels, target, 40, level) for target in range(6)]
    for target, heat in enumerate(found):
        torch.testing.assert_close(heat, naive_grad_cam(model, pixels, target, 40, level), rtol=1e-9, atol=1e-12)
    assert (torch.stack(found) > 0).any()
    assert not all(torch.equal(heat, found[0]) for heat in found)
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_last_level_is_the_default():
    model, pixels = make_classifier(), torch.randn(2, 1, 32, 32)
    assert torch.equal(grad_cam(model, pixels, 1, 32), grad_cam(model, pixels, 1, 32, 4))
    assert not pixels.requires_grad


@pytest.mark.parametrize("level", [-1, 5])
def test_a_level_that_is_not_there(level: int):
    with pytest.raises(ValueError, match=f"level={level} found; test_resnet has levels 0 to 4, or last"):
        grad_cam(make_classifier(), torch.randn(1, 1, 32, 32), 0, 32, level)


# -- scores ------------------------------------------------------------------------------------------------------------


def make_region(rows: slice, columns: slice, side: int = 8) -> np.ndarray:
    region = np.zeros((side, side), dtype=bool)
    region[rows, columns] = True
    return region


REGION = make_region(slice(2, 5), slice(3, 6))


def peak(row: int, column: int, height: float = 1.0) -> np.ndarray:
    heat = np.zeros((8, 8))
    heat[row, column] = height
    return heat


@pytest.mark.parametrize("context", [True, False])
def test_backbones_that_collect_their_maps_have_heat_maps(context: bool):
    pixels = torch.rand(2, 1, 64, 64)
    for level in (0, None):
        model = MLVICXForImageClassification(tiny_config(backbone="test_efficientnet", use_context=context)).eval()
        assert grad_cam(model, pixels, 0, 32, level).shape == (2, 32, 32)
    taps = tiny_config(backbone="test_efficientnet", context_placement="taps")
    with pytest.raises(UserError, match="level=0 found; no layer of this test_efficientnet sees the map of that level"):
        grad_cam(MLVICXForImageClassification(taps).eval(), pixels, 0, 32, 0)


def test_a_map_that_is_the_region_gets_everything():
    assert localize(REGION * 0.3, REGION) == (1, 1, 1)


def test_a_map_beside_the_region_gets_nothing():
    assert localize(make_region(slice(5, 8), slice(0, 3)) * 2.0, REGION) == (0, 0, 0)


def test_a_map_that_is_zero_is_a_miss():
    assert localize(np.zeros((8, 8)), REGION) == (0, 0, 0)
    assert localize(np.zeros((8, 8)), REGION, tolerance=100) == (0, 0, 0)


def test_a_region_that_is_the_whole_image():
    region = np.ones((8, 8), dtype=bool)
    assert localize(peak(7, 7), region) == chance(region) == (1, 1, 1)


@pytest.mark.parametrize(
    ("row", "column", "tolerance", "hit"),
    [
        (4, 5, 0, 1), (5, 5, 0, 0), (4, 6, 0, 0), (2, 3, 0, 1), (1, 3, 0, 0),
        (5, 5, 1, 1), (6, 5, 1, 0), (5, 6, 1, 0), (5, 6, 1.5, 1), (6, 5, 2, 1),
    ],
)  # fmt: skip
def test_the_pointing_game_on_the_border(row: int, column: int, tolerance: float, hit: int):
    assert localize(peak(row, column), REGION, tolerance).pointing == hit


def test_equal_maxima_count_their_share():
    heat = peak(2, 3) + peak(0, 0) + peak(7, 7) + peak(4, 4) + peak(6, 6, 0.5)
    assert localize(heat, REGION).pointing == 0.5
    assert localize(heat, REGION).energy == pytest.approx(2 / 4.5)


def test_equally_high_pixels_are_shared_between_region_and_the_rest():
    """Two pixels are wanted: the highest lies inside, of the three that follow one does."""
    region = make_region(slice(0, 1), slice(0, 2))
    heat = peak(0, 0, 3) + peak(0, 1, 2) + peak(5, 5, 2) + peak(6, 6, 2) + peak(7, 7, 1)
    assert localize(heat, region).iou == pytest.approx((1 + 1 / 3) / (4 - 1 - 1 / 3))


REGIONS = arrays.arrays(bool, (5, 6)).filter(np.any)


@given(st.permutations(range(30)), REGIONS)
def test_scores_without_ties(order: list[int], region: np.ndarray):
    heat = np.array(order, dtype=np.float32).reshape(5, 6)
    highest = sorted(range(30), key=lambda place: -heat.flat[place])
    truth = {place for place in range(30) if region.flat[place]}
    chosen = set(highest[: len(truth)])
    found = localize(heat, region)
    assert found.pointing == (highest[0] in truth)
    assert found.energy == pytest.approx(sum(order[place] for place in truth) / sum(order))
    assert found.iou == pytest.approx(len(truth & chosen) / len(truth | chosen))


@given(REGIONS, st.sampled_from([0, 1, 2.5]), st.sampled_from([1e-6, 1.0, 3e4]))
def test_the_same_everywhere_is_chance(region: np.ndarray, tolerance: float, height: float):
    found = localize(np.full((5, 6), height, dtype=np.float32), region, tolerance)
    assert found == pytest.approx(chance(region, tolerance))


def test_random_maps_are_chance_on_average():
    generator = np.random.default_rng(0)
    found = np.mean([localize(generator.random((8, 8)), REGION) for _ in range(2000)], axis=0)
    assert found == pytest.approx(np.array(chance(REGION)), abs=0.02)


@pytest.mark.parametrize(
    ("heat", "region"),
    [
        (np.ones((8, 7)), REGION),
        (peak(0, 0, -1), REGION),
        (peak(0, 0, float("nan")), REGION),
        (peak(0, 0), np.zeros((8, 8), dtype=bool)),
        (peak(0, 0), REGION.astype(int)),
    ],
)
def test_what_cannot_be_scored(heat: np.ndarray, region: np.ndarray):
    with pytest.raises(AssertionError):
        localize(heat, region)


def test_the_usual_place_is_that_of_the_other_patients():
    left, right = np.zeros((2, 8, 8), dtype=bool)
    left[2:4, :2], right[2:4, 6:] = True, True
    scores = usual_place([left, left, right, left], ["a", "a", "b", "c"])
    assert [score.pointing for score in scores] == [0.5, 0.5, 0, 1]  # left once and right once; left; left twice
    assert scores[3].energy == pytest.approx(2 / 3)
    assert np.isnan(usual_place([left, left], ["a", "a"])).all()  # nobody else


def test_intervals_resample_patients():
    generator = np.random.default_rng(1)
    good, poor, chances = generator.uniform(0.5, 1, (60, 3)), generator.uniform(0, 0.5, (60, 3)), np.full((60, 3), 0.1)
    scores = {"good": good, "poor": poor, "same": good}
    found = summarize(scores, {"chance": chances}, np.arange(60).astype(str))
    for name, table in scores.items():
        for column, (score, value) in enumerate(found["scores"][name].items()):
            assert score == ("pointing", "energy", "iou")[column]
            mean, error = table[:, column].mean(), table[:, column].std() / 60**0.5
            assert value["mean"] == pytest.approx(mean)
            assert value["low"] == pytest.approx(mean - 1.96 * error, abs=0.25 * error)
            assert value["high"] == pytest.approx(mean + 1.96 * error, abs=0.25 * error)
            assert value["chance"] == pytest.approx(0.1)
    assert list(found["differences"]) == ["poor", "same"]
    assert found["differences"]["same"]["iou"] == {"difference": 0, "low": 0, "high": 0}
    assert found["differences"]["poor"]["energy"]["difference"] == pytest.approx((good - poor)[:, 1].mean())
    assert found["differences"]["poor"]["energy"]["low"] > 0
    assert summarize(scores, {"chance": chances}, np.arange(60).astype(str)) == found

    levels = {"chance": chances, "usual_place": np.full((60, 3), np.nan)}
    one = summarize({"good": good}, levels, np.full(60, "p"))["scores"]["good"]["iou"]
    assert one["mean"] == pytest.approx(good[:, 2].mean())
    assert one["low"] == one["high"] == one["usual_place"] == "n/a"  # one patient tells nothing of others
    two = summarize({"good": good}, {"chance": chances}, np.repeat(["a", "b"], 30))["scores"]["good"]["iou"]
    assert [two["low"], two["high"]] == pytest.approx(sorted([good[:30, 2].mean(), good[30:, 2].mean()]))


# -- a collection with boxes and masks ---------------------------------------------------------------------------------


def draw_disc(number: int, present: bool) -> tuple[np.ndarray, np.ndarray, Box]:
    """Noise with a bright disc somewhere, or without; its mask; its box."""
    generator = np.random.default_rng(number)
    x, y = generator.integers(RADIUS, SIDE - RADIUS, 2)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    inside = (rows - y) ** 2 + (columns - x) ** 2 < RADIUS**2
    pixels = generator.normal(90, 12, (SIDE, SIDE)) + 100 * (inside & present)
    box = Box("Nodule/Mass", x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS)
    return pixels.clip(0, 255).astype(np.uint8), inside & present, box


def draw(number: int, present: bool, masks: bool) -> Drawing:
    pixels, mask, _ = draw_disc(number, present)
    return Drawing(pixels, mask.astype(np.uint8) if masks else None)


class Discs(Collection):
    """Two images a patient, of which the first shows a disc; every third patient is in test.

    Args:
        masks: name of the structure in the masks, if there are any.
        boxes: whether there are boxes: of one image in four none are known.
    """

    name = source = "discs"
    synthetic = True

    def __init__(self, masks: str | None = None, boxes: bool = True, count: int = 24) -> None:
        self.masks, self.boxes, self.count = masks, boxes, count

    def read(self) -> Listing:
        records = []
        for number in range(self.count):
            patient, present = number // 2, number % 2 == 0
            boxes: tuple[Box, ...] | None = (draw_disc(number, present)[2],) if present else ()
            if not self.boxes or number % 4 == 3 or number == 4:
                boxes = None
            split = "test" if patient % 3 == 2 else "train"
            drawing = partial(draw, number, present, self.masks is not None)
            labels = (float(present), float(number % 5 == 0), 0.0)
            records.append(
                Record(f"images/{number:03}.png", f"p{patient}", "PA", labels, split, draw=drawing, boxes=boxes)
            )
        masks = () if self.masks is None else (self.masks,)
        return Listing(records, ("Nodule/Mass", "Edema", "Hernia"), mask_names=masks)


def prepare_discs(folder: Path, **options: Any) -> Path:
    prepare(Discs(**options), folder, size=SIDE, num_workers=0, progress=False)
    return folder


@pytest.fixture(scope="module")
def boxed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_discs(tmp_path_factory.mktemp("boxed") / "cache")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_discs(tmp_path_factory.mktemp("masked") / "cache", masks="lesion", boxes=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("model"), ("Edema", "Nodule/Mass", "Hernia"))


def explain_on(models: dict[str, Path], cache: Path, output: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {"progress": False, "device": "cpu"}
    return explain({name: str(path) for name, path in models.items()}, cache, output, **(defaults | options))


def test_boxes_become_every_pixel_that_they_touch():
    subject = Subject("Nodule", None, 8)
    boxes = [
        {"label": "Nodule", "x_min": 1.5, "y_min": 2.0, "x_max": 3.0, "y_max": 4.25},
        {"label": "Nodule", "x_min": 7.9, "y_min": 7.2, "x_max": 8.0, "y_max": 7.3},
        {"label": "Mass", "x_min": 0, "y_min": 0, "x_max": 8, "y_max": 8},
    ]
    expected = make_region(slice(2, 5), slice(1, 3)) | make_region(slice(7, 8), slice(7, 8))
    assert np.array_equal(subject.region({"boxes": boxes}), expected)
    for row in ({}, {"boxes": None}, {"boxes": []}, {"boxes": boxes[2:]}):
        assert subject.region(row) is None


def test_a_mask_goes_before_boxes():
    boxes = [{"label": "Nodule", "x_min": 0, "y_min": 0, "x_max": 8, "y_max": 8}]
    drawn = Image.fromarray(REGION.astype(np.uint8) * 2)
    assert np.array_equal(Subject("Nodule", 2, 8).region({"mask": drawn, "boxes": boxes}), REGION)
    for value, mask in ((1, drawn), (2, None), (None, drawn)):
        assert Subject("Nodule", value, 8).region({"mask": mask, "boxes": boxes}).all()


def test_images_with_a_known_region_come_first(boxed: Path, masked: Path):
    subject = find_subject(load_cache(boxed), "test", "Nodule/Mass")
    images = load_cache(boxed).datasets["test"]
    names = [images[row]["source"] for row in subject.rows]
    assert names == [f"discs:images/{number:03}.png" for number in (10, 16, 22, 4)]
    assert (subject.located, subject.mask_value, subject.size) == (3, None, SIDE)
    row = images[subject.rows[0]]
    bright = np.asarray(row["image"]) > 150
    assert subject.region(row)[bright].mean() > 0.97
    assert find_subject(load_cache(boxed), "test", "Edema").located == 0

    assert find_subject(load_cache(masked), "test", "Nodule/Mass").located == 0
    subject = find_subject(load_cache(masked), "test", "Nodule/Mass", "lesion")
    assert (subject.located, subject.mask_value) == (4, 1)
    drawn = draw_disc(4, True)[1]
    assert np.array_equal(subject.region(load_cache(masked).datasets["test"][subject.rows[0]]), drawn)


def test_a_picture_shows_heat_and_outline(tmp_path: Path):
    image, heat = np.full((8, 8), 100, dtype=np.uint8), make_region(slice(0, 2), slice(0, 4)) * 0.1
    pictures = {}
    for name, region, shown in (("both", REGION, heat), ("heat", None, heat), ("nothing", None, heat * 0)):
        draw_overlay(tmp_path / f"{name}.png", Panel(image, region, shown))
        with Image.open(tmp_path / f"{name}.png") as picture:
            pictures[name] = np.asarray(picture.convert("RGB")).astype(int)
    side = len(pictures["both"]) // 8  # of a pixel of the image
    red, green, blue = pictures["both"][side, 2 * side]
    assert red > max(green, blue) + 40
    assert tuple(pictures["both"][7 * side, side]) == (100, 100, 100)
    lettered = (pictures["nothing"] != 100).any(2)  # "zero everywhere" at the foot
    assert lettered.any()
    assert not lettered[: 7 * side].any()

    changed = (pictures["both"] != pictures["heat"]).any(2)
    rows, columns = np.nonzero(changed)
    assert (rows.min() // side, rows.max() // side) == (1, 5)  # around rows 2 to 4: the line lies on the edge
    assert (columns.min() // side, columns.max() // side) == (2, 6)
    assert not changed[3 * side : 4 * side, 4 * side : 5 * side].any()


def test_a_grid_has_a_row_an_image_and_a_column_a_model(tmp_path: Path):
    panel = Panel(np.zeros((8, 8), dtype=np.uint8), REGION, REGION * 1.0)
    sizes = []
    for models, images in ((1, 1), (3, 1), (1, 4)):
        draw_grid(tmp_path / "grid.png", "Mass", {f"model {i}": [panel] * images for i in range(models)})
        with Image.open(tmp_path / "grid.png") as picture:
            sizes.append(picture.size)
    assert sizes[1][0] == 2 * sizes[0][0]
    assert sizes[2][1] - sizes[0][1] == pytest.approx(3 * sizes[0][0] / 2, abs=1)


# -- all of it ---------------------------------------------------------------------------------------------------------


def test_pictures_and_scores(boxed: Path, model: Path, tmp_path: Path):
    other = save_classifier(tmp_path / "other", ("nodule or mass", "Edema"), use_context=False)
    found = explain_on({"ours": model, "other one": other}, boxed, tmp_path / "out", score=True, max_images=2)
    assert found == json.loads((tmp_path / "out" / "explanations.json").read_text())
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    pictures = {
        f"{finding}/images%2F{number:03}.png_{name}.png"
        for finding, numbers in {"Nodule%2FMass": (10, 16), "Edema": (5, 10)}.items()
        for number in numbers
        for name in ("ours", "other one")
    }
    assert names == pictures | {"explanations.json", "grid_Nodule%2FMass.png", "grid_Edema.png"}

    assert list(found["findings"]) == ["Nodule/Mass", "Edema"]  # no image shows a hernia
    nodule, edema = found["findings"].values()
    assert [nodule[key] for key in ("images", "located", "explained", "patients")] == [4, 3, 3, 3]
    assert nodule["pictures"] == ["discs:images/010.png", "discs:images/016.png"]
    assert list(nodule["scores"]) == ["ours", "other one"]
    assert list(nodule["differences"]) == ["other one"]
    assert edema["scores"] == "n/a"
    assert found["models"]["ours"]["weights_sha256"] == {"model.safetensors": sha256(model / "model.safetensors")}
    assert found["models"]["ours"]["level"] == 4
    assert found["data"]["cache"] == str(boxed)
    assert found["data"]["data_hash"] == load_cache(boxed).manifest["data_hash"]

    again = explain_on({"ours": model, "other one": other}, boxed, tmp_path / "again", score=True, max_images=2)
    assert again == found
    assert all((tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes() for name in names)


@pytest.mark.parametrize(("split", "said"), [("test", []), ("train", ["the model was trained on these images"])])
def test_images_of_the_training_are_explained_with_a_warning(
    boxed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, split: str, said: list[str]
):
    hashes = {name: load_cache(boxed).manifest[name] for name in ("data_hash", "split_hash")}
    trained = save_classifier(
        tmp_path / "trained", ("Edema",), decision_thresholds={"values": {"Edema": 0.5}, **hashes}
    )
    found = explain_on({"ours": trained}, boxed, tmp_path / "out", split=split, max_images=1)
    overlap = found["models"]["ours"]["overlap"]
    assert overlap["compared"] == "the training's own division into splits"
    assert len(overlap["warnings"]) == len(said) == caplog.text.count("the model was trained on these images")
    assert all(words in warning for words, warning in zip(said, overlap["warnings"], strict=True))


@pytest.mark.parametrize(("level", "warned"), [(None, True), (3, False)])
def test_maps_of_one_pixel_are_warned_of(
    boxed: Path, model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, level: int | None, warned: bool
):
    explain_on({"ours": model}, boxed, tmp_path / "out", level=level, max_images=1)  # 32 pixels, stride 32
    assert ("cannot point; --level 3 can" in caplog.text) == warned


def test_scores_are_those_of_the_heat_maps(boxed: Path, model: Path, tmp_path: Path):
    """Each image by itself, and a batch that does not divide them; the cache's squares are not the model's."""
    found = explain_on(
        {"m": model}, boxed, tmp_path / "out", score=True, max_images=0, batch_size=2, level=2, tolerance=3
    )["findings"]["Nodule/Mass"]
    network, processor = (kind.from_pretrained(model) for kind in (MLVICXForImageClassification, MLVICXImageProcessor))
    scores, chances, empty = [], [], 0
    for number in (10, 16, 22):
        pixels, _, box = draw_disc(number, True)
        region = np.zeros((SIDE, SIDE), dtype=bool)
        region[int(box.y_min) : int(box.y_max), int(box.x_min) : int(box.x_max)] = True
        heat = naive_grad_cam(network.eval(), processor(pixels)["pixel_values"], 1, SIDE, 2)[0].numpy()
        scores.append(localize(heat, region, 3))
        chances.append(chance(region, 3))
        empty += not heat.any()
    for column, score in enumerate(("pointing", "energy", "iou")):
        assert found["scores"]["m"][score]["mean"] == pytest.approx(np.mean(scores, 0)[column], abs=1e-3)
        assert found["scores"]["m"][score]["chance"] == pytest.approx(np.mean(chances, 0)[column])
        assert 0 <= found["scores"]["m"][score]["usual_place"] <= 1
    assert found["empty_maps"] == {"m": empty}
    assert not (tmp_path / "out" / "grid_Nodule%2FMass.png").exists()


def test_maps_that_are_zero_are_counted(boxed: Path, tmp_path: Path):
    silent = make_classifier(("Nodule/Mass",))
    with torch.no_grad():
        silent.classifier.weight.zero_()
    silent.save_pretrained(tmp_path / "silent")
    MLVICXImageProcessor(image_size=32).save_pretrained(tmp_path / "silent")
    found = explain_on({"silent": tmp_path / "silent"}, boxed, tmp_path / "out", score=True, max_images=1)
    found = found["findings"]["Nodule/Mass"]
    assert found["empty_maps"] == {"silent": 3}
    assert all(value["mean"] == 0 < value["chance"] for value in found["scores"]["silent"].values())


def test_exclusive_classes(tmp_path: Path):
    kinds = ("disc", "stripes")
    rows = [
        {
            "patient_id": f"p{n}",
            "split": ("train", "test")[n % 2],
            "label": kinds[n // 2 % 2],
            "_draw": {kinds[n // 2 % 2]: 1},
        }
        for n in range(12)
    ]
    cache = make_cache(tmp_path, rows)
    model = save_classifier(tmp_path / "model", kinds, problem_type="single_label_classification")
    found = explain_on({"m": model}, cache, tmp_path / "out", findings=["stripes"], max_images=9)
    assert list(found["findings"]) == ["stripes"]
    assert found["findings"]["stripes"]["images"] == found["findings"]["stripes"]["explained"] == 3
    assert len(list((tmp_path / "out" / "stripes").iterdir())) == 3
    assert "scores" not in found["findings"]["stripes"]


def test_a_classifier_that_looks_at_the_disc_points_at_it(tmp_path: Path):
    """A linear layer fitted to say where discs are; its negative looks anywhere else."""
    cache = load_cache(prepare_discs(tmp_path / "cache", count=120))
    network = make_classifier(("Nodule/Mass",), use_context=False)
    processor = MLVICXImageProcessor(image_size=4 * SIDE)
    look_at_discs(cache, network, processor)
    save_pair(network, processor, tmp_path / "looking")
    with torch.no_grad():
        network.classifier.weight.neg_()
    save_pair(network, processor, tmp_path / "elsewhere")
    models = {name: tmp_path / name for name in ("looking", "elsewhere")}
    nodule = explain_on(models, cache.path, tmp_path / "out", score=True, max_images=0)["findings"]["Nodule/Mass"]
    for score, value in nodule["scores"]["looking"].items():
        assert value["low"] > 5 * value["chance"], score
        assert nodule["scores"]["elsewhere"][score]["high"] < value["chance"], score
        assert nodule["differences"]["elsewhere"][score]["low"] > 0.5, score
    assert nodule["scores"]["looking"]["pointing"]["mean"] > 0.95


def look_at_discs(cache: Cache, network: MLVICXForImageClassification, processor: MLVICXImageProcessor) -> None:
    """Weights with which the last map, place by place, shows how much of the place a disc covers."""
    images = cache.datasets["train"]
    with torch.no_grad():
        parts = processor(images["image"][:])["pixel_values"].split(16)
        maps = torch.cat([network.mlvicx(pixels).last_hidden_state for pixels in parts])  # [N, C, 8, 8]
    numbers = [int(source.split("/")[1].removesuffix(".png")) for source in images["source"]]
    discs = torch.tensor(np.stack([draw_disc(number, number % 2 == 0)[1] for number in numbers])).double()
    covered = F.adaptive_avg_pool2d(discs, 8).flatten()
    features = maps.double().permute(0, 2, 3, 1).flatten(0, 2)  # [N · 64, C]
    centred = features - features.mean(0)
    ridge = centred.T @ centred + 1e-3 * torch.eye(centred.shape[1], dtype=torch.float64)
    with torch.no_grad():
        network.classifier.weight[0] = torch.linalg.solve(ridge, centred.T @ (covered - covered.mean()))


def save_pair(network: MLVICXForImageClassification, processor: MLVICXImageProcessor, folder: Path) -> None:
    network.save_pretrained(folder)
    processor.save_pretrained(folder)


# -- what cannot be done -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"findings": ["Edema", "Fibrosis"]}, "findings Fibrosis found; .* has Nodule/Mass, Edema, Hernia"),
        ({"findings": ["Hernia"]}, "no image of test with Hernia found"),
        ({"findings": ["Edema"], "score": True}, "no box and no mask of Edema found in test"),
        ({"level": 5}, "level=5 found; test_resnet has levels 0 to 4, or last"),
        ({"level": -1}, "level=-1 found"),
        ({"mask_name": "lungs", "findings": ["Edema"]}, "mask_name='lungs' found; .* has masks of nothing"),
        ({"mask_name": "lungs"}, "mask_name='lungs' for Nodule/Mass, Edema found; expected one finding"),
        ({"split": "dev"}, "expected dev as well"),
        ({"batch_size": 0}, "batch_size=0 found; expected 1 or more"),
        ({"max_images": -1}, "max_images=-1"),
        ({"tolerance": float("nan")}, "tolerance=nan"),
        ({"tolerance": float("inf")}, "tolerance=inf found; expected a finite number, 0 or more"),
        ({"device": "tpu"}, "device='tpu' found"),
    ],
)
def test_arguments_that_do_not_fit(boxed: Path, model: Path, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        explain_on({"m": model}, boxed, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit(boxed: Path, model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="models=0 found; expected 1 or more"):
        explain_on({}, boxed, tmp_path / "out")
    other = save_classifier(tmp_path / "other", ("Fibrosis",))
    with pytest.raises(ValueError, match=r"no finding in common found; .* all models know none of these"):
        explain_on({"m": model, "other": other}, boxed, tmp_path / "out")
    with pytest.raises(ValueError, match=r"findings Edema found; .* all models know none of these"):
        explain_on({"m": model, "other": other}, boxed, tmp_path / "out", findings=["Edema"])
    MLVICXModel(tiny_config()).save_pretrained(tmp_path / "encoder")
    MLVICXImageProcessor(image_size=32).save_pretrained(tmp_path / "encoder")
    with pytest.raises(ValueError, match="MLVICXModel found; expected a MLVICXForImageClassification"):
        explain_on({"m": tmp_path / "encoder"}, boxed, tmp_path / "out")


def test_a_cache_without_labels(model: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"no finding in common found; .* has no labels"):
        explain_on({"m": model}, unlabelled_cache(tmp_path, 6), tmp_path / "out", split="train")


def test_an_output_that_is_there_stays(boxed: Path, model: Path, tmp_path: Path):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    with pytest.raises(FileExistsError, match="out is there already"):
        explain_on({"m": model}, boxed, tmp_path / "out")


def test_what_is_not_finite_leaves_nothing(boxed: Path, tmp_path: Path):
    broken = make_classifier(("Edema",))
    with torch.no_grad():
        broken.classifier.weight.fill_(float("nan"))
    save_pair(broken, MLVICXImageProcessor(image_size=32), tmp_path / "broken")
    with pytest.raises(FloatingPointError, match="not finite"):
        explain_on({"m": tmp_path / "broken"}, boxed, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("name", ["captum", "matplotlib"])
def test_a_library_that_is_missing(
    boxed: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'a heat map needs {name}: pip install "\.\[explain\]"'):
        explain_on({"m": model}, boxed, tmp_path / "out")


def test_pictures_of_long_names_have_short_ones_that_differ():
    assert picture_name("deep/a b.png", "m/x") == "deep%2Fa b.png_m%2Fx.png"
    long = [picture_name("胸部X線写真" * 6 + end, "MLVICX") for end in ("甲.png", "乙.png")]
    assert len(set(long)) == 2
    assert all(len(name.encode()) <= 255 and name.endswith(".png") for name in long)
    assert len(f"grid_{file_name('нижнедолевое затемнение ' * 9)}.png") <= 255


def test_models_are_named():
    assert parse_models(["a=runs/a", "b=org/name=x"]) == {"a": "runs/a", "b": "org/name=x"}
    for word in ("runs/a", "=runs/a", "a="):
        with pytest.raises(ValueError, match=f"--models '{word}' found; expected NAME=FOLDER or NAME=HUB_NAME"):
            parse_models([word])
    with pytest.raises(ValueError, match="--models a=x and a=y found; expected each name once"):
        parse_models(["a=x", "a=y"])
