import io

import numpy as np
import pytest
from PIL import Image
from test_pixels import colour_png_16

from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import fit_square_gray
from mlvicx_hf.data.masks import check_mask_names, class_indices, decode_mask, encode_mask, foreground

CLASSES = ("background", "lung", "heart")
INDICES = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def palette(indices: np.ndarray) -> Image.Image:
    """Colours in which no value is its index, and of which two look alike."""
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette([200, 200, 200, 0, 0, 0, 200, 200, 200] + [9] * 759)
    return image


@pytest.mark.parametrize(
    "image",
    [
        INDICES,
        INDICES.astype(np.uint16),
        palette(INDICES),
        Image.fromarray(INDICES).convert("LA"),
        Image.merge("RGB", [Image.fromarray(INDICES)] * 3),
        Image.merge("RGBA", [Image.fromarray(INDICES)] * 3 + [Image.new("L", (4, 3), 255)]),
        Image.merge("RGBA", [Image.fromarray(INDICES)] * 4),
    ],
    ids=["8-bit", "16-bit", "palette", "LA", "RGB", "opaque RGBA", "RGBA of four equal channels"],
)
def test_every_kind_of_file_gives_its_indices(image: Image.Image | np.ndarray):
    found = class_indices(decode_mask(encode(image), "m.png"), CLASSES, (4, 3), "m.png")
    assert found.dtype == np.uint8
    assert np.array_equal(found, INDICES)


def test_more_than_8_bits_are_not_cut_to_8():
    deep = INDICES.astype(np.uint16) + 256
    with pytest.raises(UnreadableImageError, match=r"value\(s\) 256, 257, 258 found; expected 0 to 2"):
        class_indices(decode_mask(encode(deep), "m.png"), CLASSES, (4, 3), "m.png")
    with pytest.raises(UnreadableImageError, match="16 bits a channel of which 14 or fewer are used"):
        decode_mask(colour_png_16(INDICES.astype(np.uint16)), "m.png")


@pytest.mark.parametrize("values", [(0, 1), (0, 255), (0,), (1,), (255,)])
def test_binary_masks_are_0_and_1_whichever_way_they_are_written(values: tuple[int, ...]):
    pixels = np.array([values, values[::-1]], np.uint8)
    found = class_indices(pixels, ("disc",), (len(values), 2), "m.png")
    assert np.array_equal(found, pixels > 0)


def test_a_one_bit_file_is_a_binary_mask():
    found = class_indices(decode_mask(encode(INDICES == 1), "m.png"), ("disc",), (4, 3), "m.png")
    assert np.array_equal(found, INDICES == 1)


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        ((0, 2), ("disc",), r"value\(s\) 2 found; expected 0 and 1, or 0 and 255 \(disc\)"),
        ((0, 128, 255), ("disc",), r"value\(s\) 128 found; expected 0 and 1"),
        ((0, 1, 255), ("disc",), r"value\(s\) 0, 1, 255 found; expected 0 and 1"),
        ((0, 255), CLASSES, r"value\(s\) 255 found; expected 0 to 2 \(background, lung, heart\)"),
        (range(10), CLASSES, r"value\(s\) 3, 4, 5, 6, 7, … found; expected 0 to 2"),
        (range(8), CLASSES, r"value\(s\) 3, 4, 5, 6, 7 found; expected 0 to 2"),
    ],
)
def test_values_out_of_range_are_named(values: tuple[int, ...], names: tuple[str, ...], message: str):
    pixels = np.array([values], np.uint8)
    with pytest.raises(UnreadableImageError, match=rf"m\.png: {message}"):
        class_indices(pixels, names, (len(values), 1), "m.png")


def test_a_mask_of_another_size_is_refused():
    with pytest.raises(UnreadableImageError, match=r"m\.png: 4 x 3 pixels found; expected 3 x 4 as its image"):
        class_indices(INDICES, CLASSES, (3, 4), "m.png")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty file"),
        (b"text", "content is none of PNG"),
        (encode(INDICES, "JPEG"), "content is none of PNG"),  # its losses would move the borders
        (encode(np.random.default_rng(0).integers(0, 2, (99, 99), np.uint8))[:-900], "truncated"),
        (encode(np.eye(3, dtype=np.uint8)[INDICES]), "colours found; expected one channel, a palette, or equal"),
        (
            encode(Image.merge("LA", [Image.new("L", (4, 3)), Image.fromarray(INDICES)])),
            "transparency that varies found; expected an opaque mask",
        ),
    ],
    ids=["empty", "text", "jpeg", "truncated", "colours", "transparency"],
)
def test_files_that_are_no_masks_are_refused(data: bytes, message: str):
    with pytest.raises(UnreadableImageError, match=rf"m\.png: .*{message}"):
        decode_mask(data, "m.png")


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (31, 33), (16, 16)])
def test_masks_follow_the_geometry_of_their_images_without_mixing_classes(shape: tuple[int, int], fit: str):
    indices = np.zeros(shape, np.uint8)
    indices[shape[0] // 4 : shape[0] // 2, shape[1] // 3 :] = 2
    mask = encode_mask(indices, b"content", 32, fit)
    square = np.asarray(Image.open(io.BytesIO(mask.png)))
    assert square.shape == (32, 32)
    assert mask.values == (0, 2) == tuple(np.unique(square))
    # Interpolated as an image, the rectangle covers the same pixels but for those that its border cuts.
    gray = np.asarray(fit_square_gray(Image.fromarray(indices * 127), 32, fit)) / 254
    assert ((square == 2) == (gray > 0.5))[abs(gray - 0.5) > 0.3].all()
    assert (square == 2).sum() == pytest.approx(gray.sum(), rel=0.15)


def test_foreground_is_everything_but_the_background():
    assert foreground(()) == {}
    assert foreground(("lungs",)) == {"lungs": 1}
    assert foreground(CLASSES) == {"lung": 1, "heart": 2}


@pytest.mark.parametrize("names", [("",), ("a", ""), ("a", "b", "a"), tuple(map(str, range(257)))])
def test_names_that_do_not_fit_are_refused(names: tuple[str, ...]):
    with pytest.raises(ValueError, match=r"mask_names='.* found; expected one structure, or up to 256 classes"):
        check_mask_names(names)
