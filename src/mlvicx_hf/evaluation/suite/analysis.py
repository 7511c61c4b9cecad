"""What the finished cells of a suite say: scores with intervals, comparisons, calibration, subgroups, paper tables."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import read_json
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.common.text import some
from mlvicx_hf.scoring.calibration import COVERAGES, calibration_error, selective_errors
from mlvicx_hf.scoring.labels import NOT_SCORED, mean_scored
from mlvicx_hf.scoring.significance import delong_test, paired_tests

from ..runs import Predictions, RunResults, check_same_images, read_run, scored_everywhere
from ..statistics import Estimate, defined, difference, estimate
from .grid import SEARCH, Cell, Suite
from .paper import paper_results
from .shortcuts import Audit, read_audits

PAPER_METRICS = {"AUROC": "auroc_macro", "accuracy": "accuracy", "Dice": "dice"}


@dataclass(frozen=True)
class FinishedCell:
    """A finished cell with its results and what it predicted."""

    cell: Cell
    results: dict[str, Any]
    predictions: RunResults
    files: dict[str, str]  # SHA-256 of what it was made with


@dataclass(frozen=True)
class SuiteSetting:
    """Runs that differ only in the weights of pretraining and in the seed."""

    task: str
    protocol: str
    label_fraction: float
    model: str
    runs: tuple[FinishedCell, ...]
    samples: int

    @property
    def names(self) -> dict[str, Any]:
        """What tells the setting from others."""
        return {name: getattr(self, name) for name in ("task", "protocol", "label_fraction", "model")}

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


def analyse(suite: Suite, finished: Sequence[Cell], output: Path, samples: int = 1000) -> dict[str, Any]:
    """Compute what the report of a suite shows, of one finished cell or more, as it is written to `report.json`.

    Every interval takes `samples` draws of patients.

    Returns:
        `suite`, `code`, `cells` (planned, finished, failed), `tasks` (data and counts), `settings` (scores and more by
        task, protocol, label fraction and model), `comparisons`, `shortcuts`, `not_audited` (kinds of shortcuts),
        `search`, `tables` (of the paper).

    Raises:
        UserError: cells of a task that were run on different data.
    """
    settings = _read_settings(finished, output, samples)
    described = []
    with progress_bar(len(settings), "intervals", "setting") as bar:
        for setting in settings:
            described.append(_describe_setting(setting, suite.metrics[setting.task]))
            bar.update()
    audits = read_audits(suite, output)
    shortcuts = _shortcuts(audits)
    found = {SEARCH, *(row["kind"] for row in shortcuts)}
    failures = {str(cell.path): cell.failure(output) for cell in suite.cells}
    tasks: dict[str, list[FinishedCell]] = {}
    for setting in settings:
        tasks.setdefault(setting.task, []).extend(setting.runs)
    return {
        "suite": {"title": suite.title, "file": suite.path.name, "sha256": suite.digest, "samples": samples},
        "code": code_version(),
        "cells": {
            "planned": len(suite.cells),
            "finished": len(finished),
            "failed": {path: reason for path, reason in failures.items() if reason is not None},
        },
        "tasks": {task: _describe_task(suite.metrics[task], runs) for task, runs in tasks.items()},
        "settings": described,
        "comparisons": _compare(suite, settings),
        "shortcuts": shortcuts,
        "not_audited": [kind for kind in suite.shortcuts if audits and kind not in found],
        "search": _search_precision(audits),
        "tables": {table: paper_table(suite, settings, table) for table in suite.paper_tables},
    }


def _read_settings(cells: Sequence[Cell], output: Path, samples: int) -> list[SuiteSetting]:
    groups: dict[tuple[str, str, float, str], list[FinishedCell]] = {}
    by_task: dict[str, dict[str, RunResults]] = {}
    for cell in cells:
        folder = output / cell.path
        results, about = (read_json(folder / f"{n}.json") for n in ("results", "cell"))
        run = FinishedCell(cell, results, read_run(folder), about["files"])
        groups.setdefault((cell.task, cell.protocol, cell.label_fraction, cell.model), []).append(run)
        by_task.setdefault(cell.task, {})[str(folder)] = run.predictions
    for runs in by_task.values():
        check_same_images(runs)
    order = [list(dict.fromkeys(axis)) for axis in zip(*groups, strict=True)]  # of every axis, as in the suite
    names = sorted(groups, key=lambda name: [axis.index(value) for axis, value in zip(order, name, strict=True)])
    return [SuiteSetting(*name, tuple(groups[name]), samples) for name in names]


def _describe_task(metric: str, runs: Sequence[FinishedCell]) -> dict[str, Any]:
    """Data, counts, code and machines of all runs of a task."""
    first = runs[0].results
    data = {name: value for name, value in first["data"].items() if name != "used_hash"}
    for run in runs:
        for name, value in data.items():
            other = run.results["data"].get(name)
            if other != value and None not in (other, value):  # an earlier version does not say all
                raise UserError(
                    f"{run.cell.path} was run with {name} {other}, other cells of task {run.cell.task} with {value}; "
                    "expected one cache"
                )
    machines = [run.results["hardware"] for run in runs]
    return {
        "kind": runs[0].cell.kind,
        "metric": metric,
        "labels": first["labels"],
        "data": data,
        "test": first["counts"]["test"],
        "validation": first["counts"]["validation"],
        "train": _count_training(runs),
        "commits": list(dict.fromkeys(run.results["code"]["commit"] for run in runs)),
        "hardware": [machine for i, machine in enumerate(machines) if machine not in machines[:i]],
    }


def _count_training(runs: Sequence[FinishedCell]) -> dict[str, dict[str, list[int]]]:
    """Label fraction → images and patients of train; of each the numbers that there are, which seeds may change."""
    found: dict[str, dict[str, set[int]]] = {}
    for run in runs:
        for name, number in run.results["counts"]["train"].items():
            found.setdefault(f"{run.cell.label_fraction:g}", {}).setdefault(name, set()).add(number)
    return {share: {name: sorted(numbers) for name, numbers in counts.items()} for share, counts in found.items()}


def _describe_setting(setting: SuiteSetting, metric: str) -> dict[str, Any]:
    runs = setting.runs
    found = setting.names | {
        "members": sorted({run.cell.member for run in runs}),
        "seeds": sorted({run.cell.seed for run in runs}),
        "weights": {run.cell.weights: run.files.get(run.cell.weights_file) for run in runs},
        "hyperparameters": _hyperparameters(runs),
        "scores": {name: value.describe() for name, value in setting.estimates.items()},
        "subgroups": _subgroups(setting, metric),
    }
    classifiers = [run.predictions for run in runs if isinstance(run.predictions, Predictions)]
    if classifiers:
        calibrated = _calibration(classifiers)
        found |= {"calibration": calibrated} if calibrated else {}
        found["confidence"] = _confidence(runs)
        found["decisions"] = _mean_decisions([run.results["test"].get("decisions") for run in runs])
    return found


def _hyperparameters(runs: Sequence[FinishedCell]) -> dict[str, Any]:
    """Settings of the runs; where they differ, as another version has other defaults, a list of all values."""
    rows = [run.results["hyperparameters"] for run in runs]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        different = [value for i, value in enumerate(values) if value not in values[:i]]
        found[name] = different[0]
        if len(different) > 1:
            found[name] = different
            print(f"runs of {runs[0].cell.path.parent} differ in {name}: {some(different)}", file=sys.stderr)
    return found


def _subgroups(setting: SuiteSetting, metric: str) -> dict[str, dict[str, Any]]:
    """The main metric of each view, sex and age band, where there are two or more.

    A mean is over the labels that can be scored in every group (`labels`), since others would make groups differ.
    """
    predictions = [run.predictions for run in setting.runs]
    found: dict[str, dict[str, Any]] = {}
    for kind, names in predictions[0].groups.items():
        present = sorted(set(names) - {""})
        if len(present) < 2:
            continue
        rows = {name: np.flatnonzero(names == name) for name in present}
        shared = scored_everywhere([predictions[0].only(chosen).scored(metric) for chosen in rows.values()])
        for name, chosen in rows.items():
            score: dict[str, Any] = dict.fromkeys(("mean", "sd", "low", "high"), NOT_SCORED) | {
                "runs": len(predictions)
            }
            if shared.any():
                score = estimate([run.only(chosen, shared) for run in predictions], setting.samples)[metric].describe()
            counts = {"images": len(chosen), "patients": len(set(predictions[0].patients[chosen]))}
            labels = list(itertools.compress(predictions[0].names, shared))
            found.setdefault(kind, {})[name] = counts | {"labels": labels} | score
    return found


def _calibration(runs: Sequence[Predictions]) -> dict[str, Any] | None:
    """`ece_macro`, and by label `ece` and `bins`, of the probabilities of all runs together. None without a label."""
    by_label = {}
    for i, name in enumerate(runs[0].names):
        labels = np.concatenate([run.labels[:, i] for run in runs])
        if (~np.isnan(labels)).any():
            by_label[name] = calibration_error(labels, np.concatenate([run.probabilities[:, i] for run in runs]))
    if not by_label:
        return None
    return {"ece_macro": float(np.mean([row["ece"] for row in by_label.values()])), "labels": by_label}


def _confidence(runs: Sequence[FinishedCell]) -> dict[str, Any] | None:
    """Means over runs of `ece_macro` and `brier_macro`, `before` and `after` calibration; `unsure`, `error`, `errors`.

    `errors` are those at every coverage. None if a run is of an earlier version, which did not calibrate.
    """
    tests = [run.results["test"] for run in runs]
    if not all("calibration" in test for test in tests):
        return None
    found: dict[str, Any] = {
        when: {
            name: mean_scored(test["calibration"][when][name] for test in tests)
            for name in ("ece_macro", "brier_macro")
        }
        for when in ("before", "after")
    }
    found |= {name: mean_scored(test["answers"][name] for test in tests) for name in ("unsure", "error")}
    errors = [_errors_of_the_confident(run.predictions) for run in runs if isinstance(run.predictions, Predictions)]
    means = [NOT_SCORED if np.isnan(error) else float(error) for error in np.mean(errors, 0)]  # without known labels
    return found | {"errors": {f"{share:g}": error for share, error in zip(COVERAGES, means, strict=True)}}


def _errors_of_the_confident(run: Predictions) -> np.ndarray:
    """Error of the likeliest answer at every coverage, averaged over the findings; NaN without a known label."""
    if run.exclusive:
        right = run.probabilities.argmax(1) == run.labels.argmax(1)
        return np.array(selective_errors(run.probabilities.max(1), right))
    found = [np.full(len(COVERAGES), np.nan)]
    for given, truth in zip(run.probabilities.T, run.labels.T, strict=True):
        known = ~np.isnan(truth)
        if known.any():
            right = (given > 0.5) == (truth == 1)
            found.append(np.array(selective_errors(np.maximum(given, 1 - given)[known], right[known])))
    return np.mean(found[1:] or found, axis=0)


def _mean_decisions(runs: Sequence[dict[str, dict[str, Any]] | None]) -> dict[str, dict[str, Any]] | None:
    """Sensitivity, specificity and accuracy at the thresholds of validation, averaged over the runs."""
    known = [run for run in runs if run is not None]
    if not known:
        return None
    means: dict[str, dict[str, Any]] = {}
    for name, scores in known[0].items():
        for score in scores:
            means.setdefault(name, {})[score] = mean_scored(run[name][score] for run in known)
    return means


def _compare(suite: Suite, settings: Sequence[SuiteSetting]) -> list[dict[str, Any]]:
    by_name = {(s.task, s.protocol, s.label_fraction, s.model): s for s in settings}
    rows = []
    for task, protocol, fraction in dict.fromkeys((s.task, s.protocol, s.label_fraction) for s in settings):
        for pair in suite.compare:
            ours, theirs = (by_name.get((task, protocol, fraction, model)) for model in pair)
            if ours is None or theirs is None:
                continue
            metric = suite.metrics[task]
            runs = len(ours.runs) + len(theirs.runs)
            ours, theirs = _with_common_runs(ours, theirs)
            row = ours.names | {
                "baseline": theirs.model,
                "metric": metric,
                **difference(ours.estimates[metric], theirs.estimates[metric]),
                "paired": pair_scores(ours, theirs, metric),
                "left_out": runs - len(ours.runs) - len(theirs.runs),
            }
            if len(ours.runs) == len(theirs.runs) == 1:
                known = ours.runs[0].results["data"].get("patients_known") is not False
                row["delong"] = _delong(ours.runs[0].predictions, theirs.runs[0].predictions) if known else None
            rows.append(row)
    return rows


def _with_common_runs(ours: SuiteSetting, theirs: SuiteSetting) -> tuple[SuiteSetting, SuiteSetting]:
    """Both settings without the runs that have no counterpart, as in a grid that is not finished.

    Counterparts have one seed, and one pretraining if both models have several. Without any, all runs stay.
    """
    several = all(len({run.cell.member for run in setting.runs}) > 1 for setting in (ours, theirs))

    def name(run: FinishedCell) -> tuple[int, int]:
        return (run.cell.member if several else 0, run.cell.seed)

    common = set(map(name, ours.runs)) & set(map(name, theirs.runs))
    if not common:
        return ours, theirs
    first, second = (
        setting
        if common.issuperset(map(name, setting.runs))
        else replace(setting, runs=tuple(run for run in setting.runs if name(run) in common))
        for setting in (ours, theirs)
    )
    return first, second


def pair_scores(ours: SuiteSetting, theirs: SuiteSetting, metric: str) -> dict[str, Any] | None:
    """Paired t-test and Wilcoxon test over the pretrainings if both models have several, else over the seeds.

    Runs of one pretraining are not independent, so with several pretrainings their mean is one value. Returns None if
    there are fewer than two pairs, or if a score is not defined.
    """
    for unit in ("member", "seed"):
        first, second = ours.by(unit, metric), theirs.by(unit, metric)
        common = sorted(set(first) & set(second))
        if len(common) > 1:
            values = [[scores[key] for key in common] for scores in (first, second)]
            if np.isfinite(values).all():
                name = {"member": "pretrainings", "seed": "seeds"}[unit]
                found = paired_tests(*values)
                return {"unit": name, "pairs": found["seeds"]} | defined({p: found[p] for p in ("t_p", "wilcoxon_p")})
    return None


def _delong(ours: RunResults, theirs: RunResults) -> dict[str, Any] | None:
    """DeLong test by label. None for segmenters, and where a patient has several images, which are not independent."""
    if not (isinstance(ours, Predictions) and isinstance(theirs, Predictions)):
        return None
    if len(set(ours.patients)) < len(ours.patients):
        return None
    found = {}
    for i, name in enumerate(ours.names):
        labels = ours.labels[:, i]
        if min((labels == value).sum() for value in (0, 1)) > 1:
            found[name] = defined(delong_test(labels, ours.probabilities[:, i], theirs.probabilities[:, i]))
    return found


def _shortcuts(audits: Mapping[str, Sequence[Audit]]) -> list[dict[str, Any]]:
    """Average over the weights of each model, with the lowest and the highest end of their intervals."""
    rows = []
    for model, members in audits.items():
        for first in (row for row in members[0] if row["kind"] != SEARCH):
            same = [row for audit in members for row in audit if all(row[k] == first[k] for k in ("kind", "data"))]
            ends = [row for row in same if row["low"] != NOT_SCORED]
            merged = first | {
                "auroc": float(np.mean([row["auroc"] for row in same])),
                "low": min((row["low"] for row in ends), default=NOT_SCORED),
                "high": max((row["high"] for row in ends), default=NOT_SCORED),
            }
            rows.append({"model": model, "members": len(same)} | merged)
    return rows


def _search_precision(audits: Mapping[str, Sequence[Audit]]) -> list[dict[str, Any]]:
    """Average the precision of neighbours over the weights of each model."""
    rows = []
    for model, members in audits.items():
        found = [row for audit in members for row in audit if row["kind"] == SEARCH and row["precision"] is not None]
        for data in dict.fromkeys(row["data"] for row in found):
            same = [row for row in found if row["data"] == data]
            precision = float(np.mean([row["precision"] for row in same]))
            about = {"model": model, "members": len(same), "data": data}
            rows.append(about | {"precision": precision, "chance": same[0]["chance"]})
    return rows


def paper_table(suite: Suite, settings: Sequence[SuiteSetting], table: str) -> list[dict[str, Any]]:
    """Put our figures beside those of a table of the paper, one of `paper_tables`.

    A setting belongs to a figure when its task has the paper's name of the data set (`paper` of the suite) and shows
    the paper's score, and its model has the paper's name of the method; upper and lower case count alike.

    Returns:
        Rows of `paper_results` with `paper` (value), `paper_sd`, `ours`, `ours_sd`, `low` and `high`; None for a figure
        that there is not, as the deviation of a single run.
    """
    ours = {}
    for setting in settings:
        dataset, metric = suite.paper.get(setting.task), suite.metrics[setting.task]
        for column, found in _columns(setting, metric).items():
            ours[(metric, dataset, setting.protocol, setting.label_fraction, setting.model.lower(), column)] = found
    rows = []
    figures = paper_results()
    for row in figures[figures["table"] == table].to_dict("records"):
        key = (row["dataset"], row["protocol"], row["label_fraction"], row["method"].lower(), row["column"])
        mine = ours.get((PAPER_METRICS[row["metric"]], *key), {})
        rows.append(
            {name: row[name] for name in ("dataset", "protocol", "label_fraction", "method", "column", "metric")}
            | {"paper": row["value"], "paper_sd": None if np.isnan(row["sd"]) else row["sd"]}
            | {"ours": mine.get("mean"), "ours_sd": mine.get("sd") if mine.get("runs", 0) > 1 else None}
            | {"low": mine.get("low"), "high": mine.get("high")}
        )
    return rows


def _columns(setting: SuiteSetting, metric: str) -> dict[str, dict[str, Any]]:
    """Scores under the names of the paper's columns."""
    start = f"{metric.removesuffix('_macro')}:"
    by_label = {n.removeprefix(start): value for n, value in setting.estimates.items() if n.startswith(start)}
    main = {"Dice" if metric.startswith("dice") else "Mean": setting.estimates[metric]}
    return {name: value.describe() for name, value in (main | by_label).items()}
