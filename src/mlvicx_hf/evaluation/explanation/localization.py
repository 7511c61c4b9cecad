"""Does a heat map point at the finding? True regions, scores against them, and intervals over patients."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import distance_transform_edt

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import Cache
from mlvicx_hf.data.masks import foreground
from mlvicx_hf.data.vocabulary import normalize
from mlvicx_hf.scoring.bootstrap import draw_patients, weighted_mean

from ..statistics import Estimate, defined, difference

ROUNDING = 1e-5  # of the maximum: a value this close to it counts as equal, since interpolation rounds


@dataclass(frozen=True)
class Subject:
    """A finding, the images of a split that show it, and where it is in them."""

    finding: str  # label of the cache
    mask_value: int | None  # of the finding in the masks; None where they do not show it
    size: int  # side of the cache's images
    rows: tuple[int, ...] = ()  # of the images that show it, those with a known region first
    located: int = 0  # number of those

    def region(self, row: Mapping[str, Any]) -> np.ndarray | None:
        """Find where the finding is in an image of the cache: its mask, or else every pixel that its boxes touch.

        Returns:
            Bool [size, size]; None if it is not known.
        """
        if self.mask_value is not None and row["mask"] is not None:
            region = np.asarray(row["mask"]) == self.mask_value
            if region.any():
                return region
        region = np.zeros((self.size, self.size), dtype=bool)
        for box in row.get("boxes") or ():
            if box["label"] == self.finding:
                rows = slice(math.floor(box["y_min"]), math.ceil(box["y_max"]))
                region[rows, math.floor(box["x_min"]) : math.ceil(box["x_max"])] = True
        return region if region.any() else None


def find_subject(cache: Cache, split: str, finding: str, mask_name: str | None = None) -> Subject:
    """Find the images of a split that show a finding, and those of them in which its region is known.

    `mask_name` is the structure of the masks that is the finding; by default the one of the same name, if there is one.

    Raises:
        UserError: a structure that the masks do not have.
    """
    structures = foreground(cache.mask_names)
    if mask_name is not None and mask_name not in structures:
        listed = ", ".join(structures) or "nothing"
        raise UserError(f"mask_name={mask_name!r} found; {cache.path} has masks of {listed}")
    alike = {normalize(name): value for name, value in structures.items()}
    value = alike.get(normalize(finding)) if mask_name is None else structures[mask_name]
    subject = Subject(finding, value, cache.manifest["size"])
    images, column = cache.datasets[split], cache.label_names.index(finding)
    shown = [row for row, labels in enumerate(images["labels"]) if labels[column] == 1]
    truth = images.select_columns(["source", *(name for name in ("mask", "boxes") if name in images.features)])
    located = [row for row in shown if subject.region(truth[row]) is not None]
    unknown = sorted(set(shown) - set(located))
    return replace(subject, rows=(*located, *unknown), located=len(located))


class Localization(NamedTuple):
    """Scores of one heat map, between 0 and 1."""

    pointing: float  # pointing game (arXiv 1608.00507): whether the maximum lies in the region
    energy: float  # share of the map's sum that lies in the region (arXiv 1910.01279)
    iou: float  # intersection over union of the region and as many of the map's highest pixels


def localize(heat: np.ndarray, region: np.ndarray, tolerance: float = 0) -> Localization:
    """Score a heat map against the region where the finding is.

    Equally high pixels count their share, as if one of them were drawn by lot, so a constant map gets exactly the
    scores of `chance`. A map that is zero everywhere is a miss, 0 in all scores.

    Args:
        heat: [H, W], nowhere negative.
        region: bool [H, W], not empty.
        tolerance: pixels by which the maximum may miss the region.
    """
    assert region.dtype == bool
    assert region.any()
    assert heat.shape == region.shape
    assert (heat >= 0).all()
    if not heat.any():
        return Localization(0, 0, 0)
    heat = heat.astype(np.float64)
    peak = heat >= heat.max() * (1 - ROUNDING)
    size = int(region.sum())
    lowest = np.partition(heat, -size, axis=None)[-size]  # of as many of the highest pixels as the region has
    above, level = heat > lowest, heat == lowest
    common = (above & region).sum() + (size - above.sum()) * level[region].sum() / level.sum()
    return Localization(
        pointing=float(_widen(region, tolerance)[peak].mean()),
        energy=float(heat[region].sum() / heat.sum()),
        iou=float(common / (2 * size - common)),
    )


def chance(region: np.ndarray, tolerance: float = 0) -> Localization:
    """Scores of a constant map: the region's share a of the image, and a / (2 - a) for IoU.

    Args:
        region: bool [H, W], not empty.
        tolerance: see `localize`.
    """
    area = float(region.mean())
    return Localization(float(_widen(region, tolerance).mean()), area, area / (2 - area))


def usual_place(regions: Sequence[np.ndarray], patients: Sequence[str], tolerance: float = 0) -> list[Localization]:
    """Scores of a map that does not look at the image: of where the finding lies in the other patients.

    They are NaN where there is no other patient.

    Args:
        regions: bool [H, W] of each of N images.
        patients: of the N images.
        tolerance: see `localize`.
    """
    total, own = np.zeros(regions[0].shape), defaultdict[str, Any](float)
    for patient, region in zip(patients, regions, strict=True):
        total += region
        own[patient] = own[patient] + region
    if len(own) < 2:
        return [Localization(np.nan, np.nan, np.nan)] * len(regions)
    places = zip(patients, regions, strict=True)
    return [localize(total - own[patient], region, tolerance) for patient, region in places]


def _widen(region: np.ndarray, tolerance: float) -> np.ndarray:
    """The region and all pixels that are at most so far away from it, [H, W]."""
    return distance_transform_edt(~region) <= tolerance if tolerance else region


def summarize(
    scores: Mapping[str, np.ndarray], levels: Mapping[str, np.ndarray], patients: np.ndarray
) -> dict[str, Any]:
    """Average the scores of every model, and compare the first with the others, each with a 95 % interval.

    The interval is the percentile bootstrap over patients, with the same draws for all models.

    Args:
        scores: model → [N, 3], a `Localization` of each of the same N images.
        levels: what maps without a model score for these images: "chance" and "usual_place" → [N, 3].
        patients: of the N images.

    Returns:
        `scores`: model → score → `mean`, `low`, `high` and the mean of each level; `differences`: other model → score
        → `difference` (of the first model from it), `low`, `high`.
    """
    draws = list(draw_patients(patients))
    main, *others = scores
    found: dict[str, Any] = {"scores": {name: {} for name in scores}, "differences": {name: {} for name in others}}
    for column, score in enumerate(Localization._fields):
        estimates, means = {}, defined({name: float(table[:, column].mean()) for name, table in levels.items()})
        for name, table in scores.items():
            values = table[:, column]
            drawn = np.concatenate([weighted_mean(values, weights) for weights in draws])
            estimates[name] = Estimate(np.array([values.mean()]), drawn)
            described = estimates[name].describe()
            found["scores"][name][score] = {key: described[key] for key in ("mean", "low", "high")} | means
        for name in others:
            found["differences"][name][score] = difference(estimates[main], estimates[name])
    return found
