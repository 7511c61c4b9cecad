"""Pictures of every kind to model input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from transformers import AutoImageProcessor, pipeline
from transformers.image_utils import ChannelDimension
from transformers.modeling_outputs import SemanticSegmenterOutput

from mlvicx_hf import MLVICXConfig, MLVICXForImageClassification, MLVICXImageProcessor
from mlvicx_hf.data.images.pixels import fit_square_gray, read_gray
from mlvicx_hf.models.image_processing_mlvicx import _robust_range, fit_square, to_unit_gray

GRAY = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 20, 3), np.uint8)


def unit(array: np.ndarray, scale: float = 255) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64) / scale).float()[None]


def stretched(gray: torch.Tensor) -> torch.Tensor:
    """What becomes of more than 8 bits: half a percent of the pixels off the border is clipped at each end."""
    inner = gray[(gray > gray.min()) & (gray < gray.max())].sort().values.double()
    low, high = (inner[int(np.ceil(share * len(inner))) - 1] for share in (0.005, 0.995))
    return ((gray - low) / (high - low)).clamp(0, 1).float()


def luminance(colour: np.ndarray) -> torch.Tensor:
    return unit(colour.astype(np.float64) @ [0.299, 0.587, 0.114])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "F", "I;16", "I;16B", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_pil_images_of_every_mode(mode: str):
    source = Image.fromarray(GRAY)
    tolerance = 1e-6
    expected = unit(GRAY)
    if mode in ("I;16", "I;16B"):
        deep, expected = GRAY.astype(np.uint16) * 257, stretched(expected)
        image = Image.fromarray(deep if mode == "I;16" else deep.astype(">u2"))
        assert image.mode == mode
    elif mode == "F":
        image = Image.fromarray((GRAY / 255).astype(np.float32))
    elif mode == "1":
        image, expected = Image.fromarray(GRAY > 127), unit(GRAY > 127, 1)
    elif mode == "P":
        image = source.convert("P", palette=Image.Palette.ADAPTIVE, colors=256)
    else:
        image, tolerance = source.convert(mode), 2.5 / 255  # YCbCr rounds
    assert image.mode == mode
    found = to_unit_gray(image)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "CMYK"])
def test_colour_becomes_luminance_and_alpha_is_dropped(mode: str):
    image = Image.fromarray(COLOUR).convert(mode)
    if mode == "RGBA":
        image.putalpha(7)
    torch.testing.assert_close(to_unit_gray(image), luminance(COLOUR), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", ["HW", "HW1", "1HW", "HWC", "CHW", "HWA", "AHW"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int32", "float32", "float64", "torch", "bfloat16"])
def test_arrays_and_tensors(shape: str, kind: str):
    alpha = np.full((24, 20, 1), 9, np.uint8)
    pixels = {
        "HW": GRAY,
        "HW1": GRAY[..., None],
        "1HW": GRAY[None],
        "HWC": COLOUR,
        "CHW": COLOUR.transpose(2, 0, 1),
        "HWA": np.concatenate([COLOUR, alpha], 2),
        "AHW": np.concatenate([COLOUR, alpha], 2).transpose(2, 0, 1),
    }[shape]
    expected = unit(GRAY) if shape in ("HW", "HW1", "1HW") else luminance(COLOUR)
    if kind == "uint16":
        image, expected = pixels.astype(np.uint16) * 257, stretched(expected)
    elif kind == "int32":
        image = pixels.astype(np.int32)
    elif kind in ("float32", "float64"):
        image = (pixels / 255).astype(kind)
    elif kind == "torch":
        image = torch.from_numpy(pixels.copy())
    elif kind == "bfloat16":
        image = torch.from_numpy(pixels.copy()).float().div(255).bfloat16()
    else:
        image = pixels
    atol = 4e-3 if kind == "bfloat16" else 1e-6
    torch.testing.assert_close(to_unit_gray(image), expected, rtol=0, atol=atol)


def test_booleans_become_zero_and_one():
    torch.testing.assert_close(to_unit_gray(GRAY > 99), unit(GRAY > 99, 1))
    torch.testing.assert_close(to_unit_gray(torch.from_numpy(GRAY > 99)), unit(GRAY > 99, 1))


@pytest.mark.parametrize("container", ["numpy", "torch", "pil"])
def test_of_a_16_bit_ramp_one_percent_is_clipped(container: str):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = {"numpy": ramp, "torch": torch.from_numpy(ramp), "pil": Image.fromarray(ramp)}[container]
    values = to_unit_gray(image).flatten()
    assert (values.diff() >= 0).all()
    assert (values == 0).float().mean().item() == pytest.approx(0.005, abs=1e-4)
    assert (values == 1).float().mean().item() == pytest.approx(0.005, abs=1e-4)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_whole_numbers_up_to_255_are_grey_levels_in_any_type(dtype: type):
    values = np.array([[3, 100, 250]]) if dtype != np.uint8 else np.array([[3, 100, 250]], np.uint8)
    torch.testing.assert_close(to_unit_gray(values.astype(dtype)), torch.tensor([[[3, 100, 250]]]) / 255)


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (33069, 36863), (30000, 32000), (-1024, 3071), (0, 70000)])
def test_the_part_of_the_range_that_a_film_uses_does_not_matter(low: int, high: int):
    film = np.random.default_rng(0).uniform(0, 1, (64, 64))
    film[:8] = 0  # a border
    film[20:23, 20:23] = 4  # a marker
    found = to_unit_gray((low + film * (high - low)).round().astype(np.int64))[0].numpy()
    inner = np.sort(film[(film > 0) & (film < 4)])
    black, white = inner[len(inner) // 200], inner[-(len(inner) // 200) - 1]
    assert np.abs(found - ((film - black) / (white - black)).clip(0, 1)).max() < 2e-3


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-70000, 70000), min_size=1, max_size=40))
def test_the_robust_range_lies_within_the_values(values: list[int]):
    low, high = _robust_range(np.array(values))
    assert min(values) <= low <= high <= max(values)
    assert low < high or len(set(values)) == 1


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.array([[0.0, 255.0]]), r"0\.0 to 255\.0 found; expected \[0, 1\] for floats"),
        (np.array([[-0.1, 0.5]]), r"from -0\.1 .* expected \[0, 1\]"),
        (np.array([[0.0, np.nan]]), "NaN or infinite pixels"),
        (np.array([[0.0, np.inf]]), "NaN or infinite pixels"),
        (np.zeros((4, 4), complex), "complex128 found"),
        (np.array([["a"]]), "expected boolean, integer or float"),
        (np.zeros((0, 4)), "empty image"),
        ([0, 1, 2], r"\(3,\) found; expected an array \[H, W\], such as np\.array of nested lists"),
        (np.zeros(7), r"\(7,\) found; expected an array \[H, W\]"),
        (np.zeros((5, 6, 2)), r"\(5, 6, 2\) found; expected \[H, W\]"),
        (np.zeros((2, 3, 8, 8)), r"\(2, 3, 8, 8\) found"),
        (torch.tensor([[0.0, float("nan")]]), "NaN or infinite pixels"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str):
    with pytest.raises(ValueError, match=message):
        to_unit_gray(image)  # type: ignore[arg-type]


def test_what_rounding_adds_to_floats_is_cut_off():
    found = to_unit_gray(np.array([[-1e-7, 0.5, 1 + 1e-6]]))
    assert found.tolist() == [[[0.0, 0.5, 1.0]]]


@pytest.mark.parametrize("size", [16, [16, 16], {"height": 16, "width": 16}])
def test_a_size_may_be_set_in_every_form(size: object):
    processor = MLVICXImageProcessor(image_size=8)
    processor.size = size
    assert (processor.image_size, processor.to_dict()["size"]) == (16, {"height": 16, "width": 16})
    with pytest.raises(ValueError, match="expected a square: S, or"):
        processor.size = {"shortest_edge": 16}


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (3, 90), (7, 1)])
@pytest.mark.parametrize("size", [16, 33])
def test_every_fit_gives_the_square(fit: str, shape: tuple[int, int], size: int):
    image = torch.ones(1, *shape)
    square = fit_square(image, size, fit)
    assert square.shape == (1, size, size)
    assert square.max() <= 1 + 1e-6
    if fit == "pad":
        side = max(1, round(size * min(shape) / max(shape)))
        assert square.sum().item() == pytest.approx(side * size, rel=1e-5)  # borders are 0, the rest untouched
    else:
        torch.testing.assert_close(square, torch.ones_like(square))


def test_what_the_fits_do_to_a_wide_image():
    image = torch.zeros(1, 20, 40)
    image[..., :10] = 1
    pad, squash, crop = (fit_square(image, 40, fit) for fit in ("pad", "squash", "crop"))
    assert torch.equal(pad[:, 10:30], image)
    assert pad[:, :10].sum() == pad[:, 30:].sum() == 0
    assert squash[..., :9].min() == pytest.approx(1)
    assert squash[..., 11:].max() == pytest.approx(0)
    assert crop.max() == 0  # the left quarter is cut away


def test_an_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="'stretch' found; expected one of pad, squash, crop"):
        MLVICXImageProcessor(fit="stretch")
    with pytest.raises(ValueError, match="'stretch' found"):
        fit_square(torch.zeros(1, 4, 4), 4, "stretch")


def test_downsizing_is_antialiased():
    stripes = torch.zeros(1, 64, 64)
    stripes[..., ::2] = 1
    small = fit_square(stripes, 16, "pad")
    assert (small[..., 2:-2] - 0.5).abs().max() < 0.1  # sampling alone would give 0 or 1


def test_values_are_normalised():
    processor = MLVICXImageProcessor(image_size=8, image_mean=0.4, image_std=0.2)
    values = processor(np.full((8, 8), 255, np.uint8))["pixel_values"]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, torch.full((1, 1, 8, 8), (1 - 0.4) / 0.2))


def test_one_image_a_list_and_a_batch_are_the_same():
    processor = MLVICXImageProcessor(image_size=16)
    arrays = np.random.default_rng(2).integers(0, 256, (3, 20, 24, 1), np.uint8)
    one_by_one = torch.cat([processor(array)["pixel_values"] for array in arrays])
    assert one_by_one.shape == (3, 1, 16, 16)
    for images in (list(arrays), tuple(arrays), arrays, torch.from_numpy(arrays), torch.from_numpy(arrays).mT.mT):
        assert torch.equal(processor(images)["pixel_values"], one_by_one)
    pictures = [Image.fromarray(array[..., 0]) for array in arrays]
    assert torch.equal(processor(pictures)["pixel_values"], one_by_one)
    assert torch.equal(processor.preprocess(images=pictures[0])["pixel_values"], one_by_one[:1])
    assert np.array_equal(processor(pictures, return_tensors="np")["pixel_values"], one_by_one.numpy())


def test_images_of_different_sizes_share_a_batch():
    processor = MLVICXImageProcessor(image_size=16)
    values = processor([np.zeros((20, 30), np.uint8), Image.new("RGB", (9, 5)), torch.zeros(1, 16, 16)])
    assert values["pixel_values"].shape == (3, 1, 16, 16)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="no images found; expected at least one"):
        MLVICXImageProcessor()([])


def test_three_channels_repeat_the_grey_image():
    gray = MLVICXImageProcessor(image_size=16)(COLOUR)["pixel_values"]
    colour = MLVICXImageProcessor(image_size=16, num_channels=3)(COLOUR)["pixel_values"]
    assert colour.shape == (1, 3, 16, 16)
    assert all(torch.equal(colour[:, channel], gray[:, 0]) for channel in range(3))
    assert colour.is_contiguous()


def test_the_input_is_left_alone():
    array, tensor = GRAY.copy(), torch.from_numpy(GRAY / 255)
    kept = tensor.clone()
    processor = MLVICXImageProcessor(image_size=16)
    processor(array)
    processor(tensor)
    assert np.array_equal(array, GRAY)
    assert torch.equal(tensor, kept)


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", [(90, 61), (33, 70), (40, 40)])
def test_images_are_as_the_squares_that_the_model_was_trained_on(fit: str, shape: tuple[int, int]):
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)  # noise: all of its detail is fine
    plain, prepared = (MLVICXImageProcessor(48, fit=fit, **kept) for kept in ({}, {"prepared_size": 20}))
    square = fit_square_gray(Image.fromarray(pixels), 20, fit)
    expected = plain(square)["pixel_values"]
    step = 4 / 255  # a grey level after normalisation
    assert (prepared(pixels)["pixel_values"] - expected).abs().max() <= 1.01 * step
    assert (plain(pixels)["pixel_values"] - expected).abs().mean() > 10 * step
    assert torch.equal(prepared(square)["pixel_values"], expected)
    mask = (pixels > 128).astype(np.uint8)
    found = prepared(pixels, mask)["labels"][0].numpy()
    small = np.asarray(fit_square_gray(Image.fromarray(mask), 20, fit, Image.Resampling.NEAREST))
    assert np.array_equal(found, plain(np.zeros_like(small), small)["labels"][0].numpy())


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", [(90, 61), (100, 150), (150, 100)])
@pytest.mark.parametrize(("prepared_size", "image_size"), [(20, 48), (25, 24), (24, 48)])
def test_masks_lie_where_they_lay_before_the_squares_of_training(
    fit: str, shape: tuple[int, int], prepared_size: int, image_size: int
):
    """Borders are whole pixels of the cache's squares, not of the model's input."""
    processor = MLVICXImageProcessor(image_size, fit=fit, prepared_size=prepared_size, do_normalize=False)
    mask = np.zeros(shape, np.uint8)
    mask[shape[0] // 3 : shape[0] // 2, shape[1] // 3 : shape[1] * 2 // 3] = 1
    logits = processor(mask * 255)["pixel_values"] - 0.5
    (found,) = processor.post_process_semantic_segmentation(SemanticSegmenterOutput(logits=logits), [shape])
    centres = [np.argwhere(each).mean(0) for each in (found.numpy(), mask)]
    assert np.abs(centres[0] - centres[1]).max() < 0.5


def test_constants_survive_saving(tmp_path: Path):
    processor = MLVICXImageProcessor(image_size=48, num_channels=3, image_mean=0.41, image_std=0.19, fit="crop")
    assert "prepared_size" not in processor.to_dict()
    processor.prepared_size = 30
    processor.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["preprocessor_config.json"]
    loaded = MLVICXImageProcessor.from_pretrained(tmp_path)
    for name in ("image_size", "num_channels", "image_mean", "image_std", "fit", "prepared_size"):
        assert getattr(loaded, name) == getattr(processor, name)
    assert torch.equal(loaded(GRAY)["pixel_values"], processor(GRAY)["pixel_values"])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    config = MLVICXConfig(backbone="test_resnet", image_size=32, id2label={0: "Edema", 1: "Mass", 2: "Nodule"})
    torch.manual_seed(0)
    MLVICXForImageClassification(config).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["pil", "numpy", "path"])
def test_in_the_pipeline(classifier: Path, kind: str, tmp_path: Path):
    deep = np.random.default_rng(4).integers(0, 65536, (40, 36)).astype(np.uint16)
    deep[0, 0] = 65535
    Image.fromarray(deep).save(tmp_path / "deep.png")
    eight = read_gray(tmp_path / "deep.png")
    eight.save(tmp_path / "eight.png")
    image = {"pil": eight, "numpy": np.asarray(eight), "path": str(tmp_path / "eight.png")}[kind]
    if kind == "numpy" and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("the pipelines of older transformers take no arrays")
    classify = pipeline("image-classification", model=str(classifier))
    found = {row["label"]: row["score"] for row in classify(image, top_k=3)}
    model = MLVICXForImageClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        logits = model(MLVICXImageProcessor(image_size=32)(eight)["pixel_values"]).logits[0]
    assert found == pytest.approx(
        dict(zip(("Edema", "Mass", "Nodule"), logits.sigmoid().tolist(), strict=True)), abs=1e-6
    )


# -- keywords ----------------------------------------------------------------------------------------------------------

PICTURE = np.random.default_rng(5).integers(0, 256, (30, 40), np.uint8)


def values(processor: MLVICXImageProcessor, **keywords: Any) -> torch.Tensor:
    return processor(PICTURE, **keywords)["pixel_values"]


@pytest.mark.parametrize(
    ("keywords", "same_as"),
    [
        ({"size": {"height": 24, "width": 24}}, {"image_size": 24}),
        ({"size": 24}, {"image_size": 24}),
        ({"size": [24, 24]}, {"image_size": 24}),
        ({"image_size": 24}, {"image_size": 24}),
        ({"fit": "crop"}, {"fit": "crop"}),
        ({"num_channels": 3}, {"num_channels": 3}),
        ({"image_mean": 0.25, "image_std": 1}, {"image_mean": 0.25, "image_std": 1}),
        ({"image_mean": [0.25], "image_std": [1.0]}, {"image_mean": 0.25, "image_std": 1.0}),
        ({"image_mean": (0.25,) * 3, "image_std": np.ones(3)}, {"image_mean": 0.25, "image_std": 1.0}),
        ({"resample": 3}, {"resample": Image.Resampling.BICUBIC}),
        ({"resample": Image.Resampling.NEAREST}, {"resample": 0}),
        ({"do_resize": False}, {"do_resize": False}),
        ({"do_normalize": False}, {"image_mean": 0, "image_std": 1}),
        ({"do_rescale": False}, {"rescale_factor": 1.0}),
        ({"rescale_factor": 1 / 255}, {}),
        ({"do_convert_rgb": True}, {}),
        ({"do_convert_rgb": False, "do_center_crop": False, "do_pad": None, "crop_size": None}, {}),
        ({"size": None, "image_mean": None, "do_resize": None}, {}),
        ({"disable_grouping": True, "device": "cpu", "default_to_square": True}, {}),
    ],
)
def test_keywords_of_a_call_of_the_constructor_and_of_loading_do_the_same(
    tmp_path: Path, keywords: dict[str, Any], same_as: dict[str, Any]
):
    plain = MLVICXImageProcessor(image_size=16)
    plain.save_pretrained(tmp_path)
    expected = values(MLVICXImageProcessor(**({"image_size": 16} | same_as)))
    found = values(plain, **keywords)
    torch.testing.assert_close(found, expected)
    assert plain.to_dict() == MLVICXImageProcessor(image_size=16).to_dict()  # a call changes nothing
    settings = {k: v for k, v in keywords.items() if k not in ("device", "disable_grouping") and v is not None}
    for loaded in (
        MLVICXImageProcessor.from_pretrained(tmp_path, **settings),
        AutoImageProcessor.from_pretrained(tmp_path, **settings),
        MLVICXImageProcessor(**({} if {"size", "image_size"} & set(settings) else {"image_size": 16}), **settings),
    ):
        torch.testing.assert_close(values(loaded), expected)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoImageProcessor.from_pretrained(tmp_path / "again")
        assert again.to_dict() == loaded.to_dict()
        torch.testing.assert_close(values(again), expected)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"nonsense": 3}, TypeError, "keyword 'nonsense' found; expected one of image_size, size"),
        ({"imagesize": 3}, TypeError, "keyword 'imagesize' found; expected image_size"),
        ({"do_normalise": False}, TypeError, "keyword 'do_normalise' found; expected do_normalize"),
        (
            {"size": {"height": 16, "width": 24}},
            ValueError,
            r"size=\{'height': 16, 'width': 24\} found; expected a square",
        ),
        ({"size": {"shortest_edge": 16}}, ValueError, "found; expected a square"),
        ({"size": 0}, ValueError, "image_size=0 found; expected 1 or more pixels"),
        ({"image_size": -3}, ValueError, "image_size=-3 found; expected 1 or more pixels"),
        ({"image_size": 16.5}, ValueError, "image_size=16.5 found"),
        ({"size": 24, "image_size": 16}, ValueError, "size=24 and image_size=16 found; expected one of them"),
        ({"prepared_size": 0}, ValueError, "prepared_size=0 found; expected 1 or more pixels"),
        ({"fit": "bogus"}, ValueError, "fit='bogus' found; expected one of pad, squash, crop"),
        ({"num_channels": 0}, ValueError, "num_channels=0 found; expected 1, or 3"),
        ({"resample": 1}, ValueError, r"resample=1 found; expected one of 0 \(NEAREST\), 2 \(BILINEAR\)"),
        (
            {"image_mean": [0.1, 0.2]},
            ValueError,
            r"image_mean=\[0.1, 0.2\] found; expected a number, or 1, one a channel",
        ),
        ({"image_std": 0}, ValueError, "image_std=0 found; expected more than 0"),
        ({"image_mean": float("nan")}, ValueError, "image_mean=nan found; expected a number"),
        ({"do_resize": "no"}, ValueError, "do_resize='no' found; expected true or false"),
        ({"rescale_factor": "1/255"}, ValueError, "rescale_factor='1/255' found; expected a number"),
        ({"do_center_crop": True}, ValueError, "do_center_crop=True found; this image processor has size, fit"),
        ({"do_pad": True}, ValueError, "do_pad=True found"),
        ({"crop_size": 16}, ValueError, "crop_size=16 found"),
        ({"data_format": "last"}, ValueError, "data_format='last' found"),
    ],
)
def test_keywords_that_it_cannot_follow_are_refused_by_name(
    tmp_path: Path, keywords: dict[str, Any], error: type[Exception], message: str
):
    plain = MLVICXImageProcessor()
    plain.save_pretrained(tmp_path)
    for ask in (
        lambda: plain(PICTURE, **keywords),
        lambda: plain.preprocess([PICTURE], **keywords),
        lambda: MLVICXImageProcessor(**keywords),
        lambda: MLVICXImageProcessor.from_dict(dict(keywords)),
        lambda: MLVICXImageProcessor.from_pretrained(tmp_path, **keywords),
        lambda: AutoImageProcessor.from_pretrained(tmp_path, **keywords),
    ):
        with pytest.raises(error, match=message):
            ask()


def test_keywords_that_are_not_for_it_can_be_handed_back(tmp_path: Path):
    MLVICXImageProcessor().save_pretrained(tmp_path)
    processor, rest = MLVICXImageProcessor.from_pretrained(tmp_path, foo=1, size=8, return_unused_kwargs=True)
    assert processor.image_size == 8
    assert rest["foo"] == 1


@pytest.mark.parametrize("nothing", ["film.png", Path("film.png"), b"\x89PNG", None, {"bytes": b"", "path": "a.png"}])
def test_what_is_no_opened_image_says_what_is_expected(nothing: Any):
    for images in (nothing, [nothing], [PICTURE, nothing]):
        with pytest.raises(ValueError, match=r"found; expected an image: a PIL image .*, an array or a tensor"):
            MLVICXImageProcessor()(images)


def test_channels_of_their_own_constants():
    processor = MLVICXImageProcessor(image_size=8, num_channels=3, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4])
    unit = MLVICXImageProcessor(image_size=8, do_normalize=False)(PICTURE)["pixel_values"]
    expected = torch.cat([(unit - mean) / std for mean, std in ((0.1, 1), (0.2, 2), (0.3, 4))], 1)
    torch.testing.assert_close(processor(PICTURE)["pixel_values"], expected)


def test_layouts_of_arrays_and_of_the_result():
    processor = MLVICXImageProcessor(image_size=16, num_channels=3)
    first = np.random.default_rng(6).integers(0, 256, (3, 20, 3), np.uint8)  # rows or channels?
    last = np.moveaxis(first, 0, -1)
    expected = processor(np.pad(last, ((0, 0), (0, 1), (0, 0)))[:, :3])["pixel_values"]
    torch.testing.assert_close(processor(first, input_data_format="channels_first")["pixel_values"], expected)
    torch.testing.assert_close(processor(last, input_data_format=ChannelDimension.LAST)["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"\(20, 24, 3\) found; expected \[H, W\], \[C, H, W\]"):
        processor(np.zeros((20, 24, 3), np.uint8), input_data_format="channels_first")
    turned = processor(first, input_data_format="channels_first", data_format="channels_last")["pixel_values"]
    assert torch.equal(turned, expected.permute(0, 2, 3, 1))


def test_images_that_keep_their_sizes():
    processor = MLVICXImageProcessor(do_resize=False)
    assert values(processor).shape == (1, 1, 30, 40)
    made = processor([PICTURE, PICTURE], [PICTURE > 9, PICTURE > 99])
    assert made["pixel_values"].shape == (2, 1, 30, 40)
    assert torch.equal(made["labels"][1], torch.from_numpy(PICTURE > 99).long())
    other = np.zeros((8, 9), np.uint8)
    with pytest.raises(ValueError, match=r"images of the sizes .* found with do_resize=False; expected one size"):
        processor([PICTURE, other])
    assert [tuple(v.shape) for v in processor([PICTURE, other], return_tensors=None)["pixel_values"]] == [
        (1, 30, 40),
        (1, 8, 9),
    ]


def test_lists_of_lists_are_one_batch():
    processor = MLVICXImageProcessor(image_size=16)
    nested = processor([[PICTURE, PICTURE], [PICTURE]])["pixel_values"]
    assert torch.equal(nested, processor([PICTURE] * 3)["pixel_values"])


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
def test_scores_of_a_segmentation(fit: str, labels: int):
    processor = MLVICXImageProcessor(image_size=16, fit=fit)
    outputs = SemanticSegmenterOutput(logits=torch.randn(2, labels, 16, 16))
    for sizes in (None, [(20, 30), (5, 4)]):
        classes = processor.post_process_semantic_segmentation(outputs, sizes)
        scored = processor.post_process_semantic_segmentation(outputs, sizes, return_segmentation_scores=True)
        for found, both in zip(classes, scored, strict=True):
            assert torch.equal(both.segmentation, found)
            assert both.segmentation_scores.shape == (labels, *found.shape)
            best = both.segmentation_scores.argmax(0) if labels > 1 else (both.segmentation_scores[0] > 0).long()
            assert torch.equal(best, found)


def test_the_pipelines_own_keywords_reach_it(classifier: Path):
    features = pipeline("image-feature-extraction", model=str(classifier), image_processor_kwargs={"size": 64})
    found = torch.tensor(features(Image.fromarray(PICTURE)))
    encoder = MLVICXForImageClassification.from_pretrained(classifier).mlvicx
    with torch.no_grad():
        expected = encoder(values(MLVICXImageProcessor(image_size=64))).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_attributes_that_other_code_reads():
    processor = MLVICXImageProcessor()
    assert processor.size == {"height": 224, "width": 224}
    assert (processor.do_resize, processor.do_rescale, processor.do_normalize, processor.resample) == (
        True,
        True,
        True,
        2,
    )
    processor.image_size = 64
    assert processor.size == {"height": 64, "width": 64}
    one, other = MLVICXImageProcessor(image_mean=[0.5]), MLVICXImageProcessor(image_mean=[0.5])
    one.size["height"], one.image_mean[0] = 1, 9
    assert (other.image_size, other.image_mean) == (224, [0.5])


def test_a_file_of_an_earlier_version_is_read(tmp_path: Path):
    old = {"fit": "crop", "image_mean": 0.41, "image_processor_type": "MLVICXImageProcessor", "image_size": 48}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | {"image_std": 0.19, "num_channels": 3}))
    expected = MLVICXImageProcessor(image_size=48, num_channels=3, image_mean=0.41, image_std=0.19, fit="crop")
    assert MLVICXImageProcessor.from_pretrained(tmp_path).to_dict() == expected.to_dict()
