"""Read splits and classes from the folders in which images lie, such as `train/PNEUMONIA/a.png`."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import SPLIT_NAMES
from .cells import one_spelling

FOLDER_MEANINGS = ("read", "classes", "ignore")  # what the folders mean
MOST_CLASSES = 50
NOT_RADIOGRAPHS = {f"{name}{plural}" for name in ("mask", "segmentation", "annotation") for plural in ("", "s")}


@dataclass(frozen=True)
class Layout:
    """What the folders say of each of N images: [N] splits and classes, None where they say nothing."""

    splits: list[str] | None = None
    classes: list[str] | None = None
    others: tuple[str, ...] = ()  # folders that are not taken for classes, though they may be


def split_of(folder: str) -> str | None:
    """Find the split that a folder is named for, such as `val`, `Testing` or `test_images`."""
    return SPLIT_NAMES.get(re.sub(r"^images?[_-]|[_-]images?$", "", folder.lower()))


def refuse_masks(root: Path, names: Sequence[str]) -> None:
    """Refuse masks beside radiographs, in folders or files named so: without a table they would be read as radiographs.

    Raises:
        UserError: naming such a folder or file, and an image.
    """
    inside = [next(filter(_is_mask, PurePosixPath(name).with_suffix("").parts), None) for name in names]
    if any(inside) and not all(inside):
        raise UserError(
            f"{root}: {next(filter(None, inside))} found beside images such as {names[inside.index(None)]}; "
            "expected radiographs alone: a metadata.csv with a column mask_file_name names the masks, and --folders "
            "ignore takes all for radiographs"
        )


def _is_mask(name: str) -> bool:
    """Whether the name of a folder or file, such as `infection masks` or `leftMask`, has a word for masks."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return any(word.lower() in NOT_RADIOGRAPHS for word in words)


def read_layout(root: Path, names: Sequence[str], folders: str | None = None) -> Layout:
    """Find a division into splits, and classes inside or around it.

    Each image must lie in one folder that is named like a split, and all splits beside each other. Folders right below
    the splits, or right above them, are classes if most of them occur in two splits or more: patients would not.

    Args:
        root: folder of the collection, for messages.
        names: images relative to the root.
        folders: "read" and None read splits and classes; "classes" takes folders for classes without splits as well;
            "ignore" reads nothing.

    Raises:
        UserError: some images lie in a split and others do not; there are too many classes; or one split has classes of
            which no other split has any.
    """
    if folders == "ignore":
        return Layout()
    parts = [PurePosixPath(name).parts[:-1] for name in names]
    levels = [[level for level, part in enumerate(found) if split_of(part)] for found in parts]
    named = {found[level[0]] for found, level in zip(parts, levels, strict=True) if level}
    splits = {split for name in named if (split := split_of(name))}
    if len(splits) < 2:  # a lone folder `train` divides nothing
        if folders == "classes":
            return _without_splits(root, names, parts)
        if splits - {"train"}:
            return _only(root, names, levels, sorted(named))
        return Layout(others=_folders([found[-1:] for found in parts]))
    usual = Counter(level[0] for level in levels if len(level) == 1).most_common(1)
    odd = [name for name, level in zip(names, levels, strict=True) if not usual or level != [usual[0][0]]]
    if odd:
        listed = some(odd, 3)
        raise UserError(
            f"{root}: folders {some(sorted(named))} found beside images that lie in none of them, or in two, such as "
            f"{listed}; expected every image in one of train, validation (val) and test, or --folders ignore"
        )
    level = usual[0][0]
    division = [split_of(found[level]) or "" for found in parts]
    for place in (level + 1, level - 1):
        inside = [found[place] if 0 <= place < len(found) else "" for found in parts]
        spelling = one_spelling(inside)
        classes = [spelling[folder] for folder in inside]
        if all(classes) and _are_classes(root, division, classes):
            return Layout(division, classes)
    return Layout(division, others=_folders([found[level + 1 :][-1:] for found in parts]))


def _are_classes(root: Path, splits: Sequence[str], folders: Sequence[str]) -> bool:
    """Whether most folders occur in two splits or more, and there are at least two.

    Raises:
        UserError: they do, but one split shares none of its folders with another.
    """
    seen: dict[str, set[str]] = defaultdict(set)
    for split, folder in zip(splits, folders, strict=True):
        seen[folder].add(split)
    shared = {folder: found for folder, found in seen.items() if len(found) > 1}
    if not (2 <= len(seen) <= MOST_CLASSES and 2 * len(shared) > len(seen)):
        return False
    if alone := sorted(set(splits) - set().union(*shared.values())):
        own = some(sorted(folder for folder, found in seen.items() if alone[0] in found))
        raise UserError(
            f"{root}: folders {own} found in {alone[0]}, and classes {some(sorted(shared))} in the other splits; "
            "expected the same classes in all of them, or --folders ignore"
        )
    return True


def _folders(parts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The folders of images if there are from 2 to as many as there can be classes."""
    found = sorted({folder for part in parts for folder in part})
    return tuple(found) if 2 <= len(found) <= MOST_CLASSES else ()


def _only(root: Path, names: Sequence[str], levels: Sequence[list[int]], named: list[str]) -> Layout:
    """Read a lone folder of images for validation or test; refuse it beside images without a split."""
    if not all(levels):
        other = names[[bool(level) for level in levels].index(False)]
        raise UserError(
            f"{root}: folder {some(named)} found beside images that lie in no split, such as {other}; expected train "
            "as well, or --folders ignore"
        )
    return Layout([split_of(named[0]) or ""] * len(names))


def _without_splits(root: Path, names: Sequence[str], parts: Sequence[tuple[str, ...]]) -> Layout:
    """Read classes from the last folder of each image.

    Raises:
        UserError: too few or too many of them, an image in none, or folders above that tell classes as well as the last
            ones do, which may be patients.
    """
    classes = [found[-1] if found else "" for found in parts]
    above = sorted({found[-2] for found in parts if len(found) > 1})
    lying = defaultdict(set)
    for found in parts:
        lying[found[-1:]].add(found[:-1])
    if len(above) > 1 and any(len(places) < 2 for places in lying.values()):
        raise UserError(
            f"{root}: folders {some(above)} found above folders {some(sorted(set(classes)))} for --folders classes; "
            "expected one level of classes, or the same classes in every folder above: a metadata.csv can tell both"
        )
    if not all(classes) or not 2 <= len(set(classes)) <= MOST_CLASSES:
        raise UserError(
            f"{root}: {len(set(classes))} folders of images found for --folders classes; expected from 2 to "
            f"{MOST_CLASSES}, and every image in one of them"
        )
    return Layout(None, classes)


def describe_layout(layout: Layout) -> list[str]:
    """Tell the user what the folders were taken for."""
    notes = []
    if layout.splits is not None:
        notes.append(f"folders are splits: {_counted(layout.splits)} (--folders ignore)")
    if layout.classes is not None:
        notes.append(f"folders are classes: {_counted(layout.classes)} (--folders ignore)")
    if layout.others:
        advice = "the same classes in every split, or a metadata.csv" if layout.splits else "--folders classes"
        notes.append(f"folders {some(layout.others)} are not taken for classes ({advice} would give labels)")
    return notes


def _counted(values: Sequence[str]) -> str:
    return some((f"{value} {count}" for value, count in Counter(values).items()), MOST_CLASSES)
