# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""The command `scripts/evaluate_suite.py`: the grid, what its features give away, the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

import transformers
from filelock import FileLock

from mlvicx_hf.finetuning.linear_probe import FeatureStore

from .analysis import analyse
from .figures import check_matplotlib
from .grid import SOURCES, Cell, find_suite, is_finished, read_suite, run_suite, suite_names
from .report import describe_briefly, write_report
from .shortcuts import audit_shortcuts


def main() -> None:
    """Run what is not finished, and report on what is.

    Raises:
        SystemExit: with code 1 when a cell failed.
    """
    parser = argparse.ArgumentParser(description="Run a grid of fine-tuning runs, and go on where it was stopped.")
    parser.add_argument("suite", help=f"YAML file, or one of {', '.join(suite_names())}")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells and of the report")
    parser.add_argument(
        "--keep_models", action="store_true", help="keep the weights of every cell: 45 MB with ResNet-18"
    )
    parser.add_argument("--report_only", action="store_true", help="report on the cells that there are")
    parser.add_argument("--samples", type=int, default=1000, help="draws of patients for every interval (default 1000)")
    arguments = parser.parse_args()
    check_matplotlib()
    transformers.utils.logging.set_verbosity_error()  # every run begins with a head that no checkpoint has
    suite, output = read_suite(find_suite(arguments.suite)), arguments.output
    for name, what in _absent(suite.cells).items():
        print(f"no folder {name}: {what}", file=sys.stderr)
    store = FeatureStore()
    failed = [] if arguments.report_only else run_suite(suite.cells, output, arguments.keep_models, store)
    finished = [cell for cell in suite.cells if is_finished(cell, output)]
    if finished:
        with FileLock(output / ".report.lock"):
            if not arguments.report_only:
                audit_shortcuts(suite, finished, output, store)
            report = analyse(suite, output, arguments.samples)
            write_report(report, output)
        print(describe_briefly(report))
        print(f"report: {output / 'report.html'}, report.md and report.json beside it")
    print(f"{len(finished)} of {len(suite.cells)} cells finished, {len(failed)} failed")
    if failed:
        raise SystemExit(1)


def _absent(cells: Iterable[Cell]) -> dict[str, str]:
    """What a grid needs and has no folder, with what follows from it, said before hours of work on the other cells."""
    found = {}
    for cell in cells:
        if not Path(cell.dataset).is_dir():
            found[cell.dataset] = f"task {cell.task} will fail until its cache is there"
        for source in (cell.weights, cell.architecture):
            if source is not None and source not in SOURCES and not Path(source).is_dir():
                found[source] = f"it is looked for on the Hub for model {cell.model}"
    return found
