# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""RSNA Pneumonia Detection Challenge as released: 26,684 radiographs, 6,012 with boxes around lung opacities."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

from ..images.pixels import image_files
from .base import Box, Listing, Record, ReleasedCollection, files_by_name, normalize_view
from .boxes import FRAME, add_box, parse_framed_box
from .people import check_age, check_sex, note_ages
from .tables import Columns, read_columns, require_columns

LABELS = "stage_2_train_labels.csv"
CORNER = ("x", "y", "width", "height")
_CLASSES = "stage_2_detailed_class_info.csv"
_FINDING = "Lung Opacity"
CLASS_NAMES = ("Normal", "No Lung Opacity / Not Normal", _FINDING)
FOLDERS = ("stage_2_train_images", "train_images", "images")
MAPPED_NAMES = ("subset_img_id", "patientId")  # of the challenge's image, in a mapping
HEADER_COLUMNS = ("PatientID", "PatientSex", "PatientAge", "ViewPosition")

Details = tuple[str, str, float]  # view, sex, age
UNKNOWN: Details = ("UNKNOWN", "", math.nan)


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
    source = "rsna"

    def __init__(
        self,
        root: str | Path,
        *,
        classes: str = "target",
        mapping: str | Path | None = None,
        headers: str | Path | None = None,
    ) -> None:
        if classes not in ("target", "detailed"):
            raise UserError(f"classes={classes!r} found; expected target or detailed")
        self.root = Path(root)
        self.classes = classes
        self.mapping = mapping
        self.headers = headers

    def read(self) -> Listing:
        """List the images of the table that are on disk."""
        listing = super().read()
        if not listing.records:
            raise FileNotFoundError(
                f"{self.root}: none of the {len(listing.missing)} images found; expected <patientId>.dcm, .png or .jpg "
                f"in {'/, '.join(FOLDERS)}/"
            )
        return listing

    def list_all(self) -> Listing:
        """List the images of the table."""
        boxes = _read_boxes(self._find(LABELS))
        detailed = _read_classes(self._find(_CLASSES), boxes) if self.classes == "detailed" else {}
        patients = {} if self.mapping is None else _read_mapping(self._find(self.mapping), boxes)
        details, age_notes = ({}, []) if self.headers is None else _read_headers(self._find(self.headers))
        files = self._find_images(boxes)
        records = []
        for image, drawn in boxes.items():
            view, sex, age = details.get(image, UNKNOWN)
            labels = (
                tuple(float(name == detailed[image]) for name in CLASS_NAMES) if detailed else (float(bool(drawn)),)
            )
            records.append(
                Record(
                    image,
                    patients.get(image, image),
                    view,
                    labels,
                    path=files.get(image),
                    boxes=drawn,
                    frame=FRAME,
                    sex=sex,
                    age=age,
                )
            )
        notes = ["RSNA's images are a subset of NIH ChestX-ray14: an encoder pretrained on NIH may have seen them"]
        if not patients:
            notes.append(
                "patientId names an image: each counts as a patient of its own, so one patient's images may fall into "
                "two splits; a mapping to NIH's files tells the patients"
            )
        if details and not boxes.keys() <= details.keys():
            notes.append(f"{self.headers} lacks {len(boxes.keys() - details.keys())} image(s): view, sex, age unknown")
        return Listing(
            records,
            CLASS_NAMES if detailed else (_FINDING,),
            exclusive=bool(detailed),
            notes=notes + age_notes,
            policy={"classes": self.classes},
            patients_known=bool(patients),
            patient_source="nih14" if patients else None,
        )

    def _find(self, name: str | Path) -> Path:
        """Find a table of the release, in the root, or of the user, in the working directory or the root."""
        released = name in (LABELS, _CLASSES)
        for path in (self.root / name,) if released else (Path(name), self.root / name):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"{self.root / name}: no such file; expected RSNA's table"
            if released
            else f"{name}: no such file, neither here nor in {self.root}"
        )

    def _find_images(self, names: Iterable[str]) -> dict[str, Path]:
        for folder in FOLDERS:
            files = files_by_name(image_files(self.root / folder), names)
            if files:
                return files
        return {}


def _read_boxes(table: Path) -> dict[str, tuple[Box, ...]]:
    """Read the boxes of each image. There are none if Target is 0."""
    columns = read_columns(table)
    require_columns(table, columns, ("patientId", *CORNER, "Target"))
    boxes: dict[str, tuple[Box, ...]] = {}
    rows = zip(columns["patientId"], columns["Target"], *(columns[name] for name in CORNER), strict=True)
    for number, (image, target, *corner) in enumerate(rows, start=1):
        where = f"{table}: row {number}"
        if not image:
            raise UserError(f"{where}: empty patientId found; expected the name of an image")
        if target not in ("0", "1"):
            raise UserError(f"{where}, column Target: {target!r} found; expected 0 or 1")
        if any(corner) != (target == "1"):
            expected = "a box" if target == "1" else "no box"
            raise UserError(f"{where}: Target {target} and x, y, width, height {corner} found; expected {expected}")
        others = boxes.get(image)
        if others is not None and not (others and any(corner)):
            raise UserError(
                f"{where}: Target {target} found for {image}, listed before; expected one row of Target 0, or rows of "
                "boxes"
            )
        box = (parse_framed_box(where, _FINDING, CORNER, corner),) if any(corner) else ()
        boxes[image] = add_box(where, others, *box) if others else box
    return boxes


def _read_classes(table: Path, boxes: dict[str, tuple[Box, ...]]) -> dict[str, str]:
    """Read the class of each image. The release repeats an image for each of its boxes."""
    columns = read_columns(table)
    require_columns(table, columns, ("patientId", "class"))
    classes: dict[str, str] = {}
    for number, (image, value) in enumerate(zip(columns["patientId"], columns["class"], strict=True), start=1):
        where = f"{table}: row {number}, column class: {value!r} found"
        if value not in CLASS_NAMES:
            raise UserError(f"{where}; expected one of {some(CLASS_NAMES)}")
        if classes.setdefault(image, value) != value:
            raise UserError(f"{where} for {image}; expected {classes[image]!r} as in an earlier row")
        if image in boxes and (value == _FINDING) != bool(boxes[image]):
            target = int(bool(boxes[image]))
            raise UserError(
                f"{where} for {image}, whose Target in {LABELS} is {target}; expected {_FINDING} for 1 only"
            )
    _require_images(table, classes, boxes)
    return classes


def _read_mapping(table: Path, images: Iterable[str]) -> dict[str, str]:
    """Read NIH's patient of each image. Ignore other images."""
    columns = _read_objects(table) if table.suffix.lower() == ".json" else read_columns(table)
    name = next((name for name in MAPPED_NAMES if name in columns), MAPPED_NAMES[0])
    require_columns(table, columns, (name, "img_id"))
    wanted, patients = set(images), dict[str, str]()
    for number, (image, file) in enumerate(zip(columns[name], columns["img_id"], strict=True), start=1):
        if image not in wanted:
            continue
        patient, _, rest = file.partition("_")
        if not patient.isdigit() or not rest:
            raise UserError(
                f"{table}: row {number}, column img_id: {file!r} found; expected an NIH file such as 00000001_000.png"
            )
        if image in patients:
            raise UserError(
                f"{table}: row {number}, column {name}: {image!r} found for the second time; expected it once"
            )
        patients[image] = patient
    _require_images(table, patients, wanted)
    return patients


def _read_objects(table: Path) -> Columns:
    """Read a JSON list of objects by column."""
    try:
        rows = json.loads(table.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{table}: not JSON in UTF-8: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{table}: no list of objects found; expected one object an image")
    return {
        name: [str(row.get(name, "")) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)
    }


def _read_headers(table: Path) -> tuple[dict[str, Details], list[str]]:
    """Read view, sex and age of each image, and notes for the user."""
    columns = read_columns(table)
    require_columns(table, columns, HEADER_COLUMNS)
    details: dict[str, Details] = {}
    rows = zip(*(columns[name] for name in HEADER_COLUMNS), strict=True)
    for number, (image, sex, age, view) in enumerate(rows, start=1):
        where = f"{table}: row {number}, column "
        if image in details:
            raise UserError(f"{where}PatientID: {image!r} found for the second time; expected it once")
        details[image] = (
            normalize_view(view) or "UNKNOWN",
            check_sex(f"{where}PatientSex", sex),
            check_age(f"{where}PatientAge", age),
        )
    return details, note_ages(columns["PatientAge"], [age for _, _, age in details.values()])


def _require_images(table: Path, found: Iterable[str], images: Iterable[str]) -> None:
    absent = sorted(set(images) - set(found))
    if absent:
        raise UserError(f"{table}: {len(absent)} image(s) of {LABELS} lacking: {some(absent)}; expected all of them")
