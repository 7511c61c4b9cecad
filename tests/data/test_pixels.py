import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, PngImagePlugin

from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import (
    DICOM_SUFFIXES,
    HALVED_REDUCTION,
    IMAGE_SUFFIXES,
    _gray,
    _unit,
    decode_gray,
    fit_square_gray,
    original_size,
    read_gray,
)
from mlvicx_hf.data.synthetic.phantom import draw_phantom
from mlvicx_hf.models.image_processing_mlvicx import FITS, fit_square, to_unit_gray

HEIGHT, WIDTH = 24, 40


def ramp(maximum: int, dtype: type = np.uint8) -> np.ndarray:
    """0 to `maximum` along the rows, one column after another brighter."""
    return np.round(np.linspace(0, maximum, HEIGHT * WIDTH)).reshape(HEIGHT, WIDTH).astype(dtype)


def save(path: Path, image: Image.Image | np.ndarray, kind: str | None = None, **options: object) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, kind, **options)
    return path


def png(width: int, height: int, bit_depth: int, colour: int, scanlines: bytes) -> bytes:
    """A PNG written by hand, for depths that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(scanlines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def colour_png_16(values: np.ndarray) -> bytes:
    """16-bit RGB PNG whose three channels are `values` [H, W]."""
    pixels = np.repeat(values[..., None], 3, axis=2).astype(">u2")
    return png(values.shape[1], values.shape[0], 16, 2, b"".join(b"\0" + row.tobytes() for row in pixels))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(("low", "high"), [(0, 1023), (0, 4095), (30000, 32000), (33069, 36863), (0, 65535)])
def test_16_bit_files_fill_the_grey_range_whatever_part_they_use(tmp_path: Path, suffix: str, low: int, high: int):
    values = low + ramp(high - low, np.uint16)
    gray = np.asarray(read_gray(save(tmp_path / f"ramp{suffix}", values.astype(np.uint16)))).astype(int)
    assert (np.diff(gray.ravel()) >= 0).all()
    assert np.abs(gray - (values - low) / (high - low) * 255).max() <= 3  # half a percent at each end is clipped
    assert len(np.unique(gray)) > 200


def test_a_marker_does_not_darken_a_16_bit_film(tmp_path: Path):
    values = ramp(4095, np.uint16)
    plain = np.asarray(read_gray(save(tmp_path / "plain.png", values))).astype(int)
    values[5:8, 5:9] = 65535
    marked = np.asarray(read_gray(save(tmp_path / "marked.png", values))).astype(int)
    elsewhere = values < 65535
    assert np.abs(plain - marked)[elsewhere].max() <= 2


def test_a_file_and_the_image_processor_agree_on_16_bits(tmp_path: Path):
    path = save(tmp_path / "deep.png", ramp(3000, np.uint16))
    with Image.open(path) as image:
        expected = to_unit_gray(image)[0].numpy()
    assert np.abs(np.asarray(read_gray(path)) / 255 - expected).max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_every_integer_is_scaled_as_the_image_processor_scales_it(bits: int):
    values = np.arange(2**bits, dtype=np.uint16).reshape(-1, 4)
    assert np.abs(_unit(values) - to_unit_gray(values)[0].numpy()).max() < 1e-6


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_every_8_bit_mode_is_read_as_the_image_processor_reads_it(tmp_path: Path, mode: str):
    colours = np.stack([ramp(255), ramp(255)[::-1], np.full((HEIGHT, WIDTH), 77, np.uint8)], axis=-1)
    image = Image.fromarray(colours).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(ramp(255)))  # transparency must not darken anything
    path = save(tmp_path / "image.tif", image) if mode in ("CMYK", "YCbCr") else save(tmp_path / "image.png", image)
    if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:  # which cannot read the file that it writes
        with pytest.raises(UnreadableImageError, match="damaged"):
            read_gray(path)
        expected, gray = to_unit_gray(image)[0].numpy() * 255, _gray(image)
    else:
        with Image.open(path) as stored:
            assert stored.mode == mode
            expected = to_unit_gray(stored)[0].numpy() * 255
        gray = read_gray(path)
    assert gray.mode == "L"
    assert gray.size == (WIDTH, HEIGHT)
    assert np.abs(np.asarray(gray) - expected).max() <= 1
    assert np.asarray(gray).std() > 10


def test_jpeg_is_read(tmp_path: Path):
    values = ramp(255)
    gray = np.asarray(read_gray(save(tmp_path / "image.jpg", values, quality=95)))
    assert np.abs(gray.astype(int) - values).max() < 12


def test_float_tiff_in_unit_range_is_taken_as_it_is(tmp_path: Path):
    values = ramp(255).astype(np.float32) / 255 * 0.5
    gray = np.asarray(read_gray(save(tmp_path / "unit.tif", values)))
    assert np.abs(gray - values * 255).max() <= 0.5 + 1e-4


def test_other_float_tiff_is_stretched(tmp_path: Path):
    values = ramp(255).astype(np.float32) * 10 - 1000
    gray = np.asarray(read_gray(save(tmp_path / "float.tif", values)))
    assert np.abs(gray.astype(int) - ramp(255)).max() <= 2


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (0, 70000), (-1024, 3071), (2**30, 2**30 + 4000)])
def test_32_bit_integers_are_read(tmp_path: Path, low: int, high: int):
    values = low + ramp(4095, np.int32).astype(np.int64) * (high - low) // 4095
    gray = np.asarray(read_gray(save(tmp_path / "deep.tif", values.astype(np.int32)))).astype(int)
    assert np.abs(gray - ramp(255)).max() <= 3


def test_16_bit_tiff_with_white_at_zero_is_inverted(tmp_path: Path):
    path = save(tmp_path / "16.tif", ramp(65535, np.uint16), tiffinfo={262: 0})
    with Image.open(path) as image:
        assert image.tag_v2[262] == 0
        assert np.asarray(image)[0, 0] == 0  # Pillow leaves 16 bits as they are stored
    assert np.abs(np.asarray(read_gray(path)).astype(int) - (255 - ramp(255))).max() <= 3


def test_16_bit_colour_keeps_its_high_bits_or_is_refused(tmp_path: Path):
    full, shallow = tmp_path / "full.png", tmp_path / "shallow.png"
    full.write_bytes(colour_png_16(ramp(65535, np.uint16)))
    assert np.abs(np.asarray(read_gray(full)).astype(int) - ramp(255)).max() <= 1
    for marker in (0, 65535):
        values = ramp(4095, np.uint16)
        values[0, 0] = marker
        shallow.write_bytes(colour_png_16(values))
        with pytest.raises(UnreadableImageError, match="14 or fewer"):
            read_gray(shallow)


def raw_tiff(values: np.ndarray, order: str, *more: tuple[int, int, int]) -> bytes:
    """An uncompressed TIFF of any numbers, as other libraries write it; `more` tags are (tag, type, word)."""
    data, bits = values.astype(values.dtype.newbyteorder(order)).tobytes(), 8 * values.dtype.itemsize
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, bits), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    tags += [(278, 4, height), (279, 4, len(data)), (339, 3, "uif".index(values.dtype.kind) + 1), *more]
    listed = struct.pack(f"{order}H", len(tags))
    for tag, kind, value in sorted(tags):
        word = struct.pack(f"{order}HH", value, 0) if kind == 3 else struct.pack(f"{order}I", value)
        listed += struct.pack(f"{order}HHI", tag, kind, 1) + word
    start = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return start + data + listed + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("scale", [1 / 255, 12.5])
def test_float64_tiff_is_read_as_float32_is(tmp_path: Path, order: str, scale: float):
    found = []
    for dtype in (np.float32, np.float64):
        (tmp_path / "float.tif").write_bytes(raw_tiff(ramp(255).astype(dtype) * dtype(scale), order))
        found.append(np.asarray(read_gray(tmp_path / "float.tif")).astype(int))
    assert np.abs(found[0] - found[1]).max() <= 1
    assert len(np.unique(found[1])) > 200


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_tiff_of_numbers_with_a_sign(tmp_path: Path, dtype: type):
    (tmp_path / "signed.tif").write_bytes(raw_tiff((ramp(255).astype(int) - 128).astype(dtype), "<"))
    gray = np.asarray(read_gray(tmp_path / "signed.tif")).astype(int)
    assert np.abs(gray - ramp(255)).max() <= 2


@pytest.mark.parametrize("dtype", [np.float16, np.uint64, np.int64])
def test_tiff_of_a_kind_that_is_not_read_is_named(tmp_path: Path, dtype: type):
    (tmp_path / "odd.tif").write_bytes(raw_tiff(ramp(255).astype(dtype), "<"))
    with pytest.raises(UnreadableImageError, match=r"odd\.tif: TIFF of a kind that is not read"):
        read_gray(tmp_path / "odd.tif")


@pytest.mark.parametrize("tag", [282, 700, 33434])  # resolution, XMP, exposure time
def test_a_damaged_tag_does_not_hinder_the_orientation(tmp_path: Path, tag: int):
    nan = struct.unpack("<I", struct.pack("<f", float("nan")))[0]
    (tmp_path / "plain.tif").write_bytes(raw_tiff(ramp(255), "<", (274, 3, 6)))
    (tmp_path / "nan.tif").write_bytes(raw_tiff(ramp(255), "<", (274, 3, 6), (tag, 11, nan)))
    plain, damaged = (np.asarray(read_gray(tmp_path / f"{name}.tif")) for name in ("plain", "nan"))
    assert plain.shape == (WIDTH, HEIGHT)
    assert np.array_equal(plain, damaged)


def test_an_exif_tag_that_is_not_a_number_does_not_hinder_the_orientation(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    block = bytearray(exif.tobytes())
    at = block.index(struct.pack(">II" if block[6:8] == b"MM" else "<II", 72, 1))
    block[at : at + 8] = bytes(8)  # 0/0
    for suffix in ("jpg", "png"):
        Image.fromarray(ramp(255)).save(tmp_path / f"film.{suffix}", exif=bytes(block))
        assert read_gray(tmp_path / f"film.{suffix}").size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[: HEIGHT // 2, : WIDTH // 2] = 200  # upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    gray = np.asarray(read_gray(save(tmp_path / "turned", values, kind, exif=exif)))
    assert gray.shape == (WIDTH, HEIGHT)
    assert gray[: WIDTH // 2, HEIGHT // 2 :].mean() > 180  # upper right
    assert gray[WIDTH // 2 :].mean() < 20


def test_exif_orientation_is_applied_to_16_bits(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 3
    gray = np.asarray(read_gray(save(tmp_path / "turned.png", ramp(65535, np.uint16), exif=exif)))
    assert gray[0, 0] == 255
    assert gray[-1, -1] == 0


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "BMP", "JPEG2000"])
def test_content_decides_not_the_name(tmp_path: Path, kind: str):
    gray = read_gray(save(tmp_path / "image.jpg", ramp(255), kind))
    assert np.abs(np.asarray(gray).astype(int) - ramp(255)).mean() < 5


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".webp"])
def test_truncated_files_are_refused_with_their_name(tmp_path: Path, suffix: str):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    path = save(tmp_path / f"cut{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match=rf"cut\{suffix}: \w+") as caught:
        read_gray(path)
    assert isinstance(caught.value, ValueError)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"patient,label\n1,0\n", "content is none of PNG, JPEG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "content is none of PNG, JPEG"),
        (bytes(128) + b"DICM" + bytes(64), "no PixelData found; expected an image"),
    ],
)
def test_files_that_are_no_images_are_refused_with_the_reason(tmp_path: Path, content: bytes, reason: str):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    with pytest.raises(UnreadableImageError, match=rf"image\.png: {reason}"):
        read_gray(path)


def test_dicom_is_known_by_its_content_and_not_by_its_name(tmp_path: Path):
    old = tmp_path / "scan.png"  # an old one has no preamble
    old.write_bytes(b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100" * 20)
    with pytest.raises(UnreadableImageError, match=r"scan\.png: no PixelData found"):
        read_gray(old)
    assert read_gray(save(tmp_path / "png.dcm", ramp(255), "PNG")).mode == "L"
    assert set(DICOM_SUFFIXES) < set(IMAGE_SUFFIXES)


def test_decompression_bombs_are_refused_whether_pillow_warns_or_raises(tmp_path: Path):
    for side in (10_000, 20_000):  # 100 million pixels make Pillow warn, 400 million make it raise
        path = tmp_path / f"bomb{side}.png"
        path.write_bytes(png(side, side, 1, 0, bytes(100)))
        with pytest.raises(UnreadableImageError, match=rf"bomb{side}\.png: suspiciously large"):
            read_gray(path)


def test_a_file_that_is_not_there_is_no_unreadable_image(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        read_gray(tmp_path / "none.png")


SIDE = 64  # of the squares to which large JPEG files are padded
LARGE = 2 * HALVED_REDUCTION * SIDE  # the least side that is halved


def film(width: int, height: int, patient: int = 0) -> Image.Image:
    """A synthetic radiograph of this size, as blurred as a scanned film."""
    drawn = Image.fromarray(draw_phantom(patient, size=max(width, height) // 2).image)
    return drawn.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("patient", range(4))
@pytest.mark.parametrize("quality", [75, 95])
def test_a_large_jpeg_is_halved_while_it_is_decoded_and_gives_the_same_square(
    tmp_path: Path, patient: int, quality: int
):
    path = save(tmp_path / "film.jpg", film(LARGE, LARGE - 90, patient), quality=quality)
    halved = decode_gray(path.read_bytes(), path, padded_to=SIDE)
    assert halved.size == (LARGE // 2, LARGE // 2 - 45)
    assert original_size(halved) == read_gray(path).size == (LARGE, LARGE - 90)
    squares = [np.asarray(fit_square_gray(gray, SIDE)).astype(int) for gray in (halved, read_gray(path))]
    difference = np.abs(squares[0] - squares[1])
    assert 0 < difference.mean() < 0.15
    assert difference.max() <= 1


@pytest.mark.parametrize("kind", ["smaller", "odd width", "odd height", "colour", "PNG", "not padded"])
def test_other_files_are_decoded_whole(tmp_path: Path, kind: str):
    width, height = {"smaller": (LARGE - 2, 80), "odd width": (LARGE + 1, 80), "odd height": (LARGE, 81)}.get(
        kind, (LARGE, 80)
    )
    image = film(width, height)
    path = save(
        tmp_path / "film", image.convert("RGB") if kind == "colour" else image, "PNG" if kind == "PNG" else "JPEG"
    )
    gray = decode_gray(path.read_bytes(), path, padded_to=None if kind == "not padded" else SIDE)
    assert gray.size == original_size(gray) == (width, height)
    assert np.array_equal(np.asarray(gray), np.asarray(read_gray(path)))


def test_exif_orientation_is_applied_to_a_halved_jpeg(tmp_path: Path):
    values = np.zeros((80, LARGE), np.uint8)
    values[:40, : LARGE // 2] = 200  # upper left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = save(tmp_path / "turned.jpg", values, exif=exif)
    gray = decode_gray(path.read_bytes(), path, padded_to=SIDE)
    assert gray.size == (40, LARGE // 2)
    assert original_size(gray) == (80, LARGE)
    assert np.asarray(gray)[: LARGE // 4, 20:].mean() > 180  # upper right


def test_a_truncated_large_jpeg_is_refused(tmp_path: Path):
    path = save(tmp_path / "cut.jpg", film(LARGE, LARGE))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UnreadableImageError, match=r"cut\.jpg: damaged or unsupported"):
        decode_gray(path.read_bytes(), path, padded_to=SIDE)


@pytest.mark.parametrize("key", ["note", "original_size"])
def test_text_in_a_file_is_not_taken_for_what_the_decoder_says(tmp_path: Path, key: str):
    text = PngImagePlugin.PngInfo()
    text.add_text(key, "Jane Doe")
    gray = read_gray(save(tmp_path / "text.png", ramp(255), pnginfo=text))
    assert original_size(gray) == (WIDTH, HEIGHT)
    assert "Jane Doe" not in gray.info.values()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", [(50, 81), (81, 50), (33, 33), (7, 200), (1, 300), (301, 299), (64, 64)])
@pytest.mark.parametrize("size", [32, 64])
def test_fit_square_gray_agrees_with_the_image_processor(shape: tuple[int, int], fit: str, size: int):
    values = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    expected = fit_square(torch.from_numpy(values)[None], size, fit)[0].numpy().astype(int)
    found = np.asarray(fit_square_gray(Image.fromarray(values), size, fit)).astype(int)
    assert found.shape == (size, size)
    assert np.abs(found - expected).max() <= 1


def test_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="fit='stretch' found; expected one of pad, squash, crop"):
        fit_square_gray(Image.new("L", (4, 4)), 8, "stretch")


@pytest.mark.real_data
def test_awkward_real_files_are_read(real_data: Path):
    files = [path for path in sorted((real_data / "originals").iterdir()) if path.suffix != ".dcm"]
    assert len(files) >= 8
    for path in files:
        gray = np.asarray(read_gray(path))
        assert min(gray.shape) > 50
        assert gray.std() > 20


@pytest.mark.parametrize("name", ["a.tif", "a.png", "a.webp"])
def test_a_file_of_several_images_is_refused(tmp_path: Path, name: str):
    pages = [Image.new("L", (8, 8), shade) for shade in (10, 200)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    with pytest.raises(UnreadableImageError, match="2 images in one file found; expected one"):
        read_gray(tmp_path / name)
