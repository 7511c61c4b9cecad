# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""CheXpert: 223,414 training radiographs of 64,540 patients, 13 findings mined from reports, some of them uncertain."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mlvicx_hf.common.errors import UserError

from ..splits import check_no_patient_overlap, split_by_patient
from .base import Listing, Record, ReleasedCollection, normalize_view
from .labels import binary_labels, label_values
from .people import parse_age, parse_sex
from .tables import check_unique, read_columns, require_columns

CHEXPERT_FINDINGS = (  # in the order of the release, without No Finding
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
PERSON_COLUMNS = ("Sex", "Age", "Frontal/Lateral", "AP/PA")
# CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg; test.csv has no folder in front.
FILE = re.compile(r"(?:[^/]+/)?((?:train|valid|test)/(patient\d+)/study\d+/view\d+_(frontal|lateral)\.\w+)")
_SHARES = {"train": 0.9, "validation": 0.1}  # of the patients of train.csv where valid.csv is the test part


class CheXpertCollection(ReleasedCollection):
    """The release's folder: `train.csv`, `valid.csv`, perhaps `test.csv`, and images in `train/`, `valid/`, `test/`.

    With `test.csv` the parts are those of the release. Without it `valid.csv` is the test part, as in most papers, and
    validation is a tenth of the patients of `train.csv`, the same for any `uncertain`. A blank label is unknown and
    never 0, so 0 means that a report denies the finding. No Finding is no label and turns no blank into 0.

    Args:
        root: the folder that holds `train.csv`.
        uncertain: what a label of -1 becomes: "ignore" (unknown), "ones" or "zeros".
        seed: seed for the choice of the validation patients.
    """

    name = "chexpert"
    source = "chexpert"

    def __init__(self, root: str | Path, *, uncertain: str = "ignore", seed: int = 0) -> None:
        self.root = Path(root)
        self.uncertain = uncertain
        self.seed = seed
        self.values = label_values(uncertain)

    def list_all(self) -> Listing:
        """List the images of the tables."""
        if (self.root / "test.csv").is_file():
            splits: dict[str, str | None] = {"train.csv": "train", "valid.csv": "validation", "test.csv": "test"}
            divided = "train.csv, valid.csv and test.csv are training, validation and test"
        else:
            splits = {"train.csv": None, "valid.csv": "test"}
            divided = f"no test.csv: valid.csv is the test part, validation a tenth of train.csv, seed {self.seed}"
        parts = {name: self._read(name, split) for name, split in splits.items()}
        check_no_patient_overlap({name: [record.patient_id for record in part] for name, part in parts.items()})
        records = [record for part in parts.values() for record in part]
        notes = ["13 findings are scored; No Finding is no column; a blank is unknown and never 0", divided]
        unclear = sum(record.view == "UNKNOWN" for record in records)
        if unclear:
            notes.append(f"{unclear} views unknown: AP/PA is blank or contradicts Frontal/Lateral")
        return Listing(records, CHEXPERT_FINDINGS, notes=notes, policy={"uncertain": self.uncertain})

    def _read(self, name: str, split: str | None) -> list[Record]:
        """Read the records of a table. Without a split divide them into train and validation."""
        table = self.root / name
        if not table.is_file():
            raise FileNotFoundError(
                f"{table}: no such file; expected --root to hold CheXpert's train.csv and valid.csv"
            )
        columns = read_columns(table)
        persons = () if name == "test.csv" else PERSON_COLUMNS  # the released test.csv has labels alone
        require_columns(table, columns, ("Path", *persons, *CHEXPERT_FINDINGS))
        files = [_split_path(table, number, path) for number, path in enumerate(columns["Path"], start=1)]
        check_unique(table, [file for file, _, _ in files])
        labels = binary_labels(table, columns, CHEXPERT_FINDINGS, self.values)
        splits = [split or "train"] * len(files)
        if split is None:
            certain = labels  # stratify by what is certainly positive, whatever -1 becomes
            if self.uncertain == "ones":
                certain = binary_labels(table, columns, CHEXPERT_FINDINGS, label_values("ignore"))
            splits = split_by_patient([patient for _, patient, _ in files], certain, _SHARES, self.seed)
        people = zip(*(columns.get(column, [""] * len(files)) for column in PERSON_COLUMNS), strict=True)
        records = []
        for number, ((file, patient, side), person) in enumerate(zip(files, people, strict=True)):
            view, sex, age = _person(table, number + 1, side, person)
            path = self.root / file
            records.append(Record(file, patient, view, labels[number], splits[number], path, sex=sex, age=age))
        return records


def _split_path(table: Path, number: int, path: str) -> tuple[str, str, str]:
    """Split a path into the file below the root, the patient, and frontal or lateral."""
    found = FILE.fullmatch(path)
    if found is None:
        raise UserError(
            f"{table}: row {number}, column Path: {path!r} found; expected a file such as "
            "CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
        )
    return found[1], found[2], found[3]


def _person(table: Path, number: int, side: str, cells: tuple[str, ...]) -> tuple[str, str, float]:
    """Read view, sex and age of a row."""
    sex, age = parse_sex(cells[0]), parse_age(cells[1])
    if sex is None or age is None or cells[2].lower() not in ("", side):
        raise UserError(
            f"{table}: row {number}, columns {', '.join(PERSON_COLUMNS[:3])}: {', '.join(map(repr, cells[:3]))} found; "
            f"expected Female, Male or Unknown, years, and {side.capitalize()} as the file's name has it"
        )
    view = "LATERAL" if side == "lateral" else normalize_view(cells[3])
    if view is None or (view == "LATERAL" and side == "frontal"):  # some frontal images have LL or RL as their view
        view = "UNKNOWN"
    return view, sex, age or math.nan  # an age of 0 stands for unknown: all others are 18 or more
