"""Read findings that several readers drew, as VinBigData and VinDr-CXR release them."""

import math
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import DICOM_SUFFIXES
from ..options import check_choice
from .base import Box, Record
from .tables import FILLED, PLAIN_NAME, CellType

NO_FINDING_CLASS = "No finding"
NUM_READERS = 3
READERS = {"any": 1, "majority": 2}  # policy → how many of the three readers must see a finding
SUFFIXES = (*DICOM_SUFFIXES, ".jpeg", ".jpg", ".png")
SIZES = "train_meta.csv"


def _coordinate(text: str) -> float | None:
    if not text:
        return None
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


READER_COLUMNS = {"image_id": PLAIN_NAME, "rad_id": FILLED}
_COORDINATE = CellType(_coordinate, "pixels, or nothing without a box")
BOX_COLUMNS = dict.fromkeys(("x_min", "y_min", "x_max", "y_max"), _COORDINATE)


@dataclass
class Reading:
    """The readers of one image, the readers who saw each finding, and the boxes of all."""

    readers: set[str] = field(default_factory=set)
    votes: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    boxes: list[Box] = field(default_factory=list)

    def seen(self, needed: int) -> set[str]:
        """Find the findings that at least this number of readers saw."""
        return {finding for finding, readers in self.votes.items() if len(readers) >= needed}

    def add_box(self, where: str, label: str, corners: list[float | None], *, boxed: bool) -> None:
        """Add the box of a row.

        Args:
            where: beginning of the error message.
            label: the finding.
            corners: left, upper, right and lower edge; all None without a box.
            boxed: whether rows of this finding have boxes.

        Raises:
            UserError: a box lacks, encloses nothing, or belongs to a finding without boxes.
        """
        x_min, y_min, x_max, y_max = corners
        if not boxed:
            if any(edge is not None for edge in corners):
                raise UserError(f"{where}: a box found for {label}; expected none")
            return
        if x_min is None or y_min is None or x_max is None or y_max is None or x_min >= x_max or y_min >= y_max:
            raise UserError(
                f"{where}, columns {', '.join(BOX_COLUMNS)}: {', '.join(map(str, corners))} found for {label}; "
                "expected numbers with min below max"
            )
        self.boxes.append(Box(label, x_min, y_min, x_max, y_max))


def votes_needed(readers: str) -> int:
    """Find how many readers must see a finding.

    Raises:
        UserError: the policy is neither "any" nor "majority".
    """
    return READERS[check_choice("readers", readers, READERS)]


def check_readers(table: Path, readings: dict[str, Reading]) -> None:
    """Refuse images without exactly three readers, for which a majority would be undefined."""
    counts = {image: len(reading.readers) for image, reading in readings.items()}
    strange = [f"{image} ({count})" for image, count in counts.items() if count != NUM_READERS]
    if strange:
        raise UserError(
            f"{table}: {len(strange)} image(s) with more or fewer readers found: {some(strange)}; expected "
            f"{NUM_READERS} different rad_id each"
        )


def make_records(
    root: Path,
    folders: Iterable[str],
    readings: dict[str, Reading],
    names: tuple[str, ...],
    needed: int,
    *,
    split: str | None = None,
    frames: dict[str, tuple[int, int]] | None = None,
) -> list[Record]:
    """Make the records of images. Boxes are unknown if the file is no DICOM and its original size is unknown.

    Args:
        root: folder of the release.
        folders: where images may lie below the root, the preferred one first.
        readings: image → what the readers saw.
        names: names of the findings.
        needed: how many readers must see a finding.
        split: split of the images.
        frames: image → width and height of the original.
    """
    folders = list(folders)
    files = _images_by_stem([root / folder for folder in folders])
    records = []
    for image, reading in readings.items():
        path = files.get(image, root / folders[0] / f"{image}.dicom")
        seen, frame = reading.seen(needed), (frames or {}).get(image)
        known = frame is not None or path.suffix.lower() in DICOM_SUFFIXES
        boxes = tuple(box for box in reading.boxes if box.label in seen) if known else None
        labels = tuple(float(name in seen) for name in names)
        name = path.relative_to(root).as_posix()
        records.append(Record(name, path.stem, "PA", labels, split, path, boxes=boxes, frame=frame))
    return records


def _images_by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    """Map names without suffix to image files. Prefer earlier folders, and DICOM files over others."""
    found: dict[str, Path] = {}
    for folder in folders:
        if folder.is_dir():
            for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_file()):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES:
                    found.setdefault(stem, folder / name)
    return found


def reader_notes(names: tuple[str, ...], records: list[Record], readings: Iterable[Reading]) -> list[str]:
    """Note what the labels are, and how many boxes were left out and why."""
    outvoted = sum(
        len(reading.boxes) - len(record.boxes)
        for record, reading in zip(records, readings, strict=True)
        if record.boxes is not None
    )
    unframed = sum(record.boxes is None for record in records)
    notes = [
        f"{len(names)} findings are scored; No finding is no column",
        "the release has no patients: each image is counted as a patient of its own",
    ]
    if outvoted:
        notes.append(f"{outvoted} boxes left out, of findings that too few readers saw")
    if unframed:
        notes.append(
            f"boxes of {unframed} images left out: the files are no DICOM and may have been resized, and no table "
            f"gives the size of the originals ({SIZES} with image_id, dim0, dim1)"
        )
    return notes
