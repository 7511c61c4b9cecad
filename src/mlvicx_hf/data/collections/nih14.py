"""NIH ChestX-ray14 as released: 112,120 frontal radiographs of 30,805 patients, 14 text-mined findings."""

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import image_files
from ..splits import check_no_patient_overlap, split_by_patient
from ..vocabulary import release_labels
from .base import Box, Listing, Record, ReleasedCollection, files_by_name
from .boxes import FRAME, PIXELS, add_box
from .cells import NO_FINDING
from .people import AGE, SEX, believe_ages
from .tables import DIGITS, FILLED, TEXT, VIEW, CellType, find_table, numbered, one_of, read_table

NIH_FINDINGS = release_labels("nih14")
_TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
BOXES = "BBox_List_2017.csv"
BOX_LABELS = {name: name for name in NIH_FINDINGS} | {"Infiltrate": "Infiltration"}  # the list of boxes spells it so
VALIDATION_SHARE = 0.1  # of the patients of train_val_list.txt; ours, the release has no validation part


def _labels(text: str) -> tuple[float, ...]:
    found = {part.strip() for part in text.split("|")}
    if [name.lower() for name in found] == [NO_FINDING]:
        found = set()
    if not found <= set(NIH_FINDINGS):
        raise ValueError(text)
    return tuple(float(finding in found) for finding in NIH_FINDINGS)


_COLUMNS = {
    "Image Index": FILLED,
    "Finding Labels": CellType(_labels, f"No Finding or, joined by |, some of {', '.join(NIH_FINDINGS)}"),
    "Patient ID": DIGITS,
    "Patient Age": AGE,
    "Patient Gender": SEX,
    "View Position": VIEW,
}
_BOX_COLUMNS = {  # the release does not quote the commas in the brackets
    "Image Index": TEXT,
    "Finding Label": one_of(BOX_LABELS),
    **dict.fromkeys(("Bbox [x", "y", "w", "h]"), PIXELS),
}


@dataclass
class NIH14Collection(ReleasedCollection):
    """The release's folder: table, official lists, and images flat in `images/` or in `images_001…012/images/`.

    If `BBox_List_2017.csv` is there, the images that it lists have boxes. The boxes of other images are unknown.

    Test is the official list. Validation is a tenth of the patients of `train_val_list.txt`, drawn from the whole list
    whatever part of the images is on the disk.
    """

    name = "nih14"
    layout = "images/ or images_001/images/ and so on"

    metadata: str | Path | None = None  # the table; by default the 2020 version, else the 2017 one
    _: KW_ONLY
    seed: int = 0  # for the choice of the validation patients

    def list_all(self) -> Listing:
        """List the images of the table."""
        table = find_table(self.folder, *_TABLES, expected="NIH's table", given=self.metadata)
        rows = read_table(table, _COLUMNS, key=("Image Index",))
        names, labels, numbers, written_ages, sexes, views = map(list, zip(*rows, strict=True))
        patients = [_patient(table, row, *found) for row, found in numbered(table, zip(names, numbers, strict=True))]
        ages, notes = believe_ages(written_ages)
        splits = self._splits(names, patients, labels)
        folders = [self.folder / "images", *(folder / "images" for folder in sorted(self.folder.glob("images_*")))]
        found = (file for folder in folders if folder.is_dir() for file in image_files(folder))
        files = files_by_name(found, names, lambda file: file.name)
        boxes = self._read_boxes()
        records = []
        for index, name in enumerate(names):
            row = (name, patients[index], views[index], labels[index], splits[index], files.get(name))
            known = boxes.get(name)
            records.append(Record(*row, boxes=known, frame=FRAME, sex=sexes[index], age=ages[index]))
        strays = len(boxes.keys() - set(names))
        if strays:
            notes.append(f"{BOXES} lists {strays} image(s) that {table.name} does not: their boxes are left out")
        return Listing(records, NIH_FINDINGS, notes=["14 findings are scored; No Finding is no column", *notes])

    def _read_boxes(self) -> dict[str, tuple[Box, ...]]:
        """Read the boxes of each image, if their list exists."""
        table = self.folder / BOXES
        boxes: dict[str, tuple[Box, ...]] = {}
        rows = read_table(table, _BOX_COLUMNS) if table.is_file() else []
        for row, (name, label, *corner) in numbered(table, rows):
            boxes[name] = add_box(f"{table}: row {row}", boxes.get(name, ()), label, *corner)
        return boxes

    def _splits(self, names: list[str], patients: list[str], labels: list[tuple[float, ...]]) -> list[str]:
        train_val = self._read_list("train_val_list.txt")
        test = self._read_list("test_list.txt")
        strays = [name for name in names if (name in train_val) == (name in test)]
        if strays:
            raise UserError(
                f"{self.folder}: {len(strays)} image(s) of the table in neither or both of train_val_list.txt and "
                f"test_list.txt: {some(strays)}; expected each in one of them"
            )
        rows = [index for index, name in enumerate(names) if name in train_val]
        train_patients = [patients[index] for index in rows]
        test_patients = [patient for name, patient in zip(names, patients, strict=True) if name in test]
        check_no_patient_overlap({"train_val_list.txt": train_patients, "test_list.txt": test_patients})
        shares = {"train": 1 - VALIDATION_SHARE, "validation": VALIDATION_SHARE}
        carved = split_by_patient(train_patients, [labels[index] for index in rows], shares, self.seed)
        split = dict(zip(rows, carved, strict=True))
        return [split.get(index, "test") for index in range(len(names))]

    def _read_list(self, name: str) -> set[str]:
        path = find_table(self.folder, name, expected="NIH's official list, one image a line")
        try:
            return {line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()}
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not text in UTF-8: {error}") from error


def _patient(table: Path, row: int, name: str, number: str) -> str:
    """Find the patient of a file such as 00000001_000.png, and compare it with the table's own column."""
    patient = name.split("_")[0]
    if not patient.isdecimal() or int(patient) != int(number):
        raise UserError(f"{table}: row {row}: Patient ID {number!r} found for {name!r}; expected its first number")
    return patient
