# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""What the finished cells of a suite say: scores with intervals, comparisons, calibration, subgroups, paper tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.scoring.labels import NOT_SCORED
from mlvicx_hf.scoring.significance import calibration, delong_test, paired_tests

from ..runs import Predictions, RunResults, check_same_images, read_run
from ..statistics import Estimate, difference, estimate
from .grid import Cell, Suite, is_finished, read_reason
from .shortcuts import read_audits

PAPER_METRICS = {"AUROC": "auroc_macro", "accuracy": "accuracy", "Dice": "dice"}


@dataclass(frozen=True)
class Run:
    """A finished cell with its results and what it predicted."""

    cell: Cell
    results: dict[str, Any]
    predictions: RunResults
    files: dict[str, str]  # SHA-256 of what it was made with


@dataclass(frozen=True)
class Setting:
    """Runs that differ only in the weights of pretraining and in the seed."""

    task: str
    protocol: str
    label_fraction: float
    model: str
    runs: tuple[Run, ...]
    samples: int

    @property
    def names(self) -> dict[str, Any]:
        """What tells it from other settings."""
        return {
            "task": self.task,
            "protocol": self.protocol,
            "label_fraction": self.label_fraction,
            "model": self.model,
        }

    @cached_property
    def estimates(self) -> dict[str, Estimate]:
        """Every metric over the runs."""
        return estimate([run.predictions for run in self.runs], self.samples)

    def by(self, what: str, metric: str) -> dict[int, float]:
        """Mean of a metric over the runs of each `member` or `seed`."""
        values: dict[int, list[float]] = {}
        for run, value in zip(self.runs, self.estimates[metric].runs, strict=True):
            values.setdefault(getattr(run.cell, what), []).append(float(value))
        return {key: float(np.mean(found)) for key, found in values.items()}


def analyse(suite: Suite, output: Path, samples: int = 1000) -> dict[str, Any]:
    """Everything that the report of a suite shows, as it is written to `report.json`.

    Args:
        suite: the grid.
        output: its folder.
        samples: draws of patients for every interval.

    Returns:
        `suite`, `code`, `cells` (planned, finished, failed), `tasks` (data and counts), `settings` (scores and more by
        task, protocol, label fraction and model), `comparisons`, `shortcuts`, `tables` (of the paper).

    Raises:
        ValueError: no finished cell, or cells of a task that were run on different data.
    """
    settings = _read_settings(suite, output, samples)
    if not settings:
        raise UserError(f"{output} holds no finished cell of {suite.path}; expected one or more")
    finished = sum(len(setting.runs) for setting in settings)
    described = []
    with progress_bar(len(settings), "intervals", "setting") as bar:
        for setting in settings:
            described.append(_describe(setting, suite.metrics[setting.task]))
            bar.update()
    return {
        "suite": {"title": suite.title, "file": suite.path.name, "sha256": suite.digest, "samples": samples},
        "code": code_version(),
        "cells": {
            "planned": len(suite.cells),
            "finished": finished,
            "failed": {
                str(cell.path): read_reason(output / cell.error_path)
                for cell in suite.cells
                if (output / cell.error_path).is_file()
            },
        },
        "tasks": _describe_tasks(suite, settings),
        "settings": described,
        "comparisons": _compare(suite, settings),
        "shortcuts": _shortcuts(suite, output),
        "tables": {table: paper_table(suite, settings, table) for table in suite.paper_tables},
    }


def _read_settings(suite: Suite, output: Path, samples: int) -> list[Setting]:
    groups: dict[tuple[str, str, float, str], list[Run]] = {}
    by_task: dict[str, dict[str, RunResults]] = {}
    for cell in suite.cells:
        folder = output / cell.path
        if is_finished(cell, output):
            results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
            described = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
            run = Run(cell, results, read_run(folder), described["files"])
            groups.setdefault((cell.task, cell.protocol, cell.label_fraction, cell.model), []).append(run)
            by_task.setdefault(cell.task, {})[str(folder)] = run.predictions
    for runs in by_task.values():
        check_same_images(runs)
    order = [list(dict.fromkeys(axis)) for axis in zip(*groups, strict=True)]  # of every axis, as in the suite
    names = sorted(groups, key=lambda name: [axis.index(value) for axis, value in zip(order, name, strict=True)])
    return [Setting(*name, tuple(groups[name]), samples) for name in names]


def _describe_tasks(suite: Suite, settings: Sequence[Setting]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for setting in settings:
        first = setting.runs[0]
        about = found.setdefault(
            setting.task,
            {
                "kind": first.cell.kind,
                "metric": suite.metrics[setting.task],
                "labels": first.results["labels"],
                "data": {k: v for k, v in first.results["data"].items() if k != "used_hash"},
                "test": first.results["counts"]["test"],
                "validation": first.results["counts"]["validation"],
                "train": {},
                "commits": [],
                "hardware": [],
            },
        )
        for run in setting.runs:
            for name, value in about["data"].items():
                if run.results["data"].get(name) != value:
                    raise UserError(
                        f"{run.cell.path} was run with {name} {run.results['data'].get(name)}, other cells of task "
                        f"{setting.task} with {value}; expected one cache"
                    )
            about["train"][f"{run.cell.label_fraction:g}"] = run.results["counts"]["train"]
            for key, value in (("commits", run.results["code"]["commit"]), ("hardware", run.results["hardware"])):
                if value not in about[key]:
                    about[key].append(value)
    return found


def _describe(setting: Setting, metric: str) -> dict[str, Any]:
    runs = setting.runs
    first = runs[0]
    found = setting.names | {
        "members": sorted({run.cell.member for run in runs}),
        "seeds": sorted({run.cell.seed for run in runs}),
        "weights": {run.cell.weights: run.files.get(run.cell.weights_file) for run in runs},
        "hyperparameters": first.results["hyperparameters"],
        "scores": {name: value.describe() for name, value in setting.estimates.items()},
        "subgroups": _subgroups(setting, metric),
    }
    classifiers = [run.predictions for run in runs if isinstance(run.predictions, Predictions)]
    if classifiers:
        calibrated = _calibration(classifiers)
        found |= {"calibration": calibrated} if calibrated else {}
        found["decisions"] = _mean_decisions([run.results["test"].get("decisions") for run in runs])
    return found


def _subgroups(setting: Setting, metric: str) -> dict[str, dict[str, Any]]:
    """The main metric of each view, sex and age band, where there are two or more."""
    predictions = [run.predictions for run in setting.runs]
    found: dict[str, dict[str, Any]] = {}
    for kind, names in predictions[0].groups.items():
        present = sorted(set(names) - {""})
        if len(present) < 2:
            continue
        for name in present:
            rows = np.flatnonzero(names == name)
            parts = [run.only(rows) for run in predictions]
            score = estimate(parts, setting.samples)[metric].describe()
            patients = len(set(predictions[0].patients[rows]))
            found.setdefault(kind, {})[name] = {"images": len(rows), "patients": patients} | score
    return found


def _calibration(runs: Sequence[Predictions]) -> dict[str, Any] | None:
    """By label, of the probabilities of all runs together: `ece` and `bins`; and `ece_macro`. None without a label."""
    by_label = {}
    for i, name in enumerate(runs[0].names):
        labels = np.concatenate([run.labels[:, i] for run in runs])
        if (~np.isnan(labels)).any():
            by_label[name] = calibration(labels, np.concatenate([run.probabilities[:, i] for run in runs]))
    if not by_label:
        return None
    return {"ece_macro": float(np.mean([row["ece"] for row in by_label.values()])), "labels": by_label}


def _mean_decisions(runs: Sequence[dict[str, dict[str, Any]] | None]) -> dict[str, dict[str, Any]] | None:
    """Sensitivity, specificity and accuracy at the thresholds of validation, averaged over the runs."""
    known = [run for run in runs if run is not None]
    if not known:
        return None
    means: dict[str, dict[str, Any]] = {}
    for name, scores in known[0].items():
        for score in scores:
            values = [run[name][score] for run in known if run[name][score] != NOT_SCORED]
            means.setdefault(name, {})[score] = float(np.mean(values)) if values else NOT_SCORED
    return means


def _compare(suite: Suite, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    by_name = {(s.task, s.protocol, s.label_fraction, s.model): s for s in settings}
    rows = []
    for task, protocol, fraction in dict.fromkeys((s.task, s.protocol, s.label_fraction) for s in settings):
        for pair in suite.compare:
            ours, theirs = (by_name.get((task, protocol, fraction, model)) for model in pair)
            if ours is None or theirs is None:
                continue
            metric = suite.metrics[task]
            row = {
                "task": task,
                "protocol": protocol,
                "label_fraction": fraction,
                "model": pair[0],
                "baseline": pair[1],
                "metric": metric,
                **difference(ours.estimates[metric], theirs.estimates[metric]),
                "paired": pair_scores(ours, theirs, metric),
            }
            if len(ours.runs) == len(theirs.runs) == 1:
                row["delong"] = _delong(ours.runs[0].predictions, theirs.runs[0].predictions)
            rows.append(row)
    return rows


def pair_scores(ours: Setting, theirs: Setting, metric: str) -> dict[str, Any] | None:
    """Paired t-test and Wilcoxon test over the pretrainings where both have several, else over the seeds.

    Runs of one pretraining are not independent: with several pretrainings their mean is one value. None where there
    are fewer than two pairs, or where a score is not defined.
    """
    for unit in ("member", "seed"):
        first, second = ours.by(unit, metric), theirs.by(unit, metric)
        common = sorted(set(first) & set(second))
        if len(common) > 1:
            values = [[scores[key] for key in common] for scores in (first, second)]
            if np.isfinite(values).all():
                name = {"member": "pretrainings", "seed": "seeds"}[unit]
                found = paired_tests(*values)
                return {"unit": name, "pairs": found["seeds"], "t_p": found["t_p"], "wilcoxon_p": found["wilcoxon_p"]}
    return None


def _delong(ours: RunResults, theirs: RunResults) -> dict[str, Any] | None:
    """By label of two classifiers; None for segmenters, and where patients have several images, which depend."""
    if not (isinstance(ours, Predictions) and isinstance(theirs, Predictions)):
        return None
    if len(set(ours.patients)) < len(ours.patients):
        return None
    found = {}
    for i, name in enumerate(ours.names):
        labels = ours.labels[:, i]
        if min((labels == value).sum() for value in (0, 1)) > 1:
            found[name] = delong_test(labels, ours.probabilities[:, i], theirs.probabilities[:, i])
    return found


def _shortcuts(suite: Suite, output: Path) -> list[dict[str, Any]]:
    """By model, kind and data: the mean over the model's weights, with the widest interval among them."""
    rows = []
    for model, audits in read_audits(suite, output).items():
        for first in audits[0]:
            same = [row for audit in audits for row in audit if all(row[k] == first[k] for k in ("kind", "data"))]
            merged = first | {
                "auroc": float(np.mean([row["auroc"] for row in same])),
                "low": min(row["low"] for row in same),
                "high": max(row["high"] for row in same),
            }
            rows.append({"model": model, "members": len(same)} | merged)
    return rows


# -- the paper's tables ------------------------------------------------------------------------------------------------


def paper_results() -> pd.DataFrame:
    """The figures of Tables I to IV of the paper (arXiv 2403.11504), a row each.

    Columns: table, dataset, protocol, label_fraction, method, column (a finding, Mean or Dice), metric, value, sd.
    """
    with (files(__package__) / "paper_results.csv").open(encoding="utf-8") as file:
        return pd.read_csv(file, dtype={"table": str})


def paper_table(suite: Suite, settings: Sequence[Setting], table: str) -> list[dict[str, Any]]:
    """A table of the paper with our figure beside each of its own.

    A setting belongs to a figure when its task is called (`paper` of the suite) what the paper calls the data set and
    shows the paper's score, and its model what the paper calls the method, upper and lower case alike.

    Returns:
        Rows as of `paper_results` with `paper` (value), `paper_sd`, `ours`, `ours_sd`, `low` and `high`; None where one
        has no figure.

    Raises:
        ValueError: a table that the paper does not have.
    """
    everything = paper_results()
    known = everything[everything["table"] == table]
    if known.empty:
        raise UserError(f"paper table {table!r} found; expected one of {', '.join(dict.fromkeys(everything['table']))}")
    ours = {}
    for setting in settings:
        dataset, metric = suite.paper.get(setting.task), suite.metrics[setting.task]
        for column, found in _columns(setting, metric).items():
            ours[(metric, dataset, setting.protocol, setting.label_fraction, setting.model.lower(), column)] = found
    rows = []
    for row in known.to_dict("records"):
        key = (row["dataset"], row["protocol"], row["label_fraction"], row["method"].lower(), row["column"])
        mine = ours.get((PAPER_METRICS[row["metric"]], *key), {})
        rows.append(
            {name: row[name] for name in ("dataset", "protocol", "label_fraction", "method", "column", "metric")}
            | {"paper": row["value"], "paper_sd": None if np.isnan(row["sd"]) else row["sd"]}
            | {
                name: mine.get(key)
                for name, key in (("ours", "mean"), ("ours_sd", "sd"), ("low", "low"), ("high", "high"))
            }
        )
    return rows


def _columns(setting: Setting, metric: str) -> dict[str, dict[str, Any]]:
    """Scores under the names of the paper's columns."""
    estimates = setting.estimates
    columns = {"Dice" if metric.startswith("dice") else "Mean": estimates[metric].describe()}
    kind = metric.removesuffix("_macro")
    return columns | {
        name.removeprefix(f"{kind}:"): value.describe()
        for name, value in estimates.items()
        if name.startswith(f"{kind}:")
    }
