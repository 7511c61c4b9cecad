"""Scores of finished runs with intervals by resampling patients, and the comparison of two groups of runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import read_json
from mlvicx_hf.data.options import check_least, check_once
from mlvicx_hf.scoring.bootstrap import draw_patients
from mlvicx_hf.scoring.labels import NOT_SCORED

from .runs import RunResults, check_same_images, read_run

SHARED_FIELDS = ("protocol", "label_fraction", "max_train_samples", "drop_context")  # of results in one group


@dataclass(frozen=True)
class Estimate:
    """A score averaged over runs that were tested on the same images."""

    runs: np.ndarray  # [R], score of each run, NaN where it is not defined
    draws: np.ndarray = field(repr=False)  # [D], mean over the runs in each draw of patients
    raised: bool = False  # whether draws score higher than the patients themselves; see `interval`

    @property
    def value(self) -> float:
        """Mean over the runs."""
        return float(self.runs.mean())

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the runs (divisor R - 1); 0 of a single one that has a value."""
        return float(self.runs.std(ddof=1)) if len(self.runs) > 1 else 0.0 * self.value

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval over the draws that define the score; NaN if fewer than half of them do.

        It is the percentile interval, but the basic one for a score that draws raise. Such is average precision: a
        positive that is drawn twice ties with itself, and a mean over labels keeps the bias while its spread shrinks.
        It is widened to hold the score itself, if draws raise that by more than they differ.
        """
        low, high = interval(self.draws, self.value, self.raised)
        return max(low, 0.0), min(high, 1.0)

    def describe(self) -> dict[str, Any]:
        """`mean`, `sd` over the runs, `low`, `high`, `runs`; "n/a" for what is not defined."""
        low, high = self.interval
        found = {"mean": self.value, "sd": self.deviation, "low": low, "high": high}
        return defined(found) | {"runs": len(self.runs)}


def interval(draws: np.ndarray, value: float, raised: bool = False) -> tuple[float, float]:
    """95 % percentile interval of draws [D], or if they are `raised` the basic one; NaN if fewer than half are defined.

    It always holds the value.
    """
    known = draws[~np.isnan(draws)]
    if 2 * len(known) < len(draws):
        return float("nan"), float("nan")
    low, high = (float(end) for end in np.percentile(known, [2.5, 97.5]))
    low, high = (2 * value - high, 2 * value - low) if raised else (low, high)
    return min(low, value), max(high, value)


def defined(found: dict[str, float]) -> dict[str, float | str]:
    """Write "n/a" for every number that is not finite."""
    return {name: value if np.isfinite(value) else NOT_SCORED for name, value in found.items()}


def estimate(runs: Sequence[RunResults], samples: int = 1000, seed: int = 0) -> dict[str, Estimate]:
    """Average every metric over runs that were tested on the same images, with `samples` draws of their patients."""
    everything = np.ones((1, len(runs[0].sources)))
    values = [run.scores(everything) for run in runs]
    draws: dict[str, list[np.ndarray]] = {name: [] for name in values[0]}
    for weights in draw_patients(runs[0].patients, samples, seed):
        drawn = [run.scores(weights) for run in runs]
        for name, parts in draws.items():
            parts.append(np.mean([found[name] for found in drawn], axis=0))
    return {
        name: Estimate(np.concatenate([v[name] for v in values]), np.concatenate(parts), name.startswith("auprc"))
        for name, parts in draws.items()
    }


def difference(ours: Estimate, theirs: Estimate) -> dict[str, float | str]:
    """`difference` of two estimates with the same draws, `low` and `high`; "n/a" for what is not defined."""
    value = ours.value - theirs.value
    # What raises draws raises those of a higher score more, so it does not cancel.
    low, high = interval(ours.draws - theirs.draws, value, ours.raised)
    return defined({"difference": value, "low": low, "high": high})


def compare_runs(runs: Sequence[Path], baselines: Sequence[Path], samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Compare macro AUROC or Dice of two groups of runs, each averaged over its seeds.

    The 95 % interval of the difference is the percentile bootstrap over patients: each sample draws the test patients
    with replacement and scores every run on the same draw. It says how far the difference depends on who was tested,
    not on the seed of pretraining.

    Args:
        runs: folders of finished runs, one for each seed.
        baselines: folders of the runs that they are compared with.
        samples: draws of patients.
        seed: of the draws.

    Returns:
        `metric`, `labels`, `images`, `patients`, `runs`, `baselines`, their standard deviations over seeds,
        `difference`, `low` and `high`; "n/a" for what is not defined, as the deviation of a single run. Also
        `patients_known`, False if a run says that each image counts as a patient, and None if one says nothing of it.

    Raises:
        UserError: runs that were not tested on the same images and labels, runs of a group that differ in more than
            weights and seed, or no draws.
    """
    check_least(1, samples=samples)
    check_least(0, seed=seed)
    check_once("--runs and --baselines", [str(folder.resolve()) for folder in (*runs, *baselines)])
    told = [*_told(runs), *_told(baselines)]
    groups = [[read_run(run) for run in group] for group in (runs, baselines)]
    check_same_images(dict(zip(map(str, (*runs, *baselines)), groups[0] + groups[1], strict=True)))
    first = groups[0][0]
    ours, theirs = (estimate(group, samples, seed)[first.metric] for group in groups)
    found: dict[str, Any] = {"metric": first.title, "labels": list(first.names)}
    found |= {"images": len(first.sources), "patients": len(set(first.patients))}
    for name, score in (("runs", ours.describe()), ("baselines", theirs.describe())):
        found |= {name: score["mean"], f"{name}_sd": score["sd"] if score["runs"] > 1 else NOT_SCORED}
    known = {about.get("data", {}).get("patients_known") for about in told}
    found["patients_known"] = False if False in known else None if None in known else True
    return found | difference(ours, theirs)


def _told(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """What the results of a group say of each run; nothing if they are gone.

    Raises:
        UserError: runs that do not repeat one another.
    """
    files = [run / "results.json" for run in runs]
    told = [read_json(file) if file.is_file() else {} for file in files]
    for run, about in zip(runs, told, strict=True):
        ours, first = (
            each.get("hyperparameters", {})
            | ({"image_size": each["image_size"]} if "image_size" in each else {})  # of segmenters
            | {name: each.get(name) or None for name in SHARED_FIELDS}
            for each in (about, told[0])
        )
        for name in (name for name in first if name in ours):  # earlier versions told fewer
            if ours[name] != first[name]:
                raise UserError(
                    f"{run}: {name} {ours[name]} found, and {first[name]} in {runs[0]}; expected runs that differ in "
                    "their weights and seeds alone"
                )
    return told
