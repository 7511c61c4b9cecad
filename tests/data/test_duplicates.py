import io
import tracemalloc
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import scipy.fft
from PIL import Image, ImageDraw, ImageOps

from mlvicx_hf.data.copies import duplicates
from mlvicx_hf.data.copies.duplicates import (
    NEAR,
    SAME,
    _agree,
    _detail,
    confirm,
    find_copies,
    groups,
    near_pairs,
    perceptual_hash,
)
from mlvicx_hf.data.synthetic.phantom import draw_phantom

Alteration = Callable[[Image.Image], Image.Image]


def agreement(one: Image.Image, other: Image.Image) -> float:
    return _agree(_detail(one), _detail(other))


def bits(text: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8))


def distance(one: Image.Image, other: Image.Image) -> int:
    return int((bits(perceptual_hash(one)) != bits(perceptual_hash(other))).sum())


@pytest.fixture(scope="module")
def chests() -> list[Image.Image]:
    """Two radiographs each of 40 synthetic patients."""
    return [Image.fromarray(draw_phantom(number // 2, number % 2, size=96).image) for number in range(80)]


def jpeg(quality: int) -> Alteration:
    def save(image: Image.Image) -> Image.Image:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        return Image.open(buffer).convert("L")

    return save


def scaled(side: int) -> Alteration:
    return lambda image: image.resize((side, side), Image.Resampling.BILINEAR)


def curve(function: Callable[[float], float]) -> Alteration:
    return lambda image: image.point([round(min(max(255 * function(value / 255), 0), 255)) for value in range(256)])


def marked(image: Image.Image) -> Image.Image:
    image = image.copy()
    ImageDraw.Draw(image).text((4, 4), "R", fill=255, font_size=9)
    return image


def cropped(share: float) -> Alteration:
    return lambda image: image.crop([round(image.width * part) for part in (share, share, 1 - share, 1 - share)])


COPIES = {
    "JPEG 75": jpeg(75),
    "JPEG 50": jpeg(50),
    "enlarged": scaled(256),
    "reduced": scaled(64),
    "brighter": curve(lambda value: 1.1 * value),
    "darker": curve(lambda value: 0.8 * value),
    "more contrast": curve(lambda value: 1.2 * value - 0.1),
    "gamma 0.8": curve(lambda value: value**0.8),
    "gamma 1.25": curve(lambda value: value**1.25),
    "windowed": curve(lambda value: (value - 0.05) / 0.9),
    "marked": marked,
    "cropped by 1 %": cropped(0.01),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_found(chests: list[Image.Image], name: str):
    for image in chests[::8]:
        copy = COPIES[name](image)
        assert distance(image, copy) <= NEAR
        assert agreement(image, copy) >= SAME


@pytest.mark.parametrize("alteration", [ImageOps.mirror, ImageOps.invert, cropped(0.1)], ids=["flip", "invert", "crop"])
def test_what_the_documentation_says_is_not_found_is_not(chests: list[Image.Image], alteration: Alteration):
    copy = alteration(chests[0])
    assert distance(chests[0], copy) > NEAR or agreement(chests[0], copy) < SAME


def test_strangers_and_two_films_of_one_patient_are_told_apart(chests: list[Image.Image]):
    pairs = list(near_pairs([perceptual_hash(image) for image in chests], 110))
    assert sum(one // 2 == other // 2 for one, other, _ in pairs) >= 5  # what is told apart is there
    assert sum(one // 2 != other // 2 for one, other, _ in pairs) >= 50
    assert confirm(pairs, chests.__getitem__) == []


def test_the_hash_is_that_of_the_cosine_transform(chests: list[Image.Image]):
    for image in (*chests[:5], chests[5].resize((33, 33)), chests[6].resize((200, 200))):
        small = image.resize((64, 64), Image.Resampling.LANCZOS)
        low = scipy.fft.dctn(np.asarray(small, dtype=float))[:16, :16]
        assert (bits(perceptual_hash(image)) == (low > np.median(low)).ravel()).all()


def test_the_hash_is_that_of_imagehash():
    # str(imagehash.phash(image, hash_size=16)), imagehash 4.3.2
    y, x = np.mgrid[:96, :96]
    pixels = 128 + 60 * np.sin(x / 7 + y**2 / 900) + 50 * np.cos(y / 5 - x * y / 2000)
    assert perceptual_hash(Image.fromarray(pixels.astype(np.uint8))) == GOLDEN


GOLDEN = "b800f8007800d2aa27ff9800d2aa2d55d2aa2d5dd2aa2d7fd2aa2dffd2aa2dff"


def planted_hashes(count: int, seed: int = 0) -> list[str]:
    """Random ones, and after each of them one with a few other bits."""
    generator = np.random.default_rng(seed)
    hashes = []
    for number in range(count // 2):
        row = generator.integers(0, 2, 256)
        other = row.copy()
        other[generator.permutation(256)[: number % 60]] ^= 1
        hashes += [np.packbits(row).tobytes().hex(), np.packbits(other).tobytes().hex()]
    return hashes


def naive(hashes: list[str], others: list[str], limit: int) -> list[tuple[int, int, int]]:
    return [
        (i, j, (int(one, 16) ^ int(other, 16)).bit_count())
        for i, one in enumerate(hashes)
        for j, other in enumerate(others)
        if (int(one, 16) ^ int(other, 16)).bit_count() <= limit
    ]


@pytest.mark.parametrize("limit", [0, 1, 30, 56, 110, 256])
@pytest.mark.parametrize("block", [1, 7, 30, 4096])
def test_pairs_are_those_of_the_naive_loop(monkeypatch: pytest.MonkeyPatch, limit: int, block: int):
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    hashes = planted_hashes(60)
    expected = [pair for pair in naive(hashes, hashes, limit) if pair[0] < pair[1]]
    assert sorted(near_pairs(hashes, limit)) == expected
    assert expected
    others = hashes[9:31]
    assert sorted(near_pairs(hashes, limit, others)) == naive(hashes, others, limit)


def test_no_hashes_have_no_pairs():
    assert list(near_pairs([])) == []
    assert list(near_pairs([], 56, planted_hashes(2))) == []
    assert list(near_pairs(planted_hashes(2), 56, [])) == []


@pytest.mark.parametrize("text", ["", "ab", "g" * 64, "A" * 64, "0" * 65])
def test_a_hash_of_another_form_is_an_error(text: str):
    with pytest.raises(ValueError, match=rf"hash 1: '{text}' found; expected 64 hexadecimal characters"):
        list(near_pairs(["0" * 64, text]))


def test_flat_images_are_no_copies(chests: list[Image.Image]):
    black, gray = Image.new("L", (96, 96)), Image.new("L", (96, 96), 90)
    assert agreement(black, black) == agreement(black, gray) == agreement(gray, chests[0]) == 0
    assert agreement(chests[0], chests[0]) == pytest.approx(1, abs=1e-5)


def test_pairs_are_confirmed_between_two_lists(chests: list[Image.Image]):
    copies = [jpeg(60)(image) for image in chests[3:6]]
    asked: Counter[int] = Counter()

    def square(row: int) -> Image.Image:
        asked[row] += 1
        return chests[row]

    pairs = [(row, other, 0) for row in range(3, 8) for other in range(3)]
    assert confirm(pairs, square, copies.__getitem__) == [(3, 0, 0), (4, 1, 0), (5, 2, 0)]
    assert asked == dict.fromkeys(range(3, 8), 1)  # read once, however many pairs there are


def test_films_that_look_alike_need_no_memory_for_their_pairs():
    tracemalloc.start()
    assert find_copies(["0" * 64] * 1000, lambda row: Image.new("L", (96, 96))) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # half a million pairs would be twice as much


def test_groups_join_what_pairs_join():
    assert groups([]) == []
    assert groups([(7, 9, 0), (2, 3, 5), (3, 8, 1), (5, 2, 0)]) == [[2, 3, 5, 8], [7, 9]]
