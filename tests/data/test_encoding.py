import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlvicx_hf.data.collections.base import Drawing, Record
from mlvicx_hf.data.images.encoding import make_picture

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
    assert make_picture(record, 8, "pad", ("disc",)).reason.startswith("mask none.png: cannot be read: No such file")


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
