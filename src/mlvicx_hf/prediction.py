# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""A saved model on image files: probabilities, masks or embeddings, with a record of what made them."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .data.pixels import IMAGE_SUFFIXES, UnreadableImageError, image_files, read_gray
from .hub import check_source, load_model, saved_class
from .image_processing_mlvicx import MLVICXImageProcessor
from .integrity_mlvicx import SUMS, sha256
from .machine import describe_hardware
from .modeling_mlvicx import MLVICXForImageClassification, MLVICXForSemanticSegmentation, MLVICXModel
from .prediction_outputs import (
    Head,
    MultiLabelHead,
    NoHead,
    Outputs,
    SegmentationHead,
    SingleLabelHead,
    check_mask_names,
    printable,
    write_embeddings,
)
from .progress import progress_bar
from .provenance import code_version, new_file, new_folder, write_json

NOTICE = "Research use only. Not a medical device; not for clinical decisions."
WEIGHTS = "model*.safetensors"  # one file, or shards
FILES = ["*.json", WEIGHTS, SUMS]  # of a repository; no code


# The model


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and where it came from.

    Attributes:
        source: folder or Hub name.
        revision: commit on the Hub; None for a folder.
        model: in float32; an encoder alone is a `MLVICXModel`.
        processor: its image processor.
        weights: SHA-256 hash of every weights file by name.
        labels: names of the head's outputs, in their order.
    """

    source: str
    revision: str | None
    model: Any
    processor: MLVICXImageProcessor
    weights: dict[str, str]
    labels: list[str]


def load(source: str, revision: str | None = None, device: str | torch.device = "cpu") -> LoadedModel:
    """Load a saved model by the installed classes, whatever code its repository holds.

    Args:
        source: folder or Hub name.
        revision: branch, tag or commit on the Hub.
        device: where the model goes.

    Raises:
        ValueError: a model of another type, whose weights do not fit its configuration, or whose labels repeat.
        OSError: files that are absent, damaged or not reachable.
    """
    folder = _folder(check_source(source), revision)
    saved = saved_class(folder)
    headless = saved not in (MLVICXForImageClassification, MLVICXForSemanticSegmentation)
    loaded: Any = load_model(folder, MLVICXModel if headless else saved)
    model, processor = loaded
    labels = [] if headless else [model.config.id2label[i] for i in range(model.num_labels)]
    if len(set(labels)) < len(labels):
        raise ValueError(f"{source}: labels {', '.join(labels)} found; expected each name once")
    weights = {path.name: sha256(path) for path in sorted(folder.glob(WEIGHTS))}
    commit = None if Path(source).is_dir() else folder.name
    return LoadedModel(source, commit, model.to(device, torch.float32).eval(), processor, weights, labels)


def _folder(source: str, revision: str | None) -> Path:
    """Where a model's files lie: its own folder, or the Hub's cache of one commit."""
    if not Path(source).is_dir():
        try:
            return Path(snapshot_download(source, revision=revision, allow_patterns=FILES, ignore_patterns="*/*"))
        except OSError as error:
            raise OSError(f"{source}: not found here, nor on the Hub: {error}") from error
    if revision is not None:
        raise ValueError(f"revision={revision!r} of the folder {source} found; only models on the Hub have revisions")
    if not any(Path(source).glob(WEIGHTS)):
        raise FileNotFoundError(f"{source} holds no {WEIGHTS}; expected the weights of a saved model")
    return Path(source)


def choose_device(name: str | None) -> torch.device:
    """The device of this name; by default a GPU where there is one.

    Raises:
        ValueError: no such device.
    """
    gpus = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if gpus else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={name!r} found; expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} found; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device={name!r} found; this machine has {gpus} usable GPU(s)")
    return device


# The images


class InputImage(NamedTuple):
    """A file, and its place below the folder that all inputs share."""

    path: Path
    place: Path


def find_images(inputs: Sequence[Path]) -> list[InputImage]:
    """Image files in the order of the inputs, each once.

    Args:
        inputs: files, taken whatever they are called; folders, searched recursively and in sorted order for names that
            end as images do. Hidden ones are skipped and links to folders not followed.

    Raises:
        FileNotFoundError: an input that does not exist.
        ValueError: no images.
    """
    places: dict[Path, Path] = {}
    bases = []
    for item in inputs:
        if not item.exists():
            raise FileNotFoundError(f"input {str(item)!r} does not exist; expected an image or a folder of images")
        folder, files = (item, list(image_files(item, _fail))) if item.is_dir() else (item.parent, [item])
        bases.append(folder.resolve())
        for file in files:
            places.setdefault(bases[-1] / file.relative_to(folder), file)
    if not places:
        raise ValueError(
            f"no images found in {', '.join(map(str, inputs)) or 'no inputs'}; expected files, or folders with files "
            f"ending in {', '.join(IMAGE_SUFFIXES)}"
        )
    root = os.path.commonpath(bases)
    return [InputImage(file, place.relative_to(root)) for place, file in places.items()]


def _fail(error: OSError) -> None:
    raise error


class Item(NamedTuple):
    """An image as model input [C, S, S] with its own height and width, or the error why not."""

    pixels: Tensor | None
    size: tuple[int, int] | None
    error: str


class Batch(NamedTuple):
    """Some images in order; `pixels` [R, C, S, S] are those that could be read."""

    pixels: Tensor
    sizes: list[tuple[int, int] | None]
    errors: list[str]


class ImageFiles(Dataset[Item]):
    """Files as model input.

    Args:
        paths: of the files.
        processor: of the model.
    """

    def __init__(self, paths: Sequence[Path], processor: MLVICXImageProcessor) -> None:
        self.paths, self.processor = paths, processor

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Item:
        try:
            image = read_gray(self.paths[index])
        except UnreadableImageError as error:
            return Item(None, None, error.reason)
        except OSError as error:
            return Item(None, None, f"cannot be read: {error.strerror or error}")
        return Item(self.processor(image)["pixel_values"][0], (image.height, image.width), "")


def collate(items: Sequence[Item]) -> Batch:
    """One tensor a batch, so that a worker hands over one piece of shared memory."""
    pixels = [item.pixels for item in items if item.pixels is not None]
    stacked = torch.stack(pixels) if pixels else torch.empty(0)
    return Batch(stacked, [item.size for item in items], [item.error for item in items])


# The results


def make_head(loaded: LoadedModel, masks: Path | None) -> Head:
    """What the model's head says about an image."""
    if isinstance(loaded.model, MLVICXForSemanticSegmentation):
        return SegmentationHead(loaded.labels, loaded.processor, masks)
    if not isinstance(loaded.model, MLVICXForImageClassification):
        return NoHead()
    if loaded.model.config.problem_type == "single_label_classification":
        return SingleLabelHead(loaded.labels)
    return MultiLabelHead(loaded.labels, loaded.model.config.decision_thresholds)


def encode(loaded: LoadedModel, pixels: Tensor, embed: bool) -> tuple[Tensor, Tensor]:
    """One forward pass in float32.

    Args:
        loaded: the model.
        pixels: [R, C, S, S].
        embed: embeddings are wanted.

    Returns:
        Logits [R, …] of the head, and embeddings [R, C] on the CPU; an empty tensor [R, 0] for what there is not.

    Raises:
        FloatingPointError: results that are not finite.
    """
    nothing = torch.empty(len(pixels), 0)
    with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        output = loaded.model(pixels.to(loaded.model.device), output_hidden_states=embed)
        logits = nothing if isinstance(loaded.model, MLVICXModel) else output.logits
        # what `pooler_output` is, which the heads do not pass on
        embeddings = loaded.model.base_model.pool(output.hidden_states).cpu() if embed else nothing
    if not (logits.isfinite().all() and embeddings.isfinite().all()):
        raise FloatingPointError(f"{loaded.source} gives values that are not finite; expected a trained model")
    return logits, embeddings


def write_rows(
    loaded: LoadedModel,
    head: Head,
    images: Sequence[InputImage],
    loader: Iterable[Batch],
    table: Path,
    *,
    embed: bool,
    progress: bool,
) -> tuple[list[str], list[Tensor]]:
    """Predict batch by batch, one row an image.

    Args:
        loaded: the model.
        head: what is said about an image.
        images: in the order in which the loader gives them.
        loader: of the images.
        table: CSV file.
        embed: embeddings are wanted.
        progress: show a bar.

    Returns:
        The files that could be read, and their embeddings in batches, the first of them empty.
    """
    readable: list[str] = []
    batches = [torch.empty(0, loaded.model.base_model.pooled_features)]
    remaining = iter(images)
    bar = progress_bar(len(images), "predicting", "image", show=progress)
    with table.open("w", newline="", encoding="utf-8") as file, bar:
        writer = csv.writer(file)
        writer.writerow(["file", "error", *head.columns])
        for batch in loader:
            if len(batch.pixels):
                logits, embeddings = encode(loaded, batch.pixels, embed)
                batches += [embeddings] if embed else []
                scores = iter(logits)
            for size, reason in zip(batch.sizes, batch.errors, strict=True):
                image = next(remaining)
                name = printable(image.path)
                if size is None:
                    writer.writerow([name, reason, *[""] * len(head.columns)])
                    continue
                writer.writerow([name, "", *head.cells(next(scores), size, image.place)])
                readable.append(name)
            bar.update(len(batch.sizes))
    return readable, batches


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
    """Run a saved model on image files and write a table, a record of what made it, and what else is asked for.

    The model's architecture decides: a classifier gives probabilities, with decisions by the thresholds saved with it;
    a segmenter areas and masks in the geometry of the files; any model embeddings. A file that cannot be read is a row
    with the reason. Every output is whole or absent; the record `OUTPUT.json` comes last.

    Args:
        model_source: folder or Hub name.
        inputs: images and folders, see `find_images`.
        output: table, a .csv file.
        embeddings: .safetensors or .parquet file for `pooler_output` of the images that could be read.
        masks: folder for the masks of a segmenter, one PNG an image: 0 and 255 for one structure, else class indices.
        batch_size: images a forward pass.
        num_workers: processes that read files; 0 reads them in this one.
        device: of torch; by default a GPU where there is one.
        revision: branch, tag or commit of a model on the Hub.
        overwrite: replace earlier outputs once the new ones are complete.
        progress: show a bar.

    Returns:
        The content of the record.

    Raises:
        FileExistsError: outputs that exist already.
        ValueError: arguments or a model that do not fit, no images, or (with everything written) none that can be read.
        OSError: a model or inputs that are absent, damaged or not reachable.
        FloatingPointError: a model whose results are not finite.
    """
    if batch_size < 1 or num_workers < 0:
        raise ValueError(f"batch_size={batch_size}, num_workers={num_workers} found; expected at least 1 and 0")
    given = [Path(item) for item in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    outputs = Outputs(
        Path(output),
        embeddings=None if embeddings is None else Path(embeddings),
        masks=None if masks is None else Path(masks),
    )
    outputs.check(overwrite)
    images = find_images(given)
    if outputs.masks is not None:
        check_mask_names((image.place for image in images), given, outputs.masks)
    loaded = load(model_source, revision, choose_device(device))
    _check_task(loaded, outputs)
    loader = DataLoader(
        ImageFiles([image.path for image in images], loaded.processor),
        batch_size,
        num_workers=min(num_workers, math.ceil(len(images) / batch_size)),
        collate_fn=collate,
    )
    for path in (outputs.table, outputs.embeddings, outputs.masks):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:  # left in reverse: masks, embeddings, table
        table = stack.enter_context(new_file(outputs.table))
        vectors = outputs.embeddings and stack.enter_context(new_file(outputs.embeddings))
        head = make_head(loaded, outputs.masks and stack.enter_context(new_folder(outputs.masks)))
        embed = vectors is not None
        readable, batches = write_rows(loaded, head, images, loader, table, embed=embed, progress=progress)
        if outputs.embeddings is not None and vectors is not None:
            write_embeddings(vectors, outputs.embeddings.suffix, readable, batches)
        outputs.check(overwrite)  # again, for what came up meanwhile
        outputs.sidecar.unlink(missing_ok=True)  # an old one beside new results would be wrong
    record = _describe(loaded, head, given, outputs) | {
        "images": len(images),
        "errors": len(images) - len(readable),
        "settings": {"batch_size": batch_size, "num_workers": num_workers},
    }
    write_json(outputs.sidecar, record)
    if not readable:
        raise ValueError(f"none of {len(images)} images could be read; column error of {outputs.table} says why")
    return record


def _check_task(loaded: LoadedModel, outputs: Outputs) -> None:
    name = type(loaded.model).__name__
    if outputs.masks is not None and not isinstance(loaded.model, MLVICXForSemanticSegmentation):
        raise ValueError(f"--masks and {loaded.source} ({name}) found; expected a MLVICXForSemanticSegmentation")
    if outputs.embeddings is None and isinstance(loaded.model, MLVICXModel):
        raise ValueError(f"{loaded.source} has no head, so it gives embeddings only; expected --embeddings FILE")


def _describe(loaded: LoadedModel, head: Head, inputs: Sequence[Path], outputs: Outputs) -> dict[str, Any]:
    """Which model, code and machine made the results."""
    return {
        "notice": NOTICE,
        "model": loaded.source,
        "revision": loaded.revision,
        "architectures": loaded.model.config.architectures,
        "weights_sha256": loaded.weights,
        "labels": loaded.labels,
        "decision_thresholds": loaded.model.config.decision_thresholds if isinstance(head, MultiLabelHead) else None,
        "mask_values": head.mask_values if isinstance(head, SegmentationHead) else None,
        "inputs": [printable(item) for item in inputs],
        "embeddings": None if outputs.embeddings is None else str(outputs.embeddings),
        "masks": None if outputs.masks is None else str(outputs.masks),
        "hardware": describe_hardware(loaded.model.device),
        "code": code_version(),
    }
