"""MIMIC-CXR-JPG: 377,110 radiographs of 65,379 patients, 13 findings mined from reports, with an official split."""

import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from .base import Listing, Record, ReleasedCollection
from .cells import label_cells
from .chexpert import CHEXPERT_FINDINGS, REPORT_NOTE
from .tables import DIGITS, PLAIN_NAME, TEXT, numbered, one_of, read_table, read_views

_STUDY = {"subject_id": DIGITS, "study_id": DIGITS}
_IMAGE_COLUMNS = {"dicom_id": PLAIN_NAME, **_STUDY, "ViewPosition": TEXT}
_SPLIT_COLUMNS = {
    "dicom_id": TEXT,
    "split": one_of({"train": "train", "validate": "validation", "test": "test"}),
}


@dataclass
class MIMICCXRJPGCollection(ReleasedCollection):
    """The release's folder: the tables metadata, chexpert and split, and images in `files/`.

    The labels are those of the CheXpert labeller; the radiologists' labels of the 2.1.0 test part are not read. A
    blank label is unknown and never 0. All labels of studies that the table lacks are unknown. Sex and age are in
    another release and unknown here.
    """

    name = "mimic_cxr_jpg"

    _: KW_ONLY
    uncertain: str = "ignore"  # what a label of -1 becomes: "ignore" (unknown), "ones" or "zeros"

    def __post_init__(self) -> None:
        self.label_cells = label_cells(self.uncertain)

    def list_all(self) -> Listing:
        """List the images of the metadata."""
        labels = self._labels()
        splits = dict(read_table(self._find("split"), _SPLIT_COLUMNS, key=("dicom_id",)))
        table = self._find("metadata")
        rows = read_table(table, _IMAGE_COLUMNS, key=("dicom_id",))
        notes = [REPORT_NOTE, "split: the release's own"]
        views = read_views([view for *_, view in rows], notes)
        unknown = (math.nan,) * len(CHEXPERT_FINDINGS)
        records, unlabelled = [], 0
        for number, ((image, patient, study, _), view) in numbered(table, zip(rows, views, strict=True)):
            if image not in splits:
                raise UserError(f"{table}: row {number}: image {image} found; expected it in the split's table as well")
            unlabelled += (patient, study) not in labels
            name = f"files/p{patient[:2]}/p{patient}/s{study}/{image}.jpg"
            row = labels.get((patient, study), unknown)
            records.append(Record(name, patient, view, row, splits[image], self.folder / name))
        if unlabelled:
            notes.append(f"{unlabelled} images are of studies without labels: all of theirs are unknown")
        return Listing(records, CHEXPERT_FINDINGS, notes=notes, policy={"uncertain": self.uncertain})

    def _find(self, kind: str) -> Path:
        """Find the table of this kind, of any version, compressed or not."""
        found = [path for end in (".csv", ".csv.gz") for path in sorted(self.folder.glob(f"mimic-cxr-*-{kind}{end}"))]
        if not found:
            raise FileNotFoundError(
                f"{self.folder}: no table mimic-cxr-*-{kind}.csv.gz or .csv found; expected MIMIC-CXR-JPG's, such as "
                f"mimic-cxr-2.0.0-{kind}.csv.gz"
            )
        if len({path.name.removesuffix(".gz") for path in found}) > 1:
            raise UserError(f"{some(map(str, found))} found; expected one version")
        return found[0]

    def _labels(self) -> dict[tuple[str, str], tuple[float, ...]]:
        """Read the labels of each patient and study."""
        types = _STUDY | dict.fromkeys(CHEXPERT_FINDINGS, self.label_cells)
        rows = read_table(self._find("chexpert"), types, key=tuple(_STUDY))
        return {(patient, study): tuple(labels) for patient, study, *labels in rows}
