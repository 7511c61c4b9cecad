import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlvicx_hf.data.collections.base import Box, Drawing, Record
from mlvicx_hf.data.images.encoding import encode_png, make_picture
from mlvicx_hf.data.images.pixels import HALVED_REDUCTION, fit_square_gray
from mlvicx_hf.data.synthetic.phantom import draw_phantom

UPRIGHT = np.zeros((20, 30), np.uint8)  # of the mask
UPRIGHT[:5, 10:] = 1


def save_turned(path: Path) -> Path:
    """A JPEG whose EXIF orientation turns what is stored by a quarter: 30 wide and 20 high upright."""
    image = Image.fromarray(UPRIGHT * 200).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)
    return path


def test_a_mask_is_compared_with_its_image_upright(tmp_path: Path):
    image, mask = save_turned(tmp_path / "a.jpg"), tmp_path / "m.png"
    record = Record("a.jpg", "p", path=image, mask_path=mask)
    Image.fromarray(UPRIGHT).save(mask)
    picture = make_picture(record, 30, "squash", ("disc",))
    assert picture.reason == ""
    pixels = [np.asarray(Image.open(io.BytesIO(png))) for png in (picture.png, picture.mask.png)]
    assert ((pixels[0] > 100) == (pixels[1] == 1)).mean() > 0.9
    Image.fromarray(UPRIGHT).transpose(Image.Transpose.ROTATE_90).save(mask)
    picture = make_picture(record, 30, "squash", ("disc",))
    assert picture.reason == "mask m.png: 20 x 30 pixels found; expected 30 x 20 as its image"
    assert picture.mask is None


def test_a_mask_is_read_only_where_masks_are_wanted(tmp_path: Path):
    Image.fromarray(UPRIGHT).save(tmp_path / "a.png")
    record = Record("a.png", "p", path=tmp_path / "a.png", mask_path=tmp_path / "none.png")
    assert make_picture(record, 8, "pad").reason == ""
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        make_picture(record, 8, "pad", ("disc",))


def draw() -> Drawing:
    return Drawing(UPRIGHT * 90, UPRIGHT)


def draw_out_of_range() -> Drawing:
    return Drawing(UPRIGHT * 90, UPRIGHT * 7)


def test_a_drawing_gives_image_and_mask():
    picture = make_picture(Record("a", "p", draw=draw), 30, "pad", ("disc",))
    assert picture.sha256 == hashlib.sha256((UPRIGHT * 90).tobytes()).hexdigest()
    assert picture.mask.sha256 == hashlib.sha256(UPRIGHT.tobytes()).hexdigest()
    assert picture.mask.values == (0, 1)
    image, mask = (np.asarray(Image.open(io.BytesIO(png))) for png in (picture.png, picture.mask.png))
    assert np.array_equal(image, mask * 90)
    picture = make_picture(Record("a", "p", draw=draw_out_of_range), 30, "pad", ("disc",))
    assert picture.reason == "mask drawn: value(s) 7 found; expected 0 and 1, or 0 and 255 (disc)"


def test_a_record_without_pixels_is_a_bug():
    with pytest.raises(ValueError, match="a: neither a file nor a drawing found"):
        make_picture(Record("a", "p"), 8, "pad")


NOISE = np.random.default_rng(0).integers(0, 256, (61, 47), np.uint8)


@pytest.mark.parametrize(
    "pixels",
    [NOISE, NOISE[:1], NOISE[:, :1], NOISE[:1, :1], NOISE * 0, NOISE * 0 + 255, np.tile(NOISE, (9, 9))],
    ids=["noise", "row", "column", "pixel", "black", "white", "large"],
)
def test_png_is_lossless_and_valid(pixels: np.ndarray):
    png = encode_png(Image.fromarray(pixels))
    Image.open(io.BytesIO(png)).verify()  # the check sums of all chunks
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "L")
    assert np.array_equal(np.asarray(image), pixels)


def test_png_is_compressed():
    square = Image.fromarray(draw_phantom(0, size=256).image)
    buffer = io.BytesIO()
    square.save(buffer, "PNG")
    assert len(encode_png(square)) < 1.3 * len(buffer.getvalue()) < 0.7 * 256**2


@pytest.mark.parametrize("fit", ["pad", "squash", "crop"])
def test_the_square_of_a_large_8_bit_png_has_the_very_pixels_of_one_resize(tmp_path: Path, fit: str):
    drawn = Image.fromarray(draw_phantom(1, size=700).image[:500])
    drawn.save(tmp_path / "a.png")
    picture = make_picture(Record("a.png", "p", path=tmp_path / "a.png"), 32, fit)
    square = np.asarray(Image.open(io.BytesIO(picture.png)))
    assert np.array_equal(square, np.asarray(fit_square_gray(drawn, 32, fit)))


def test_size_mask_and_boxes_of_a_halved_jpeg_are_those_of_the_file(tmp_path: Path):
    side = 2 * HALVED_REDUCTION * 32
    shape = np.zeros((side - 40, side), np.uint8)
    shape[100:200, 40:240] = 1
    Image.fromarray(shape * 200).save(tmp_path / "a.jpg", quality=95)
    Image.fromarray(shape).save(tmp_path / "m.png")
    box = Box("disc", 40, 100, 240, 200)
    record = Record("a.jpg", "p", path=tmp_path / "a.jpg", mask_path=tmp_path / "m.png", boxes=(box,))
    picture = make_picture(record, 32, "pad", ("disc",))
    assert picture.reason == ""
    assert (picture.width, picture.height) == (side, side - 40)
    image, mask = (np.asarray(Image.open(io.BytesIO(png))) for png in (picture.png, picture.mask.png))
    assert ((image > 100) == (mask == 1)).mean() > 0.99
    assert picture.boxes == (Box("disc", 4, 12, 24, 22),)


def test_a_mask_beside_a_turned_image_is_noted(tmp_path: Path):
    mask = tmp_path / "m.png"
    Image.fromarray(UPRIGHT).save(mask)
    record = Record("a.jpg", "p", path=save_turned(tmp_path / "a.jpg"), mask_path=mask)
    note = "turned by EXIF orientation 6; mask and boxes are taken as upright already"
    assert make_picture(record, 30, "squash", ("disc",)).note == note
    assert make_picture(record, 30, "squash").note == ""  # without masks nothing can differ
