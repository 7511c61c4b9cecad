"""VinBigData as released on Kaggle: 15,000 radiographs, 14 findings boxed by three readers each."""

from collections import defaultdict
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..vocabulary import release_labels
from .base import Listing, ReleasedCollection
from .readers import (
    BOX_COLUMNS,
    NO_FINDING_CLASS,
    READER_COLUMNS,
    SIZES,
    Reading,
    check_readers,
    make_records,
    reader_notes,
    votes_needed,
)
from .tables import TEXT, CellType, find_table, numbered, read_columns, read_table

_FINDINGS = release_labels("vinbigdata")  # in the order of class_id
_CLASSES = [f"{number} {name}" for number, name in enumerate((*_FINDINGS, NO_FINDING_CLASS))]


def _count_pixels(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise ValueError(text)
    return int(text)


_SIZE = CellType(_count_pixels, "pixels")


@dataclass
class VinBigDataCollection(ReleasedCollection):
    """The competition's folder: `train.csv`, and images in `train/`, `images/` or the folder itself.

    The images are frontal (PA) and have no patients. The 3,000 test images have no labels and are not read. Boxes are
    in pixels of the original images. If the files on the disk are not DICOM, the original sizes come from the columns
    `width` and `height` of `train.csv`, or from `train_meta.csv` (`image_id, dim0, dim1`: height and width).
    """

    name = "vinbigdata"

    _: KW_ONLY
    # "any" counts a finding that one reader saw; "majority" counts one that two of the three readers saw. Boxes are
    # those of all readers, of the findings that count.
    readers: str = "any"

    def __post_init__(self) -> None:
        self.needed = votes_needed(self.readers)

    def list_all(self) -> Listing:
        """List the images of `train.csv`."""
        table = find_table(self.folder, "train.csv", expected="the release's table train.csv")
        readings = _read_table(table)
        check_readers(table, readings)
        folders, sizes = ("train", "images", ""), self._sizes(table)
        records = make_records(self.folder, folders, readings, _FINDINGS, self.needed, frames=sizes)
        notes = [
            *reader_notes(_FINDINGS, records, readings.values()),
            "the competition's 3,000 test images have no labels and are left out",
        ]
        return Listing(records, _FINDINGS, notes=notes, policy={"readers": self.readers}, patients_known=False)

    def _sizes(self, table: Path) -> dict[str, tuple[int, int]]:
        """Read width and height of the original images, if a table has them."""
        width, height = "width", "height"
        if (self.folder / SIZES).is_file():
            table, width, height = self.folder / SIZES, "dim1", "dim0"
        elif not {width, height} <= read_columns(table).keys():
            return {}
        rows = read_table(table, {"image_id": TEXT, width: _SIZE, height: _SIZE})
        return {image: (width, height) for image, width, height in rows}


def _read_table(table: Path) -> dict[str, Reading]:
    """Read the readings of each image, in the order of the table."""
    readings: dict[str, Reading] = defaultdict(Reading)
    rows = read_table(table, READER_COLUMNS | {"class_id": TEXT, "class_name": TEXT} | BOX_COLUMNS)
    for row, (image, reader, key, name, *corners) in numbered(table, rows):
        if f"{key} {name}" not in _CLASSES:
            raise UserError(
                f"{table}: row {row}, columns class_id, class_name: {key!r}, {name!r} found; expected one of "
                f"{some(_CLASSES, 15)}"
            )
        found = name != NO_FINDING_CLASS
        readings[image].readers.add(reader)
        readings[image].add_box(f"{table}: row {row}", name, corners, boxed=found)
        if found:
            readings[image].votes[name].add(reader)
    return dict(readings)
