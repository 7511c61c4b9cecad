"""Find copies of a radiograph: a perceptual hash proposes pairs, the fine detail of their pixels confirms them.

This finds copies that were saved again, scaled, windowed or marked. It does not find copies that were flipped,
inverted, turned by 3 degrees, or cropped or framed by 2 % on every side, nor copies whose squares were made in another
way (one padded, one squashed). Chest radiographs look alike: hashes alone would take different patients for copies.
An image without contrast or texture is no copy of anything: such images look alike, whatever film they are of.

Functions import SciPy where they need it: the workers that hash images do not, and it takes a second.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.progress import progress_bar

HASH_SIDE = 16  # coefficients per side
BITS = HASH_SIDE**2  # 256
HEXADECIMAL = re.compile(f"[0-9a-f]{{{BITS // 4}}}")
THUMBNAIL = 64  # side in pixels of the thumbnails that are hashed and compared
# Measured on 7,907 distinct chest radiographs of 5 collections (31 million pairs) and 46 alterations of 1,300 of them.
# Different patients: 10 pairs in a million are within NEAR; their details agree by 0.61 at most. Two films of one
# patient: 0.71 at most. Copies saved again, scaled, windowed or marked: median 0.93 or more, 99 % above 0.83 (0.77 at
# 32 px).
NEAR = 56  # compare the pixels of two images if at most this number of the 256 bits differ
SAME = 0.75  # two images are copies if their details agree at least so much
SHIFT = 2  # a copy may be displaced by this number of pixels of the thumbnail
# An image is flat if its 5th and 95th percentile are closer than CONTRAST, or if fewer than TEXTURE of its pixels
# differ by a grey level from the mean of their neighbours. 1,800 chest radiographs have at least 52, and 37 % of the
# pixels. A white film, padded or collimated, has 16 % at most.
CONTRAST = 10  # grey levels of 255
TEXTURE = 0.2
_BLOCK = 2048  # hashes to compare at a time: a table of 16 MB
HELD = 16_384  # thumbnails to keep for the next pairs: 128 MB
MANY = 20_000  # show a progress bar for this number of hashes or more

Pair = tuple[int, int, int]
_COSINES = np.cos(np.pi / THUMBNAIL * np.outer(np.arange(HASH_SIDE), np.arange(THUMBNAIL) + 0.5))  # DCT-II, [16, 64]


def perceptual_hash(gray: Image.Image) -> str:
    """Compute which of the 256 lowest cosine coefficients of a cached square are above their median.

    `imagehash.phash(gray, hash_size=16)` gives the same bits; computing 256 coefficients alone takes two thirds of its
    time. Return 64 hexadecimal characters, row by row.
    """
    low = _COSINES @ _thumbnail(gray).astype(np.float64) @ _COSINES.T  # [16, 16]
    return np.packbits(low > np.median(low)).tobytes().hex()


def _thumbnail(gray: Image.Image) -> npt.NDArray[np.uint8]:
    return np.asarray(gray.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))


def near_pairs(
    hashes: Sequence[str], max_distance: int = NEAR, others: Sequence[str] | None = None, *, progress: bool = False
) -> Iterator[Pair]:
    """Find all pairs of hashes that differ in few bits. This is exact, in bounded memory and quadratic time.

    Args:
        hashes: N results of `perceptual_hash`.
        max_distance: number of bits, of 256, that may differ.
        others: M further hashes. If given, each pair takes one of each list, otherwise two of `hashes`.
        progress: show a bar on stderr if there are many hashes.

    Yields:
        (index in `hashes`, index in `others`, distance), block by block: of films that look alike there are too many to
        keep. Without `others` the first index is the smaller one.

    Raises:
        UserError: a hash has another form.
    """
    rows = _signs(hashes)
    columns = rows if others is None else _signs(others)
    show = progress and max(len(rows), len(columns)) >= MANY
    with progress_bar(len(rows), "comparing", "img", show=show) as bar:
        for top in range(0, len(rows), _BLOCK):
            block = rows[top : top + _BLOCK].astype(np.float32)
            for left in range(top if others is None else 0, len(columns), _BLOCK):
                other = columns[left : left + _BLOCK].astype(np.float32)
                agreement = block @ other.T  # [B, B]: whole numbers, so float32 is exact
                near = np.argwhere(agreement >= BITS - 2 * max_distance)
                if others is None and left == top:
                    near = near[near[:, 0] < near[:, 1]]
                for start in range(0, len(near), _BLOCK):
                    piece = near[start : start + _BLOCK]
                    distances = (BITS - agreement[piece[:, 0], piece[:, 1]]).astype(int) // 2
                    first, second = (piece + np.array([top, left])).T.tolist()
                    yield from zip(first, second, distances.tolist(), strict=True)
            bar.update(len(block))


def _signs(hashes: Sequence[str]) -> npt.NDArray[np.int8]:
    """Turn bits into -1 and 1, [N, 256]. The product of two rows is 256 minus twice their distance."""
    for number, text in enumerate(hashes):
        if not HEXADECIMAL.fullmatch(text):
            raise UserError(f"hash {number}: {text!r} found; expected {BITS // 4} hexadecimal characters")
    data = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(-1, BITS // 8)
    return np.unpackbits(data, axis=1).astype(np.int8) * np.int8(2) - np.int8(1)


def confirm(
    pairs: Iterable[Pair],
    square: Callable[[int], Image.Image],
    other: Callable[[int], Image.Image] | None = None,
) -> list[Pair]:
    """Keep the pairs whose details agree at least so much that they are copies. Flat images are never copies.

    `square` and `other` give the images of the first and the second index; without `other`, `square` gives both.
    """
    first = lru_cache(HELD)(lambda index: _detail_of_film(square(index)))
    second = lru_cache(HELD)(lambda index: _detail_of_film(other(index))) if other is not None else first
    found = []
    for one, two, distance in pairs:
        details = first(one), second(two)
        if details[0] is not None and details[1] is not None and _agree(details[0], details[1]) >= SAME:
            found.append((one, two, distance))
    return found


def find_copies(
    hashes: Sequence[str],
    square: Callable[[int], Image.Image],
    others: Sequence[str] | None = None,
    other: Callable[[int], Image.Image] | None = None,
    *,
    max_distance: int = NEAR,
    skip: Callable[[int, int], bool] = lambda one, other: False,
    progress: bool = False,
) -> list[Pair]:
    """Search for pairs of images that are copies: `near_pairs` proposes them, `confirm` compares their pixels.

    `skip` tells which pairs of indices to leave out. The result is in ascending order. For all else see `near_pairs`
    and `confirm`.
    """
    pairs = near_pairs(hashes, max_distance, others, progress=progress)
    return sorted(confirm((pair for pair in pairs if not skip(*pair[:2])), square, other))


def group_copies(
    contents: Sequence[tuple[str, str]],
    square: Callable[[int], Image.Image],
    *,
    max_distance: int = NEAR,
    progress: bool = False,
) -> tuple[list[list[int]], list[Pair]]:
    """Group images of the same file, and search for copies among the groups. Many copies of a file cost as one.

    Args:
        contents: hash of the file and perceptual hash of each of N images.
        square: gives the image of an index in `contents`.
        max_distance: see `near_pairs`.
        progress: see `near_pairs`.

    Returns:
        The indices of each group, and pairs of groups of other files: (number, number, distance). A flat image is a
        group of its own, even where another file has the same content.
    """
    groups_of: dict[tuple[str, str], list[int]] = defaultdict(list)
    for index, content in enumerate(contents):
        groups_of[content].append(index)
    found, members = list(groups_of), list(groups_of.values())
    pairs = find_copies(
        [phash for _, phash in found],
        lambda number: square(members[number][0]),
        max_distance=max_distance,
        skip=lambda one, other: found[one][0] == found[other][0],
        progress=progress,
    )
    for number, group in enumerate(members[:]):
        if len(group) > 1 and is_flat(square(group[0])):
            members[number] = group[:1]
            members += [[index] for index in group[1:]]
    return members, pairs


FLAT = "no contrast or texture"


def is_flat(gray: Image.Image) -> bool:
    """Check whether a square is without contrast or texture, such as a film that a wrong window turned white.

    Padding, a collimated border and a marker do not count as texture.
    """
    # A thumbnail of means: other filters would swing beside an edge and look like texture.
    pixels = np.asarray(gray.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)).astype(np.float32)
    low, high = np.percentile(pixels, (5, 95))
    if high - low < CONTRAST:
        return True
    neighbours = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return bool((np.abs(pixels[1:-1, 1:-1] - neighbours / 4) >= 1).mean() < TEXTURE)


def _detail_of_film(gray: Image.Image) -> npt.NDArray[np.float16] | None:
    return None if is_flat(gray) else _detail(gray)


def _detail(gray: Image.Image) -> npt.NDArray[np.float16]:
    """What a blur removes, divided by its local deviation; zero of a flat image.

    Edges of ribs and vessels count. The bright heart between dark lungs, which all chests share, does not, and neither
    does the exposure.
    """
    from scipy.ndimage import gaussian_filter

    pixels = _thumbnail(gray).astype(np.float32)
    detail = pixels - gaussian_filter(pixels, 2)
    local = np.sqrt(gaussian_filter(detail**2, 2)) + 3  # 3 of 255: noise stays small
    return (detail / local).astype(np.float16)


def _agree(one: npt.NDArray[np.float16], other: npt.NDArray[np.float16]) -> float:
    """Correlate two details, at the displacement with the highest correlation: from -1 to 1."""
    side = THUMBNAIL - 2 * SHIFT
    middle = _normalize(one.astype(np.float32)[SHIFT:-SHIFT, SHIFT:-SHIFT].reshape(1, -1))
    windows = np.lib.stride_tricks.sliding_window_view(other.astype(np.float32), (side, side))
    shifted = _normalize(windows.reshape(-1, side * side))  # [25, 3600]
    return float((shifted @ middle.T).max())


def _normalize(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def groups(pairs: Iterable[Pair]) -> list[list[int]]:
    """Group indices that pairs join, directly or through others. Sort each group, and the groups by their first."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = np.array([pair[:2] for pair in pairs], dtype=int).reshape(-1, 2)
    size = int(edges.max(initial=-1)) + 1
    table = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(size, size))
    group_of = connected_components(table, directed=False)[1]
    members: dict[int, list[int]] = defaultdict(list)
    for index in np.unique(edges).tolist():
        members[group_of[index]].append(index)
    return list(members.values())
