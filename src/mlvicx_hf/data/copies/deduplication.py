# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Copies of one image among the images of a cache: found when it is made, listed, and left out on request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..cache.summary import column
from ..collections.base import SPLITS
from .duplicates import confirm, groups, near_pairs

DROPS = ("none", "identical", "near")
KINDS = {"identical": "identical to", "near": "nearly identical to"}


class Duplicate(NamedTuple):
    """Two images that are one.

    Attributes:
        kind: "identical" files, or "near" for images that `duplicates.confirm` takes for one.
        split: of the one that is kept where one of them is dropped.
        source: likewise.
        patient_id: likewise.
        other_split: of the other one.
        other_source: likewise.
        other_patient_id: likewise.
        distance: differing bits of their perceptual hashes.
    """

    kind: str
    split: str
    source: str
    patient_id: str
    other_split: str
    other_source: str
    other_patient_id: str
    distance: int


class _Place(NamedTuple):
    """An image; the one that comes first is kept: tests are worth most, as there are fewest of them."""

    rank: int
    row: int
    split: str
    source: str
    patient_id: str


def _places(parts: Mapping[str, Any]) -> list[_Place]:
    found = []
    for split, part in parts.items():
        rank = len(SPLITS) - SPLITS.index(split)
        rows = zip(column(part, "source"), column(part, "patient_id"), strict=True)
        found += [_Place(rank, row, split, source, patient) for row, (source, patient) in enumerate(rows)]
    return found


def find_duplicates(parts: Mapping[str, Any], *, progress: bool = False) -> list[Duplicate]:
    """Images that are there twice, within a split or in two.

    Of several identical files each is listed with the first of them, and only that one is compared with images of
    other content.

    Args:
        parts: data set by split.
        progress: show a bar on stderr where there are many images.

    Returns:
        Identical ones first; each pair begins with the one that `choose_dropped` would keep.
    """
    places = _places(parts)
    by_content: dict[str, list[_Place]] = defaultdict(list)
    hash_of: dict[str, str] = {}
    contents = ((sha, phash) for part in parts.values() for sha, phash in _hashes(part))
    for place, (sha, phash) in zip(places, contents, strict=True):
        by_content[sha].append(place)
        hash_of.setdefault(sha, phash)
    same = [sorted(group) for group in by_content.values()]
    found = [_duplicate("identical", group[0], other, 0) for group in same for other in group[1:]]
    first = [group[0] for group in same]

    def square(index: int) -> Image.Image:
        image: Image.Image = parts[first[index].split][first[index].row]["image"]
        return image

    pairs = confirm(near_pairs(list(hash_of.values()), progress=progress), square)
    for one, other, distance in pairs:
        kept, twin = sorted((first[one], first[other]))
        found.append(_duplicate("near", kept, twin, distance))
    return found


def _hashes(part: Any) -> Sequence[tuple[str, str]]:
    return list(zip(column(part, "sha256"), column(part, "phash"), strict=True))


def _duplicate(kind: str, one: _Place, other: _Place, distance: int) -> Duplicate:
    return Duplicate(kind, *one[2:], *other[2:], distance)


def choose_dropped(parts: Mapping[str, Any], duplicates: Sequence[Duplicate], drop: str) -> dict[tuple[str, int], str]:
    """Which images are left out so that one of each group of copies stays.

    That of the test split stays before one of validation, that before one of train, and else the first.

    Args:
        parts: data set by split.
        duplicates: of `find_duplicates`.
        drop: "none", "identical" or "near" (which includes identical ones).

    Returns:
        Reason by split and row.
    """
    kinds = {"none": (), "identical": ("identical",), "near": ("identical", "near")}[drop]
    places = _places(parts)
    number = {(place.split, place.source): index for index, place in enumerate(places)}
    pairs, kind_of = [], {}
    for pair in duplicates:
        if pair.kind in kinds:
            one, other = number[pair.split, pair.source], number[pair.other_split, pair.other_source]
            pairs.append((one, other, 0))
            kind_of[one, other] = kind_of[other, one] = pair.kind
    dropped = {}
    for group in groups(pairs):
        kept = min(group, key=lambda index: places[index])
        for index in group:
            if index != kept:
                kind = kind_of.get((kept, index), "near")
                dropped[places[index].split, places[index].row] = f"{KINDS[kind]} {places[kept].source}"
    return dropped


def count_across(duplicates: Sequence[Duplicate], parts: Mapping[str, Any]) -> int:
    """Pairs whose images are both left, in different splits."""
    left = {source for part in parts.values() for source in column(part, "source")}
    return sum(pair.split != pair.other_split and {pair.source, pair.other_source} <= left for pair in duplicates)
