import io
import json
import logging
import re
import struct
import subprocess
import sys
import warnings
import zlib
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pytest
from dicom_files import LOSSY, NATIVE, SYNTAXES, by_gdcm, dataset, dicom, encapsulated, written
from PIL import Image
from pydicom import DataElement, dcmread, uid
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments
from pydicom.filewriter import write_file_meta_info
from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut, apply_windowing, get_decoder, pixel_array

from mlvicx_hf.common.errors import MissingExtraError
from mlvicx_hf.data.images.dicom.decoding import decode_dicom
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import read_gray

HEIGHT, WIDTH = 38, 29
LINE, COLUMN = np.mgrid[:HEIGHT, :WIDTH]
SHADE = (LINE * 5 + COLUMN * 9) / (37 * 5 + 28 * 9)  # smooth, from 0 to 1
LUMINANCE = (0.299, 0.587, 0.114)
SECRET = "SECRET^NAME"
NAME = attrgetter("name")
IMPLICIT, LITTLE, BIG = ORDERS = (uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian)
J2K, JPEG, JPEG_LS, LOSSLESS, RLE = COMPRESSED = [
    *(uid.JPEG2000Lossless, uid.JPEGBaseline8Bit, uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.RLELossless)
]


def shade(low: int, high: int, dtype: type = np.uint16) -> np.ndarray:
    return np.round(low + SHADE * (high - low)).astype(dtype)


def colours() -> np.ndarray:
    return np.stack([shade(*ends, np.uint8) for ends in ((0, 255), (20, 200), (250, 90))], axis=-1)


def read(content: bytes) -> np.ndarray:
    image = decode_dicom(content, "scan")
    assert image.mode == "L"
    return np.asarray(image).astype(int)


def refusal(content: bytes) -> str:
    with pytest.raises(UnreadableImageError) as caught:
        decode_dicom(content, "scan")
    assert str(caught.value).startswith("scan: ")
    return caught.value.reason


def own_range(values: np.ndarray, bits: int, stored: bool = True) -> tuple[float, float]:
    """Black and white of an image without a grey scale: half a percent of the pixels off the border clips.

    Stored values of 0 to 255 are grey levels already.
    """
    low, high = float(values.min()), float(values.max())
    if stored and bits >= 8 and low >= 0 and high <= 255:
        return 0, 255
    inner = np.sort(values[(values > low) & (values < high)])
    if bits < 8 or not len(inner) or inner[0] == inner[-1]:
        return low, high
    return tuple(float(inner[int(np.ceil(share * len(inner))) - 1]) for share in (0.005, 0.995))  # type: ignore[return-value]


def by_pydicom(content: bytes, ignored: tuple[str, ...] = (), padding: tuple[int, int] | None = None) -> np.ndarray:
    """Grey levels [H, W] as pydicom's own functions make them, in float64."""
    scan = dcmread(io.BytesIO(content))
    for keyword in ignored:
        del scan[keyword]
    stored = pixel_array(scan)
    outputs = apply_modality_lut(stored, scan)
    empty = np.zeros(stored.shape, bool) if padding is None else (stored >= padding[0]) & (stored <= padding[1])
    low, high = own_range(outputs[~empty], scan.BitsStored, np.array_equal(stored, outputs))
    if scan.get("VOILUTSequence"):
        entries = apply_voi_lut(np.arange(2**16), scan)
        low, high = entries.min(), entries.max()
    elif "WindowWidth" in scan:
        with np.errstate(over="ignore"):
            low, high = apply_windowing(np.array([-1e300, 1e300]), scan)
    unit = ((apply_voi_lut(outputs, scan) - np.float64(low)) / (np.float64(high) - low)).clip(0, 1)
    gray = np.round(255 * (1 - unit if scan.PhotometricInterpretation == "MONOCHROME1" else unit))
    gray[empty] = 0
    return gray


def assert_same(found: np.ndarray, expected: np.ndarray, tolerance: int = 1) -> None:
    assert found.shape == expected.shape
    assert expected.std() > 10  # else nothing would be shown
    assert np.abs(found - expected).max() <= tolerance


def stretched(values: np.ndarray, bits: int | None = None, stored: bool = True) -> np.ndarray:
    """Grey levels of an image without a grey scale, by `own_range`."""
    low, high = own_range(values, 8 * values.dtype.itemsize if bits is None else bits, stored)
    return np.round(((values - low) / (high - low)).clip(0, 1) * 255)


def lut(first: int, entries: np.ndarray | list[int], bits: int = 16, **attributes: Any) -> Dataset:
    """An item of a modality or VOI LUT sequence."""
    item = Dataset()
    item.LUTDescriptor = [len(entries) % 2**16, first, bits]
    item.LUTData = np.asarray(entries, "<u2").tobytes()
    item["LUTData"].VR = "OW"
    for keyword, value in attributes.items():
        setattr(item, keyword, value)
    return item


def palette(pixels: np.ndarray, entries: list[np.ndarray], first: int = 0, syntax: uid.UID = LITTLE) -> bytes:
    made = dataset(pixels, syntax, PhotometricInterpretation="PALETTE COLOR")
    for colour, values in zip(("Red", "Green", "Blue"), entries, strict=True):
        keyword = f"{colour}PaletteColorLookupTable"
        setattr(made, f"{keyword}Descriptor", [len(values) % 2**16, first, 8 * values.dtype.itemsize])
        order = ">" if syntax == BIG else "<"
        setattr(made, f"{keyword}Data", values.astype(values.dtype.newbyteorder(order)).tobytes())
    return written(made)


def meta_end(content: bytes) -> int:
    """Where a file's meta information ends, which starts with its own length."""
    return 132 + 12 + struct.unpack_from("<I", content, 140)[0]


def rle_frame(*segments: bytes) -> bytes:
    starts = [64 + sum(len(segment) for segment in segments[:index]) for index in range(len(segments))]
    return struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


def codestream(content: bytes) -> bytes:
    return b"".join(list(generate_fragments(dcmread(io.BytesIO(content)).PixelData))[1:])


@pytest.mark.parametrize("syntax", NATIVE, ids=NAME)
@pytest.mark.parametrize("pixels", [shade(0, 255, np.uint8), shade(40, 60000), shade(-3000, 9000, np.int16)])
def test_uncompressed_files_are_read_as_pydicom_reads_them(tmp_path: Path, syntax: uid.UID, pixels: np.ndarray):
    path = tmp_path / "scan"
    path.write_bytes(dicom(pixels, syntax))
    gray = np.asarray(read_gray(path)).astype(int)
    assert_same(gray, by_pydicom(path.read_bytes()))
    assert_same(gray, stretched(pixels))


@pytest.mark.parametrize("syntax", ORDERS)
@pytest.mark.parametrize("lacking", ["preamble", "preamble and meta information", "transfer syntax"])
def test_files_without_preamble_meta_information_or_transfer_syntax_are_read(
    tmp_path: Path, syntax: uid.UID, lacking: str
):
    pixels = shade(100, 3000)
    content = dicom(pixels, syntax, WindowCenter=1500, WindowWidth=2000)
    expected = by_pydicom(content)
    if lacking == "transfer syntax":
        meta, buffer = dcmread(io.BytesIO(content)).file_meta, io.BytesIO()
        del meta.TransferSyntaxUID
        write_file_meta_info(buffer, meta, enforce_standard=False)
        content = bytes(128) + b"DICM" + buffer.getvalue() + content[meta_end(content) :]
    else:
        content = content[132 if lacking == "preamble" else meta_end(content) :]
    path = tmp_path / "scan.dcm"
    path.write_bytes(content)
    assert_same(np.asarray(read_gray(path)).astype(int), expected)


KINDS = ["8 bits", "12 bits", "16 bits", "16 bits signed", "colour"]


@pytest.mark.parametrize(
    ("syntax", "kind"),
    [(syntax, kind) for syntax in SYNTAXES[len(NATIVE) :] for kind in KINDS if syntax != JPEG or kind[0] in "8c"],
    ids=str,
)
def test_every_compressed_transfer_syntax_is_decoded(syntax: uid.UID, kind: str):
    pixels, options = {
        "8 bits": (shade(0, 255, np.uint8), {}),
        "12 bits": (shade(0, 4095), {"BitsStored": 12}),
        "16 bits": (shade(0, 65535), {}),
        "16 bits signed": (shade(-20000, 20000, np.int16), {}),
        "colour": (colours(), {}),
    }[kind]
    if syntax in (J2K, uid.JPEG2000) and ("12" in kind or "signed" in kind):  # Pillow encodes neither
        target = gdcm.TransferSyntax.JPEG2000Lossless if syntax == J2K else gdcm.TransferSyntax.JPEG2000
        content = by_gdcm(dicom(pixels, **options), target)
    else:
        content = dicom(pixels, syntax, **options)
    assert dcmread(io.BytesIO(content)).file_meta.TransferSyntaxUID == syntax
    expected = pixels @ LUMINANCE if kind == "colour" else stretched(pixels)
    assert_same(read(content), expected, 6 if syntax in LOSSY else 1)


@pytest.mark.lowest
def test_12_bit_jpeg_is_decoded():
    pixels = shade(0, 4095)
    content = by_gdcm(dicom(pixels, BitsStored=12), gdcm.TransferSyntax.JPEGExtendedProcess2_4)
    assert dcmread(io.BytesIO(content)).file_meta.TransferSyntaxUID == uid.JPEGExtended12Bit
    assert_same(read(content), stretched(pixels), 3)


@pytest.mark.lowest
def test_frames_in_several_fragments_and_in_jp2_boxes_are_decoded():
    pixels, buffer = shade(0, 255, np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG2000")
    for options in ({}, {"fragments_per_frame": 3}):
        made = encapsulated(dataset(pixels), buffer.getvalue(), J2K, **options)
        assert_same(read(written(made)), pixels, 0)


OTHERS = [syntax for syntax in uid.AllTransferSyntaxes if syntax not in (*SYNTAXES, uid.JPEGExtended12Bit)]


@pytest.mark.parametrize("syntax", OTHERS, ids=NAME)
def test_other_transfer_syntaxes_are_refused_by_name(syntax: uid.UID):
    assert syntax.is_encapsulated
    reason = refusal(written(encapsulated(dataset(shade(0, 9)), bytes(100), syntax)))
    assert reason.startswith(f"transfer syntax {syntax.name} found; expected an uncompressed one, JPEG Baseline")


def test_unknown_or_unnamed_compression_is_refused():
    content = dicom(shade(0, 255, np.uint8), JPEG_LS)
    assert refusal(content.replace(b"1.2.840.10008.1.2.4.80", b"1.2.840.113619.5.2.4.8")) == "unknown transfer syntax"
    end = meta_end(content)
    assert "without a transfer syntax" in refusal(content[end:])


MODALITY = lut(-50, np.arange(300) ** 2 // 3)
VOI = lut(200, 60000 - np.arange(3000) ** 2 // 200)
PIPELINES = {
    "window": {"WindowCenter": 1500, "WindowWidth": 900},
    "several windows": {"WindowCenter": [1500, 90], "WindowWidth": [900, 10]},
    "narrowest window": {"WindowCenter": 1500, "WindowWidth": 1},
    "exact": {"WindowCenter": 1500, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"},
    "wide exact": {"WindowCenter": 1500, "WindowWidth": 8000, "VOILUTFunction": "LINEAR_EXACT"},
    "sigmoid": {"WindowCenter": 1500, "WindowWidth": 1200, "VOILUTFunction": "SIGMOID"},
    "rescale": {"RescaleSlope": 0.25, "RescaleIntercept": -300},
    "rescale and window": {"RescaleSlope": 2, "RescaleIntercept": -1000, "WindowCenter": 900, "WindowWidth": 1800},
    "falling rescale": {"RescaleSlope": -2, "RescaleIntercept": 4000},
    "modality LUT": {"ModalityLUTSequence": [MODALITY]},
    "modality LUT and window": {"ModalityLUTSequence": [MODALITY], "WindowCenter": 9000, "WindowWidth": 15000},
    "VOI LUT": {"VOILUTSequence": [VOI]},
    "VOI LUT of 12 bits": {"VOILUTSequence": [lut(300, np.arange(4095, 5, -2), 12)]},
    "VOI LUT before window": {"VOILUTSequence": [VOI], "WindowCenter": 9, "WindowWidth": 9},
    "VOI LUT of 2**16": {"VOILUTSequence": [lut(0, np.minimum(np.arange(2**16) * 16, 65535))]},
}


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("syntax", ORDERS)
@pytest.mark.parametrize("name", PIPELINES)
def test_grey_levels_are_those_of_pydicoms_own_pipeline(name: str, syntax: uid.UID, photometric: str):
    pixels = shade(-80, 280, np.int16) if "modality" in name else shade(20, 3900)
    made = dataset(pixels, syntax, PhotometricInterpretation=photometric)
    for keyword, value in PIPELINES[name].items():
        setattr(made, keyword, value)
    if syntax == BIG:
        for sequence in (made.get("ModalityLUTSequence"), made.get("VOILUTSequence")):
            if sequence:  # pydicom writes bytes as they are
                item = sequence[0]
                sequence[0] = lut(item.LUTDescriptor[1], np.frombuffer(item.LUTData, ">u2"), item.LUTDescriptor[2])
    content = written(made)
    ignored = tuple(PIPELINES[name]) if name in ("narrowest window", "exact") else ()  # they leave black and white
    assert_same(read(content), by_pydicom(content, ignored))


@pytest.mark.parametrize(
    "attributes",
    [
        {"WindowCenter": 1500, "WindowWidth": 0},
        {"WindowCenter": 1500, "WindowWidth": 0.5},
        {"WindowCenter": 1500, "WindowWidth": -900},
        {"WindowCenter": 1500, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 1500, "WindowWidth": 900, "VOILUTFunction": "CUBIC"},
        {"WindowCenter": 90000, "WindowWidth": 10},
        {"WindowCenter": 1500},
        {"VOILUTSequence": [lut(0, [7, 7, 7])]},
        {"VOILUTSequence": [lut(0, np.arange(9), LUTDescriptor=[4096, 0, 16])]},
        {"VOILUTSequence": [Dataset()]},
    ],
)
def test_damaged_or_senseless_windows_and_voi_luts_are_ignored(attributes: dict[str, Any]):
    content = dicom(shade(20, 3900), **attributes)
    assert_same(read(content), by_pydicom(content, ignored=tuple(attributes)))
    note = decode_dicom(content, "scan").info["note"]
    assert re.fullmatch("(VOI LUT|window) 1 (cannot be read|makes .*): the range of the pixels was used", note)


CT = {"WindowCenter": 40, "WindowWidth": 400}
BRIGHT, DARK = lut(0, [65535] * 40 + [0]), lut(60000, np.arange(999))
RIGHT = {"WindowCenter": 2000, "WindowWidth": 3000}


@pytest.mark.parametrize(
    ("attributes", "right", "note"),
    [
        (CT, {}, "window 1 makes 100.0 %.*: the range of the pixels was used"),
        ({"WindowCenter": 2000, "WindowWidth": 1}, {}, "window 1 makes 100.0 %"),
        ({"WindowCenter": 32768, "WindowWidth": 65536}, {}, r"window 1 leaves 1\d grey levels: the range"),
        ({"WindowCenter": 16384, "WindowWidth": 32768}, {}, r"window 1 leaves 2\d grey levels: the range"),
        ({"WindowCenter": [40, 2000], "WindowWidth": [400, 3000]}, RIGHT, "^window 1 makes [^:]*white$"),
        ({"VOILUTSequence": [BRIGHT], **RIGHT}, RIGHT, "^VOI LUT 1 makes [^:]*white$"),
        ({"VOILUTSequence": [BRIGHT, DARK], **RIGHT}, RIGHT, "VOI LUT 1 makes .* VOI LUT 2 makes [^:]*white$"),
        ({"VOILUTSequence": [BRIGHT, VOI]}, {"VOILUTSequence": [VOI]}, "^VOI LUT 1 makes [^:]*white$"),
        ({"VOILUTSequence": [BRIGHT], **CT}, {}, "VOI LUT 1 makes .*; window 1 makes .*: the range"),
        ({"WindowCenter": [40, 2000], "WindowWidth": 400}, {}, "window 1 makes .*; window 2 cannot be read: the range"),
    ],
)
@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
def test_a_scale_that_does_not_fit_gives_way_to_the_next(
    attributes: dict[str, Any], right: dict[str, Any], note: str, photometric: str
):
    pixels = shade(1200, 3900)
    pixels[:6] = 0  # collimation
    found = decode_dicom(dicom(pixels, PhotometricInterpretation=photometric, **attributes), "scan")
    expected = dicom(pixels, PhotometricInterpretation=photometric, **right)
    assert_same(np.asarray(found).astype(int), by_pydicom(expected))
    assert re.search(note, found.info["note"]), found.info["note"]


def test_a_border_of_the_least_signed_value_does_not_make_a_window_fit():
    pixels = shade(500, 3900, np.int16)
    pixels[:20] = -30  # grey in the middle of the window
    content = dicom(pixels, WindowCenter=0, WindowWidth=400)
    assert_same(read(content), by_pydicom(content, ("WindowCenter", "WindowWidth")))


def test_padding_does_not_make_a_window_fit():
    pixels = shade(1200, 3900)
    pixels[:20] = 40  # grey in the middle of the window
    content = dicom(pixels, PixelPaddingValue=40, **CT)
    assert_same(read(content), by_pydicom(content, tuple(CT), padding=(40, 40)))


def test_a_film_of_two_values_keeps_them():
    bits = np.where(SHADE > 0.5, 3000, 200).astype(np.uint16)
    assert_same(read(dicom(bits, WindowCenter=40, WindowWidth=100)), (SHADE > 0.5) * 255, 0)


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("shape", ["IDENTITY", "INVERSE"])
def test_an_inverse_presentation_lut_shape_inverts(photometric: str, shape: str):
    plain = read(dicom(shade(20, 3900), **RIGHT))
    found = read(dicom(shade(20, 3900), PhotometricInterpretation=photometric, PresentationLUTShape=shape, **RIGHT))
    inverted = photometric == "MONOCHROME1" or shape == "INVERSE"
    assert_same(found, 255 - plain if inverted else plain, 0)


@pytest.mark.parametrize(("low", "high"), [(0, 4095), (30000, 32000), (33069, 36863), (5, 200)])
@pytest.mark.parametrize("marker", [False, True])
def test_the_same_pixels_look_the_same_as_dicom_png_and_tiff(tmp_path: Path, low: int, high: int, marker: bool):
    pixels = shade(low, high)
    if marker:
        pixels[3:5, 3:5] = 65535
    content, found = dicom(pixels), []
    for suffix in (".png", ".tif"):
        Image.fromarray(pixels).save(tmp_path / f"film{suffix}")
        found.append(np.asarray(read_gray(tmp_path / f"film{suffix}")).astype(int))
    for gray in found:
        assert np.abs(gray - read(content)).max() <= 1
    assert len(np.unique(found[0])) > 150


@pytest.mark.parametrize("text", [b"12,4", b"ab\\5", b"nan ", b"inf "])
def test_numbers_that_are_none_are_ignored(text: bytes):
    content = dicom(shade(20, 3900), WindowCenter="5000", WindowWidth="1234", RescaleSlope="7531", RescaleIntercept="0")
    for number in (b"1234", b"7531"):
        assert content.count(number) == 1
        content = content.replace(number, text)
    assert_same(read(content), stretched(shade(20, 3900)))


@pytest.mark.parametrize("slope", ["0", "1e308", "-1e308"])
def test_a_rescale_that_leaves_no_picture_is_ignored_but_a_damaged_modality_lut_is_refused(slope: str):
    content = dicom(shade(20, 3900), RescaleSlope=slope, RescaleIntercept="5")
    assert_same(read(content), stretched(shade(20, 3900)))
    damaged = dicom(shade(0, 99), ModalityLUTSequence=[lut(0, np.arange(9), LUTDescriptor=[100, 0, 16])])
    assert refusal(damaged) == "ModalityLUTSequence is damaged"


def test_luts_of_12_bits_of_two_entries_in_a_word_and_of_the_wrong_type_are_applied():
    entries = np.arange(100) ** 2 // 40
    pixels = shade(0, 99, np.uint8)
    deep = dicom(pixels, ModalityLUTSequence=[lut(0, entries, 12)])
    assert_same(read(deep), stretched(entries[pixels], stored=False))
    packed = lut(0, entries, 8, LUTData=entries.astype(np.uint8).tobytes())
    assert_same(read(dicom(pixels, VOILUTSequence=[packed])), np.round(entries[pixels] * 255 / entries.max()))
    unsigned = lut(2**16 - 50, entries)  # -50 is meant
    unsigned["LUTDescriptor"].VR = "US"
    content = dicom(pixels.astype(np.int16) - 50, ModalityLUTSequence=[unsigned])
    assert_same(read(content), stretched(entries[pixels], stored=False))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("shift", [0, 1, 4])
def test_values_of_any_depth_are_found_between_bits_that_are_not_in_use(bits: int, signed: bool, shift: int):
    shift = min(shift, 16 - bits)
    low = -(2 ** (bits - 1)) if signed else 0
    values = shade(low, low + 2**bits - 1, np.int32)
    window = {"WindowCenter": low + 2 ** (bits - 1), "WindowWidth": 2**bits, "PixelRepresentation": int(signed)}
    plain = dicom((values % 2**bits).astype(np.uint16), BitsStored=bits, **window)
    noise = np.random.default_rng(0).integers(0, 2**16, values.shape)
    words = (values % 2**bits) << shift | noise & ~((2**bits - 1) << shift)
    content = dicom(words.astype(np.uint16), BitsStored=bits, HighBit=bits + shift - 1, **window)
    assert_same(read(content), by_pydicom(plain))
    if shift == 0:  # else pydicom does not find them
        assert_same(read(content), by_pydicom(content))


def picture(low: int, high: int) -> np.ndarray:
    """A film of round shapes and noise, [H, W], int32."""
    y, x = np.mgrid[:64, :64]
    waves = np.sin(x / 9) * np.cos(y / 7) + np.random.default_rng(0).normal(0, 0.02, x.shape)
    return np.interp(waves, (waves.min(), waves.max()), (low, high)).round().astype(np.int32)


@pytest.mark.parametrize("used", [13, 14, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_values_above_the_stored_bits_are_not_wrapped_and_are_noted(used: int, signed: bool):
    low = -(2 ** (used - 1)) if signed else 0
    words = (picture(low, low + 2**used - 1) % 2**16).astype(np.uint16)
    right, lying = (dicom(words, BitsStored=bits, PixelRepresentation=int(signed)) for bits in (16, 12))
    found = decode_dicom(lying, "film.dcm")
    assert_same(np.asarray(found), read(right), 0)
    assert found.info["note"] == "BitsStored 12 passed over, since the pixels use 16: the range of the pixels was used"


def test_bits_above_the_stored_ones_that_are_an_overlay_are_ignored():
    words = picture(0, 4095).astype(np.uint16)
    plain = read(dicom(words, BitsStored=12))
    words[10:50, 10:40] |= 0x1000  # an area, with few edges
    found = decode_dicom(dicom(words, BitsStored=12), "film.dcm")
    assert_same(np.asarray(found), plain, 0)
    assert "note" not in found.info


def test_overlays_that_the_file_declares_in_unused_bits_are_ignored():
    words = picture(0, 4095).astype(np.uint16)
    plain = read(dicom(words, BitsStored=12))
    y, x = np.mgrid[:64, :64]
    words |= np.where((y - 32) ** 2 + (x - 32) ** 2 > 700, 0x1000, 0).astype(np.uint16)  # a round shutter
    words[5:20, 5:40] |= 0x2000
    made = dataset(words, BitsStored=12)
    for group, position in ((0x6000, 12), (0x6002, 13)):
        made.add_new((group, 0x0100), "US", 16)
        made.add_new((group, 0x0102), "US", position)
    found = decode_dicom(written(made), "film.dcm")
    assert_same(np.asarray(found), plain, 0)
    assert "note" not in found.info
    made.add_new((0x6000, 0x0100), "OB", b"damaged")
    assert read(written(made)).shape == plain.shape


@pytest.mark.parametrize(("value", "signed"), [(65535, 0), (-32768, 1)])
def test_padding_that_needs_more_than_the_stored_bits_is_black(value: int, signed: int):
    low = -2048 if signed else 0
    words = (picture(low, low + 4095) % 2**16).astype(np.uint16)
    words[:6] = value % 2**16
    made = dataset(words, BitsStored=12, PixelRepresentation=signed, WindowCenter=low + 2048, WindowWidth=4096)
    made.add_new("PixelPaddingValue", "SS" if signed else "US", value)
    found = decode_dicom(written(made), "film.dcm")
    assert (np.asarray(found)[:6] == 0).all()
    assert np.asarray(found)[6:].std() > 40
    assert "note" not in found.info


@pytest.mark.parametrize("photometric", ["MONOCHROME2", "MONOCHROME1"])
@pytest.mark.parametrize("limit", [None, -1900])
@pytest.mark.parametrize("representation", ["SS", "US"])  # a wrong one is common
def test_padding_is_black_and_outside_of_the_range(photometric: str, limit: int | None, representation: str):
    pixels = shade(-1000, 3000, np.int16)
    pixels[:5], pixels[5:8] = -2000, -1950 if limit is not None else -900
    made = dataset(pixels, PhotometricInterpretation=photometric, RescaleSlope=3, RescaleIntercept=-10)
    for keyword, value in {"PixelPaddingValue": -2000, "PixelPaddingRangeLimit": limit}.items():
        if value is not None:
            made.add_new(keyword, representation, value % 2**16 if representation == "US" else value)
    content = written(made)
    expected = by_pydicom(content, padding=(-2000, -2000 if limit is None else limit))
    assert (expected[:5] == 0).all()
    assert_same(read(content), expected)


@pytest.mark.parametrize("first", [0, 20])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_palettes_become_luminance(dtype: type, first: int):
    maximum = np.iinfo(dtype).max
    entries = [np.linspace(*ends, 200).astype(dtype) for ends in ((0, maximum), (maximum / 4, maximum), (maximum, 0))]
    pixels = shade(0, 255, np.uint8)
    content = palette(pixels, entries, first)
    expected = apply_color_lut(pixels, dcmread(io.BytesIO(content))) @ LUMINANCE / maximum * 255
    assert_same(read(content), expected)
    wide, big = shade(0, 900), palette(pixels, entries, first, BIG)
    assert_same(read(palette(wide, entries)), read(palette(wide.clip(0, 199), entries)), 0)
    if dtype == np.uint16:
        assert_same(read(big), read(content), 0)


def test_images_without_a_whole_palette_are_refused():
    entries = [np.arange(256, dtype=np.uint16)] * 3
    content = palette(shade(0, 255, np.uint8), entries)
    made = dcmread(io.BytesIO(content))
    del made.BluePaletteColorLookupTableData
    assert refusal(written(made)).startswith("damaged or unsupported DICOM")
    made.SegmentedRedPaletteColorLookupTableData = made.RedPaletteColorLookupTableData
    del made.RedPaletteColorLookupTableData
    assert refusal(written(made)) == "no palette found; segmented ones are not supported"


@pytest.mark.parametrize("syntax", [IMPLICIT, BIG, RLE, LOSSLESS])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_colours_become_luminance(syntax: uid.UID, photometric: str):
    content = dicom(colours(), syntax, PhotometricInterpretation=photometric)
    scan = dcmread(io.BytesIO(content))
    expected = pixel_array(scan).astype(float) @ LUMINANCE if photometric == "RGB" else colours()[..., 0]
    assert_same(read(content), expected)


@pytest.mark.lowest
def test_colours_in_planes_subsampled_or_of_16_bits_become_luminance():
    planes = np.ascontiguousarray(colours().transpose(2, 0, 1)).reshape(HEIGHT, WIDTH, 3)
    assert_same(read(dicom(planes, PlanarConfiguration=1)), colours() @ LUMINANCE)
    assert_same(read(dicom(colours().astype(np.uint16) * 257 >> 4, BitsStored=12)), colours() @ LUMINANCE)
    shallow = colours().astype(np.uint16) << 4
    shallow[0, 0] = 65535
    assert refusal(dicom(shallow)).startswith("16 bits a channel of which 14 or fewer are used")
    even = shade(0, 255, np.uint8)[:, :28]
    made = dataset(np.stack([even] * 3, axis=-1), PhotometricInterpretation="YBR_FULL_422")
    middle = np.full((HEIGHT, 14), 128, np.uint8)
    made.PixelData = np.stack([even[:, ::2], even[:, 1::2], middle, middle], axis=-1).tobytes()
    assert_same(read(written(made)), even, 0)


@pytest.mark.parametrize("bits", [8, 12])
def test_stored_values_up_to_255_are_grey_levels_as_those_of_png_files(bits: int):
    pixels = shade(60, 180, np.uint8)
    made = dicom(pixels if bits == 8 else pixels.astype(np.uint16), BitsStored=bits, HighBit=bits - 1)
    assert np.array_equal(read(made), pixels)


@pytest.mark.lowest
def test_1_bit_is_black_and_white():
    bits = (LINE + COLUMN) % 3 == 0
    made = dataset(bits.astype(np.uint8), BitsAllocated=1, BitsStored=1)
    made.PixelData = np.packbits(bits, bitorder="little").tobytes() + bytes(1)
    assert_same(read(written(made)), bits * 255, 0)


@pytest.mark.lowest
def test_overlays_change_nothing():
    made = dataset(shade(0, 4095) | 0x8000, BitsStored=12, WindowCenter=2000, WindowWidth=3000)
    plain = read(written(made))
    for element, kind, value in (
        *((0x10, "US", HEIGHT), (0x11, "US", WIDTH), (0x40, "CS", "G"), (0x50, "SS", [1, 1])),
        *((0x100, "US", 1), (0x102, "US", 0), (0x3000, "OW", b"\xff" * (HEIGHT * WIDTH // 8 + 1))),
    ):
        made.add_new(0x60000000 + element, kind, value)
    assert_same(read(written(made)), plain, 0)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"NumberOfFrames": 2}, "NumberOfFrames 2 found; expected 1"),
        ({"Rows": 0}, "Rows 0 and Columns 29 found; expected 1 to 65535"),
        ({"Rows": 12}, "2204 bytes of PixelData found; expected 696 for 29 × 12 pixels of 1 × 16 bits"),
        (
            {"Rows": 19},
            "2204 bytes of PixelData found; expected 1102 for 29 × 19 pixels",
        ),  # two frames, or 16 for 8 bits
        ({"Columns": 40}, "2204 bytes of PixelData found; expected 3040 for 40 × 38 pixels of 1 × 16 bits"),
        ({"Rows": 60000, "Columns": 60000}, "suspiciously large (decompression bomb?): 60000 × 60000 pixels found"),
        ({"Rows": 9000, "Columns": 9000}, "2204 bytes of PixelData found; expected 162000000"),
        ({"BitsAllocated": 32, "BitsStored": 32}, "BitsAllocated 32 and BitsStored 32 found; expected 8 or 16"),
        ({"BitsStored": 17}, "BitsAllocated 16 and BitsStored 17 found"),
        ({"SamplesPerPixel": 4}, "SamplesPerPixel 4 of MONOCHROME2 found; expected 1 of MONOCHROME1"),
        ({"PhotometricInterpretation": "HSV"}, "SamplesPerPixel 1 of another interpretation found"),
        ({"PixelRepresentation": 2}, "PixelRepresentation 2,"),
    ],
)
def test_files_of_other_sizes_and_kinds_are_refused_with_the_reason(attributes: dict[str, Any], reason: str):
    assert refusal(dicom(shade(0, 99), **attributes)).startswith(reason)


@pytest.mark.parametrize("keyword", ["Rows", "Columns", "BitsAllocated", "PixelData"])
def test_files_that_lack_what_is_needed_are_refused(keyword: str):
    made = dataset(shade(0, 99))
    delattr(made, keyword)
    expected = "no PixelData found; expected an image" if keyword == "PixelData" else f"{keyword} is absent"
    assert refusal(written(made)) == expected


@pytest.mark.parametrize("syntax", SYNTAXES, ids=NAME)
def test_truncated_files_and_frames_are_refused(syntax: uid.UID):
    content = dicom(shade(0, 255, np.uint8), syntax)
    for share in (0.3, 0.5, 0.9):
        assert refusal(content[: int(len(content) * share)])
    if syntax.is_encapsulated:
        frame = codestream(content)
        cut = encapsulated(dataset(shade(0, 255, np.uint8)), frame[: len(frame) // 2], syntax)
        assert refusal(written(cut))


CHILD = """
import json, resource, sys
from pathlib import Path
from mlvicx_hf.data.images.dicom.decoding import UnreadableImageError, decode_dicom
for file in sys.argv[1:]:
    content = Path(file).read_bytes()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        reason = "read: " + str(decode_dicom(content, file).size)
    except UnreadableImageError as error:
        reason = error.reason
    print(json.dumps([reason, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before]), flush=True)
"""


def hostile_files() -> list[tuple[bytes, str]]:
    """Small content that declares or inflates to hundreds of megabytes, or ends the process; and what is said to it."""
    gray, buffer = shade(0, 255, np.uint8), io.BytesIO()
    Image.fromarray(gray).save(buffer, "JPEG")
    jpeg = buffer.getvalue()
    start = jpeg.index(b"\xff\xc0")
    end = start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")
    huge = jpeg[start : start + 5] + struct.pack(">HH", 13000, 13000) + jpeg[start + 9 : end]
    j2k = codestream(dicom(gray, J2K))
    lying = j2k[:8] + struct.pack(">II", 9000, 9000) + j2k[16:]
    runs = rle_frame(b"\x81\0" * 1_500_000)
    lossless = codestream(dicom(colours(), LOSSLESS))
    adobe = lossless[:2] + b"\xff\xee\0\x0eAdobe\0\x64\0\0\0\0\xf3" + lossless[2:]  # what gdcm aborts at
    frames = [
        (gray, jpeg[:start] + huge + jpeg[start:], JPEG, "no JPEG Baseline"),
        (gray, jpeg[:end] + huge + jpeg[end:], JPEG, "no JPEG Baseline"),
        (gray, jpeg[:start] + huge + jpeg[end:], JPEG, "codestream of 13000 × 13000 pixels of 1 × 8 bits found"),
        (gray, lying, J2K, "codestream of 9000 × 9000 pixels of 1 × 8 bits found; expected 29 × 38"),
        (gray, j2k[: j2k.index(b"\xff\x52")] + lying, J2K, "damaged or unsupported DICOM"),
        (gray, runs, RLE, "RLE segments of [2304] bytes or more found; expected 1 of 1102"),
        (colours(), adobe, LOSSLESS, "read: (29, 38)"),
    ]
    files = [(written(encapsulated(dataset(pixels), *frame)), reason) for pixels, *frame, reason in frames]
    giant = encapsulated(dataset(gray, Rows=9000, Columns=9000), rle_frame(b"\x81\0"), RLE)
    files.append((written(giant), "RLE segments of [128] bytes or more found; expected 1 of 81000000"))
    deflated, deflater = dicom(gray, uid.DeflatedExplicitVRLittleEndian), zlib.compressobj(wbits=-zlib.MAX_WBITS)
    bomb = b"".join(deflater.compress(bytes(2**20)) for _ in range(260)) + deflater.flush()
    files.append((deflated[: meta_end(deflated)] + bomb, "suspiciously large (decompression bomb?): inflates to more"))
    nest = struct.pack("<HHHHIHHI", 8, 0x1140, 0x5153, 0, 0xFFFFFFFF, 0xFFFE, 0xE000, 0xFFFFFFFF) * 20_000
    return [*files, (deflated[:132] + nest, "damaged or unsupported DICOM: RecursionError")]


def test_lying_sizes_bombs_and_what_ends_the_decoder_are_refused_without_large_allocation(tmp_path: Path):
    files = hostile_files()
    paths = [tmp_path / str(index) for index in range(len(files) + 1)]
    paths[0].write_bytes(dicom(shade(0, 99), WindowCenter=9, WindowWidth=9))  # loads what is loaded lazily
    for path, (content, _) in zip(paths[1:], files, strict=True):
        path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(paths)
    for (reason, kilobytes), (_, expected) in zip(found[1:], files, strict=True):
        assert reason.startswith(expected)
        assert kilobytes < 40_000, expected


@pytest.mark.parametrize("syntax", SYNTAXES, ids=NAME)
def test_mutated_files_are_read_or_refused_and_nothing_else(syntax: uid.UID):
    random = np.random.default_rng(SYNTAXES.index(syntax))
    content = dicom(shade(0, 255, np.uint8), syntax, WindowCenter="120", WindowWidth="200", PixelPaddingValue=3)
    refused = 0
    for _ in range(60):
        mutated = bytearray(content)
        for position in random.integers(meta_end(content), len(content) - 8, 2):
            mutated[position] = random.integers(256)
        try:
            assert decode_dicom(bytes(mutated), "scan").mode == "L"
        except UnreadableImageError:
            refused += 1
    assert 0 < refused < 60


@cache
def secret_files() -> dict[str, bytes]:
    made = dataset(shade(0, 255, np.uint8), WindowCenter="1234", WindowWidth="777", PatientComments=SECRET)
    made.PatientName = made.PatientID = made.OtherPatientNames = SECRET
    made.PatientBirthDate = "19610203"
    healthy = written(made)
    assert healthy.count(b"SECRET^NAME") == 4
    files = {"healthy": healthy, "cut": healthy[:-900], "no meta information": healthy[meta_end(healthy) :]}
    texts = ("PhotometricInterpretation", "VOILUTFunction", "NumberOfFrames", "WindowCenter", "SpecificCharacterSet")
    for keyword in (*texts, "RescaleSlope", "Rows", "PixelPaddingValue"):
        damaged = dcmread(io.BytesIO(healthy))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            damaged[keyword] = DataElement(keyword, "LO", SECRET)
            files[keyword] = written(damaged)
    files["interpretation"] = healthy.replace(b"MONOCHROME2 ", b"SECRET^NAME ")
    files["number"] = files["Rows"].replace(b"\x28\0\x10\0LO", b"\x28\0\x10\0DS")
    files["type"] = healthy.replace(b"DS\x04\x001234", b"PN\x04\x001234")
    files["transfer syntax"] = healthy.replace(b"1.2.840.10008.1.2.1\0", b"1.2.SECRET^NAME.1.1\0")
    files["implicit"] = healthy.replace(b"CS\x0a\0ISO_IR 100", b"\x0a\0\0\0SECRET^NAM")
    for syntax in COMPRESSED:
        files[syntax.name] = written(encapsulated(dcmread(io.BytesIO(healthy)), SECRET.encode() * 20, syntax))
    assert len(set(files.values())) == len(files)
    return files


@pytest.mark.parametrize("name", secret_files())
def test_names_of_patients_are_neither_told_nor_logged(
    name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "pydicom")
    monkeypatch.setattr("pydicom.config.debugging", True)
    content, told = secret_files()[name], ""
    caplog.clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            decode_dicom(content, "scan")
        except UnreadableImageError as error:  # whose context would be pydicom's message
            told = f"{error} {error!r} {error.args} {error.__cause__!r} {error.__context__!r}"
    output = capfd.readouterr()
    told += " ".join([*(str(warning.message) for warning in caught), caplog.text, output.out, output.err])
    assert all(part not in told for part in ("SECRET", "NAME", "19610203", "53 45 43 52"))
    assert logging.getLogger("pydicom").level == logging.DEBUG
    if name == "healthy":
        assert told.strip() == ""
        with caplog.at_level(logging.DEBUG, "pydicom"):  # pydicom itself does tell
            dcmread(io.BytesIO(content))
        assert "SECRET" in caplog.text


def test_without_pydicom_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "scan.dcm"
    path.write_bytes(dicom(shade(0, 99)))
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydicom"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("mlvicx_hf.data.images.dicom")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match=r'^a DICOM file needs pydicom: pip install "\.\[dicom\]" in the repository$'):
        read_gray(path)
    Image.new("L", (9, 9)).save(tmp_path / "image.png")
    assert read_gray(tmp_path / "image.png").size == (9, 9)


def test_without_gdcm_the_extra_is_named_and_other_files_are_read(monkeypatch: pytest.MonkeyPatch):
    for syntax in (JPEG_LS, J2K):
        monkeypatch.delitem(get_decoder(syntax)._available, "gdcm")
    expected = re.escape(f'{JPEG_LS.name} needs python-gdcm: pip install ".[dicom]" in the repository')
    with pytest.raises(MissingExtraError, match=f"^{expected}$"):
        read(dicom(shade(0, 255, np.uint8), JPEG_LS))
    assert read(dicom(shade(0, 255, np.uint8), J2K)).max() == 255


@pytest.mark.real_data
def test_real_originals_are_read_and_dicoms_as_pydicom_reads_them(real_data: Path):
    files = sorted((real_data / "originals").iterdir())
    assert len(files) >= 13
    dicoms = 0
    for path in files:
        gray = np.asarray(read_gray(path)).astype(int)
        assert min(gray.shape) > 200
        assert gray.std() > 25
        if path.suffix == ".dcm":
            dicoms += 1
            assert_same(gray, by_pydicom(path.read_bytes()))
    assert dicoms >= 3
