"""Run a saved model on image files: probabilities, masks or embeddings, and a record of what made them."""

import csv
import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.common.files import new_file, new_folder
from mlvicx_hf.common.machine import choose_device
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import made_by
from mlvicx_hf.common.text import NOTICE
from mlvicx_hf.data.copies.duplicates import FLAT, is_flat
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import fit_square_gray, image_files, read_gray
from mlvicx_hf.data.options import check_least
from mlvicx_hf.encoders.inference import LoadedModel, infer, load
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification, MLVICXForSemanticSegmentation, MLVICXModel

from .outputs import (
    Head,
    MultiLabelHead,
    Outputs,
    SegmentationHead,
    SingleLabelHead,
    check_mask_places,
    printable,
    write_embeddings,
)


class InputImage(NamedTuple):
    """An image file."""

    path: Path
    place: Path  # below the folder that all inputs share


def find_inputs(inputs: Sequence[Path], skipped: Counter[str] | None = None) -> list[InputImage]:
    """List the image files in the order of the inputs, each once.

    Args:
        inputs: files, whatever their names; or folders, which are searched as `prepare` does, see `image_files`.
        skipped: counts the files that are no images, by kind.

    Raises:
        FileNotFoundError: an input that does not exist.
        UserError: no images.
    """
    places: dict[Path, Path] = {}
    bases = []
    for item in inputs:
        if not item.exists():
            raise FileNotFoundError(f"input {str(item)!r} does not exist; expected an image or a folder of images")
        folder, files = (item, list(image_files(item, skipped))) if item.is_dir() else (item.parent, [item])
        bases.append(folder.resolve())
        for file in files:
            places.setdefault(bases[-1] / file.relative_to(folder), file)
    if not places:
        raise UserError(
            f"no images found in {', '.join(map(str, inputs)) or 'no inputs'}; expected files, or folders with files "
            "of PNG, JPEG, TIFF, WebP, BMP, JPEG 2000 or DICOM"
        )
    root = os.path.commonpath(bases)
    return [InputImage(file, place.relative_to(root)) for place, file in places.items()]


class Item(NamedTuple):
    """An image as model input [C, S, S] with its own height and width, or the error that kept it from being read."""

    pixels: Tensor | None
    size: tuple[int, int] | None
    error: str
    note: str = ""  # see `note_on`


class Batch(NamedTuple):
    """Some images in order; `pixels` [R, C, S, S] are those that could be read."""

    pixels: Tensor
    sizes: list[tuple[int, int] | None]
    errors: list[str]
    notes: list[str]


def note_on(gray: Image.Image) -> str:
    """What raises doubt about a picture that was read: grey scales of the file that were passed over, or no texture."""
    return "; ".join(filter(None, [gray.info.get("note"), FLAT if is_flat(gray) else None]))


class ImageFiles(Dataset[Item]):
    """Image files as model input, by the model's image processor; first as squares of this size and fit, if given."""

    def __init__(
        self, paths: Sequence[Path], processor: MLVICXImageProcessor, square: tuple[int, str] | None = None
    ) -> None:
        self.paths, self.processor, self.square = paths, processor, square

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        try:
            image = read_gray(self.paths[index])
        except UnreadableImageError as error:
            return Item(None, None, error.reason)
        except MissingExtraError as error:  # other files may need no extra
            return Item(None, None, str(error))
        except OSError as error:
            return Item(None, None, f"cannot be read: {error.strerror or error}")
        fitted = image if self.square is None else fit_square_gray(image, *self.square)
        return Item(self.processor(fitted)["pixel_values"][0], (image.height, image.width), "", note_on(image))


def collate(items: Sequence[Item]) -> Batch:
    """Make one tensor of a batch, so that a worker hands over one piece of shared memory."""
    pixels = [item.pixels for item in items if item.pixels is not None]
    stacked = torch.stack(pixels) if pixels else torch.empty(0)
    return Batch(stacked, [item.size for item in items], [item.error for item in items], [item.note for item in items])


def read_batches(
    images: Sequence[InputImage],
    processor: MLVICXImageProcessor,
    batch_size: int,
    num_workers: int,
    square: tuple[int, str] | None = None,
) -> Iterator[Batch]:
    """Read image files in batches, in order; see `ImageFiles`.

    Raises:
        UserError: a worker process died.
    """
    files = ImageFiles([image.path for image in images], processor, square)
    workers = min(num_workers, math.ceil(len(images) / batch_size))
    done = 0
    try:
        for batch in DataLoader(files, batch_size, num_workers=workers, collate_fn=collate):
            yield batch
            done += len(batch.sizes)
    except RuntimeError as error:
        if "exited unexpectedly" not in str(error):
            raise
        last = min(done + batch_size * workers, len(images)) - 1  # every worker reads a batch
        raise UserError(
            f"a process died that read one of the files {done + 1} to {last + 1} of {len(images)}, from "
            f"{printable(images[done].path)} to {printable(images[last].path)}: a file crashes its decoder, or memory "
            "was short; expected other files, or fewer --num_workers or a smaller --batch_size"
        ) from error


def make_head(loaded: LoadedModel, masks: Path | None) -> Head:
    """Choose the columns of the table by the model's head."""
    if isinstance(loaded.model, MLVICXForSemanticSegmentation):
        return SegmentationHead(loaded.labels, loaded.processor, masks)
    if not isinstance(loaded.model, MLVICXForImageClassification) or not loaded.labels:
        return Head()
    if loaded.model.config.problem_type == "single_label_classification":
        return SingleLabelHead(loaded.labels, loaded.model.config.calibration)
    return MultiLabelHead(loaded.labels, loaded.model.config.decision_thresholds, loaded.model.config.calibration)


def write_rows(
    loaded: LoadedModel,
    head: Head,
    images: Sequence[InputImage],
    batches: Iterable[Batch],
    table: Path,
    *,
    embed: bool,
    progress: bool,
) -> tuple[list[str], list[Tensor], int]:
    """Predict batch by batch and write one row an image to the CSV file `table`.

    Returns:
        The files that could be read, their embeddings in batches, the first of them empty, and how many have a note.
    """
    readable: list[str] = []
    noted = 0
    embedded = [torch.empty(0, loaded.model.base_model.pooled_features)]
    remaining = iter(images)
    bar = progress_bar(len(images), "predicting", "image", show=progress)
    with table.open("w", newline="", encoding="utf-8") as file, bar:
        writer = csv.writer(file)
        writer.writerow(["file", "error", "note", *head.columns])
        for batch in batches:
            if len(batch.pixels):
                logits, embeddings = infer(loaded, batch.pixels, embed)
                embedded += [embeddings] if embed else []
                scores = iter(logits)
            for size, reason, note in zip(batch.sizes, batch.errors, batch.notes, strict=True):
                image = next(remaining)
                name = printable(image.path)
                if size is None:
                    writer.writerow([name, reason, "", *[""] * len(head.columns)])
                    continue
                writer.writerow([name, "", note, *head.cells(next(scores), size, image.place)])
                readable.append(name)
                noted += bool(note)
            bar.update(len(batch.sizes))
    return readable, embedded, noted


def predict(
    model_source: str,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    embeddings: str | Path | None = None,
    masks: str | Path | None = None,
    batch_size: int = 32,
    num_workers: int = 2,
    device: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Run a saved model on image files, and write a table, what else is asked for, and a record, which is returned.

    A classifier gives probabilities, and decisions and answers by the thresholds and bands saved with it. A segmenter
    gives areas, and masks in the geometry of the files. Any model gives embeddings. A file that cannot be read gets a
    row with the reason, and one whose picture raises doubt a note. Every output is whole or absent; the record
    `OUTPUT.json` is written last.

    Args:
        model_source: folder or Hub name.
        inputs: images and folders, see `find_inputs`.
        output: table, a .csv file.
        embeddings: .safetensors or .parquet file for the `pooler_output` of the images that could be read.
        masks: folder for the masks of a segmenter, one PNG an image: 0 and 255 for one structure, else class indices.
        batch_size: images a forward pass.
        num_workers: processes that read files; 0 reads them in this process.
        device: of torch; by default a GPU if there is one.
        revision: branch, tag or commit of a model on the Hub.
        overwrite: replace earlier outputs when the new ones are complete.
        progress: show a bar.

    Raises:
        FileExistsError: outputs that exist already.
        UserError: arguments or a model that do not fit; no images; or, after everything was written, no image that
            could be read.
        OSError: a model or inputs that are absent, damaged or not reachable.
        FloatingPointError: a model whose results are not finite.
    """
    check_least(1, batch_size=batch_size)
    check_least(0, num_workers=num_workers)
    given = [Path(item) for item in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    outputs = Outputs(Path(output), *(None if path is None else Path(path) for path in (embeddings, masks)))
    outputs.check(overwrite)
    skipped: Counter[str] = Counter()
    images = find_inputs(given, skipped)
    if outputs.masks is not None:
        check_mask_places((image.place for image in images), given, outputs.masks)
    loaded = load(model_source, revision, choose_device(device))
    _check_task(loaded, outputs)
    batches = read_batches(images, loaded.processor, batch_size, num_workers)
    for path in (outputs.table, outputs.embeddings, outputs.masks):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # which completes the masks first, then the embeddings, then the table
        table = stack.enter_context(new_file(outputs.table))
        vectors = outputs.embeddings and stack.enter_context(new_file(outputs.embeddings))
        head = make_head(loaded, outputs.masks and stack.enter_context(new_folder(outputs.masks)))
        embed = vectors is not None
        readable, embedded, noted = write_rows(loaded, head, images, batches, table, embed=embed, progress=progress)
        if outputs.embeddings is not None and vectors is not None:
            write_embeddings(vectors, outputs.embeddings.suffix, readable, embedded)
        outputs.check(overwrite)  # again, because somebody else may have written there meanwhile
        outputs.sidecar.unlink(missing_ok=True)  # the old record does not describe the new results
    record = _describe(loaded, head, given, outputs) | {
        "images": len(images),
        "skipped": dict(+skipped),  # without zeros
        "errors": len(images) - len(readable),
        "noted": noted,
        "settings": {"batch_size": batch_size, "num_workers": num_workers},
    }
    outputs.write_record(record)
    return record


def _check_task(loaded: LoadedModel, outputs: Outputs) -> None:
    name = type(loaded.model).__name__
    if outputs.masks is not None and not isinstance(loaded.model, MLVICXForSemanticSegmentation):
        raise UserError(f"--masks and {loaded.source} ({name}) found; expected a MLVICXForSemanticSegmentation")
    if outputs.embeddings is None and (isinstance(loaded.model, MLVICXModel) or not loaded.labels):
        raise UserError(f"{loaded.source} has no head, so it gives embeddings only; expected --embeddings FILE")


def _describe(loaded: LoadedModel, head: Head, inputs: Sequence[Path], outputs: Outputs) -> dict[str, Any]:
    """Record which model, code and machine made the results."""
    return {
        "notice": NOTICE,
        **loaded.describe(),
        "architectures": loaded.model.config.architectures,
        "labels": loaded.labels,
        "decision_thresholds": loaded.model.config.decision_thresholds if isinstance(head, MultiLabelHead) else None,
        "calibration": loaded.model.config.calibration if isinstance(head, MultiLabelHead | SingleLabelHead) else None,
        "mask_values": head.mask_values if isinstance(head, SegmentationHead) else None,
        "inputs": [printable(item) for item in inputs],
        "embeddings": None if outputs.embeddings is None else str(outputs.embeddings),
        "masks": None if outputs.masks is None else str(outputs.masks),
        **made_by(loaded.model.device),
    }
