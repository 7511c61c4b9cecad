# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""MIMIC-CXR-JPG: 377,110 radiographs of 65,379 patients, 13 findings mined from reports, with an official split."""

from __future__ import annotations

import math
import re
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import Listing, Record, ReleasedCollection
from .chexpert import CHEXPERT_FINDINGS
from .labels import binary_labels, label_values
from .tables import Columns, check_unique, read_columns, read_views, require_columns

STUDY = ("subject_id", "study_id")
_SPLITS = {"train": "train", "validate": "validation", "test": "test"}
DICOM_ID = re.compile(r"[0-9A-Za-z.-]*[0-9A-Za-z]")

Study = tuple[str, str]


class MIMICCXRJPGCollection(ReleasedCollection):
    """The release's folder: the tables metadata, chexpert and split, and images in `files/`.

    The labels are those of the CheXpert labeller; the radiologists' labels of the 2.1.0 test part are not read. A
    blank label is unknown and never 0. All labels of studies that the table lacks are unknown. Sex and age are in
    another release and unknown here.

    Args:
        root: folder of the release.
        uncertain: what a label of -1 becomes: "ignore" (unknown), "ones" or "zeros".
    """

    name = "mimic_cxr_jpg"
    source = "mimic_cxr_jpg"

    def __init__(self, root: str | Path, *, uncertain: str = "ignore") -> None:
        self.root = Path(root)
        self.uncertain = uncertain
        self.values = label_values(uncertain)

    def list_all(self) -> Listing:
        """List the images of the metadata."""
        table = self._find("metadata")
        columns = read_columns(table)
        require_columns(table, columns, ("dicom_id", *STUDY, "ViewPosition"))
        _check_ids(table, columns)
        labels, splits = self._labels(), self._splits()
        notes = [
            "13 findings are scored; No Finding is no column; a blank is unknown and never 0",
            "split: the release's own",
        ]
        views = read_views(columns["ViewPosition"], notes)
        unknown = (math.nan,) * len(CHEXPERT_FINDINGS)
        records, unlabelled = [], 0
        images = zip(columns["dicom_id"], *(columns[name] for name in STUDY), views, strict=True)
        for number, (image, patient, study, view) in enumerate(images, start=1):
            if image not in splits:
                raise UserError(f"{table}: row {number}: image {image} found; expected it in the split's table as well")
            unlabelled += (patient, study) not in labels
            row = labels.get((patient, study), unknown)
            name = f"files/p{patient[:2]}/p{patient}/s{study}/{image}.jpg"
            records.append(Record(name, patient, view, row, splits[image], self.root / name))
        if unlabelled:
            notes.append(f"{unlabelled} images are of studies without labels: all of theirs are unknown")
        return Listing(records, CHEXPERT_FINDINGS, notes=notes, policy={"uncertain": self.uncertain})

    def _find(self, kind: str) -> Path:
        """Find the table of this kind, of any version, compressed or not."""
        found = [path for end in (".csv", ".csv.gz") for path in sorted(self.root.glob(f"mimic-cxr-*-{kind}{end}"))]
        if not found:
            raise FileNotFoundError(
                f"{self.root}: no table mimic-cxr-*-{kind}.csv.gz or .csv found; expected MIMIC-CXR-JPG's, such as "
                f"mimic-cxr-2.0.0-{kind}.csv.gz"
            )
        if len({path.name.removesuffix(".gz") for path in found}) > 1:
            raise UserError(f"{some(map(str, found))} found; expected one version")
        return found[0]

    def _labels(self) -> dict[Study, tuple[float, ...]]:
        """Read the labels of each patient and study."""
        table = self._find("chexpert")
        columns = read_columns(table)
        require_columns(table, columns, (*STUDY, *CHEXPERT_FINDINGS))
        studies = list(zip(*(columns[name] for name in STUDY), strict=True))
        check_unique(table, [" ".join(study) for study in studies])
        return dict(zip(studies, binary_labels(table, columns, CHEXPERT_FINDINGS, self.values), strict=True))

    def _splits(self) -> dict[str, str]:
        table = self._find("split")
        columns = read_columns(table)
        require_columns(table, columns, ("dicom_id", "split"))
        check_unique(table, columns["dicom_id"])
        for number, split in enumerate(columns["split"], start=1):
            if split not in _SPLITS:
                raise UserError(
                    f"{table}: row {number}, column split: {split!r} found; expected one of {', '.join(_SPLITS)}"
                )
        return {image: _SPLITS[split] for image, split in zip(columns["dicom_id"], columns["split"], strict=True)}


def _check_ids(table: Path, columns: Columns) -> None:
    """Refuse numbers and names that make no file name."""
    for name in STUDY:
        for number, value in enumerate(columns[name], start=1):
            if not value.isdecimal():
                raise UserError(f"{table}: row {number}, column {name}: {value!r} found; expected a whole number")
    for number, value in enumerate(columns["dicom_id"], start=1):
        if not DICOM_ID.fullmatch(value):
            raise UserError(f"{table}: row {number}, column dicom_id: {value!r} found; expected a file's name")
    check_unique(table, columns["dicom_id"])
