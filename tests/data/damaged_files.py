"""Image files of every kind that is read, damaged in every way that was thought of; the same seed gives the same."""

import gzip
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
from dicom_files import SYNTAXES, dicom
from PIL import Image
from pydicom.uid import JPEG2000, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit

GIANT = 60_000  # pixels a side, where two bytes hold it
SIDE = 9400  # pixels; squares of 9459 are the largest that are read
WIDTH, HEIGHT = 40, 30  # of all whole images


class File(NamedTuple):
    """A file's name and content, and whether it is whole: 40 × 30 pixels that must be read."""

    name: str
    content: bytes
    whole: bool = False


def kinds() -> dict[str, bytes]:
    """A whole image of each kind by name; the name ends like a file's."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    noise = np.random.default_rng(0).integers(0, 40, (HEIGHT, WIDTH))
    gray8 = (x * 3 + y * 2 + noise).astype(np.uint8)
    gray16 = (gray8.astype(np.uint16) << 8) + noise.astype(np.uint16)
    gray, rgb = Image.fromarray(gray8), Image.fromarray(np.stack([gray8, gray8[::-1], gray8[:, ::-1]], axis=-1))
    deep, unit = Image.fromarray(gray16), Image.fromarray(gray8.astype(np.float32) / 255)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 1, "upright"
    made = {
        "gray.png": saved(gray, "PNG", exif=exif),
        "deep.png": saved(deep, "PNG"),
        "rgb.png": saved(rgb, "PNG"),
        "rgba.png": saved(rgb.convert("RGBA"), "PNG"),
        "palette.png": saved(rgb.convert("P"), "PNG", transparency=3),
        "bit.png": saved(gray.convert("1"), "PNG"),
        "gray.jpg": saved(gray, "JPEG", exif=exif),
        "progressive.jpg": saved(rgb, "JPEG", progressive=True),
        "cmyk.jpeg": saved(rgb.convert("CMYK"), "JPEG"),
        "gray.tif": saved(gray, "TIFF", exif=exif),
        "deep.tif": saved(deep, "TIFF"),
        "float.tiff": saved(unit, "TIFF"),
        "rgb.webp": saved(rgb, "WEBP", exif=exif),
        "lossless.webp": saved(rgb, "WEBP", lossless=True),
        "gray.bmp": saved(gray, "BMP"),
        "rgb.bmp": saved(rgb, "BMP"),
        "bit.bmp": saved(gray.convert("1"), "BMP"),
        "gray.jp2.png": saved(gray, "JPEG2000"),  # JPEG 2000 is known by its content alone
        "deep.jp2.png": saved(deep, "JPEG2000", no_jp2=True),
    }
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        made[f"{compression}.tif"] = saved(rgb, "TIFF", compression=compression)
    for compression in ("tiff_lzw", "tiff_adobe_deflate"):
        made[f"deep_{compression}.tif"] = saved(deep, "TIFF", compression=compression)
    made["group4.tif"] = saved(gray.convert("1"), "TIFF", compression="group4")
    for syntax in SYNTAXES:
        pixels = gray8 if syntax in (JPEGBaseline8Bit, JPEG2000) else gray16
        made[f"{syntax.name.split('(')[0].strip().replace(' ', '_').replace(',', '')}_{syntax[-2:]}.dcm"] = dicom(
            pixels, syntax, WindowCenter="128" if pixels is gray8 else "30000", WindowWidth="200"
        )
    made["rgb.dcm"] = dicom(np.asarray(rgb))
    return made


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def damaged_files(seed: int, count: int) -> Iterator[File]:
    """Files of each kind with each damage, and of no kind, then pairs at random; bombs are few, as they cost a second.

    Every tenth file is whole.
    """
    rng = np.random.default_rng(seed)
    whole = kinds()
    names = list(whole)
    others = [*strangers(rng), *bombs()]
    for number in range(count):
        name = names[int(rng.integers(len(names)))] if number >= 10 * len(names) else names[number // 10]
        if number % 10 == 0:
            yield File(f"{number:04}_whole_{name}", whole[name], whole=True)
        elif number % 10 == 1 and others:
            suffix, content = others.pop()
            yield File(f"{number:04}_{suffix}", content)
        else:
            damage = DAMAGES[int(rng.integers(len(DAMAGES)))]
            yield File(f"{number:04}_{damage.__name__}_{name}", damage(whole[name], rng, whole))


def strangers(rng: np.random.Generator) -> Iterator[tuple[str, bytes]]:
    """Files that are no images but are called so."""
    pixels = saved(Image.new("L", (WIDTH, HEIGHT)), "PNG")
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("image.png", bytes(10**7))
    contents = {
        "empty": b"",
        "text": b"patient,label\n1,0\n",
        "html": b"<!DOCTYPE html>\n<html><body><h1>404 Not Found</h1></body></html>\n",
        "script": b"#!/bin/sh\necho hello\n",
        "elf": b"\x7fELF\x02\x01\x01" + rng.bytes(3000),
        "exe": b"MZ\x90\x00" + rng.bytes(3000),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "zeros": bytes(5000),
        "ones": b"\xff" * 5000,
        "noise": rng.bytes(5000),
        "zip": archive.getvalue(),
        "gzip": gzip.compress(dicom(np.zeros((HEIGHT, WIDTH), np.uint8))),
        "gzipped": gzip.compress(pixels),
        "preamble": bytes(128) + b"DICM",
        "byte": b"\x89",
    }
    for number, (name, content) in enumerate(contents.items()):
        for suffix in (".png", ".dcm", (".jpg", ".tif", ".bmp", ".webp")[number % 4]):
            yield name + suffix, content


def bombs() -> Iterator[tuple[str, bytes]]:
    """Small files of many pixels: few enough to be read (but never to exhaust the memory), or too many."""
    for side in (SIDE, 13_000, 30_000):
        for name, depth, colour, channels in (("gray", 8, 0, 1), ("deep", 16, 0, 1), ("rgba", 8, 6, 4)):
            yield (
                f"{name}_{side}.png",
                png(side, side, depth, colour, zipped(side * (side * channels * depth // 8 + 1))),
            )
    for kind, name in ((b"zTXt", b"Comment"), (b"iCCP", b"icc")):
        between = chunk(kind, name + b"\0\0" + zipped(10**8))
        yield f"{name.decode()}.png", png(8, 8, 8, 0, zipped(72), between)
    image = Image.new("F", (SIDE, SIDE))
    image.putpixel((1, 1), 7)
    yield f"float_{SIDE}.tif", saved(image, "TIFF", compression="packbits")
    meta = dicom(np.zeros((2, 2), np.uint16), DeflatedExplicitVRLittleEndian)
    meta = meta[: 144 + int.from_bytes(meta[140:144], "little")]  # the group's length is its first element
    start = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    element = start.compress(struct.pack("<HH2sHI", 0x7FE0, 0x10, b"OW", 0, 2**29)) + start.flush(zlib.Z_FULL_FLUSH)
    for size in (2**27, 2**29):
        yield f"deflated_{size}.dcm", meta + element + zipped(size)[2:-4]


def zipped(length: int) -> bytes:
    """So many zeros in zlib's format, without compressing them all."""
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    block = packer.compress(bytes(2**20)) + packer.flush(zlib.Z_FULL_FLUSH)
    rest = packer.compress(bytes(length % 2**20)) + packer.flush()
    return b"\x78\xda" + block * (length // 2**20) + rest + struct.pack(">HH", length % 65521, 1)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, deflated: bytes, between: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + between + chunk(b"IDAT", deflated) + chunk(b"IEND", b"")


# Damages: of a file's content, with a generator, and with whole files of all kinds


def flip(content: bytes, rng: np.random.Generator, whole: dict[str, bytes], among: int | None = None) -> bytes:
    """One bit to an eighth of all bytes."""
    data = np.frombuffer(content, np.uint8).copy()
    among = min(among or len(data), len(data))
    count = min(2 ** int(rng.integers(0, 12)), among // 8)
    np.bitwise_xor.at(data, rng.integers(0, among, count), np.uint8(1) << rng.integers(0, 8, count, np.uint8))
    return data.tobytes()


def flip_header(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    """A bit or several near the beginning."""
    return flip(content, rng, whole, 64 if content[128:132] != b"DICM" else 600)


def truncate(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    return content[: int(rng.integers(1, len(content)))]


def blank(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    """A stretch of zeros, ones or noise, as a disk leaves it."""
    start = int(rng.integers(0, len(content)))
    length = min(int(rng.integers(1, 600)), len(content) - start)
    filling = (bytes(length), b"\xff" * length, rng.bytes(length))[int(rng.integers(3))]
    return content[:start] + filling + content[start + length :]


def cut_out(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    start = int(rng.integers(0, len(content)))
    return content[:start] + content[start + int(rng.integers(1, 300)) :]


def glue(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    """The beginning of another kind before this one, or instead of its own."""
    other = whole[list(whole)[int(rng.integers(len(whole)))]]
    length = int(rng.choice([4, 12, 33, 132, 400]))
    return other[:length] + content[length if rng.random() < 0.5 else 0 :]


def interleave(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    """A stretch of another file in the middle."""
    other = whole[list(whole)[int(rng.integers(len(whole)))]]
    start, length = int(rng.integers(0, len(content))), int(rng.integers(1, 500))
    return content[:start] + other[:length] + content[start:]


def declare(content: bytes, rng: np.random.Generator, whole: dict[str, bytes]) -> bytes:
    """Another width and height than it has: giant, none, or somewhat wrong."""
    width, height = (int(rng.choice([0, 1, 39, 41, 9000, GIANT, 2**16 - 1])) for _ in range(2))
    data = bytearray(content)
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))  # of a JPEG, perhaps inside another file
    with suppress(struct.error):  # what is damaged already may be too short
        if data[:4] == b"\x89PNG":
            struct.pack_into(">II", data, 16, width, height)
            struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
        elif data[:2] == b"BM":
            struct.pack_into("<ii", data, 18, width, height * int(rng.choice([1, -1])))
        elif data[:4] == b"II*\0":
            for tag, value in ((256, width), (257, height)):
                position = max(data.find(struct.pack("<HHI", tag, kind, 1)) for kind in (3, 4))  # 16 or 32 bits
                if position > 0:
                    struct.pack_into("<HII", data, position + 2, 4, 1, value)
        elif data[8:16] == b"WEBPVP8 ":
            struct.pack_into("<HH", data, 26, width & 0x3FFF, height & 0x3FFF)
        elif data[128:132] == b"DICM":
            for start, value in ((b"\x28\0\x10\0", height), (b"\x28\0\x11\0", width)):
                position = data.find(start)
                if position > 0:
                    struct.pack_into("<H", data, position + 8, value)
        elif data.find(b"\xff\x4f\xff\x51") >= 0:
            struct.pack_into(">II", data, data.find(b"\xff\x4f\xff\x51") + 8, width, height)
        elif frame > 0:
            struct.pack_into(">HH", data, frame + 5, height, width)
    return bytes(data)


DAMAGES: tuple[Callable[[bytes, np.random.Generator, dict[str, bytes]], bytes], ...] = (
    *(flip, flip, flip_header, flip_header, truncate, blank, cut_out, glue, interleave, declare, declare),
)
