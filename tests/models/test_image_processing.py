"""Pictures of every kind to model input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from mlvicx_hf import MLVICXConfig, MLVICXForImageClassification, MLVICXImageProcessor
from mlvicx_hf.data.images.pixels import read_gray
from mlvicx_hf.models.image_processing_mlvicx import fit_square, full_scale, to_unit_gray

GRAY = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (24, 20, 3), np.uint8)


def unit(array: np.ndarray, scale: float = 255) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float64) / scale).float()[None]


def luminance(colour: np.ndarray) -> torch.Tensor:
    return unit(colour.astype(np.float64) @ [0.299, 0.587, 0.114])


@pytest.mark.parametrize("mode", ["1", "L", "LA", "I", "F", "I;16", "I;16B", "RGB", "RGBA", "P", "CMYK", "YCbCr"])
def test_pil_images_of_every_mode(mode: str):
    source = Image.fromarray(GRAY)
    tolerance = 1e-6
    expected = unit(GRAY)
    if mode in ("I;16", "I;16B"):
        deep = GRAY.astype(np.uint16) * 257
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
        image = pixels.astype(np.uint16) * 257
    elif kind == "int32":
        image = pixels.astype(np.int32)
        image.flat[0] = 255  # the depth is read off the largest value
        if shape in ("HW", "HW1", "1HW"):
            expected = expected.clone()
            expected[0, 0, 0] = 1
        else:
            image.flat[0] = pixels.flat[0]
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
def test_a_16_bit_ramp_is_rescaled_and_not_saturated(container: str):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    image = {"numpy": ramp, "torch": torch.from_numpy(ramp), "pil": Image.fromarray(ramp)}[container]
    values = to_unit_gray(image).flatten()
    assert (values.diff() > 0).all()
    assert values[0] == 0
    assert values[-1] == 1
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    torch.testing.assert_close(to_unit_gray(eight), to_unit_gray(eight.astype(np.uint16) * 257), rtol=0, atol=1e-7)


@pytest.mark.parametrize(("bits", "peak"), [(8, 200), (10, 1000), (12, 4095), (12, 2100), (14, 16000), (16, 40000)])
def test_the_usual_bit_depths(bits: int, peak: int):
    assert full_scale(peak) == 2**bits - 1
    values = to_unit_gray(np.array([[0, peak]], np.uint16))
    assert values[0, 0, 1].item() == pytest.approx(peak / (2**bits - 1))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 65535))
def test_full_scale_is_the_smallest_that_holds(maximum: int):
    scale = full_scale(maximum)
    assert scale in [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
    assert scale >= maximum
    assert all(s < maximum for s in (255, 1023, 4095, 16383) if s < scale)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.array([[0.0, 255.0]]), r"0\.0 to 255\.0 found; expected \[0, 1\] for floats"),
        (np.array([[-0.1, 0.5]]), r"from -0\.1 .* expected \[0, 1\]"),
        (np.array([[-5, 3]]), "from -5 to 3 found; expected 0 or more for integers"),
        (np.array([[0.0, np.nan]]), "NaN or infinite pixels"),
        (np.array([[0.0, np.inf]]), "NaN or infinite pixels"),
        (np.array([[0, 70000]]), "70000 found; expected at most 16 bits"),
        (np.zeros((4, 4), complex), "complex128 found"),
        (np.array([["a"]]), "expected boolean, integer or float"),
        (np.zeros((0, 4)), "empty image"),
        (np.zeros(7), r"\(7,\) found; expected \[H, W\]"),
        (np.zeros((5, 6, 2)), r"\(5, 6, 2\) found; expected \[H, W\]"),
        (np.zeros((2, 3, 8, 8)), r"\(2, 3, 8, 8\) found"),
        (torch.tensor([[0.0, float("nan")]]), "NaN or infinite pixels"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str):
    with pytest.raises(ValueError, match=message):
        to_unit_gray(image)  # type: ignore[arg-type]


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
    filled = fit_square(image, 40, "pad", fill=0.5)
    assert (filled[:, :10] == 0.5).all()


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


def test_constants_survive_saving(tmp_path: Path):
    processor = MLVICXImageProcessor(image_size=48, num_channels=3, image_mean=0.41, image_std=0.19, fit="crop")
    processor.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["preprocessor_config.json"]
    loaded = MLVICXImageProcessor.from_pretrained(tmp_path)
    for name in ("image_size", "num_channels", "image_mean", "image_std", "fit"):
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
    classify = pipeline("image-classification", model=str(classifier))
    found = {row["label"]: row["score"] for row in classify(image, top_k=3)}
    model = MLVICXForImageClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        logits = model(MLVICXImageProcessor(image_size=32)(eight)["pixel_values"]).logits[0]
    assert found == pytest.approx(
        dict(zip(("Edema", "Mass", "Nodule"), logits.sigmoid().tolist(), strict=True)), abs=1e-6
    )
