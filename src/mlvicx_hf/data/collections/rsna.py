"""RSNA Pneumonia Detection Challenge as released: 26,684 radiographs, 6,012 with boxes around lung opacities."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import image_files
from ..options import check_choice
from .base import Box, Listing, Record, ReleasedCollection, files_by_name
from .boxes import FRAME, PIXELS, add_box
from .people import AGE, SEX, believe_ages
from .tables import FILLED, TEXT, VIEW, ZERO_OR_ONE, CellType, find_table, numbered, one_of, read_table

LABELS = "stage_2_train_labels.csv"
_CLASSES = "stage_2_detailed_class_info.csv"
_FINDING = "Lung Opacity"
CLASS_NAMES = ("Normal", "No Lung Opacity / Not Normal", _FINDING)
FOLDERS = ("stage_2_train_images", "train_images", "images")
CORNER = ("x", "y", "width", "height")
_LABEL_COLUMNS = {
    "patientId": FILLED,
    "Target": ZERO_OR_ONE,
    **dict.fromkeys(CORNER, CellType(lambda text: PIXELS.read(text) if text else None, PIXELS.expected)),
}
_HEADER_COLUMNS = {"PatientID": TEXT, "ViewPosition": VIEW, "PatientSex": SEX, "PatientAge": AGE}

Details = tuple[str, str, float]  # view, sex, age
UNKNOWN: Details = ("UNKNOWN", "", math.nan)


@dataclass
class RSNACollection(ReleasedCollection):
    """The release's folder: `stage_2_train_labels.csv` and the images `<patientId>.dcm` (or .png, .jpg).

    The images are in the first of `stage_2_train_images/`, `train_images/` and `images/` that holds any of them. There
    is no official split: the labels of the test images are not published. A `patientId` names an image; `mapping` tells
    the patient.

    Args:
        root: folder of the release.
        classes: "target" for one label, Lung Opacity, or "detailed" for the three classes of
            `stage_2_detailed_class_info.csv`.
        mapping: the challenge's mapping to NIH ChestX-ray14 (.json, or a table): `subset_img_id` or `patientId`, and
            `img_id`, the NIH file, whose patient counts. Found from the working directory or else from the root.
        headers: table of the DICOM headers: PatientID, PatientSex, PatientAge, ViewPosition. Found as `mapping`.

    Raises:
        UserError: `classes` has another value.
    """

    name = "rsna"
    layout = f"<patientId>.dcm, .png or .jpg in {'/, '.join(FOLDERS)}/"

    _: KW_ONLY
    classes: str = "target"
    mapping: str | Path | None = None
    headers: str | Path | None = None

    def __post_init__(self) -> None:
        check_choice("classes", self.classes, ("target", "detailed"))

    def list_all(self) -> Listing:
        """List the images of the table."""
        boxes = _read_boxes(find_table(self.folder, LABELS, expected="RSNA's table"))
        names: tuple[str, ...] = (_FINDING,)
        labels: dict[str, tuple[float, ...]] = {image: (float(bool(drawn)),) for image, drawn in boxes.items()}
        if self.classes == "detailed":
            classes = _read_classes(find_table(self.folder, _CLASSES, expected="RSNA's table"), boxes)
            names = CLASS_NAMES
            labels = {image: tuple(float(name == found) for name in names) for image, found in classes.items()}
        notes = ["RSNA's images are a subset of NIH ChestX-ray14: an encoder pretrained on NIH may have seen them"]
        patients = self._read_patients(boxes, notes)
        details = self._read_headers(boxes, notes)
        files = self._find_images(boxes)
        records = []
        for image, drawn in boxes.items():
            view, sex, age = details.get(image, UNKNOWN)
            row = (image, patients.get(image, image), view, labels[image])
            records.append(Record(*row, path=files.get(image), boxes=drawn, frame=FRAME, sex=sex, age=age))
        return Listing(
            records,
            names,
            exclusive=self.classes == "detailed",
            notes=notes,
            policy={"classes": self.classes},
            patients_known=bool(patients),
            patient_source="nih14" if patients else None,
        )

    def _read_patients(self, images: Iterable[str], notes: list[str]) -> dict[str, str]:
        """Read NIH's patient of each image. Ignore other images of the mapping."""
        if self.mapping is None:
            notes.append(
                "patientId names an image: each counts as a patient of its own, so one patient's images may fall into "
                "two splits; a mapping to NIH's files tells the patients"
            )
            return {}
        table = find_table(self.folder, expected="a mapping to NIH's files", given=self.mapping)
        types, other_name = {"subset_img_id": TEXT, "img_id": TEXT}, {"patientId": "subset_img_id"}
        wanted, patients = set(images), dict[str, str]()
        rows = read_table(table, types, key=("subset_img_id",), renamed=other_name)
        for row, (image, file) in numbered(table, rows):
            if image in wanted:
                patient, _, rest = file.partition("_")
                if not (patient.isdecimal() and len(patient) == 8 and rest):
                    raise UserError(
                        f"{table}: row {row}, column img_id: {file!r} found; expected an NIH file such as "
                        "00000001_000.png"
                    )
                patients[image] = patient
        _require_images(table, patients, wanted)
        return patients

    def _read_headers(self, images: Mapping[str, object], notes: list[str]) -> dict[str, Details]:
        """Read view, sex and age of each image."""
        if self.headers is None:
            return {}
        table = find_table(self.folder, expected="a table of DICOM headers", given=self.headers)
        rows = read_table(table, _HEADER_COLUMNS, key=("PatientID",))
        ages, age_notes = believe_ages([age for *_, age in rows])
        details = {image: (view, sex, age) for (image, view, sex, _), age in zip(rows, ages, strict=True)}
        lacking = len(images.keys() - details.keys())
        if lacking:
            notes.append(f"{self.headers} lacks {lacking} image(s): view, sex, age unknown")
        notes += age_notes
        return details

    def _find_images(self, names: Iterable[str]) -> dict[str, Path]:
        for folder in filter(Path.is_dir, (self.folder / name for name in FOLDERS)):
            files = files_by_name(image_files(folder), names)
            if files:
                return files
        return {}


def _read_boxes(table: Path) -> dict[str, tuple[Box, ...]]:
    """Read the boxes of each image. There are none if Target is 0."""
    boxes: dict[str, tuple[Box, ...]] = {}
    for row, (image, target, *corner) in numbered(table, read_table(table, _LABEL_COLUMNS)):
        where = f"{table}: row {row}"
        found = f"{where}: Target {target:d} and x, y, width, height {corner} found for {image}"
        if [value is not None for value in corner] != [target] * 4:
            raise UserError(f"{found} (None is empty); expected {'a box' if target else 'no box'}")
        others = boxes.get(image)
        if others is not None and not (others and target):
            raise UserError(f"{found}, listed before; expected one row of Target 0, or rows of boxes")
        boxes[image] = add_box(where, others or (), _FINDING, *corner) if target else ()
    return boxes


def _read_classes(table: Path, boxes: dict[str, tuple[Box, ...]]) -> dict[str, str]:
    """Read the class of each image. The release repeats an image for each of its boxes."""
    classes: dict[str, str] = {}
    for row, (image, value) in numbered(table, read_table(table, {"patientId": TEXT, "class": one_of(CLASS_NAMES)})):
        where = f"{table}: row {row}, column class: {value!r} found for {image}"
        if classes.setdefault(image, value) != value:
            raise UserError(f"{where}; expected {classes[image]!r} as in an earlier row")
        if image in boxes and (value == _FINDING) != bool(boxes[image]):
            target = int(bool(boxes[image]))
            raise UserError(f"{where}, whose Target in {LABELS} is {target}; expected {_FINDING} for 1 only")
    _require_images(table, classes, boxes)
    return classes


def _require_images(table: Path, found: Iterable[str], images: Iterable[str]) -> None:
    absent = sorted(set(images) - set(found))
    if absent:
        raise UserError(f"{table}: {len(absent)} image(s) of {LABELS} lacking: {some(absent)}; expected all of them")
