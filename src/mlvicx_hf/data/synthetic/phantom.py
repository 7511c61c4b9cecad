"""Synthetic frontal chest radiographs with known findings, drawn from a seed. Not for any clinical conclusion.

A patient is a set of shapes. A picture is the sum of their attenuations, seen in a pose and with an exposure.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from ..options import check_least
from .drawing import (
    FINDINGS,
    SIDES,
    TILE_EXTENT,
    Canvas,
    Exposure,
    Heart,
    Lung,
    Patch,
    Patient,
    Pleura,
    Points,
    Pose,
    Spot,
    VesselTree,
    Visit,
    attenuate,
    expose,
    smooth_curve,
)

MASKS = ("lungs", "heart", *FINDINGS)


@dataclass(frozen=True)
class Phantom:
    """One synthetic radiograph with its truth; not for any clinical conclusion.

    Attributes:
        image: uint8 [S, S].
        masks: uint8 [S, S] of 0 and 255 for "lungs" (the lung fields beside the heart and above the diaphragm, with
            any fluid or air in them), "heart", and each finding (all zero if it is absent).
        labels: 0 or 1 in the order of `FINDINGS`.
        patient_id: "phantom-000012".
        image_id: "phantom-000012-0".
    """

    image: np.ndarray
    masks: dict[str, np.ndarray]
    labels: tuple[float, ...]
    patient_id: str
    image_id: str


def draw_phantom(patient: int, image: int = 0, *, size: int = 256, seed: int = 0) -> Phantom:
    """Draw one synthetic radiograph; not for any clinical conclusion.

    The picture depends on the arguments alone, so patients and pictures can be drawn in any order.

    Args:
        patient: number of the patient, from 0.
        image: number of the picture of this patient, from 0.
        size: height and width in pixels, at least 32.
        seed: number of the whole collection, from 0.

    Raises:
        UserError: a number is too small.
    """
    check_least(0, patient=patient, image=image, seed=seed)
    check_least(32, size=size)
    anatomy = _sample_patient(patient, seed)
    rng = np.random.default_rng([seed, patient, image + 1])
    visit = _sample_visit(rng)
    canvas = Canvas(size, visit.pose)
    attenuation, masks = attenuate(canvas, anatomy, visit)
    picture = expose(canvas, attenuation, visit.exposure, rng)
    open_beam = _collimate(size, visit.border)
    return Phantom(
        image=np.where(open_beam, picture, 0).astype(np.uint8),
        masks={name: np.where(mask & open_beam, 255, 0).astype(np.uint8) for name, mask in masks.items()},
        labels=anatomy.labels,
        patient_id=f"phantom-{patient:06d}",
        image_id=f"phantom-{patient:06d}-{image}",
    )


def phantom_labels(patient: int, *, seed: int = 0) -> tuple[float, ...]:
    """Find the labels of a synthetic patient, in the order of `FINDINGS`, without drawing a picture."""
    return _sample_labels(_patient_stream(patient, seed))


def _patient_stream(patient: int, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, patient, 0])


def _collimate(size: int, border: Sequence[float]) -> np.ndarray:
    axis = np.linspace(-1, 1, size)
    columns = (axis > -border[0]) & (axis < border[1])
    rows = (axis > -border[2]) & (axis < border[3])
    return rows[:, None] & columns[None, :]


def _sample_labels(rng: np.random.Generator) -> tuple[float, ...]:
    """Draw the findings of a patient. A fifth are normal by design, some others by chance."""
    present = (rng.random(len(FINDINGS)) < 0.37) & (rng.random() > 0.18)
    return tuple(float(value) for value in present)


@functools.lru_cache(maxsize=64)
def _sample_patient(patient: int, seed: int) -> Patient:
    rng = _patient_stream(patient, seed)
    labels = _sample_labels(rng)  # draw these first: `phantom_labels` draws nothing else
    has = dict(zip(FINDINGS, labels, strict=True))
    width, apex = rng.uniform(0.5, 0.8), rng.uniform(-0.8, -0.64)
    lungs = (_sample_lung(rng, -1, width, apex), _sample_lung(rng, 1, width, apex))
    trees = (_grow_vessels(rng, lungs[0]), _grow_vessels(rng, lungs[1]))
    effusions, pneumothorax = _sample_pleura(rng, bool(has["Effusion"]), bool(has["Pneumothorax"]))
    nodules, patches = _sample_nodules(rng, lungs), _sample_patches(rng, lungs, trees)
    return Patient(
        labels=labels,
        lungs=lungs,
        heart=_sample_heart(rng, lungs, bool(has["Cardiomegaly"])),
        wall=rng.uniform(0.1, 0.24),
        bulk=rng.uniform(3.6, 4.6),
        bone=rng.uniform(0.7, 1.2),
        markings=rng.uniform(0.8, 1.3),
        trees=trees,
        rib_start=rng.uniform(-0.84, -0.74),
        rib_step=rng.uniform(0.118, 0.14),
        rib_drop=rng.uniform(0.8, 1.25),
        breasts=_sample_breasts(rng),
        haze=_sample_haze(rng),
        clavicle_tilt=rng.uniform(-0.05, 0.12),
        scapula=(rng.uniform(0.5, 0.72), rng.uniform(0.5, 0.72)),
        stomach=max(0.0, rng.uniform(-0.8, 1.0)),
        tiles=(noise_tile(rng, 60), noise_tile(rng, 140)),
        end_on=_sample_end_on(rng, lungs),
        effusions=effusions,
        pneumothorax=pneumothorax,
        nodules=nodules if has["Nodule"] else (),
        patches=patches if has["Consolidation"] else (),
    )


def _sample_lung(rng: np.random.Generator, side: int, width: float, apex: float) -> Lung:
    # Raise the diaphragm often without fluid, so that a bright base says little.
    raised = rng.uniform(0.05, 0.28) if rng.random() < 0.4 else 0.0
    return Lung(
        side=side,
        apex=apex + rng.normal(0, 0.015),
        apex_x=rng.uniform(0.27, 0.33),
        width=width * rng.uniform(0.96, 1.04),
        medial=rng.uniform(0.085, 0.125),
        sulcus=rng.normal(0.56, 0.03) - 0.7 * raised,
        dome=rng.uniform(0.16, 0.25) + 0.3 * raised,
        peak=rng.uniform(0.3, 0.5),
    )


def _sample_heart(rng: np.random.Generator, lungs: tuple[Lung, Lung], enlarged: bool) -> Heart:
    """Draw the shape of a heart. Its width follows from the cardio-thoracic ratio, its height does not."""
    ratio = rng.uniform(0.56, 0.68) if enlarged else rng.uniform(0.37, 0.49)
    width = ratio * (lungs[0].width + lungs[1].width)
    tilt = rng.uniform(0.3, 0.8)
    elongation = rng.uniform(1.2, 1.6)
    short = width / 2 / np.sqrt((elongation * np.cos(tilt)) ** 2 + np.sin(tilt) ** 2)
    floors = [lung.sulcus - lung.dome for lung in lungs]
    floor = float(np.clip(sum(floors) / 2, floors[1], floors[1] + 0.06))
    half_height = short * np.sqrt((elongation * np.sin(tilt)) ** 2 + np.cos(tilt) ** 2)
    return Heart(
        x=width * rng.uniform(0.06, 0.22),
        y=floor + rng.uniform(0.06, 0.14) - half_height,
        long=short * elongation,
        short=short,
        tilt=tilt,
        knob=rng.uniform(0.055, 0.09),
    )


def _grow_vessels(rng: np.random.Generator, lung: Lung) -> VesselTree:
    """Grow a tree from the hilum until its branches reach the chest wall."""
    num_trunks, num_levels, ratio = 8, 5, 0.8
    hilum = (lung.side * (lung.medial + 0.05), rng.uniform(-0.16, -0.06))
    angle = np.linspace(-1.45, 1.35, num_trunks) + rng.normal(0, 0.1, num_trunks)
    start = np.array(hilum) + rng.normal(0, 0.02, (num_trunks, 2))
    length = lung.width * (1 - ratio) / (1 - ratio**num_levels) * rng.uniform(0.8, 1.2, num_trunks)
    width = rng.uniform(0.024, 0.034, num_trunks)
    paths, widths = [], []
    for _ in range(num_levels):
        heading = np.stack([lung.side * np.cos(angle), np.sin(angle)], axis=1)
        end = start + length[:, None] * heading
        bend = rng.normal(0, 0.08, len(start)) * length
        middle = (start + end) / 2 + bend[:, None] * heading[:, ::-1] * np.array([-1, 1])
        paths.append(np.stack([start, middle, end], axis=1))
        widths.append(width)
        spread = rng.uniform(0.2, 0.55, (2, len(start))) * np.array([[1], [-1]])
        angle = (angle + spread).ravel()
        start = np.concatenate([end, end])
        length = np.tile(length * ratio, 2) * rng.uniform(0.7, 1.2, 2 * len(end))
        width = np.tile(width * 0.68, 2)
    return VesselTree(np.concatenate(paths), np.concatenate(widths))


def _sample_pleura(rng: np.random.Generator, fluid: bool, air: bool) -> tuple[tuple[Pleura, ...], Pleura | None]:
    """Put fluid on one or both sides and air on one, never both on one side, where the fluid would lie level."""
    first = int(rng.choice(SIDES))
    both = rng.random() < 0.3 and not air
    sides = (first, -first) if both else (first,)
    effusions = tuple(Pleura(side, rng.uniform(0.12, 0.3), rng.uniform(0.26, 0.5)) for side in sides)
    pneumothorax = Pleura(-first, rng.uniform(0.14, 0.32), rng.uniform(0.16, 0.4))
    return effusions if fluid else (), pneumothorax if air else None


def _sample_nodules(rng: np.random.Generator, lungs: tuple[Lung, Lung]) -> tuple[Spot, ...]:
    spots = []
    for _ in range(rng.choice([1, 2, 3, 4], p=[0.25, 0.25, 0.25, 0.25])):
        lung = lungs[rng.integers(2)]
        x, y = lung.point(rng.uniform(0.25, 0.85), rng.uniform(0.15, 0.85))
        spots.append(Spot(x, y, rng.uniform(0.085, 0.13), rng.uniform(0.9, 1.5)))
    return tuple(spots)


def _sample_patches(
    rng: np.random.Generator, lungs: tuple[Lung, Lung], trees: tuple[VesselTree, VesselTree]
) -> tuple[Patch, ...]:
    patches = []
    first = rng.integers(2)
    for index in [first, 1 - first][: 1 + (rng.random() < 0.35)]:
        x, y = lungs[index].point(rng.uniform(0.3, 0.75), rng.uniform(0.25, 0.85))
        spot = Spot(x, y, rng.uniform(0.24, 0.4), rng.uniform(0.8, 1.3))
        # Airways run along the vessels: leave a few branches of the tree open inside the opacity.
        near = np.linalg.norm(trees[index].paths[:, 1] - np.array([x, y]), axis=1) < spot.radius
        bronchi = tuple(trees[index].paths[near & (trees[index].widths > 0.011)])
        patch = Patch(SIDES[index], spot, rng.uniform(0.6, 0.9), rng.uniform(0, np.pi), _cloud_tile(rng, spot), bronchi)
        patches.append(patch)
    return tuple(patches)


def _cloud_tile(rng: np.random.Generator, spot: Spot) -> np.ndarray:
    """Draw noise that is a little positive on average around the spot, so that no cloud vanishes."""
    tile = noise_tile(rng, 40)
    axis = (np.arange(40) + 0.5) / 40 * 2 * TILE_EXTENT - TILE_EXTENT
    weight = np.exp(-2 * ((axis[None, :] - spot.x) ** 2 + (axis[:, None] - spot.y) ** 2) / spot.radius**2)
    return tile - np.float32((weight * tile).sum() / weight.sum() - 0.3)


def _sample_end_on(rng: np.random.Generator, lungs: tuple[Lung, Lung]) -> tuple[Spot, ...]:
    """Draw vessels seen end on. They are small, sharp and dense; a nodule is larger."""
    spots = []
    for _ in range(rng.integers(3, 9)):
        x, y = lungs[rng.integers(2)].point(rng.uniform(0.1, 0.7), rng.uniform(0.3, 0.8))
        spots.append(Spot(x, y, rng.uniform(0.014, 0.028), rng.uniform(0.3, 0.7)))
    return tuple(spots)


def _sample_breasts(rng: np.random.Generator) -> tuple[float, float]:
    density = max(0.0, rng.uniform(-0.5, 0.7))
    return density * rng.uniform(0.6, 1), density * rng.uniform(0.6, 1)


def _sample_haze(rng: np.random.Generator) -> tuple[Spot, ...]:
    """Draw soft tissue before or behind the lungs: as bright as a consolidation, but smooth and not only in a lung."""
    return tuple(
        Spot(rng.uniform(-0.7, 0.7), rng.uniform(-0.5, 0.6), rng.uniform(0.15, 0.35), rng.uniform(0.2, 0.6))
        for _ in range(rng.integers(0, 3))
    )


def _sample_visit(rng: np.random.Generator) -> Visit:
    rotation, scale, aspect = rng.normal(0, 0.06), rng.uniform(0.85, 1.15), rng.uniform(0.94, 1.06)
    # Keep both costophrenic angles in view, as on a real radiograph.
    reach = max(0.03, 1.0 - 0.75 * scale * aspect)
    lowest = 0.86 - 0.62 * scale / aspect
    shift = (float(np.clip(rng.normal(0, 0.11), -reach, reach)), min(rng.normal(0.02, 0.1), lowest))
    pose = Pose(rotation, scale, aspect, shift)
    exposure = Exposure(
        beam=rng.uniform(0.75, 1.05),
        scatter=rng.uniform(0.1, 0.35),
        photons=10 ** rng.uniform(3.7, 4.9),
        blur=rng.uniform(0.4, 0.9),
        black=rng.uniform(0.0, 0.22),
        white=rng.uniform(-0.08, 0.15),
        gamma=2 ** rng.uniform(-0.5, 0.5),
    )
    has_leads = rng.random() < 0.35
    return Visit(
        pose=pose,
        exposure=exposure,
        inspiration=rng.normal(0, 0.04),
        turn=rng.normal(0, 0.04),
        growth=rng.uniform(0.9, 1.1),
        border=tuple(rng.uniform(0.93, 1.3, 4)),
        fold=_sample_fold(rng) if rng.random() < 0.4 else None,
        leads=tuple(_sample_lead(rng) for _ in range(rng.integers(1, 4))) if has_leads else (),
        electrodes=tuple(_sample_electrode(rng) for _ in range(rng.integers(1, 4))) if has_leads else (),
    )


def _sample_fold(rng: np.random.Generator) -> Points:
    """Draw a skin fold. It runs down the outer chest and, unlike a pleural line, crosses the border of the lung."""
    side, top = rng.choice(SIDES), rng.uniform(-0.75, -0.1)
    x = side * rng.uniform(0.35, 0.65)
    drift = side * rng.uniform(-0.15, 0.2)
    knots = [(x, top), (x + drift / 3 + rng.normal(0, 0.04), top + 0.4), (x + drift, top + rng.uniform(0.6, 1.0))]
    return smooth_curve(np.array(knots))


def _sample_lead(rng: np.random.Generator) -> Points:
    return smooth_curve(np.cumsum(rng.normal(0, 0.3, (5, 2)), axis=0) + rng.uniform(-0.4, 0.4, 2), 40)


def _sample_electrode(rng: np.random.Generator) -> Spot:
    return Spot(rng.uniform(-0.7, 0.7), rng.uniform(-0.6, 0.5), rng.uniform(0.04, 0.06), rng.uniform(0.25, 0.5))


def noise_tile(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Draw smooth noise [cells, cells] of mean 0 and variance 1."""
    tile = ndimage.gaussian_filter(rng.standard_normal((cells, cells)), 1.2, mode="wrap")
    return ((tile - tile.mean()) / tile.std()).astype(np.float32)
