"""Find copies among the images of a new cache, list them, and leave them out on request."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from ..cache.summary import column
from ..collections.base import SPLITS
from .duplicates import group_copies, groups

DROPS = ("none", "identical", "near")
_WORDS = {"identical": "identical to", "near": "nearly identical to"}


class Duplicate(NamedTuple):
    """Two images that are copies. If one of them is dropped, the first is kept."""

    kind: str  # "identical" for equal files, or "near" for images that `duplicates.confirm` takes for copies
    split: str  # split of the first image
    source: str  # source of the first image
    patient_id: str  # patient of the first image
    other_split: str  # split of the second image
    other_source: str  # source of the second image
    other_patient_id: str  # patient of the second image
    distance: int  # number of bits in which their perceptual hashes differ


class _Place(NamedTuple):
    """An image. The first of several copies is kept; test images come first, as they are few."""

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
    """Find images that occur twice, within a split or in two splits.

    List each of several identical files with the first of them, and compare this one alone with other images.

    Returns:
        Pairs, identical ones first. Each begins with the image that `choose_dropped` would keep.
    """
    places = _places(parts)
    contents = [
        content
        for part in parts.values()
        for content in zip(column(part, "sha256"), column(part, "phash"), strict=True)
    ]

    def square(index: int) -> Image.Image:
        image: Image.Image = parts[places[index].split][places[index].row]["image"]
        return image

    members, pairs = group_copies(contents, square, progress=progress)
    same = [sorted(places[index] for index in group) for group in members]
    found = [Duplicate("identical", *first[2:], *other[2:], 0) for first, *others in same for other in others]
    for one, other, distance in pairs:
        kept, twin = sorted((same[one][0], same[other][0]))
        found.append(Duplicate("near", *kept[2:], *twin[2:], distance))
    return found


def choose_dropped(parts: Mapping[str, Any], duplicates: Sequence[Duplicate], drop: str) -> dict[tuple[str, int], str]:
    """Choose which images to leave out so that one of each group of copies stays. Return (split, row) → reason.

    Keep an image of the test split, or else one of validation, or else one of train; among these keep the first.
    `drop` is "none", "identical" or "near" (which includes identical images).
    """
    if drop == "none":
        return {}
    kinds = {"identical": ("identical",), "near": ("identical", "near")}[drop]
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
                dropped[places[index].split, places[index].row] = f"{_WORDS[kind]} {places[kept].source}"
    return dropped


def note_contradictions(parts: Mapping[str, Any], duplicates: Sequence[Duplicate], patients_known: bool) -> list[str]:
    """Tell the user of copies whose known labels differ, and of copies that belong to two patients."""
    labels = {
        source: values
        for part in parts.values()
        for source, values in zip(column(part, "source"), column(part, "labels"), strict=True)
    }

    def differ(pair: Duplicate) -> bool:
        both = zip(labels[pair.source], labels[pair.other_source], strict=True)
        return any(one != other for one, other in both if one in (0, 1) and other in (0, 1))

    notes = []
    if unlike := [pair for pair in duplicates if differ(pair)]:
        such = f"{unlike[0].source} and {unlike[0].other_source}"
        notes.append(f"copies with other labels: {len(unlike)}, such as {such}")
    if patients_known and (shared := [pair for pair in duplicates if pair.patient_id != pair.other_patient_id]):
        such = f"{shared[0].patient_id} and {shared[0].other_patient_id}"
        notes.append(f"copies of two patients, who may be one person: {len(shared)}, such as {such}")
    return notes


def count_across(duplicates: Sequence[Duplicate], parts: Mapping[str, Any]) -> int:
    """Count the pairs whose images are both left, in different splits."""
    left = {source for part in parts.values() for source in column(part, "source")}
    return sum(pair.split != pair.other_split and {pair.source, pair.other_source} <= left for pair in duplicates)
