"""Small copies of VinBigData, VinDr-CXR, CheXpert and MIMIC-CXR-JPG in the releases' layout."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

from mlvicx_hf.data.collections import chexpert, vindr

WIDTH, HEIGHT = 56, 64
CHEXPERT = ("No Finding", *chexpert.CHEXPERT_FINDINGS)

Row = dict[str, Any]


def released(name: str) -> bytes:
    """A released table that torchxrayvision carries, without importing that package, which is slow."""
    specification = importlib.util.find_spec("torchxrayvision")
    assert specification is not None
    assert specification.submodule_search_locations
    folder = Path(specification.submodule_search_locations[0])
    return gzip.decompress((folder / "data" / name).read_bytes())


def write_csv(path: Path, rows: list[Row]) -> None:
    """A table, compressed if its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(seed: int, bright: bool = False) -> np.ndarray:
    """Noise, uint8 [H, W], with a bright disc if asked for."""
    pixels = np.random.default_rng(seed).normal(90, 20, (HEIGHT, WIDTH))
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels[(y - 40) ** 2 + (x - 28) ** 2 < 15**2] += 90 * bright
    return pixels.clip(0, 255).astype(np.uint8)


def write_jpeg(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_dicom(path: Path, pixels: np.ndarray) -> None:
    """A 12-bit DICOM file, uncompressed."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = DigitalXRayImageStorageForPresentation
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[path.name])
    dicom = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dicom.SOPClassUID, dicom.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    dicom.Rows, dicom.Columns = pixels.shape
    dicom.PhotometricInterpretation = "MONOCHROME2"
    dicom.SamplesPerPixel, dicom.PixelRepresentation = 1, 0
    dicom.BitsAllocated, dicom.BitsStored, dicom.HighBit = 16, 12, 11
    dicom.PixelData = (pixels.astype("<u2") * 16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dicom, enforce_file_format=True)


def vin_id(number: int) -> str:
    return f"{number:032x}"


def vin_row(number: int, name: str, reader: str, box: tuple[float, ...] | None = None) -> Row:
    corners = dict(zip(("x_min", "y_min", "x_max", "y_max"), box or ("",) * 4, strict=True))
    return {"image_id": vin_id(number), "rad_id": reader, "class_name": name, **corners}


def vin_rows(number: int) -> list[Row]:
    """Three readings: two see Cardiomegaly on every second image, and one Pneumothorax on every fourth."""
    rows = []
    for reader in ("R8", "R9", "R10"):
        found = []
        if number % 2 == 0 and reader != "R10":
            found.append(vin_row(number, "Cardiomegaly", reader, (10.0, 24.0, 44.0, 56.5 if reader == "R8" else 58.0)))
        if number % 4 == 0 and reader == "R8":
            found.append(vin_row(number, "Pneumothorax", reader, (2.0, 4.0, 20.0, 30.0)))
        rows += found or [vin_row(number, "No finding", reader)]
    return rows


def write_vinbigdata(root: Path) -> Path:
    """20 training images of three readers, and two test images without labels."""
    ids = {"Cardiomegaly": 3, "Pneumothorax": 12, "No finding": 14}
    rows = []
    for number in range(20):
        rows += [
            {
                "image_id": row["image_id"],
                "class_name": row["class_name"],
                "class_id": ids[row["class_name"]],
                "rad_id": row["rad_id"],
                **{corner: row[corner] for corner in ("x_min", "y_min", "x_max", "y_max")},
            }
            for row in vin_rows(number)
        ]
        write_dicom(root / "train" / f"{vin_id(number)}.dicom", draw(number, number % 2 == 0))
    write_csv(root / "train.csv", rows)
    for number in (20, 21):
        write_dicom(root / "test" / f"{vin_id(number)}.dicom", draw(number))
    write_csv(root / "sample_submission.csv", [{"image_id": vin_id(20), "PredictionString": "14 1 0 0 1 1"}])
    return root


def vindr_labels(rows: list[Row], spelling: str) -> Row:
    """Labels of a reading: every finding 0 or 1, and Tuberculosis where there is Pneumothorax."""
    seen = {row["class_name"] for row in rows}
    seen |= {"Tuberculosis", spelling} if "Pneumothorax" in seen else set()
    names = [spelling if name == "Other diseases" else name for name in vindr.VINDR_FINDINGS]
    return {name: int(name in seen) for name in (*names, "No finding")}


def write_vindr(root: Path) -> Path:
    """20 training images of three readers, and six test images of a consensus."""
    labels: list[Row] = []
    boxes: list[Row] = []
    for number in range(20):
        rows = vin_rows(number)
        boxes += rows
        for reader in ("R8", "R9", "R10"):
            own = [row for row in rows if row["rad_id"] == reader]
            labels.append({"image_id": vin_id(number), "rad_id": reader, **vindr_labels(own, "Other diseases")})
        write_dicom(root / "train" / f"{vin_id(number)}.dicom", draw(number, number % 2 == 0))
    write_csv(root / "annotations" / "image_labels_train.csv", labels)
    write_csv(root / "annotations" / "annotations_train.csv", boxes)
    labels, boxes = [], []
    for number in range(20, 26):
        rows = [row for row in vin_rows(number) if row["rad_id"] == "R8"]
        labels.append({"image_id": vin_id(number), **vindr_labels(rows, "Other disease")})
        boxes += [{name: cell for name, cell in row.items() if name != "rad_id"} for row in rows]
        write_dicom(root / "test" / f"{vin_id(number)}.dicom", draw(number, number % 2 == 0))
    write_csv(root / "annotations" / "image_labels_test.csv", labels)
    write_csv(root / "annotations" / "annotations_test.csv", boxes)
    return root


def report_labels(positive: bool, number: int) -> Row:
    """Labels of a report: Pleural Effusion by `positive`, Edema uncertain at times, most of them blank."""
    labels: Row = dict.fromkeys(CHEXPERT, "")
    labels["Pleural Effusion"] = "1.0" if positive else "0.0"
    labels["Edema"] = "-1.0" if number % 3 == 0 else ("1.0" if positive else "0.0")
    labels["No Finding"] = "" if positive else "1.0"
    return labels


def write_chexpert(root: Path, test: bool = False) -> Path:
    """12 training patients and 3 of valid.csv, two studies each, the first with a lateral view; 3 of test.csv if asked.

    As released: the paths begin with a folder's name, but for those of test.csv, which has labels alone.
    """
    seed = 0
    for part, patients in (("train", range(1, 13)), ("valid", range(21, 24)), ("test", range(31, 34))):
        rows: list[Row] = []
        for patient in patients:
            for study in (1, 2):
                for view in ("view1_frontal", "view2_lateral")[: 3 - study]:
                    seed += 1
                    file = f"{part}/patient{patient:05d}/study{study}/{view}.jpg"
                    row: Row = {"Path": file if part == "test" else f"CheXpert-v1.0-small/{file}"}
                    if part != "test":
                        row |= {"Sex": ("Male", "Female")[patient % 2], "Age": 40 + patient}
                        frontal = view.endswith("frontal")
                        row |= {"Frontal/Lateral": "Frontal" if frontal else "Lateral"}
                        row |= {"AP/PA": ("AP" if patient % 2 else "PA") if frontal else ""}
                    rows.append(row | report_labels(study == 1, patient))
                    if part != "test" or test:
                        write_jpeg(root / file, draw(seed, study == 1))
        if part != "test" or test:
            write_csv(root / f"{part}.csv", rows)
    return root


def write_mimic_cxr_jpg(root: Path, end: str = ".csv.gz") -> Path:
    """Ten patients of two studies each, the first with a lateral view; one study is absent from the labels."""
    metadata: list[Row] = []
    splits: list[Row] = []
    labels: list[Row] = []
    for number in range(10):
        subject = 10_000_032 + 1_000_000 * (number % 3) + number
        split = ("train",) * 6 + ("validate",) * 2 + ("test",) * 2
        for index in (0, 1):
            study = 50_414_267 + 2 * number + index
            if (number, index) != (0, 1):
                labels.append({"subject_id": subject, "study_id": study, **report_labels(index == 0, number)})
            for position in (("PA" if number % 2 else "AP", "LATERAL"), ("" if number % 3 else "AP AXIAL",))[index]:
                image = f"{len(metadata):08x}-bde0afdd-112c0b34-7bc16630-4e384014"
                keys = {"dicom_id": image, "subject_id": subject, "study_id": study}
                size = {"Rows": HEIGHT, "Columns": WIDTH}
                metadata.append(keys | {"PerformedProcedureStepDescription": "", "ViewPosition": position} | size)
                splits.append({"dicom_id": image, "study_id": study, "subject_id": subject, "split": split[number]})
                file = root / "files" / f"p{str(subject)[:2]}" / f"p{subject}" / f"s{study}" / f"{image}.jpg"
                write_jpeg(file, draw(len(metadata), index == 0))
    for kind, rows in (("metadata", metadata), ("split", splits), ("chexpert", labels)):
        write_csv(root / f"mimic-cxr-2.0.0-{kind}{end}", rows)
    return root
