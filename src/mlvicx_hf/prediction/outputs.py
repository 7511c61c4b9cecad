"""The columns and files of a prediction."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers.modeling_outputs import SemanticSegmenterOutput

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import write_json
from mlvicx_hf.data.masks import MAX_CLASSES, foreground
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor

from .answers import Answers

MASK_SUFFIX = ".mask.png"
EMBEDDING_SUFFIXES = (".safetensors", ".parquet")


class Head:
    """Columns of the table, and their cells for one image; none for an encoder alone."""

    columns: Sequence[str] = ()

    def cells(self, logits: Tensor, size: tuple[int, int], place: Path) -> list[str]:
        """One cell a column, of an image's logits, height and width, and place below the folder of all inputs."""
        return []


class MultiLabelHead(Head):
    """Probability of every label; a decision 1 or 0 if the model has a threshold for it; an answer if it has a band.

    Args:
        labels: names of the logits.
        thresholds: `decision_thresholds` of the configuration.
        calibration: of the configuration.

    Raises:
        UserError: thresholds or a calibration that do not fit the labels.
    """

    def __init__(
        self, labels: list[str], thresholds: dict[str, Any] | None, calibration: dict[str, Any] | None = None
    ) -> None:
        values = dict.fromkeys(labels) if thresholds is None else thresholds.get("values")
        if not isinstance(values, dict) or not set(labels) <= set(values):
            raise UserError(f"decision_thresholds={thresholds} found; expected values for {', '.join(labels)}")
        self.thresholds = [values[name] for name in labels]
        for name, value in zip(labels, self.thresholds, strict=True):
            if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
                raise UserError(f"decision_thresholds: {value!r} found for {name}; expected a probability or null")
        self.answers = Answers(labels, calibration, exclusive=False)
        self.columns = [f"{kind}:{name}" for kind in ("probability", "decision") for name in labels]
        self.columns += self.answers.columns

    def cells(self, logits: Tensor, size: tuple[int, int], place: Path) -> list[str]:
        """Cells for logits [L]."""
        probabilities = self.answers.probabilities(logits)
        decisions = [
            "" if threshold is None else str(int(value >= threshold))
            for value, threshold in zip(probabilities, self.thresholds, strict=True)
        ]
        return [f"{value:.6f}" for value in probabilities] + decisions + self.answers.cells(probabilities)


class SingleLabelHead(Head):
    """Probability of every class, the most probable class, and the answer, a class or "unsure".

    Args:
        labels: names of the logits.
        calibration: of the configuration.

    Raises:
        UserError: a calibration that does not fit the labels.
    """

    def __init__(self, labels: list[str], calibration: dict[str, Any] | None = None) -> None:
        self.labels = labels
        self.answers = Answers(labels, calibration, exclusive=True)
        self.columns = [*(f"probability:{name}" for name in labels), "class", *self.answers.columns]

    def cells(self, logits: Tensor, size: tuple[int, int], place: Path) -> list[str]:
        """Cells for logits [L]."""
        probabilities = self.answers.probabilities(logits)
        cells = [*(f"{value:.6f}" for value in probabilities), self.labels[int(logits.argmax())]]
        return cells + self.answers.cells(probabilities)


class SegmentationHead(Head):
    """Every structure's share of the image's pixels, and the mask.

    Args:
        labels: names of the classes.
        processor: the model's image processor.
        folder: where to write masks; None for nowhere.

    Raises:
        UserError: more classes than a mask file can hold.
    """

    def __init__(self, labels: list[str], processor: MLVICXImageProcessor, folder: Path | None) -> None:
        if len(labels) > MAX_CLASSES:
            raise UserError(f"{len(labels)} classes found; expected at most {MAX_CLASSES}, as an 8-bit mask holds")
        self.structures, self.processor, self.folder = foreground(labels), processor, folder
        self.scale = 255 if len(labels) <= 2 else 1  # a binary mask can be seen; a class is its index
        self.columns = [f"area:{name}" for name in self.structures] + (["mask"] if folder else [])

    @property
    def mask_values(self) -> dict[str, int]:
        """Pixel value of every structure in a mask file."""
        return {name: value * self.scale for name, value in self.structures.items()}

    def cells(self, logits: Tensor, size: tuple[int, int], place: Path) -> list[str]:
        """Cells for logits [K, S, S]."""
        output = SemanticSegmenterOutput(logits=logits[None])
        classes = self.processor.post_process_semantic_segmentation(output, [size])[0]  # [H, W]
        counts = classes.flatten().bincount(minlength=MAX_CLASSES).tolist()
        cells = [f"{counts[value] / classes.numel():.6f}" for value in self.structures.values()]
        if self.folder is None:
            return cells
        name = mask_name(place)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((classes * self.scale).to("cpu", torch.uint8).numpy()).save(self.folder / name, "PNG")
        return [*cells, printable(name)]


def mask_name(place: Path) -> Path:
    """Name the file of an image's mask below the mask folder. Two places never share a name."""
    return place.with_name(place.name + MASK_SUFFIX)


def printable(path: Path) -> str:
    """Write a path as text. Escape bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class Outputs:
    """Where the results go: a CSV file, a .safetensors or .parquet file, a folder, a PNG file."""

    table: Path
    embeddings: Path | None = None
    masks: Path | None = None
    sheet: Path | None = None

    @property
    def sidecar(self) -> Path:
        """Record beside the table."""
        return self.table.with_suffix(".json")

    def check(self, overwrite: bool) -> None:
        """Refuse outputs that cannot be written, before work starts.

        Raises:
            FileExistsError: something is there already and may not be replaced.
            UserError: a wrong suffix, or one output within another.
        """
        if self.table.suffix != ".csv":
            raise UserError(f"output {self.table} found; expected a name that ends in .csv")
        if self.embeddings is not None and self.embeddings.suffix not in EMBEDDING_SUFFIXES:
            raise UserError(f"embeddings {self.embeddings} found; expected a .safetensors or .parquet file")
        if self.sheet is not None and self.sheet.suffix != ".png":
            raise UserError(f"sheet {self.sheet} found; expected a name that ends in .png")
        for path in (self.table, self.sidecar, self.embeddings, self.sheet):
            if path is None:
                continue
            if self.masks is not None and self.masks.resolve() in (path.resolve(), *path.resolve().parents):
                raise UserError(f"{path} lies in the mask folder {self.masks}; expected it elsewhere")
            if path.is_dir():
                raise FileExistsError(f"{path} is a folder; expected a file that can be written")
            if path.exists() and not overwrite:
                raise FileExistsError(f"{path} exists; choose another name, or overwrite it with --overwrite")
        if self.masks is not None:
            self._check_masks(self.masks, overwrite)

    def write_record(self, record: dict[str, Any]) -> None:
        """Write the record beside the table.

        Raises:
            UserError: none of its `images` could be read: all are `errors`.
        """
        write_json(self.sidecar, record)
        if record["errors"] == record["images"]:
            raise UserError(f"none of {record['images']} images could be read; column error of {self.table} says why")

    def _check_masks(self, masks: Path, overwrite: bool) -> None:
        """Refuse a folder that holds anything but masks, because replacing a folder removes it."""
        if masks.resolve() == Path.cwd():
            raise FileExistsError(f"mask folder {masks} is the working folder; expected another one, absent or empty")
        if masks.is_symlink() or (masks.exists() and not masks.is_dir()):
            raise FileExistsError(f"mask folder {masks} is a file or a link; expected a folder, absent or empty")
        held = [path for path in sorted(masks.rglob("*")) if not path.is_dir()]
        if held and not overwrite:
            raise FileExistsError(f"mask folder {masks} holds files; choose another, or overwrite it with --overwrite")
        strange = [path for path in held if not path.name.endswith(MASK_SUFFIX)]
        if strange:
            raise FileExistsError(f"mask folder {masks} holds {strange[0].name}, which is no mask: it is not replaced")


def check_outside(output: Path, inputs: Iterable[Path], what: str) -> None:
    """Refuse an output in the place of an input, or in its folder, where the next run would take it for one.

    Raises:
        UserError: naming `what` and the input.
    """
    place = output.resolve()
    for item in inputs:
        if item.resolve() in (place, *place.parents):
            raise UserError(f"{what} {output} lies in the input {item}; expected it elsewhere")


def check_mask_places(places: Iterable[Path], inputs: Iterable[Path], masks: Path) -> None:
    """Refuse masks that cannot be written beside one another, or that the next run would take for images.

    Raises:
        UserError: a mask folder within an input, or names that no file system takes.
    """
    check_outside(masks, inputs, "mask folder")
    names = {mask_name(place) for place in places}
    for name in names:
        if len(os.fsencode(name.name)) > 255:
            raise UserError(f"{name.name[:40]}…: name of {len(os.fsencode(name.name))} bytes; expected at most 255")
        if not names.isdisjoint(name.parents):
            raise UserError(f"mask {printable(name)} lies in a folder that is called as another mask; rename it")


def write_embeddings(path: Path, suffix: str, files: list[str], batches: list[Tensor]) -> None:
    """Write the embeddings of batches, [B, C] each, with the names of their N files.

    The suffix is ".safetensors" (tensor "embeddings" [N, C], JSON list "files" in the metadata) or ".parquet" (columns
    file and embedding).
    """
    if suffix == ".safetensors":
        save_file({"embeddings": torch.cat(batches)}, path, metadata={"files": json.dumps(files)})
        return
    import pyarrow
    import pyarrow.parquet

    kind = pyarrow.list_(pyarrow.float32())
    column = pyarrow.chunked_array([pyarrow.array(list(batch.numpy()), kind) for batch in batches], kind)
    table = pyarrow.table({"file": pyarrow.array(files, pyarrow.string()), "embedding": column})
    pyarrow.parquet.write_table(table, path)
