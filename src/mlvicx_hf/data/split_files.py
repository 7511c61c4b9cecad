"""Split files, which say which image is in which split: `splits.csv` of a cache and of a fine-tuning run."""

import csv
import io
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from mlvicx_hf.common.errors import UserError

from .collections.tables import FILLED, SPLIT, check_unique, read_cells, read_columns, require_columns
from .splits import check_no_patient_overlap

SPLIT_FILE = "splits.csv"


def split_file(rows: Iterable[tuple[str, str, str]]) -> str:
    """Write the text of a split file from source, patient and split of each image, one per line.

    Its SHA-256 is the split hash that results name.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("source", "patient_id", "split"))
    writer.writerows(rows)
    return text.getvalue()


def plain_path(name: str) -> str:
    """Write `./a.png` and `x\\b.png` of Windows as `a.png` and `x/b.png`."""
    return os.path.normpath(name.replace("\\", "/"))


def read_split_file(path: Path) -> dict[str, str]:
    """Read a CSV file with the columns source (or file_name) and split. Return image → split.

    Images are as `plain_path` writes them.

    Args:
        path: the file. A source such as `folder:a.png` means the image `a.png`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the columns are others, a split has another name, an image is in two rows, or a patient of a column
            patient_id in two splits.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected --splits to be auto, none or a CSV file")
    columns = read_columns(path)
    name = next((name for name in ("source", "file_name") if name in columns), "source (or file_name)")
    require_columns(path, columns, (name, "split"))
    images = read_cells(path, name, columns[name], FILLED)
    if name == "source":
        images = [image.partition(":")[2] or image for image in images]
    images = [plain_path(image) for image in images]
    check_unique(path, images)
    splits = read_cells(path, "split", columns["split"], SPLIT)
    patients: dict[str, list[str]] = defaultdict(list)
    for patient, split in zip(columns.get("patient_id", ()), splits, strict=False):
        patients[split] += [patient] if patient else []
    try:
        check_no_patient_overlap(patients)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return dict(zip(images, splits, strict=True))
