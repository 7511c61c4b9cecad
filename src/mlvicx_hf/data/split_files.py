# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Split files, which say which image is in which split: `splits.csv` of a cache and of a fine-tuning run."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from mlvicx_hf.common.errors import UserError

from .collections.base import SPLIT_NAMES
from .collections.tables import read_columns

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


def read_split_file(path: Path) -> dict[str, str]:
    """Read a CSV file with the columns source (or file_name) and split. Return image → split.

    Args:
        path: the file. A source such as `folder:a.png` means the image `a.png`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the columns are others, a split has another name, or an image is in two rows.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected --splits to be auto, none or a CSV file")
    columns = read_columns(path)
    name = "source" if "source" in columns else "file_name"
    if name not in columns or "split" not in columns:
        raise UserError(f"{path}: columns {', '.join(columns)} found; expected source (or file_name) and split")
    listed: dict[str, str] = {}
    for number, (image, split) in enumerate(zip(columns[name], columns["split"], strict=True), start=1):
        if split.lower() not in SPLIT_NAMES or not image:
            raise UserError(
                f"{path}: row {number}: {name} {image!r}, split {split!r} found; expected an image, and train, "
                "validation or test"
            )
        image = image.partition(":")[2] if name == "source" else image
        if image in listed:
            raise UserError(f"{path}: row {number}: {image} found for the second time; expected each image once")
        listed[image] = SPLIT_NAMES[split.lower()]
    return listed
