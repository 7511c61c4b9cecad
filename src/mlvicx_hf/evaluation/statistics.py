# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores of finished runs from their test predictions, with intervals by resampling patients."""

from __future__ import annotations

import argparse
import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import write_json
from mlvicx_hf.scoring.bootstrap import draw_patients, weighted_areas, weighted_mean
from mlvicx_hf.scoring.metrics import NOT_SCORED, overlap_per_image

GROUPS = ("view", "sex", "age")


@dataclass(frozen=True)
class RunResults(ABC):
    """What one run found on its test images.

    Attributes:
        patients: N patients.
        sources: N names of images.
        names: L labels or structures.
        groups: kind of subgroup → N names; "" for unknown.
    """

    patients: np.ndarray
    sources: np.ndarray
    names: tuple[str, ...]
    groups: dict[str, np.ndarray]
    file: ClassVar[str]
    metric: ClassVar[str]
    title: ClassVar[str]

    @property
    @abstractmethod
    def truth(self) -> np.ndarray:
        """What was known of the images."""

    @abstractmethod
    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of every draw [D, N]: name → [D], NaN where nothing can be scored."""

    def only(self, rows: np.ndarray) -> Self:
        """The run on some of its images."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)}
        return replace(self, **chosen, groups={kind: names[rows] for kind, names in self.groups.items()})


@dataclass(frozen=True)
class Predictions(RunResults):
    """Of a classifier: labels [N, L] of 1, 0 or NaN, and probabilities [N, L]."""

    labels: np.ndarray
    probabilities: np.ndarray
    file = "test_predictions.csv"
    metric = "auroc_macro"
    title = "AUROC macro"

    @property
    def truth(self) -> np.ndarray:
        """The labels."""
        return self.labels

    @property
    def exclusive(self) -> bool:
        """Whether the labels are classes of which every image has one."""
        sums = [table.sum(1) for table in (self.labels, self.probabilities)]
        return len(self.names) > 1 and all(np.allclose(values, 1, atol=1e-6) for values in sums)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`auroc_macro`, `auroc:NAME`, `auprc_macro`, `auprc:NAME`, `accuracy`."""
        areas = [weighted_areas(*columns, weights) for columns in zip(self.labels.T, self.probabilities.T, strict=True)]
        scored = [bool((column == 0).any() and (column == 1).any()) for column in self.labels.T]
        found: dict[str, np.ndarray] = {}
        for kind, values in zip(("auroc", "auprc"), zip(*areas, strict=True), strict=True):
            found[f"{kind}_macro"] = _mean_of_scored(values, scored)
            found |= {f"{kind}:{name}": value for name, value in zip(self.names, values, strict=True)}
        if self.exclusive:
            right, known = self.probabilities.argmax(1) == self.labels.argmax(1), np.ones(len(self.labels))
        else:
            right = ((self.probabilities > 0.5) == (self.labels == 1)) & ~np.isnan(self.labels)
            right, known = right.sum(1), (~np.isnan(self.labels)).sum(1)
        with np.errstate(invalid="ignore"):
            found["accuracy"] = weights @ right / (weights @ known)
        return found


@dataclass(frozen=True)
class Overlaps(RunResults):
    """Of a segmenter: pixels of overlap, prediction and truth, [N, L, 3]."""

    counts: np.ndarray
    file = "test_overlaps.csv"
    metric = "dice"
    title = "Dice"

    @property
    def truth(self) -> np.ndarray:
        """Whether an image shows a structure; pixels depend on the size at which a model is scored."""
        return self.counts[..., 2] > 0

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`dice`, `dice_positive` (over the images that show the structure), and both by structure."""
        dice, _ = overlap_per_image(self.counts)
        positive = self.counts[..., 2] > 0
        found: dict[str, np.ndarray] = {}
        for kind, counted in (("dice", np.ones_like(positive)), ("dice_positive", positive)):
            values = [weighted_mean(dice[:, i], weights, counted[:, i]) for i in range(len(self.names))]
            found[kind] = _mean_of_scored(values, [bool(column.any()) for column in counted.T])
            found |= {f"{kind}:{name}": value for name, value in zip(self.names, values, strict=True)}
        return found


def _mean_of_scored(values: Sequence[np.ndarray], scored: Sequence[bool]) -> np.ndarray:
    """Mean over the labels that all images together score; NaN in a draw that lacks one, as that is another mean."""
    chosen = list(itertools.compress(values, scored))
    return np.mean(chosen, axis=0) if chosen else np.full_like(values[0], np.nan)


def read_run(run: Path) -> RunResults:
    """What fine-tuning wrote of the test images into a run's folder.

    Raises:
        FileNotFoundError: the run has nothing of the kind.
    """
    file = next((run / kind.file for kind in (Predictions, Overlaps) if (run / kind.file).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"{run} holds no {Predictions.file} and no {Overlaps.file}; expected a finished run of "
            "finetune_classification.py or finetune_segmentation.py"
        )
    texts = ("source", "patient_id", *GROUPS)
    table = pd.read_csv(file, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])
    table[[c for c in texts if c in table]] = table[[c for c in texts if c in table]].fillna("")

    def names_behind(kind: str) -> tuple[str, ...]:
        return tuple(c.removeprefix(f"{kind}:") for c in table.columns if c.startswith(f"{kind}:"))

    def values(kind: str, names: tuple[str, ...]) -> np.ndarray:
        return table[[f"{kind}:{name}" for name in names]].to_numpy(float)  # [N, L]

    common: dict[str, Any] = {
        "patients": table["patient_id"].to_numpy(str),
        "sources": table["source"].to_numpy(str),
        "groups": {kind: table[kind].to_numpy(str) for kind in GROUPS if kind in table},
    }
    if file.name == Predictions.file:
        names = names_behind("label")
        return Predictions(
            **common, names=names, labels=values("label", names), probabilities=values("probability", names)
        )
    names = names_behind("true")
    counts = np.stack([values(kind, names) for kind in ("overlap", "predicted", "true")], -1)
    return Overlaps(**common, names=names, counts=counts)


@dataclass(frozen=True)
class Estimate:
    """A score averaged over runs that were tested on the same images.

    Attributes:
        runs: [R], NaN where it is not defined.
        draws: [D], the mean over the runs in every draw of patients.
    """

    runs: np.ndarray
    draws: np.ndarray = field(repr=False)

    @property
    def value(self) -> float:
        """Mean over the runs."""
        return float(self.runs.mean())

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the runs (divisor n - 1); 0 of a single one that has a value."""
        return float(self.runs.std(ddof=1)) if len(self.runs) > 1 else 0.0 * self.value

    @property
    def interval(self) -> tuple[float, float]:
        """Percentile bootstrap, 95 %, over the draws in which the score is defined; NaN if those are not even half."""
        return _interval(self.draws)

    def describe(self) -> dict[str, Any]:
        """`mean`, `sd` over the runs, `low`, `high`, `runs`; "n/a" for what is not defined."""
        low, high = self.interval
        found = {"mean": self.value, "sd": self.deviation, "low": low, "high": high}
        return {name: value if np.isfinite(value) else NOT_SCORED for name, value in found.items()} | {
            "runs": len(self.runs)
        }


def _interval(draws: np.ndarray) -> tuple[float, float]:
    defined = draws[~np.isnan(draws)]
    if 2 * len(defined) < len(draws):
        return float("nan"), float("nan")
    low, high = np.percentile(defined, [2.5, 97.5])
    return float(low), float(high)


def estimate(runs: Sequence[RunResults], samples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Every metric of some runs, averaged over them; the same patients and seed give the same draws.

    Args:
        runs: tested on the same images.
        samples: draws of patients.
        seed: of the draws.
    """
    everything = np.ones((1, len(runs[0].sources)))
    values = [run.scores(everything) for run in runs]
    draws: dict[str, list[np.ndarray]] = {name: [] for name in values[0]}
    for weights in draw_patients(runs[0].patients, samples, seed):
        drawn = [run.scores(weights) for run in runs]
        for name, parts in draws.items():
            parts.append(np.mean([found[name] for found in drawn], axis=0))
    return {
        name: Estimate(np.concatenate([found[name] for found in values]), np.concatenate(parts))
        for name, parts in draws.items()
    }


def difference(ours: Estimate, theirs: Estimate) -> dict[str, float | str]:
    """`difference` of two estimates with the same draws, `low` and `high`: "n/a" for what is not defined."""
    low, high = _interval(ours.draws - theirs.draws)
    found = {"difference": ours.value - theirs.value, "low": low, "high": high}
    return {name: value if np.isfinite(value) else NOT_SCORED for name, value in found.items()}


def check_same_images(runs: Mapping[str, RunResults]) -> None:
    """Refuse to compare runs that were not tested on the same images and labels.

    Args:
        runs: by the name that a message gives them.

    Raises:
        ValueError: naming two that differ.
    """
    name, first = next(iter(runs.items()))
    for other_name, other in runs.items():
        same = type(other) is type(first) and other.names == first.names
        same = same and np.array_equal(other.sources, first.sources)
        if not same or not np.array_equal(other.truth, first.truth, equal_nan=True):
            raise UserError(
                f"{other_name} was tested on other images or labels than {name}; expected the same test split"
            )


def compare_runs(runs: Sequence[Path], baselines: Sequence[Path], samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Macro AUROC or Dice of two groups of runs, averaged over their seeds, and a 95 % interval of the difference.

    The interval is the percentile bootstrap over patients: each sample draws the test patients with replacement and
    scores every run on the same draw. It says how far the difference depends on who was tested, not on the seed of
    pretraining.

    Args:
        runs: folders of finished runs, one a seed.
        baselines: folders that they are compared with.
        samples: draws of patients.
        seed: of the draws.

    Returns:
        `metric`, `runs`, `baselines`, their standard deviations over seeds, `difference`, `low` and `high`; "n/a" for
        what is not defined.

    Raises:
        ValueError: runs that were not tested on the same images and labels.
    """
    groups = [[read_run(run) for run in group] for group in (runs, baselines)]
    check_same_images(dict(zip(map(str, (*runs, *baselines)), groups[0] + groups[1], strict=True)))
    first = groups[0][0]
    ours, theirs = (estimate(group, samples, seed)[first.metric] for group in groups)
    described, other = ours.describe(), theirs.describe()
    return {
        "metric": first.title,
        "runs": described["mean"],
        "runs_sd": described["sd"],
        "baselines": other["mean"],
        "baselines_sd": other["sd"],
        **difference(ours, theirs),
    }


def _text(value: float | str, form: str) -> str:
    return value if isinstance(value, str) else format(value, form)


def main() -> None:
    """The command `scripts/compare_runs.py`."""
    parser = argparse.ArgumentParser(description="Macro AUROC or Dice of runs against baselines, with an interval.")
    parser.add_argument("--runs", nargs="+", type=Path, required=True, help="folders of fine-tuned runs, one a seed")
    parser.add_argument("--baselines", nargs="+", type=Path, required=True, help="folders to compare with")
    parser.add_argument("--samples", type=int, default=1000, help="draws of patients")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    found = compare_runs(arguments.runs, arguments.baselines, arguments.samples, arguments.seed)
    runs, runs_sd, baselines, baselines_sd = (
        _text(found[name], ".4f") for name in ("runs", "runs_sd", "baselines", "baselines_sd")
    )
    gain, low, high = (_text(found[name], "+.4f") for name in ("difference", "low", "high"))
    print(
        f"test {found['metric']} {runs} (SD {runs_sd}) against {baselines} (SD {baselines_sd}): difference {gain}, "
        f"95 % interval {low} to {high}"
    )
    if arguments.output:
        write_json(arguments.output, found | {"samples": arguments.samples, "seed": arguments.seed})
