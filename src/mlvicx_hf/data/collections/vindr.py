"""VinDr-CXR as released on PhysioNet: 18,000 frontal radiographs, 27 findings, an official test part."""

from collections import defaultdict
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..splits import split_by_patient
from ..vocabulary import release_labels
from .base import Listing, Record, ReleasedCollection
from .readers import (
    BOX_COLUMNS,
    NO_FINDING_CLASS,
    READER_COLUMNS,
    Reading,
    check_readers,
    make_records,
    reader_notes,
    votes_needed,
)
from .tables import TEXT, ZERO_OR_ONE, find_table, numbered, one_of, read_table

DISEASES = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases")  # of the whole image: no boxes
LOCAL_FINDINGS = (*sorted({*release_labels("vindr")} - {*DISEASES, "Other disease", "Other lesion"}), "Other lesion")
VINDR_FINDINGS = (*LOCAL_FINDINGS, *DISEASES)
COMMON_NAMES = {"Other disease": "Other diseases"}  # the test tables' spelling to that of the training tables
CONSENSUS = "consensus"
_CLASSES = {name: name for name in (*VINDR_FINDINGS, NO_FINDING_CLASS)} | COMMON_NAMES
_SHARES = {"train": 0.9, "validation": 0.1}  # of the training images; ours, the release has no validation part


@dataclass
class VinDrCollection(ReleasedCollection):
    """The release's folder: `annotations/`, `train/` and `test/`.

    Test is the official part, read by a consensus of five. Validation is a tenth of the training images, the same for
    any `readers` and any part of the images on the disk. The images are frontal (PA) and have no patients.
    """

    name = "vindr"

    _: KW_ONLY
    # "any" counts a finding of a training image that one reader saw; "majority" counts one that two of the three saw.
    # Boxes are those of all readers, of the findings that count.
    readers: str = "any"
    seed: int = 0  # for the choice of the validation images

    def __post_init__(self) -> None:
        self.needed = votes_needed(self.readers)

    def list_all(self) -> Listing:
        """List the images of both parts."""
        train, test = self._readings("train"), self._readings("test")
        check_readers(self.folder / "annotations" / "image_labels_train.csv", train)
        both = train.keys() & test.keys()
        if both:
            raise UserError(f"{self.folder}: {len(both)} image(s) in both train and test: {some(sorted(both))}")
        records = self._carve(make_records(self.folder, ["train"], train, VINDR_FINDINGS, self.needed), train)
        records += make_records(self.folder, ["test"], test, VINDR_FINDINGS, 1, split="test")
        notes = [
            *reader_notes(VINDR_FINDINGS, records, [*train.values(), *test.values()]),
            f"validation: a tenth of the release's training images, seed {self.seed}; test: the release's own",
        ]
        return Listing(records, VINDR_FINDINGS, notes=notes, policy={"readers": self.readers}, patients_known=False)

    def _carve(self, records: list[Record], readings: dict[str, Reading]) -> list[Record]:
        """Move a tenth to validation. Stratify by what any reader saw, so that the policy does not matter."""
        seen = [reading.seen(1) for reading in readings.values()]
        labels = [[float(name in findings) for name in VINDR_FINDINGS] for findings in seen]
        splits = split_by_patient(list(readings), labels, _SHARES, self.seed)
        return [replace(record, split=split) for record, split in zip(records, splits, strict=True)]

    def _readings(self, part: str) -> dict[str, Reading]:
        """Read votes from `image_labels_*.csv` and boxes from `annotations_*.csv`, by image."""
        readings = _read_votes(self._find(f"annotations/image_labels_{part}.csv"), part)
        _read_boxes(self._find(f"annotations/annotations_{part}.csv"), readings)
        return readings

    def _find(self, name: str) -> Path:
        return find_table(self.folder, name, expected=f"the release's table {name}")


def _read_votes(table: Path, part: str) -> dict[str, Reading]:
    readings: dict[str, Reading] = defaultdict(Reading)
    keys = ("image_id",) if part == "test" else ("image_id", "rad_id")  # test is read by a consensus
    types = {name: READER_COLUMNS[name] for name in keys} | dict.fromkeys(VINDR_FINDINGS, ZERO_OR_ONE)
    for row in read_table(table, types, key=keys, renamed=COMMON_NAMES):
        reading, reader = readings[row[0]], CONSENSUS if part == "test" else row[1]
        reading.readers.add(reader)
        for name, vote in zip(VINDR_FINDINGS, row[len(keys) :], strict=True):
            if vote:
                reading.votes[name].add(reader)
    return dict(readings)


def _read_boxes(table: Path, readings: dict[str, Reading]) -> None:
    """Add the boxes. Rows of No finding and of diseases have none."""
    rows = read_table(table, {"image_id": TEXT, "class_name": one_of(_CLASSES)} | BOX_COLUMNS)
    for row, (image, name, *corners) in numbered(table, rows):
        if image not in readings:
            raise UserError(f"{table}: row {row}: image_id {image!r} found; expected one of the image labels")
        readings[image].add_box(f"{table}: row {row}", name, corners, boxed=name in LOCAL_FINDINGS)
