"""CheXpert: 223,414 training radiographs of 64,540 patients, 13 findings mined from reports, some of them uncertain."""

import math
import re
from dataclasses import KW_ONLY, dataclass

from mlvicx_hf.common.errors import UserError

from ..splits import check_no_patient_overlap, split_by_patient
from ..vocabulary import release_labels
from .base import Listing, Record, ReleasedCollection
from .cells import label_cells
from .people import SEX, parse_age
from .tables import TEXT, VIEW, CellType, check_unique, find_table, numbered, read_table

CHEXPERT_FINDINGS = release_labels("chexpert")
# CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg; test.csv has no folder in front.
FILE = re.compile(r"(?:[^/]+/)?((?:train|valid|test)/(patient\d+)/study\d+/view\d+_(frontal|lateral)\.\w+)")
_SHARES = {"train": 0.9, "validation": 0.1}  # of the patients of train.csv where valid.csv is the test part
REPORT_NOTE = "13 findings are scored; No Finding is no column; a blank is unknown and never 0"


def _split_path(text: str) -> tuple[str, str, str]:
    """Split a path into the file below the root, the patient, and frontal or lateral."""
    found = FILE.fullmatch(text)
    if found is None:
        raise ValueError(text)
    return found[1], found[2], found[3]


def _age(text: str) -> float:
    """Read years. 0 stands for unknown: all others are 18 or more."""
    age = parse_age(text)
    if age is None:
        raise ValueError(text)
    return age or math.nan


_PATH = CellType(_split_path, "a file such as CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg")
_PERSON = {"Sex": SEX, "Age": CellType(_age, "years, 120 at most"), "Frontal/Lateral": TEXT, "AP/PA": VIEW}


@dataclass
class CheXpertCollection(ReleasedCollection):
    """The release's folder: `train.csv`, `valid.csv`, perhaps `test.csv`, and images in `train/`, `valid/`, `test/`.

    With `test.csv` the parts are those of the release. Without it `valid.csv` is the test part, as in most papers, and
    validation is a tenth of the patients of `train.csv`, the same for any `uncertain`. A blank label is unknown and
    never 0, so 0 means that a report denies the finding. No Finding is no label and turns no blank into 0.
    """

    name = "chexpert"

    _: KW_ONLY
    uncertain: str = "ignore"  # what a label of -1 becomes: "ignore" (unknown), "ones" or "zeros"
    seed: int = 0  # for the choice of the validation patients

    def __post_init__(self) -> None:
        self.label_cells = label_cells(self.uncertain)

    def list_all(self) -> Listing:
        """List the images of the tables."""
        if (self.folder / "test.csv").is_file():
            splits: dict[str, str | None] = {"train.csv": "train", "valid.csv": "validation", "test.csv": "test"}
            divided = "train.csv, valid.csv and test.csv are training, validation and test"
        else:
            splits = {"train.csv": None, "valid.csv": "test"}
            divided = f"no test.csv: valid.csv is the test part, validation a tenth of train.csv, seed {self.seed}"
        parts = {name: self._read(name, split) for name, split in splits.items()}
        check_no_patient_overlap({name: [record.patient_id for record in part] for name, part in parts.items()})
        records = [record for part in parts.values() for record in part]
        notes = [REPORT_NOTE, divided]
        unclear = sum(record.view == "UNKNOWN" for record in records)
        if unclear:
            notes.append(f"{unclear} views unknown: AP/PA is blank or contradicts Frontal/Lateral")
        return Listing(records, CHEXPERT_FINDINGS, notes=notes, policy={"uncertain": self.uncertain})

    def _read(self, name: str, split: str | None) -> list[Record]:
        """Read the records of a table. Without a split divide them into train and validation."""
        table = find_table(self.folder, name, expected="--root to hold CheXpert's train.csv and valid.csv")
        persons = {} if name == "test.csv" else _PERSON  # the released test.csv has labels alone
        findings = dict.fromkeys(CHEXPERT_FINDINGS, self.label_cells)
        rows = read_table(table, {"Path": _PATH, **findings, **persons})
        check_unique(table, [file for (file, _, _), *_ in rows])
        count = 1 + len(findings)
        if split is not None:
            splits = [split] * len(rows)
        else:
            certain = rows  # stratify by what is certainly positive, whatever -1 becomes
            if self.uncertain == "ones":
                certain = read_table(table, {"Path": _PATH, **dict.fromkeys(findings, label_cells("ignore"))})
            patients = [patient for (_, patient, _), *_ in rows]
            splits = split_by_patient(patients, [row[1:count] for row in certain], _SHARES, self.seed)
        records = []
        for number, (row, part) in numbered(table, zip(rows, splits, strict=True)):
            (file, patient, side), labels = row[0], row[1:count]
            sex, age, written, view = row[count:] or ("", math.nan, "", "UNKNOWN")
            if written.lower() not in ("", side):
                raise UserError(
                    f"{table}: row {number}, column Frontal/Lateral: {written!r} found; expected {side.capitalize()} "
                    "as the file's name has it"
                )
            if side == "lateral" or view == "LATERAL":  # some frontal images have LL or RL as their view
                view = "LATERAL" if side == "lateral" else "UNKNOWN"
            records.append(Record(file, patient, view, labels, part, self.folder / file, sex=sex, age=age))
        return records
