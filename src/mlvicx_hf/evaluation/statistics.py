"""Intervals from the test predictions of finished runs, by resampling patients."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from ..metrics import NOT_SCORED, score_labels, score_overlap
from ..progress import progress_bar
from ..provenance import write_json


@dataclass(frozen=True)
class RunResults(ABC):
    """What one run found on its test images.

    Attributes:
        patients: N patients.
        sources: N names of images.
        names: L labels or structures.
    """

    patients: np.ndarray
    sources: tuple[str, ...]
    names: tuple[str, ...]
    file: ClassVar[str]
    metric: ClassVar[str]

    @abstractmethod
    def score(self, rows: np.ndarray) -> float:
        """The metric over some rows; NaN if nothing can be scored."""


@dataclass(frozen=True)
class Predictions(RunResults):
    """Of a classifier: labels [N, L] of 1, 0 or NaN, and probabilities [N, L]."""

    labels: np.ndarray
    scores: np.ndarray
    file = "test_predictions.csv"
    metric = "AUROC macro"

    def score(self, rows: np.ndarray) -> float:
        """Macro AUROC."""
        scored = score_labels(self.scores[rows], self.labels[rows], self.names)["auroc_macro"]
        return float("nan") if scored == NOT_SCORED else float(scored)


@dataclass(frozen=True)
class Overlaps(RunResults):
    """Of a segmenter: pixels of overlap, prediction and truth, [N, L, 3]."""

    counts: np.ndarray
    file = "test_overlaps.csv"
    metric = "Dice"

    def score(self, rows: np.ndarray) -> float:
        """Dice, averaged over images and structures."""
        return float(score_overlap(self.counts[rows], self.names)["dice"])


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
    table = pd.read_csv(file, dtype={"source": str, "patient_id": str})

    def names_behind(kind: str) -> tuple[str, ...]:
        return tuple(c.removeprefix(f"{kind}:") for c in table.columns if c.startswith(f"{kind}:"))

    def values(kind: str, names: tuple[str, ...]) -> np.ndarray:
        return table[[f"{kind}:{name}" for name in names]].to_numpy(float)  # [N, L]

    patients, sources = table["patient_id"].to_numpy(str), tuple(table["source"])
    if file.name == Predictions.file:
        names = names_behind("label")
        return Predictions(patients, sources, names, values("label", names), values("probability", names))
    names = names_behind("true")
    counts = np.stack([values(kind, names) for kind in ("overlap", "predicted", "true")], -1)
    return Overlaps(patients, sources, names, counts)


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
        `metric`, `runs`, `baselines`, their standard deviations over seeds, `difference`, `low` and `high`.

    Raises:
        ValueError: runs that were not tested on the same images and labels.
    """
    groups = [[read_run(run) for run in group] for group in (runs, baselines)]
    first = groups[0][0]
    for run, other in zip((*runs, *baselines), groups[0] + groups[1], strict=True):
        if (type(other), other.sources, other.names) != (type(first), first.sources, first.names):
            raise ValueError(f"{run} was tested on other images or labels than {runs[0]}; expected the same test split")
    everyone = np.arange(len(first.sources))
    scores = [[p.score(everyone) for p in group] for group in groups]
    rows_of = [np.flatnonzero(first.patients == patient) for patient in np.unique(first.patients)]
    generator = np.random.default_rng(seed)
    differences = []
    with progress_bar(samples, "bootstrap", "draw") as bar:
        for _ in range(samples):
            drawn = np.concatenate([rows_of[i] for i in generator.integers(len(rows_of), size=len(rows_of))])
            ours, theirs = (np.mean([p.score(drawn) for p in group]) for group in groups)
            differences.append(ours - theirs)
            bar.update()
    low, high = np.nanpercentile(differences, [2.5, 97.5])
    mean, baseline = (float(np.mean(group)) for group in scores)
    return {
        "metric": first.metric,
        "runs": mean,
        "runs_sd": float(np.std(scores[0])),
        "baselines": baseline,
        "baselines_sd": float(np.std(scores[1])),
        "difference": mean - baseline,
        "low": float(low),
        "high": float(high),
    }


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
    print(
        f"test {found['metric']} {found['runs']:.4f} (SD {found['runs_sd']:.4f}) against {found['baselines']:.4f} "
        f"(SD {found['baselines_sd']:.4f}): difference {found['difference']:+.4f}, "
        f"95 % interval {found['low']:+.4f} to {found['high']:+.4f}"
    )
    if arguments.output:
        write_json(arguments.output, found | {"samples": arguments.samples, "seed": arguments.seed})
