"""Audit prepared caches: report what they hold, and the patients, files and copies that their splits share.

A leak is anything that two splits of one cache share, and anything that the train split of one cache shares with the
validation or test split of another. The report also names other things that caches share, and copies inside a split;
these are no leaks. Images without contrast or texture are never copies of one another.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations, product
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
from PIL import Image

from mlvicx_hf.common.errors import UserError

from ..cache.cache import Cache
from ..collections.people import plain_patient
from ..vocabulary import COLLECTIONS
from .duplicates import BITS, NEAR, SAME, group_copies, is_flat

_COLUMNS = ("patient_id", "source", "view", "labels", "sha256", "phash")
_FACTS = ("collection", "patients_known", "patient_source", "size", "fit")
_KINDS = ("patients", "identical", "near")
WORDS = {
    "patients": "shared patient(s)",
    "identical": "identical image(s)",
    "near": "nearly identical image(s)",
    "respelled": "patient(s) whose ids differ in zeros, .0, case or blanks alone",
}
EXAMPLES = 5  # that are named of each kind


@dataclass(frozen=True)
class Part:
    """What an audit reads of one split with N images."""

    cache: str  # path of the cache
    split: str  # name of the split
    patients: Sequence[str]  # patient of each image
    sources: Sequence[str]  # source of each image
    sha256: Sequence[str]  # hash of each file
    phash: Sequence[str]  # perceptual hash of each square
    square: Callable[[int], Image.Image]  # gives the image of a row
    numbered_by: str | None  # the collection that numbers the patients; None if patients are not known
    labels: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 0)))  # 1, 0 or NaN, [N, L]
    label_names: Sequence[str] = ()  # names of the L labels
    views: Sequence[str] = ()  # view of each image
    exact: bool = False  # whether the user said that ids which differ in their spelling are others


def audit_caches(
    caches: Sequence[Cache], *, near: int = NEAR, same_ids: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Compare all splits of some caches with each other.

    Args:
        caches: caches that `load_cache(path, check=False)` opened.
        near: compare the pixels of two images if at most this number of bits of their hashes differ; see `near_pairs`.
        same_ids: two caches of one kind mean the same patient by the same name, even if the kind (`folder`, `hf`)
            leaves that to the user.
        progress: show a bar on stderr if there are many images.

    Returns:
        A JSON object: "near" and "agreement" (the two thresholds), "same_ids", "caches" (their splits with images,
        patients, labels and views), "splits" (copies inside each), "pairs" (what each two splits share, and whether it
        is a leak), "leaks" and "notes" (lines of text).

    Raises:
        UserError: no cache is given, or one twice, or the distance is out of range.
    """
    paths = [str(cache.path) for cache in caches]
    twice = [path for path, count in Counter(str(cache.path.resolve()) for cache in caches).items() if count > 1]
    if not paths or twice:
        raise UserError(f"caches {', '.join(paths) or 'none'} found; expected at least one, and each once")
    if not 0 <= near < BITS // 2:
        raise UserError(f"near={near} found; expected bits from 0 to {BITS // 2 - 1}")
    parts = [part for cache in caches for part in read_parts(cache)]
    result = compare(parts, near=near, same_ids=same_ids, progress=progress)
    return {
        "near": near,
        "agreement": SAME,
        "same_ids": same_ids,
        "caches": [
            {
                "cache": path,
                **{key: cache.manifest.get(key) for key in _FACTS},
                "splits": {part.split: describe_part(part) for part in parts if part.cache == path},
            }
            for path, cache in zip(paths, caches, strict=True)
        ],
        **result,
        "notes": _notes(caches),
    }


def read_parts(cache: Cache) -> Iterator[Part]:
    """Read the splits of a cache."""
    known = cache.manifest["patients_known"]
    for split, dataset in cache.datasets.items():
        columns = dataset.select_columns(list(_COLUMNS))[:]
        yield Part(
            cache=str(cache.path),
            split=str(split),
            patients=columns["patient_id"],
            sources=columns["source"],
            sha256=columns["sha256"],
            phash=columns["phash"],
            square=partial(_square, dataset.select_columns("image")),
            numbered_by=cache.manifest["patient_source"] if known else None,
            labels=np.array(columns["labels"], dtype=float).reshape(len(dataset), len(cache.label_names)),
            label_names=cache.label_names,
            views=columns["view"],
            exact=cache.manifest.get("policy", {}).get("patient_ids") == "exact",
        )


def _square(images: datasets.Dataset, row: int) -> Image.Image:
    image: Image.Image = images[row]["image"]
    return image


def describe_part(part: Part) -> dict[str, Any]:
    """Count images, patients (None: not known), labels and views of a split."""
    positive, unknown = (part.labels == 1).sum(axis=0).tolist(), np.isnan(part.labels).sum(axis=0).tolist()
    images = len(part.patients)
    return {
        "images": images,
        "patients": len(set(part.patients)) if part.numbered_by is not None else None,
        "labels": {
            name: {"positive": present, "known": images - missing, "unknown": missing}
            for name, present, missing in zip(part.label_names, positive, unknown, strict=True)
        },
        "views": dict(sorted(Counter(part.views).items())),
    }


def _notes(caches: Sequence[Cache]) -> list[str]:
    """List what the comparison cannot find."""
    notes = ["flipped, inverted, turned, or much cropped copies are not found"]
    fits = {str(cache.manifest["fit"]) for cache in caches}
    if len(fits) > 1:
        notes.append(
            f"squares made by {' and '.join(sorted(fits))}: nearly identical images that are not square are not found "
            "between them; prepare the caches with the same --fit"
        )
    return notes


def compare(
    parts: Sequence[Part], *, near: int = NEAR, same_ids: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Find what splits share, and which of it is a leak: "splits", "pairs" and "leaks" of `audit_caches`."""
    copies = copies_of_parts(parts, near, progress)
    flat = _flat_files(parts)
    pairs = []
    for (first, one), (second, other) in combinations(enumerate(parts), 2):
        shared = {
            "patients": _shared_patients(one, other, same_ids),
            "identical": _shared_files(one, other, flat),
            "near": _summarize(copies[first, second], one, other),
        }
        pair = {name: {"cache": part.cache, "split": part.split} for name, part in (("one", one), ("other", other))}
        respelled = _respelled(one, other)
        if respelled and shared["patients"]["count"] is not None:
            shared["respelled"] = {"count": len(respelled), "examples": respelled[:EXAMPLES]}
        found = [kind for kind in WORDS if shared.get(kind, {}).get("count")]
        may_leak = one.cache == other.cache or (one.split == "train") != (other.split == "train")
        pairs.append(pair | shared | {"leaks": found if may_leak else []})
    return {
        "splits": [_within(part, copies[number, number], flat) for number, part in enumerate(parts)],
        "pairs": pairs,
        "leaks": [_leak(pair, kind) for pair in pairs for kind in pair["leaks"]],
    }


def _shared_patients(one: Part, other: Part, same_ids: bool) -> dict[str, Any]:
    """Count the patients that two splits share. Return None with the reason if they cannot be compared."""
    unknown = [part for part in (one, other) if part.numbered_by is None]
    reason = None
    if unknown:
        reason = f"the patients of {unknown[0].cache} are not known"
    elif one.cache != other.cache and one.numbered_by != other.numbered_by:
        reason = f"patients are numbered by {one.numbered_by} here, by {other.numbered_by} there"
    elif one.cache != other.cache and one.numbered_by not in COLLECTIONS and not same_ids:
        reason = f"two collections of kind {one.numbered_by} number their patients as they like"
    shared = sorted(set(one.patients) & set(other.patients))
    if reason is not None:
        alike = len(shared) if not unknown and one.numbered_by == other.numbered_by else 0
        return {"count": None, "reason": reason, "alike": alike, "examples": shared[:EXAMPLES]}
    return {"count": len(shared), "examples": shared[:EXAMPLES]}


def _respelled(one: Part, other: Part) -> list[list[str]]:
    """List the patients of two splits whose ids differ in their spelling alone, unless the user said what they mean."""
    if one.exact or other.exact:
        return []
    here, there = ({plain_patient(patient): patient for patient in sorted(set(part.patients))} for part in (one, other))
    exact = {plain_patient(patient) for patient in set(one.patients) & set(other.patients)}
    return [[here[key], there[key]] for key in here if key in there and key not in exact]


def _flat_files(parts: Sequence[Part]) -> set[str]:
    """Find the files without contrast or texture among those that occur more than once. They are never copies."""
    times = Counter(content for part in parts for content in part.sha256)
    first = {content: (part, row) for part in parts for row, content in enumerate(part.sha256) if times[content] > 1}
    return {content for content, (part, row) in first.items() if is_flat(part.square(row))}


def _shared_files(one: Part, other: Part, flat: set[str]) -> dict[str, Any]:
    """Count the images of two splits that have an identical file in the other split, without flat ones."""
    rows = [_rows_by(part.sha256) for part in (one, other)]
    shared = [content for content in rows[0] if content in rows[1] and content not in flat]
    images = [sum(len(found[content]) for content in shared) for found in rows]
    named = [[one.sources[rows[0][content][0]], other.sources[rows[1][content][0]]] for content in shared[:EXAMPLES]]
    return {"count": max(images), "images": images, "examples": named}


def _rows_by(values: Sequence[str]) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, value in enumerate(values):
        rows[value].append(row)
    return dict(rows)


Copies = dict[tuple[int, int], list[tuple[int, int, int]]]  # by two numbers of parts: two rows and their distance


def copies_of_parts(parts: Sequence[Part], near: int = NEAR, progress: bool = False) -> Copies:
    """Find nearly identical images whose files differ, between every two splits and inside each.

    Returns:
        (number of one split, number of the other), the smaller first → two rows and their distance.
    """
    places = [(number, row) for number, part in enumerate(parts) for row in range(len(part.sha256))]
    contents = [content for part in parts for content in zip(part.sha256, part.phash, strict=True)]

    def square(index: int) -> Image.Image:
        number, row = places[index]
        return parts[number].square(row)

    members, pairs = group_copies(contents, square, max_distance=near, progress=progress)
    copies: Copies = defaultdict(list)
    for one, other, distance in pairs:
        for pair in product(members[one], members[other]):
            (first, row), (second, other_row) = (places[index] for index in sorted(pair))
            copies[first, second].append((row, other_row, distance))
    return copies


def _summarize(pairs: Sequence[tuple[int, int, int]], one: Part, other: Part) -> dict[str, Any]:
    """Count the images of two splits that have a copy in the other split, and name the nearest."""
    images = [len({pair[side] for pair in pairs}) for side in (0, 1)]
    nearest = sorted(pairs, key=lambda pair: (pair[2], pair[:2]))[:EXAMPLES]
    named = [[one.sources[row], other.sources[other_row], distance] for row, other_row, distance in nearest]
    return {"count": max(images), "images": images, "examples": named}


def _within(part: Part, copies: Sequence[tuple[int, int, int]], flat: set[str]) -> dict[str, Any]:
    """Count the images of a split that have a copy in the same split."""
    groups = [rows for content, rows in _rows_by(part.sha256).items() if len(rows) > 1 and content not in flat]
    named = [[part.sources[rows[0]], part.sources[rows[1]]] for rows in groups[:EXAMPLES]]
    near = _summarize(copies, part, part)
    return {
        "cache": part.cache,
        "split": part.split,
        "identical": {"count": sum(map(len, groups)), "examples": named},
        "near": {"count": len({row for pair in copies for row in pair[:2]}), "examples": near["examples"]},
    }


def _leak(pair: dict[str, Any], kind: str) -> str:
    """Describe one kind of leak in a line."""
    found = pair[kind]
    where = " and ".join(_place(pair[side]) for side in ("one", "other"))
    first = found["examples"][:1]
    such = f", such as {_example(first[0])}" if first else ""
    return f"{found['count']} {WORDS[kind]} in {where}{such}"


def _example(example: str | list[Any]) -> str:
    if isinstance(example, str):
        return f"patient {example}"
    distance = f" ({example[2]} bits)" if len(example) == 3 else ""
    return f"{example[0]} = {example[1]}{distance}"


def report(result: dict[str, Any]) -> str:
    """Write the result of `audit_caches` as text: tables, a line `LEAK: …` for each leak, and their number."""
    lines: list[str] = []
    for cache in result["caches"]:
        lines += [*_cache_lines(cache), ""]
    thresholds = f"{result['near']} bits, agreement {result['agreement']}"
    lines.append(f"copies inside a split (no leak); nearly identical: {thresholds}")
    inside = [(_place(part), _number(part["identical"]), _number(part["near"])) for part in result["splits"]]
    lines += [*_table([("split", "identical", "near"), *inside]), ""]
    if result["pairs"]:
        header = ("split", "and split", *_KINDS, "")
        rows = [
            (
                *(_place(pair[side]) for side in ("one", "other")),
                *(_number(pair[kind]) for kind in _KINDS),
                "LEAK" if pair["leaks"] else "",
            )
            for pair in result["pairs"]
        ]
        lines += ["shared by two splits (images of the one with more of them)", *_table([header, *rows])]
        reasons = {pair["patients"]["reason"] for pair in result["pairs"] if pair["patients"]["count"] is None}
        lines += [*(f"- patients not comparable: {reason}" for reason in sorted(reasons)), ""]
    lines += _alike(result["pairs"])
    lines += [f"note: {note}" for note in result["notes"]]
    lines += [f"LEAK: {leak}" for leak in result["leaks"]]
    return "\n".join([*lines, f"{len(result['leaks'])} leak(s)" if result["leaks"] else "no leak found"])


def _alike(pairs: Sequence[dict[str, Any]]) -> list[str]:
    """List patients of equal names who may or may not be the same, where that would be a leak."""
    return [
        f"UNSURE: {pair['patients']['alike']} patients have the same name in {_place(pair['one'])} and "
        f"{_place(pair['other'])}, such as {pair['patients']['examples'][0]}; are they the same (--same_ids)?"
        for pair in pairs
        if pair["patients"].get("alike") and (pair["one"]["split"] == "train") != (pair["other"]["split"] == "train")
    ]


def _cache_lines(cache: dict[str, Any]) -> list[str]:
    """List images, views and prevalences of a cache, one column per split."""
    splits = cache["splits"]
    views = sorted({view for split in splits.values() for view in split["views"]})
    labels = list(dict.fromkeys(name for split in splits.values() for name in split["labels"]))
    rows = [("", *splits), ("images", *(str(split["images"]) for split in splits.values()))]
    rows.append(("patients", *("unknown" if s["patients"] is None else str(s["patients"]) for s in splits.values())))
    rows += [(f"view {view}", *(str(split["views"].get(view, 0)) for split in splits.values())) for view in views]
    rows += [(name, *(_prevalence(split["labels"][name]) for split in splits.values())) for name in labels]
    return [f"{cache['cache']}: {cache['collection']}, {cache['size']} px, {cache['fit']}", *_table(rows)]


def _prevalence(counts: dict[str, int]) -> str:
    share = f"{counts['positive'] / counts['known']:.1%}" if counts["known"] else "-"
    unknown = f", {counts['unknown']} unknown" if counts["unknown"] else ""
    return f"{counts['positive']} of {counts['known']} ({share}){unknown}"


def _place(part: dict[str, Any]) -> str:
    return f"{part['cache']} {part['split']}"


def _number(found: dict[str, Any]) -> str:
    return "-" if found["count"] is None else str(found["count"])


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the columns of rows."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
