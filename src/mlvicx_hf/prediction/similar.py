"""Find the indexed images that are most similar to image files."""

import csv
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_file
from mlvicx_hf.common.machine import choose_device
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import made_by
from mlvicx_hf.common.text import NOTICE
from mlvicx_hf.data.cache.summary import TITLE
from mlvicx_hf.data.images.pictures import contact_sheet
from mlvicx_hf.data.images.pixels import fit_square_gray, read_gray
from mlvicx_hf.data.options import check_least
from mlvicx_hf.encoders.inference import LoadedModel, infer, load

from .outputs import Outputs, check_outside, printable
from .prediction import Batch, InputImage, find_inputs, read_batches
from .search import LABEL_PREFIX, ImageIndex

SHEET_FILES = 50  # files that a contact sheet shows, the first ones
SHEET_TILE = 128  # side of an image on it, in pixels
FROM_ITEMS = ("source", "patient_id", "split")  # columns that the table takes from the index


class Neighbours(NamedTuple):
    """Cosines and rows of the indexed images nearest to a file, or the error that kept it from being read."""

    path: Path
    error: str
    note: str  # see `note_on`
    cosines: list[float]
    rows: list[int]


def find_similar(
    index: str | Path,
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    model: str | None = None,
    revision: str | None = None,
    top: int = 5,
    sheet: str | Path | None = None,
    approximate: bool = False,
    batch_size: int = 32,
    num_workers: int = 2,
    device: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Search an index for the images most similar to image files, and write a table and a record, which is returned.

    The table has one row a file and neighbour, or one row with the error of a file that cannot be read. Its column
    `note` is that of `predict`; `unlike` is 1 if the nearest image has a smaller cosine than the index's threshold, 0
    if not, empty without one.

    Arguments that are not listed are those of `predict`.

    Args:
        index: folder that `build_index` wrote.
        inputs: images and folders, see `find_inputs`.
        output: table, a .csv file; the record `OUTPUT.json` beside it is written last.
        model: folder or Hub name of the model that made the index; by default the one that the index names.
        top: neighbours of each file.
        sheet: .png file for a contact sheet of the first 50 files with their neighbours.
        approximate: search the index's graph instead of all its images.

    Raises:
        FileExistsError: outputs that exist already.
        UserError: arguments, a model or an index that do not fit; no images; a cache that the sheet needs and that is
            not there; or, after everything was written, no image that could be read.
        OSError: a model, an index or inputs that are absent or damaged.
        FloatingPointError: a model whose results are not finite.
    """
    check_least(1, top=top, batch_size=batch_size)
    check_least(0, num_workers=num_workers)
    given = [Path(item) for item in ([inputs] if isinstance(inputs, (str, Path)) else inputs)]
    outputs = Outputs(Path(output), sheet=None if sheet is None else Path(sheet))
    outputs.check(overwrite)
    opened = ImageIndex(index)
    if outputs.sheet is not None:
        opened.check_pictures()
    skipped: Counter[str] = Counter()
    images = find_inputs(given, skipped)
    if outputs.sheet is not None:
        check_outside(outputs.sheet, given, "sheet")
    loaded = load_searcher(opened, model, revision, device)
    batches = read_batches(images, loaded.processor, batch_size, num_workers, opened.square)
    outputs.table.parent.mkdir(parents=True, exist_ok=True)
    with new_file(outputs.table) as table, progress_bar(len(images), "searching", "image", show=progress) as bar:
        neighbours = search_batches(loaded, opened, images, batches, top, approximate)
        counts, shown = write_neighbours(opened, neighbours, table, bar.update)
        outputs.check(overwrite)  # again, because somebody else may have written there meanwhile
        if outputs.sheet is not None and shown:
            outputs.sheet.parent.mkdir(parents=True, exist_ok=True)
            with new_file(outputs.sheet) as picture:
                draw_neighbours(opened, shown, top).save(picture, "PNG")
        outputs.sidecar.unlink(missing_ok=True)  # the old record does not describe the new results
    record = _describe(loaded, opened, given, outputs) | {
        "images": len(images),
        "skipped": dict(+skipped),  # without zeros
        "errors": counts["errors"],
        "noted": counts["noted"],
        "unlike": None if opened.unlike_threshold is None else counts["unlike"],
        "sheet": None if outputs.sheet is None else {"file": printable(outputs.sheet), "images": len(shown)},
        "settings": {"top": top, "approximate": approximate, "batch_size": batch_size, "num_workers": num_workers},
    }
    outputs.write_record(record)
    return record


def load_searcher(index: ImageIndex, model: str | None, revision: str | None, device: str | None) -> LoadedModel:
    """Load the model that made an index, without its head; by default the one that the index names.

    Raises:
        UserError: a model that did not make it.
    """
    if model is None:
        if revision is not None:
            raise UserError(f"revision={revision!r} found without a model; expected --model as well, or neither")
        model, revision = index.content["model"], index.content["revision"]
    loaded = load(model, revision, choose_device(device))
    index.check_model(loaded)
    return dataclasses.replace(loaded, model=loaded.model.base_model)


def _describe(loaded: LoadedModel, index: ImageIndex, inputs: Sequence[Path], outputs: Outputs) -> dict[str, Any]:
    """Record which model, index, code and machine made the results."""
    return {
        "notice": NOTICE,
        **loaded.describe(),
        "index": printable(index.folder),
        **{name: index.content[name] for name in ("caches", "unlike_threshold")},
        "inputs": [printable(item) for item in inputs],
        **made_by(loaded.model.device),
    }


def search_batches(
    loaded: LoadedModel, index: ImageIndex, images: Sequence[InputImage], batches: Iterable[Batch], top: int, fast: bool
) -> Iterator[Neighbours]:
    """Search the index for image files, batch by batch; `fast` is for `ImageIndex.nearest`."""
    remaining = iter(images)
    for batch in batches:
        near: Iterator[tuple[list[float], list[int]]] = iter(())
        if len(batch.pixels):
            cosines, rows = index.nearest(infer(loaded, batch.pixels, embed=True)[1], top, fast)
            found = (rows >= 0).sum(1)  # an approximate search may find fewer than `top`; its rows of -1 come last
            near = ((c[:n].tolist(), r[:n].tolist()) for c, r, n in zip(cosines, rows, found.tolist(), strict=True))
        for reason, note in zip(batch.errors, batch.notes, strict=True):
            path = next(remaining).path
            yield Neighbours(path, reason, "", [], []) if reason else Neighbours(path, "", note, *next(near))


def write_neighbours(
    index: ImageIndex, found: Iterable[Neighbours], table: Path, step: Callable[[], Any]
) -> tuple[Counter[str], list[Neighbours]]:
    """Write the table; call `step` after each file.

    Returns:
        The numbers of "errors", of "noted" and of "unlike" files, and the first files for a sheet.
    """
    counts, shown = Counter[str](), list[Neighbours]()
    names = [*FROM_ITEMS, *(LABEL_PREFIX + name for name in index.label_names)]
    items = index.items[names]
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "error", "note", "rank", "cosine", *names, "unlike"])
        for each in found:
            name = printable(each.path)
            if each.error:
                writer.writerow([name, each.error, *[""] * (len(names) + 4)])
                counts["errors"] += 1
            else:
                counts["noted"] += bool(each.note)
                threshold = index.unlike_threshold
                unlike = "" if threshold is None else int(max(each.cosines, default=-1) < threshold)
                counts["unlike"] += unlike == 1
                shown += [each] if len(shown) < SHEET_FILES else []
            for rank, (cosine, row) in enumerate(zip(each.cosines, each.rows, strict=True), 1):
                known = ("" if pd.isna(value) else value for value in items.iloc[row])
                cells = (value if isinstance(value, str) else f"{value:g}" for value in known)
                writer.writerow([name, "", each.note, rank, f"{cosine:.6f}", *cells, unlike])
            step()
    return counts, shown


def draw_neighbours(index: ImageIndex, shown: Sequence[Neighbours], top: int) -> Image.Image:
    """Draw rows of a file and the indexed images nearest to it, each with its cosine and its source."""
    blank = Image.new("L", (SHEET_TILE, SHEET_TILE), 255)
    tiles, titles = [], []
    for each in shown:
        pictures = [read_gray(each.path), *(index.picture(row) or blank for row in each.rows)]
        sources = [index.items["source"].iloc[row].partition(":")[2] for row in each.rows]
        words = [("file", printable(each.path))]
        words += [(f"cosine {value:.3f}", name) for value, name in zip(each.cosines, sources, strict=True)]
        missing = 1 + top - len(pictures)  # of a small index
        tiles += [fit_square_gray(picture, SHEET_TILE, resample=Image.Resampling.BICUBIC) for picture in pictures] + [
            blank
        ] * missing
        titles += [f"{first}\n{second[-TITLE:]}" for first, second in words] + [""] * missing
    return contact_sheet([np.asarray(tile) for tile in tiles], 1 + top, titles)
