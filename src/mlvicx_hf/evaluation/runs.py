"""What finished runs found on their test images, and the scores of weighted images."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some
from mlvicx_hf.scoring.bootstrap import weighted_areas, weighted_mean
from mlvicx_hf.scoring.labels import has_both_values
from mlvicx_hf.scoring.overlap import overlap_per_image

GROUPS = ("view", "sex", "age")
FEW_PIXELS = 64  # of a structure: a square that is one pixel at an eighth of the side


@dataclass(frozen=True)
class RunResults(ABC):
    """What one run found on its test images."""

    patients: np.ndarray  # [N], patient of each image
    sources: np.ndarray  # [N], name of each image
    names: tuple[str, ...]  # the L labels or structures
    groups: dict[str, np.ndarray]  # kind of subgroup → group of each image, [N]; "" for unknown
    file: ClassVar[str]
    metric: ClassVar[str]
    title: ClassVar[str]

    @property
    @abstractmethod
    def truth(self) -> np.ndarray:
        """What was known of the images, [N, L]."""

    @abstractmethod
    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of every draw [D, N]: name → [D], NaN where nothing can be scored."""

    @abstractmethod
    def scored(self, metric: str) -> np.ndarray:
        """Of which labels a metric can be computed on all images together, bool [L]."""

    def only(self, rows: np.ndarray, labels: np.ndarray | None = None) -> Self:
        """The run on some of its images, and with some of its labels, bool [L]."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {k: v[rows] for k, v in arrays.items() if isinstance(v, np.ndarray)}
        if labels is not None and not labels.all():
            chosen |= {name: value[:, labels] for name, value in chosen.items() if value.ndim > 1}
            chosen["names"] = tuple(itertools.compress(self.names, labels))
        return replace(self, **chosen, groups={kind: names[rows] for kind, names in self.groups.items()})


@dataclass(frozen=True)
class Predictions(RunResults):
    """A classifier's labels [N, L] of 1, 0 or NaN, and probabilities [N, L]."""

    labels: np.ndarray
    probabilities: np.ndarray
    file = "test_predictions.csv"
    metric = "auroc_macro"
    title = "AUROC macro"

    @property
    def truth(self) -> np.ndarray:
        """The labels."""
        return self.labels

    def scored(self, metric: str) -> np.ndarray:
        """Labels with both values; an accuracy needs none of them."""
        return np.array([metric == "accuracy" or has_both_values(column) for column in self.labels.T])

    @property
    def exclusive(self) -> bool:
        """Whether the labels are classes of which every image has exactly one."""
        sums = [table.sum(1) for table in (self.labels, self.probabilities)]
        return len(self.names) > 1 and all(np.allclose(values, 1, atol=1e-6) for values in sums)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`auroc_macro`, `auroc:NAME`, `auprc_macro`, `auprc:NAME`, `accuracy`."""
        areas = [weighted_areas(*columns, weights) for columns in zip(self.labels.T, self.probabilities.T, strict=True)]
        scored = self.scored("auroc_macro")
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
    """A segmenter's pixels of overlap, prediction and truth, [N, L, 3]."""

    counts: np.ndarray
    file = "test_overlaps.csv"
    metric = "dice"
    title = "Dice"

    @property
    def truth(self) -> np.ndarray:
        """Whether an image shows a structure. Pixel counts depend on the size at which a model is scored."""
        return self.counts[..., 2] > 0

    def scored(self, metric: str) -> np.ndarray:
        """All structures, or for `dice_positive` those that an image shows."""
        return np.array([metric == "dice" or shown.any() for shown in self.truth.T])

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """`dice`, `dice_positive` (over the images that show the structure), and both by structure."""
        dice, _ = overlap_per_image(self.counts)
        found: dict[str, np.ndarray] = {}
        for kind, counted in (("dice", np.ones_like(self.truth)), ("dice_positive", self.truth)):
            values = [weighted_mean(dice[:, i], weights, counted[:, i]) for i in range(len(self.names))]
            found[kind] = _mean_of_scored(values, self.scored(kind))
            found |= {f"{kind}:{name}": value for name, value in zip(self.names, values, strict=True)}
        return found


def scored_everywhere(groups: Sequence[np.ndarray]) -> np.ndarray:
    """Of which labels a score can be computed in every group that has any, from bool [L] of each."""
    known = [scored for scored in groups if scored.any()] or groups
    return np.array(np.stack(known).all(0))


def _mean_of_scored(values: Sequence[np.ndarray], scored: np.ndarray) -> np.ndarray:
    """Mean over the labels that can be scored on all images together.

    NaN in a draw in which one of them cannot be scored, since that draw's mean would be over other labels.
    """
    chosen = list(itertools.compress(values, scored))
    return np.mean(chosen, axis=0) if chosen else np.full_like(values[0], np.nan)


def read_run(run: Path) -> RunResults:
    """Read the test predictions that fine-tuning wrote into a run's folder.

    Raises:
        FileNotFoundError: the folder has none.
        UserError: the table is not what was written.
    """
    kind = next((kind for kind in (Predictions, Overlaps) if (run / kind.file).is_file()), None)
    if kind is None:
        raise FileNotFoundError(
            f"{run} holds no {Predictions.file} and no {Overlaps.file}; expected a finished run of mlvicx classify or "
            "mlvicx segment"
        )
    texts = ("source", "patient_id", *GROUPS)
    file = run / kind.file
    try:
        table = pd.read_csv(file, dtype=dict.fromkeys(texts, str), keep_default_na=False, na_values=[""])
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {error}; expected the table that the run wrote") from error
    truth = "label:" if kind is Predictions else "true:"
    names = tuple(column.removeprefix(truth) for column in table.columns if column.startswith(truth))
    measured = ("label", "probability") if kind is Predictions else ("overlap", "predicted", "true")
    wanted = ["source", "patient_id", *(f"{each}:{name}" for name in names or ("…",) for each in measured)]
    if absent := [column for column in wanted if column not in table]:
        raise UserError(
            f"{file}: columns {some(table.columns)} found; expected {some(absent)} as well, as the run wrote them"
        )
    table = table.fillna(dict.fromkeys(texts, ""))

    def values(kind: str) -> np.ndarray:
        return table[[f"{kind}:{name}" for name in names]].to_numpy(float)  # [N, L]

    common: dict[str, Any] = {
        "patients": table["patient_id"].to_numpy(str),
        "sources": table["source"].to_numpy(str),
        "names": names,
        "groups": {kind: table[kind].to_numpy(str) for kind in GROUPS if kind in table},
    }
    if kind is Predictions:
        return Predictions(**common, labels=values("label"), probabilities=values("probability"))
    return Overlaps(**common, counts=np.stack([values(kind) for kind in ("overlap", "predicted", "true")], -1))


def _shows_the_same(one: RunResults, other: RunResults) -> bool:
    """Whether labels are equal. A structure of few pixels may be lost at the size at which a model is scored."""
    if isinstance(one, Overlaps) and isinstance(other, Overlaps):
        pixels = np.maximum(one.counts[..., 2], other.counts[..., 2])
        return bool((pixels[one.truth != other.truth] <= FEW_PIXELS).all())
    return np.array_equal(one.truth, other.truth, equal_nan=True)


def check_same_images(runs: Mapping[str, RunResults]) -> None:
    """Refuse to compare runs, name → run, that were not tested on the same images of the same patients and labels.

    Raises:
        UserError: naming two that differ.
    """
    name, first = next(iter(runs.items()))
    for other_name, other in runs.items():
        same = type(other) is type(first) and other.names == first.names
        same = same and np.array_equal(other.sources, first.sources)
        if not (same and _shows_the_same(first, other)):
            raise UserError(
                f"{other_name} was tested on other images or labels than {name}; expected the same test split"
            )
        if not np.array_equal(other.patients, first.patients):  # a draw of one's patients is no draw of the other's
            raise UserError(
                f"{other_name} names other patients of the same test images than {name}; expected runs on one cache"
            )
