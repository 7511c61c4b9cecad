"""Small copies of NIH ChestX-ray14, RSNA and SIIM in the releases' layout and file formats: noise and bright discs."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from PIL import Image, ImageDraw
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, SecondaryCaptureImageStorage, generate_uid

SIZE = 64  # pixels of the images; boxes and masks are measured in the release's
FRAME = 1024
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
RSNA_CLASSES = ("Lung Opacity", "Normal", "Lung Opacity", "No Lung Opacity / Not Normal")


def released_tables() -> Path:
    """Folder of the released tables that torchxrayvision carries; importing that package would be slow."""
    specification = importlib.util.find_spec("torchxrayvision")
    assert specification is not None
    assert specification.submodule_search_locations
    return Path(specification.submodule_search_locations[0]) / "data"


def disc_box(number: int, side: int = 0) -> tuple[int, int, int, int]:
    """Left, upper edge, width and height of a disc in `FRAME`, on the left or the right side."""
    generator = np.random.default_rng((number, side))
    x, y = generator.integers(40, 180, 2).tolist()
    width, height = generator.integers(200, 280, 2).tolist()
    return x + 512 * side, y + 300, width, height


def draw_image(number: int, boxes: list[tuple[int, int, int, int]]) -> Image.Image:
    """Noise with a bright disc in each box."""
    noise = np.random.default_rng(number).normal(90, 18, (SIZE, SIZE))
    image = Image.fromarray(noise.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for x, y, width, height in boxes:
        pen.ellipse([value * SIZE / FRAME for value in (x, y, x + width, y + height)], fill=210)
    return image


def write_dicom(path: Path, image: Image.Image, image_id: str, sex: str, age: str, view: str) -> None:
    """A DICOM file as RSNA and SIIM have them: 8 bits, baseline JPEG."""
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=95)
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    dataset.SOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = generate_uid(entropy_srcs=[image_id])
    dataset.Modality, dataset.ConversionType, dataset.PatientID = "CR", "WSD", image_id
    dataset.PatientSex, dataset.PatientAge, dataset.ViewPosition = sex, age, view
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Columns, dataset.Rows = image.size
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PixelData = encapsulate([jpeg.getvalue()])
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)


def write_nih14(root: Path, num_patients: int = 12) -> None:
    """Two images a patient, of which one has an effusion and an infiltration; every fourth patient is in test."""
    (root / "images_001" / "images").mkdir(parents=True)
    table, boxes, lists = [NIH_HEADER], ["Image Index,Finding Label,Bbox [x,y,w,h],,,"], {False: [], True: []}
    for patient in range(1, num_patients + 1):
        for visit in range(2):
            name, found = f"{patient:08d}_{visit:03d}.png", (patient + visit) % 2 == 0
            image = draw_image(2 * patient + visit, [disc_box(patient)] if found else [])
            # Some files of the release are RGBA.
            image.convert("RGBA" if patient == 1 else "L").save(root / "images_001" / "images" / name)
            findings = "Effusion|Infiltration" if found else "No Finding"
            person = f"{40 + patient + visit},{'MF'[patient % 2]},{('PA', 'AP')[visit]}"
            table.append(f"{name},{findings},{visit},{patient},{person},2500,2048,0.168,0.168")
            lists[patient % 4 == 0].append(name)
            if found:
                boxes.append(f"{name},Infiltrate,{','.join(map(str, disc_box(patient)))},,,")
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join(table) + "\n")
    (root / "BBox_List_2017.csv").write_text("\n".join(boxes) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(lists[False]))
    (root / "test_list.txt").write_text("\n".join(lists[True]))


def rsna_id(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-{number:012x}"


def write_rsna(root: Path, num_images: int = 12) -> None:
    """Every other image has one or two boxes; with classes, headers and the mapping to NIH (two images a patient)."""
    rows, classes, mapping, headers = [], [], [], []
    for number in range(num_images):
        image_id, category = rsna_id(number), RSNA_CLASSES[number % 4]
        boxes = [disc_box(number, side) for side in range(1 + number % 4 // 2)] if number % 2 == 0 else []
        sex, age, view = "MF"[number % 3 // 2], 30 + number, ("PA", "AP")[number % 2]
        file = root / "stage_2_train_images" / f"{image_id}.dcm"
        write_dicom(file, draw_image(number, boxes), image_id, sex, f"{age:03d}Y", view)
        for box in boxes or [("", "", "", "")]:
            corner = [f"{value}.0" if boxes else "" for value in box]
            columns = ("patientId", "x", "y", "width", "height", "Target")
            rows.append(dict(zip(columns, [image_id, *corner, int(bool(boxes))], strict=True)))
            classes.append({"patientId": image_id, "class": category})
        nih = f"{number // 2 + 1:08d}_{number % 2:03d}.png"
        mapping.append({"subset_img_id": image_id, "img_id": nih, "orig_labels": ["No Finding"]})
        person = {"PatientID": image_id, "PatientSex": sex, "PatientAge": age, "ViewPosition": view}
        headers.append({"Filename": file.name, "Modality": "CR", **person})
    pd.DataFrame(rows).to_csv(root / "stage_2_train_labels.csv", index=False)
    pd.DataFrame(classes).to_csv(root / "stage_2_detailed_class_info.csv", index=False)
    pd.DataFrame(headers).to_csv(root / "kaggle_stage_2_train_images_dicom_headers.csv.gz")
    (root / "pneumonia-challenge-dataset-mappings_2018.json").write_text(json.dumps(mapping))


def siim_id(number: int) -> str:
    return f"1.2.276.0.7230010.3.1.4.8323329.{number + 1}.1517875{number:03d}.{100000 + number}"


def disc_mask(box: tuple[int, int, int, int]) -> np.ndarray:
    """A disc, bool [FRAME, FRAME]."""
    x, y, width, height = box
    mask = Image.new("1", (FRAME, FRAME))
    ImageDraw.Draw(mask).ellipse((x, y, x + width, y + height), fill=1)
    return np.asarray(mask)


def encode_runs(mask: np.ndarray) -> str:
    """SIIM's code of a mask: gaps and runs down the columns."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.T.reshape(-1).astype(int), [0]))))
    return " ".join(map(str, np.diff(np.concatenate(([0], edges))).tolist()))


def write_siim(root: Path, num_images: int = 12) -> None:
    """Every other image has a mask, every fourth one of two rows."""
    lines = ["ImageId, EncodedPixels"]
    for number in range(num_images):
        image_id = siim_id(number)
        boxes = [disc_box(number, side) for side in range(1 + number % 4 // 2)] if number % 2 == 0 else []
        study = root / "dicom-images-train" / generate_uid(entropy_srcs=[image_id, "study"])
        file = study / generate_uid(entropy_srcs=[image_id, "series"]) / f"{image_id}.dcm"
        write_dicom(file, draw_image(number, boxes), image_id, "MF"[number % 2], "051Y", "PA")
        lines += [f"{image_id}, {encode_runs(disc_mask(box))}" for box in boxes] or [f"{image_id}, -1"]
    (root / "train-rle.csv").write_text("\n".join(lines) + "\n")
