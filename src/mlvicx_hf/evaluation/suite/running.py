"""Run a suite and report on it. What is finished is never done again; what fails is reported.

The folder of a cell is there as a whole or not at all, so a grid that was killed goes on with the same command.
"""

import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import new_file, new_folder, write_json
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import package_commit
from mlvicx_hf.data.options import check_least
from mlvicx_hf.encoders.external import is_external
from mlvicx_hf.finetuning.classification import finetune_classifier
from mlvicx_hf.finetuning.linear_probe import FeatureStore
from mlvicx_hf.finetuning.segmentation import finetune_segmenter
from mlvicx_hf.recipes import fill_sections, find_recipe

from .analysis import analyse
from .grid import SOURCES, TASK_SECTIONS, WEIGHTS_FILE, Cell, read_suite
from .report import write_report
from .shortcuts import audit_shortcuts


@dataclass(frozen=True)
class SuiteOutcome:
    """Numbers of cells, and the content of `report.json`; None while no cell is finished."""

    planned: int
    finished: int
    failed: int
    report: dict[str, Any] | None


def evaluate_suite(
    name: str, output: Path, *, keep_models: bool = False, report_only: bool = False, samples: int = 1000
) -> SuiteOutcome:
    """Run the cells of a suite that are not finished, audit shortcuts, and write the report on what is finished.

    Args:
        name: YAML file, or a suite that comes with the package.
        output: folder of the cells and of the report.
        keep_models: keep the weights of every cell.
        report_only: report on the cells that there are.
        samples: draws of patients for every interval.

    Raises:
        ImportError: without matplotlib.
        UserError: a suite that is wrong, or a finished cell that was run with other settings.
    """
    require("the report of a suite", "report", "matplotlib")  # before hours of work
    package_commit()
    check_least(1, samples=samples)
    if not report_only and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # they would average the gradients of two cells
        raise UserError("several launched processes found; expected `mlvicx evaluate` once a GPU, in shells of its own")
    suite = read_suite(find_recipe(name, "suite"))
    for folder, what in _absent(suite.cells).items():
        print(f"no folder {folder}: {what}", file=sys.stderr)
    for name, source in {cell.model: cell.weights for cell in suite.cells if is_external(cell.weights)}.items():
        print(f"model {name} ({source}) has pooled features alone: no segmentation, no frozen_levels", file=sys.stderr)
    store = FeatureStore()
    failed: list[Cell] = []
    if report_only:
        finished = [cell for cell in suite.cells if cell.is_finished(output)]
    else:
        finished, failed = run_cells(suite.cells, output, keep_models, store)
    report = None
    if finished:
        with FileLock(output / ".report.lock"):
            if not report_only:
                audit_shortcuts(suite, finished, output, store)
            report = analyse(suite, finished, output, samples)
            write_report(report, output)
    return SuiteOutcome(len(suite.cells), len(finished), len(failed), report)


def _absent(cells: Iterable[Cell]) -> dict[str, str]:
    """Folders that the grid names and that do not exist, with what follows from it, to be said before hours of work."""
    found = {}
    for cell in cells:
        if not Path(cell.dataset).is_dir():
            found[cell.dataset] = f"task {cell.task} will fail until its cache is there"
        for source in (cell.weights, cell.architecture):
            if source is None or source in SOURCES or is_external(source):
                continue
            if not Path(source).is_dir():
                found[source] = f"it is looked for on the Hub for model {cell.model}"
    return found


def run_cells(
    cells: Sequence[Cell], output: Path, keep_models: bool = False, store: FeatureStore | None = None
) -> tuple[list[Cell], list[Cell]]:
    """Run the cells of a suite that are not finished and that no other process is running in the same folder.

    `keep_models` leaves the weights of every cell in its folder; `store` holds features that the cells share.

    Returns:
        The finished cells, and the failed ones, each with a `.error.txt` beside its folder.

    Raises:
        UserError: a finished cell that was run with other settings.
    """
    finished = {cell.path for cell in cells if cell.is_finished(output)}
    failed = []
    store = FeatureStore() if store is None else store
    with progress_bar(len(cells), "suite", "cell", initial=len(finished)) as bar:
        for cell in (cell for cell in cells if cell.path not in finished):
            lock = output / cell.lock_path
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(lock, blocking=False):  # else another process runs it
                if cell.is_finished(output) or _succeeds(cell, output, store, keep_models):
                    finished.add(cell.path)
                else:
                    failed.append(cell)
                    traced = f"{cell.failure(output)}; traceback in {output / cell.error_path}"
                    bar.write(f"failed: {cell.path}: {traced}", file=sys.stderr)
            bar.update()
    return [cell for cell in cells if cell.path in finished or cell.is_finished(output)], failed


def _succeeds(cell: Cell, output: Path, store: FeatureStore, keep_model: bool) -> bool:
    """Run a cell. Write the traceback into its error file if it fails."""
    error = output / cell.error_path
    error.unlink(missing_ok=True)
    try:
        _run(cell, output / cell.path, store, keep_model)
    except Exception:  # of any kind, such as an impossible value of a flag: the other cells go on
        with new_file(error) as temporary:
            temporary.write_text(traceback.format_exc(), encoding="utf-8")
        return False
    return True


def _run(cell: Cell, folder: Path, store: FeatureStore, keep_model: bool) -> None:
    made_with = cell.describe()
    with new_folder(folder) as temporary:
        values = cell.flags | {"output_dir": str(temporary)}
        encoder, data, training = fill_sections(TASK_SECTIONS[cell.kind], values, cell.kind)
        if cell.kind == "classification":
            finetune_classifier(encoder, data, training, store)
        else:
            finetune_segmenter(encoder, data, training)
        if not keep_model:
            (temporary / WEIGHTS_FILE).unlink()
        if cell.describe() != made_with:
            raise UserError(f"{cell.path}: weights, cache or recipe were changed while it ran; expected the same files")
        write_json(temporary / "cell.json", made_with)
