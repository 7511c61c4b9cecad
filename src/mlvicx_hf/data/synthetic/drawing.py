"""Draw synthetic radiographs: a view of the body, the shapes in it, their attenuation, and the detector.

Body coordinates: the thorax spans about [-1, 1] in x and y. y points down. The right of the picture is the patient's
left. Maps are float32 [S, S]. Attenuation is in optical depths, so the maps of overlapping structures are summed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

FINDINGS: tuple[str, ...] = ("Cardiomegaly", "Effusion", "Pneumothorax", "Nodule", "Consolidation")
SIDES = (-1, 1)  # picture left (the patient's right), picture right
WIDEST = 0.30  # y of the widest part of the thorax
TILE_EXTENT = 1.3  # a noise tile covers [-1.3, 1.3] of the body
TABLE_LOW, TABLE_HIGH, TABLE_LENGTH = -2.0, 2.0, 2048

Points = np.ndarray  # [N, 2] body coordinates


@dataclass(frozen=True)
class Pose:
    """The position of the detector: an affine map from body coordinates to view coordinates, [-1, 1] in the picture."""

    rotation: float = 0.0
    scale: float = 1.0
    aspect: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)

    def matrix(self) -> np.ndarray:
        """Linear part [2, 2], applied to column vectors (x, y)."""
        cosine, sine = np.cos(self.rotation), np.sin(self.rotation)
        stretch = np.diag([self.scale * self.aspect, self.scale / self.aspect])
        return np.array([[cosine, -sine], [sine, cosine]]) @ stretch


@dataclass(frozen=True)
class Canvas:
    """A square picture of the body in a pose. Everything is drawn at the picture's own resolution."""

    size: int
    pose: Pose
    x: np.ndarray = field(init=False, repr=False)  # [S, S], body coordinates of the pixel centres
    y: np.ndarray = field(init=False, repr=False)
    pixel: float = field(init=False)  # width of a pixel in body coordinates

    def __post_init__(self) -> None:
        inverse = np.linalg.inv(self.pose.matrix())
        axis = (2 * np.arange(self.size) + 1) / self.size - 1
        horizontal, vertical = axis[None, :] - self.pose.shift[0], axis[:, None] - self.pose.shift[1]
        for name, row in zip(("x", "y"), inverse, strict=True):
            object.__setattr__(self, name, (row[0] * horizontal + row[1] * vertical).astype(np.float32))
        object.__setattr__(self, "pixel", 2 / self.size / self.pose.scale)

    @property
    def supersampling(self) -> int:
        """Factor by which strokes are drawn larger before they are averaged. Small pictures need finer strokes."""
        return 2 if self.size >= 192 else 4

    def edge(self, distance: np.ndarray, softness: float = 0.0) -> np.ndarray:
        """Map positive distances (body units) to 1 and negative ones to 0. The border is at least one pixel wide."""
        return np.clip(distance / max(self.pixel, softness) + 0.5, 0, 1)

    def blur(self, picture: np.ndarray, width: float) -> np.ndarray:
        """Blur with a Gaussian whose standard deviation is in body units. Reduce the picture first if it is wide."""
        sigma = width / self.pixel
        factor = 1
        while sigma > 4 * factor and self.size // (2 * factor) >= 16:
            factor *= 2
        if factor == 1:
            return ndimage.gaussian_filter(picture, sigma, mode="nearest", truncate=3)
        small = np.asarray(Image.fromarray(picture).reduce(factor))
        small = ndimage.gaussian_filter(small, sigma / factor, mode="nearest", truncate=3)
        return np.asarray(Image.fromarray(small).resize((self.size, self.size), Image.Resampling.BICUBIC))

    def texture(self, tile: np.ndarray) -> np.ndarray:
        """Draw a noise tile [N, N] that is fixed to the body and covers [-TILE_EXTENT, TILE_EXTENT]."""
        inverse = np.linalg.inv(self.pose.matrix()) * tile.shape[0] / (2 * TILE_EXTENT)
        step = inverse * 2 / self.size
        origin = inverse @ (-1 - np.array(self.pose.shift)) + tile.shape[0] / 2
        coefficients = (step[0, 0], step[0, 1], origin[0], step[1, 0], step[1, 1], origin[1])
        picture = Image.fromarray(tile.astype(np.float32))
        return np.asarray(
            picture.transform((self.size,) * 2, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        )

    def _to_strokes(self, paths: Sequence[Points]) -> list[list[float]]:
        view = np.concatenate(paths) @ self.pose.matrix().T + np.array(self.pose.shift)
        numbers = ((view + 1) / 2 * self.size * self.supersampling).ravel().tolist()
        ends = np.cumsum([2 * len(path) for path in paths]).tolist()
        return [numbers[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _average_down(self, layer: Image.Image) -> np.ndarray:
        return np.asarray(layer.reduce(self.supersampling), dtype=np.float32) / 255

    def _blank(self) -> Image.Image:
        return Image.new("L", (self.size * self.supersampling,) * 2)

    def polygons(self, outlines: Sequence[Points], values: Sequence[float]) -> np.ndarray:
        """Fill outlines with values from 0 to 1. Later ones cover earlier ones."""
        layer = self._blank()
        draw = ImageDraw.Draw(layer)
        for outline, value in zip(self._to_strokes(outlines), values, strict=True):
            draw.polygon(outline, fill=round(255 * value))
        return self._average_down(layer)

    def lines(self, paths: Sequence[Points], widths: Sequence[float], values: Sequence[float]) -> np.ndarray:
        """Draw open paths with widths in body units. A line thinner than the finest stroke is drawn fainter instead."""
        layer = self._blank()
        draw = ImageDraw.Draw(layer)
        scale = self.supersampling / self.pixel
        for path, width, value in zip(self._to_strokes(paths), widths, values, strict=True):
            whole = max(1, round(width * scale))
            draw.line(path, fill=round(255 * value * min(1, width * scale / whole)), width=whole)
        return self._average_down(layer)


def tabulate(function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Compute a function of one body coordinate on a fine grid, for `look_up`."""
    return function(np.linspace(TABLE_LOW, TABLE_HIGH, TABLE_LENGTH)).astype(np.float32)


def look_up(table: np.ndarray, coordinate: np.ndarray) -> np.ndarray:
    """Take the nearest value of a table. On a picture this is much faster than the function itself."""
    scale = (TABLE_LENGTH - 1) / (TABLE_HIGH - TABLE_LOW)
    index = ((coordinate - TABLE_LOW) * scale + 0.5).astype(np.int32)
    return table[np.clip(index, 0, TABLE_LENGTH - 1)]


def smooth_curve(knots: Points, num_points: int = 24) -> Points:
    """Draw a smooth path along a few knots: cut the corners three times, then resample evenly."""
    for _ in range(3):
        quarter, three = 0.75 * knots[:-1] + 0.25 * knots[1:], 0.25 * knots[:-1] + 0.75 * knots[1:]
        inner = np.stack([quarter, three], axis=1).reshape(-1, 2)
        knots = np.concatenate([knots[:1], inner[1:-1], knots[-1:]])
    position = np.linspace(0, len(knots) - 1, num_points)
    return np.stack([np.interp(position, np.arange(len(knots)), knots[:, axis]) for axis in range(2)], axis=1)


def ribbon(path: Points, width: np.ndarray | float) -> Points:
    """Outline a band of the given full width along a path."""
    # Take central differences by hand: `np.gradient` takes longer than the rest of a rib.
    tangent = path[np.r_[1 : len(path), -1]] - path[np.r_[0, 0 : len(path) - 1]]
    tangent /= np.hypot(tangent[:, :1], tangent[:, 1:]) + 1e-9
    normal = tangent[:, ::-1] * np.array([-1.0, 1.0])
    half = np.reshape(width, (-1, 1)) / 2
    return np.concatenate([path + half * normal, (path - half * normal)[::-1]])


@dataclass(frozen=True)
class Lung:
    """One side of the thorax, in body coordinates with |x| measured from the midline."""

    side: int
    apex: float  # y
    apex_x: float
    width: float
    medial: float
    sulcus: float  # y of the costophrenic angle
    dome: float  # height of the diaphragm above it
    peak: float  # where the dome is highest: 0 at the mediastinum, 1 at the chest wall

    def _depth_below_apex(self, y: np.ndarray) -> np.ndarray:
        return np.clip((WIDEST - y) / (WIDEST - self.apex), 0, 1)

    def lateral(self, y: np.ndarray) -> np.ndarray:
        """|x| of the chest wall."""
        height = self._depth_below_apex(y)
        return self.apex_x + (self.width - self.apex_x) * np.sqrt(1 - height**2.3)

    def medial_border(self, y: np.ndarray) -> np.ndarray:
        """|x| of the mediastinal border."""
        height = self._depth_below_apex(y)
        return self.apex_x - (self.apex_x - self.medial) * np.sqrt(1 - height**7)

    def diaphragm(self, across: np.ndarray) -> np.ndarray:
        """Y of the diaphragm; `across` runs from 0 at the mediastinum to 1 at the chest wall."""
        beyond = np.clip((across - self.peak) / (1 - self.peak), 0, 1)
        before = np.clip((self.peak - across) / self.peak, 0, 1)
        return self.sulcus - self.dome * (1 - beyond**2.4 - 0.3 * before**2)

    def point(self, across: float, down: float) -> tuple[float, float]:
        """Signed position inside the lung: `across` as above, `down` from 0 at the apex to 1 at the diaphragm."""
        y = self.apex + down * (float(self.diaphragm(np.array(across))) - self.apex)
        inner, outer = float(self.medial_border(np.array(y))), float(self.lateral(np.array(y)))
        return self.side * (inner + across * (outer - inner)), y


@dataclass(frozen=True)
class Heart:
    """A tilted ellipse on the diaphragm."""

    x: float
    y: float
    long: float
    short: float
    tilt: float
    knob: float  # radius of the aortic knob


@dataclass(frozen=True)
class Pleura:
    """Fluid or air in one pleural space: the lung's side, the amount at its base or edge, and how far it spreads."""

    side: int
    amount: float
    spread: float


@dataclass(frozen=True)
class Spot:
    """A round lesion, or something that looks like one: centre, radius, optical depth at the centre."""

    x: float
    y: float
    radius: float
    density: float


@dataclass(frozen=True)
class VesselTree:
    """The vessels of one lung, as N branches."""

    paths: np.ndarray  # [N, 3, 2]
    widths: np.ndarray  # [N]


@dataclass(frozen=True)
class Patch:
    """An airspace opacity with its own noise."""

    side: int
    spot: Spot
    flat: float
    turn: float
    tile: np.ndarray
    bronchi: tuple[Points, ...]


@dataclass(frozen=True)
class Exposure:
    """The settings of the X-ray machine and of the display for one picture."""

    beam: float  # multiplies every optical depth: softer or harder radiation
    scatter: float  # share of the signal that is scattered light
    photons: float  # for a pixel behind no body, at a size of 256
    blur: float  # of the detector, in pixels of a 256-pixel picture
    black: float  # display window: fractions of the body's range that are cut from either end
    white: float
    gamma: float


@dataclass(frozen=True)
class Patient:
    """All that the pictures of a patient share."""

    labels: tuple[float, ...]
    lungs: tuple[Lung, Lung]
    heart: Heart
    wall: float  # chest wall beyond the lungs
    bulk: float  # optical depth of the thorax without air
    bone: float  # density of the skeleton
    markings: float  # density of the vessels
    trees: tuple[VesselTree, VesselTree]
    rib_start: float
    rib_step: float
    rib_drop: float
    breasts: tuple[float, float]
    haze: tuple[Spot, ...]
    clavicle_tilt: float
    scapula: tuple[float, float]
    stomach: float
    tiles: tuple[np.ndarray, np.ndarray]
    end_on: tuple[Spot, ...]
    effusions: tuple[Pleura, ...]
    pneumothorax: Pleura | None
    nodules: tuple[Spot, ...]
    patches: tuple[Patch, ...]


@dataclass(frozen=True)
class Visit:
    """All that differs between the pictures of a patient."""

    pose: Pose
    exposure: Exposure
    inspiration: float  # how much lower the diaphragm stands, in body units
    turn: float  # sideways shift of what lies before the spine
    growth: float  # factor on the size of the findings
    border: tuple[float, float, float, float]  # collimation: distance of each border, in view units
    fold: Points | None  # a skin fold
    leads: tuple[Points, ...]
    electrodes: tuple[Spot, ...]


@dataclass
class Chest:
    """Maps of one lung, float32 [S, S], which change while the picture is drawn."""

    lung: Lung
    across: np.ndarray  # 0 at the mediastinum, 1 at the chest wall
    inside: np.ndarray  # soft outline of the lung field
    air: np.ndarray  # how much of the body's depth is air
    markings: np.ndarray  # where vessels and lung tissue are seen


def _distance(canvas: Canvas, x: float, y: float, long: float, short: float, tilt: float = 0.0) -> np.ndarray:
    """Compute the squared distance from the centre of an ellipse; 1 on the ellipse."""
    cosine, sine = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    dx, dy = canvas.x - np.float32(x), canvas.y - np.float32(y)
    return ((cosine * dx + sine * dy) / np.float32(long)) ** 2 + ((cosine * dy - sine * dx) / np.float32(short)) ** 2


def _dome(squared: np.ndarray) -> np.ndarray:
    """Compute the path length through an ellipsoid; 1 at its centre."""
    return np.sqrt(np.maximum(1 - squared, 0))


def _circle(spot: Spot) -> Points:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    return np.stack([spot.x + spot.radius * np.cos(angle), spot.y + spot.radius * np.sin(angle)], axis=1)


def _draw_body(canvas: Canvas, patient: Patient) -> np.ndarray:
    """Draw the optical depth of the soft tissue as if the lungs were solid."""
    chest = max(lung.width for lung in patient.lungs) + patient.wall
    knots = [(-2, 0.2), (-1, 0.21), (-0.9, 0.25), (-0.78, 0.6), (-0.66, 1.05), (-0.4, 1.1), (-0.15, chest + 0.08)]
    heights, widths = np.array([*knots, (0.1, chest), (0.6, chest - 0.02), (2, chest + 0.02)]).T
    half_width = tabulate(lambda y: np.interp(y, heights, widths))
    half_width = np.convolve(np.pad(half_width, 50, mode="edge"), np.full(101, 1 / 101), mode="valid")
    depth = tabulate(lambda y: np.interp(y, [-1, -0.8, -0.5, 0.1, 0.6], [0.6, 0.75, 0.95, 1.0, 1.08]))
    relative = (canvas.x / look_up(half_width.astype(np.float32), canvas.y)) ** 2
    return np.float32(patient.bulk) * look_up(depth, canvas.y) * np.sqrt(np.maximum(1 - relative**2, 0))


def _draw_lung(canvas: Canvas, lung: Lung, turn: float) -> Chest:
    outward = lung.side * canvas.x
    lateral = look_up(tabulate(lung.lateral), canvas.y)
    medial = look_up(tabulate(lung.medial_border), canvas.y) + np.float32(lung.side * turn)
    across = (outward - medial) / np.maximum(lateral - medial, 1e-3)
    above = look_up(tabulate(lung.diaphragm), across) - canvas.y
    within = np.minimum(np.minimum(outward - medial, lateral - outward), canvas.y - np.float32(lung.apex))
    inside = canvas.edge(np.minimum(within, above), 0.02)
    clipped = np.clip(across, 0, 1)
    thickness = look_up(tabulate(lambda y: 0.55 + 0.45 * np.sqrt(1 - lung._depth_below_apex(y) ** 2)), canvas.y)
    # The lung reaches down behind the dome, so let it fade towards the diaphragm instead of ending there.
    air = inside * np.sqrt(1 - (clipped * clipped) ** 2) * thickness * (0.75 + 0.25 * np.clip(above / 0.25, 0, 1))
    return Chest(lung, clipped, inside, air, inside)


def _solid_fraction(canvas: Canvas, heart: Heart, turn: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw the mask of the heart, and the share of the lung's depth that heart and great vessels take."""
    squared = _distance(canvas, heart.x + turn, heart.y, heart.long, heart.short, heart.tilt)
    solid = np.minimum(1.5 * _dome(squared), 1)
    knob = _dome(_distance(canvas, 0.1 + turn, -0.36, heart.knob, heart.knob * 1.1))
    trunk = _dome(_distance(canvas, 0.1 + turn, -0.2, 0.07, 0.13))
    cava = _dome(_distance(canvas, -0.09 + turn, -0.35, 0.06, 0.4))
    return squared < 1, np.maximum(solid, np.float32(0.75) * np.maximum(np.maximum(knob, trunk), cava))


def _draw_ribs(canvas: Canvas, patient: Patient) -> np.ndarray:
    """Draw the ribs. Each is a ring that descends from the spine to the front; both halves are projected."""
    layers = []
    for low, high, count in ((0.13, np.pi / 2, 10), (np.pi / 2, 0.8 * np.pi, 7)):
        outlines, values = [], []
        angle = np.linspace(low, high, 14)
        for index in range(count):
            drop = patient.rib_drop * (0.17 + 0.035 * index)
            y = patient.rib_start + index * patient.rib_step + drop * (1 - np.cos(angle)) / 2
            for lung in patient.lungs:
                reach = max(float(lung.lateral(y[np.argmax(np.sin(angle))])) + 0.01, 0.22)
                path = np.stack([lung.side * reach * np.sin(angle), y], axis=1)
                outlines += [ribbon(path, 0.056), ribbon(path, 0.036)]  # a dense shell around a lighter core
                values += [1.0, 0.62]
        layers.append(canvas.polygons(outlines, values))
    return np.float32(0.5 * patient.bone) * (layers[0] + np.float32(0.75) * layers[1])


def _draw_girdle(canvas: Canvas, patient: Patient, turn: float) -> np.ndarray:
    """Draw collar bones, shoulder blades and upper arms."""
    bones, blades = [], []
    for side, edge in zip(SIDES, patient.scapula, strict=True):
        tilt = patient.clavicle_tilt
        knots = [(0.07, -0.58), (0.25, -0.64), (0.5, -0.68 - tilt), (0.85, -0.7 - tilt)]
        path = smooth_curve(np.array(knots)) * np.array([side, 1]) + np.array([turn, 0])
        bones += [ribbon(path, 0.065), ribbon(path, 0.04)]
        arm = np.array([(0.98, -0.62), (1.02, -0.4), (1.12, 0.2)])
        bones += [ribbon(smooth_curve(arm) * np.array([side, 1]), np.linspace(0.2, 0.1, 24)), np.zeros((3, 2))]
        blade = [(edge + 0.1, -0.66), (edge, -0.3), (edge + 0.08, 0.05), (edge + 0.2, -0.2), (0.98, -0.5), (0.7, -0.7)]
        outline = smooth_curve(np.array([*blade, blade[0]]), 40) * np.array([side, 1])
        blades += [outline, outline.mean(axis=0) + 0.9 * (outline - outline.mean(axis=0))]
    solid = canvas.polygons(bones, [1.0, 0.65] * (len(bones) // 2))
    return np.float32(patient.bone) * (
        np.float32(0.7) * solid + np.float32(0.3) * canvas.polygons(blades, [1.0, 0.6] * 2)
    )


def _draw_middle(canvas: Canvas, patient: Patient, turn: float) -> np.ndarray:
    """Draw the spine with its discs, and subtract the windpipe."""
    across = (canvas.x / np.float32(0.09)) ** 2
    vertebrae = tabulate(lambda y: 0.75 + 0.25 * np.tanh(4 * np.cos(2 * np.pi * y / (0.115 + 0.01 * y)) + 2.5))
    spine = np.sqrt(np.maximum(1 - across, 0)) * look_up(vertebrae, canvas.y)
    fork = np.array([0.01 + turn, -0.3])
    bronchi = [fork + np.array([side * 0.14, 0.15]) for side in SIDES]
    paths = [np.array([(turn, -1.2), fork]), *(np.stack([fork, end]) for end in bronchi)]
    airway = canvas.blur(canvas.lines(paths, [0.085, 0.06, 0.06], [1.0, 0.6, 0.6]), 0.012)
    return np.float32(0.6 * patient.bone) * spine - np.float32(0.55) * airway


def _draw_vessels(canvas: Canvas, patient: Patient) -> np.ndarray:
    paths = np.concatenate([tree.paths for tree in patient.trees])
    widths = np.concatenate([tree.widths for tree in patient.trees])
    order = np.argsort(widths)
    values = np.clip(np.sqrt(widths / 0.03), 0, 1)
    layer = canvas.lines(list(paths[order]), widths[order].tolist(), values[order].tolist())
    layer = canvas.blur(layer, 0.004)
    layer = layer + canvas.polygons(
        [_circle(spot) for spot in patient.end_on], [spot.density for spot in patient.end_on]
    )
    for tree in patient.trees:
        x, y = tree.paths[:8, 0].mean(axis=0)
        layer = layer + np.float32(0.4) * np.exp(-_distance(canvas, x, y, 0.06, 0.1))
    return np.float32(0.6 * patient.markings) * layer


def _draw_outside(canvas: Canvas, visit: Visit) -> np.ndarray:
    """Draw what lies on the patient: a skin fold, wires and electrodes."""
    layer = np.zeros_like(canvas.x)
    if visit.fold is not None:
        outward = np.array([np.sign(visit.fold[0, 0]), 0])
        steps = [visit.fold + 0.035 * step * outward for step in (4, 3, 2, 1)]
        bands = [np.concatenate([visit.fold, step[::-1]]) for step in steps]
        layer = layer + np.float32(0.4) * canvas.polygons(bands, [0.2, 0.4, 0.7, 1.0])
    if visit.leads:
        count = len(visit.leads)
        layer = layer + np.float32(0.8) * canvas.lines(visit.leads, [0.012] * count, [1.0] * count)
    for spot in visit.electrodes:
        squared = _distance(canvas, spot.x, spot.y, spot.radius, spot.radius)
        layer = layer + np.float32(spot.density) * ((squared < 1) + 2.0 * (squared < 0.1))
    return layer.astype(np.float32)


def _add_pneumothorax(canvas: Canvas, chest: Chest, finding: Pleura, visit: Visit) -> tuple[np.ndarray, np.ndarray]:
    """Detach the lung from the chest wall. Return the mask of the free air, and the pleural line."""
    lung = chest.lung
    gap, drop = finding.amount * visit.growth, finding.spread * visit.growth
    collapsed = replace(
        lung, apex=lung.apex + drop, width=lung.width - gap, apex_x=max(lung.apex_x - 0.5 * gap, lung.medial + 0.08)
    )
    outward = lung.side * canvas.x
    inner, outer = look_up(tabulate(collapsed.medial_border), canvas.y), look_up(tabulate(collapsed.lateral), canvas.y)
    covered = canvas.edge(np.minimum(outward - inner, outer - outward)) * (canvas.y > collapsed.apex)
    free = chest.inside * (1 - covered) * (outward > lung.medial + 0.02)
    down = collapsed.apex + np.linspace(0, 1, 60) ** 2 * (lung.sulcus - collapsed.apex)
    wall = np.stack([lung.side * collapsed.lateral(down), down], axis=1)
    top = np.stack([lung.side * collapsed.medial_border(down[:25]), down[:25]], axis=1)
    line = canvas.lines([np.concatenate([top[::-1], wall])], [0.018], [1.0]) * chest.inside
    chest.markings = chest.inside * (1 - free)
    chest.air = chest.air * (1 + np.float32(0.08) * free)
    return free > 0.5, np.float32(0.42) * line


def _add_effusion(canvas: Canvas, chest: Chest, finding: Pleura, visit: Visit) -> np.ndarray:
    """Fill the base with fluid that climbs the chest wall. Return its mask."""
    level = finding.amount + finding.spread * chest.across * chest.across * chest.across
    surface = np.float32(chest.lung.sulcus) - np.float32(visit.growth) * level
    fluid = np.clip((canvas.y - surface) / np.float32(0.08), 0, 1)
    chest.air = chest.air * (1 - fluid)
    chest.markings = chest.markings * (1 - fluid)
    return (chest.inside > 0.5) & (fluid > 0.4)


def _add_patch(canvas: Canvas, chest: Chest, patch: Patch, visit: Visit) -> np.ndarray:
    """Fill airspaces with a cloud that leaves the airways open. Return its mask."""
    long = patch.spot.radius * visit.growth
    squared = _distance(canvas, patch.spot.x, patch.spot.y, long, long * patch.flat, patch.turn)
    noise = canvas.texture(patch.tile)
    cloud = np.clip(1.5 * (1 - np.sqrt(squared) + np.float32(0.3) * noise), 0, 1) * (squared < 2.5)
    cloud = cloud * (np.float32(0.8) + np.float32(0.2) * canvas.texture(patch.tile.T))
    if patch.bronchi:
        widths = [0.014] * len(patch.bronchi)
        cloud = cloud * (1 - np.float32(0.5) * canvas.lines(patch.bronchi, widths, [1.0] * len(widths)))
    visible = (chest.inside > 0.5) & (cloud > 0.35)
    cloud = np.clip(cloud, 0, 1) * np.float32(0.85 * patch.spot.density)
    chest.air = chest.air * (1 - cloud)
    chest.markings = chest.markings * (1 - np.float32(0.7) * cloud)
    return visible


def _draw_nodule(canvas: Canvas, spot: Spot, tile: np.ndarray, visit: Visit) -> tuple[np.ndarray, np.ndarray]:
    radius = spot.radius * visit.growth
    squared = _distance(canvas, spot.x, spot.y, radius, radius) * (1 + np.float32(0.12) * tile)
    return squared < 1, np.float32(spot.density) * _dome(squared)


def attenuate(canvas: Canvas, patient: Patient, visit: Visit) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Sum the attenuation of all structures. Return it with the masks (bool)."""
    masks = {name: np.zeros(canvas.x.shape, dtype=bool) for name in ("lungs", "heart", *FINDINGS)}
    coarse, fine = (canvas.texture(tile) for tile in patient.tiles)
    heart = replace(patient.heart, y=patient.heart.y + 0.6 * visit.inspiration)
    masks["heart"], solid = _solid_fraction(canvas, heart, visit.turn)
    open_lung = 1 - np.float32(0.85) * solid
    markings = _draw_vessels(canvas, patient) + np.float32(0.05) * coarse + np.float32(0.045) * fine
    total = _draw_body(canvas, patient) * (1 + np.float32(0.012) * coarse)
    inside = np.zeros_like(total)
    for lung in patient.lungs:
        chest = _draw_lung(canvas, replace(lung, sulcus=lung.sulcus + visit.inspiration), visit.turn)
        inside += chest.inside
        total += _add_findings(canvas, chest, patient, visit, masks)
        total += (markings * chest.markings - np.float32(0.6 * patient.bulk) * chest.air) * open_lung
    masks["lungs"] = (inside > 0.5) & ~masks["heart"]
    if patient.labels[FINDINGS.index("Cardiomegaly")]:
        masks["Cardiomegaly"] = masks["heart"]
    for spot in patient.nodules:
        mask, density = _draw_nodule(canvas, spot, coarse, visit)
        masks["Nodule"] |= mask
        total += density
    total += _draw_soft_tissue(canvas, patient, inside)
    bones = _draw_ribs(canvas, patient) + _draw_girdle(canvas, patient, visit.turn)
    bones += _draw_middle(canvas, patient, visit.turn)
    total += bones * (total > 0.3) + _draw_outside(canvas, visit)
    return np.maximum(total, 0), masks


def _add_findings(
    canvas: Canvas, chest: Chest, patient: Patient, visit: Visit, masks: dict[str, np.ndarray]
) -> np.ndarray:
    """Change one lung by its findings and mark them in `masks`. Return their own attenuation."""
    side, line = chest.lung.side, np.zeros((), np.float32)
    if patient.pneumothorax is not None and patient.pneumothorax.side == side:
        masks["Pneumothorax"], line = _add_pneumothorax(canvas, chest, patient.pneumothorax, visit)
    for effusion in patient.effusions:
        if effusion.side == side:
            masks["Effusion"] |= _add_effusion(canvas, chest, effusion, visit)
    for patch in patient.patches:
        if patch.side == side:
            masks["Consolidation"] |= _add_patch(canvas, chest, patch, visit)
    return line


def _draw_soft_tissue(canvas: Canvas, patient: Patient, inside: np.ndarray) -> np.ndarray:
    """Draw breasts, haze before the lungs, and the air in the stomach."""
    layer = np.zeros_like(inside)
    for side, density in zip(SIDES, patient.breasts, strict=True):
        if density:
            layer += np.float32(density) * _dome(_distance(canvas, side * 0.4, 0.28, 0.34, 0.34))
    for spot in patient.haze:
        layer += np.float32(spot.density) * np.exp(-_distance(canvas, spot.x, spot.y, spot.radius, spot.radius))
    if patient.stomach:
        bubble = _dome(_distance(canvas, 0.3, patient.lungs[1].sulcus + 0.02, 0.16, 0.1))
        layer -= np.float32(patient.stomach) * bubble * (1 - inside)
    return layer


def expose(canvas: Canvas, attenuation: np.ndarray, exposure: Exposure, rng: np.random.Generator) -> np.ndarray:
    """Turn attenuation into an 8-bit picture: transmission, scatter, photon noise, logarithm, display window."""
    transmission = np.exp(-exposure.beam * attenuation)
    # Limit open air next to the body, which would outshine everything: a real grid removes most of its scatter.
    scattered = canvas.blur(np.minimum(transmission, 0.25), 0.16)
    signal = (1 - exposure.scatter) * transmission + exposure.scatter * scattered
    photons = exposure.photons * (256 / canvas.size) ** 2
    noise = rng.standard_normal(signal.shape, dtype=np.float32) * np.sqrt(signal / photons)
    sigma = exposure.blur * canvas.size / 256
    signal = ndimage.gaussian_filter(signal + noise, sigma, mode="nearest", truncate=3)
    depth = -np.log(np.maximum(signal, 1e-4))
    body = attenuation[::2, ::2] > 1
    low, high = np.percentile(depth[::2, ::2][body], (2, 99))
    span = high - low
    low, high = low - exposure.black * span, high + exposure.white * span
    grey = np.clip((depth - low) / (high - low), 0, 1) ** np.float32(exposure.gamma)
    return (255 * grey + 0.5).astype(np.uint8)
