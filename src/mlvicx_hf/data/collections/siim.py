"""SIIM-ACR pneumothorax segmentation as released: 12,047 radiographs, 2,669 with masks in a table of run lengths."""

from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mlvicx_hf.common.errors import UserError

from ..images.errors import UnreadableImageError
from ..images.pixels import image_files
from ..options import check_choice
from .base import Listing, Record, ReleasedCollection, files_by_name
from .tables import FILLED, find_table, numbered, read_table

_TABLES = ("stage_2_train.csv", "train-rle.csv")
CODE = "EncodedPixels"
_FINDING = "Pneumothorax"
NO_MASK = "-1"
SIDE = 1024  # pixels of all images of the release, and of the masks
MASKS_FOLDER = "masks"

Codes = tuple[tuple[int, str], ...]  # row of the table, run-length code


@dataclass
class SIIMCollection(ReleasedCollection):
    """The folder of the release or a mirror: its table, and images `<ImageId>.dcm` (.png, .jpg) in any folders below.

    The mask of an image is the union of its rows, or empty if the table says -1. Files below a folder `masks` are
    masks. There is no official split.
    """

    name = "siim"
    layout = "<ImageId>.dcm or .png in any folders below, and its mask if masks are files"

    _: KW_ONLY
    # "table" draws them from the run lengths. "files" takes `masks/<ImageId>.png`, anywhere below the root; an image
    # with -1 needs no file.
    masks: str = "table"

    def __post_init__(self) -> None:
        check_choice("masks", self.masks, ("table", "files"))

    def list_all(self) -> Listing:
        """List the images of the table."""
        table = find_table(self.folder, *_TABLES, expected="SIIM's table")
        codes = _read_codes(table)
        images, masks = self._find_images(codes)
        records = []
        for image, rows in codes.items():
            mask_path = masks.get(image)
            if self.masks == "files" and rows and mask_path is None:
                mask_path = self.folder / MASKS_FOLDER / f"{image}.png"  # not there, and so reported as missing
            draw_mask = partial(union_of_runs, rows, str(table)) if mask_path is None else None
            row = (image, image, "UNKNOWN", (float(bool(rows)),))
            records.append(Record(*row, path=images.get(image), mask_path=mask_path, draw_mask=draw_mask))
        notes = [
            f"labels and masks of {table.name}",
            "ImageId names an image: each counts as a patient of its own, so one patient's images may fall into two "
            "splits",
            "SIIM's images come from NIH ChestX-ray14: an encoder pretrained on NIH may have seen them",
        ]
        return Listing(
            records,
            (_FINDING,),
            notes=notes,
            mask_names=(_FINDING,),
            policy={"masks": self.masks},
            patients_known=False,
        )

    def _find_images(self, names: Iterable[str]) -> tuple[dict[str, Path], dict[str, Path]]:
        """Find the files of the images, and of their masks if these count, in one walk through the folders."""
        files: dict[bool, list[Path]] = {False: [], True: []}
        for file in image_files(self.folder):
            files[MASKS_FOLDER in file.relative_to(self.folder).parts[:-1]].append(file)
        return files_by_name(files[False], names), files_by_name(files[True] if self.masks == "files" else (), names)


def _read_codes(table: Path) -> dict[str, Codes]:
    """Read the run-length codes of each image; none for an image with -1."""
    codes: dict[str, Codes] = {}
    for row, (image, code) in numbered(table, read_table(table, {"ImageId": FILLED, CODE: FILLED})):
        others = codes.get(image)
        if code == NO_MASK and others is None:
            codes[image] = ()
        elif code == NO_MASK or others == () or code in (other for _, other in others or ()):
            raise UserError(
                f"{table}: row {row}, column {CODE}: {code[:40]!r} found for {image}, which an earlier row "
                "lists; expected -1 in its only row, or codes that differ"
            )
        else:
            codes[image] = (*(others or ()), (row, code))
    return codes


def union_of_runs(codes: Codes, table: str) -> np.ndarray:
    """Draw the mask of all pixels that any of the codes marks.

    A code consists of pairs of a gap and a run, in pixels, counted down the first column, then the second and so on.
    Each gap begins where the run before it ended.

    Args:
        codes: row of the table and code; none for an empty mask.
        table: the file, for error messages.

    Returns:
        0 and 1, uint8 [SIDE, SIDE].

    Raises:
        UnreadableImageError: a code does not consist of such pairs, or leaves the image.
    """
    columns = np.zeros((SIDE, SIDE), dtype=np.uint8)  # [x, y]
    pixels = columns.reshape(-1)
    for row, code in codes:
        where = f"row {row}, column {CODE}: "
        try:
            lengths = [int(word) for word in code.split()]
        except ValueError as error:
            raise UnreadableImageError(table, f"{where}{error}; expected pairs of whole numbers") from error
        if len(lengths) % 2 or min(lengths) < 0 or not min(lengths[1::2]) or sum(lengths) > SIDE * SIDE:
            raise UnreadableImageError(
                table,
                f"{where}{len(lengths)} numbers from {min(lengths)} that add up to {sum(lengths)} found; expected "
                f"pairs of a gap and a run, not empty, that add up to {SIDE * SIDE} pixels at most",
            )
        marked = np.repeat(np.arange(len(lengths), dtype=np.uint8) % 2, lengths)
        pixels[: len(marked)] |= marked
    return np.ascontiguousarray(columns.T)
