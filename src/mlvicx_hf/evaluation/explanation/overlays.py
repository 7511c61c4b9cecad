"""Draw heat maps over their images."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

OUTLINE = "magenta"  # no colour of the heat maps
OPACITY = 0.6  # of a map where it is highest


class Panel(NamedTuple):
    """An image, uint8 [S, S], the region of its finding, bool [S, S] (None if not known), and a heat map [S, S]."""

    image: np.ndarray
    region: np.ndarray | None
    heat: np.ndarray


def _draw(axes: Any, panel: Panel, heat: bool = True) -> None:
    """Draw the grey image, the heat map over it (opaque where it is high), and the outline of the true region."""
    axes.set_axis_off()
    axes.imshow(panel.image, cmap="gray", vmin=0, vmax=255)
    if heat and panel.heat.any():
        share = panel.heat / panel.heat.max()
        axes.imshow(share, cmap="turbo", vmin=0, vmax=1, alpha=OPACITY * share)
    elif heat:
        axes.text(0.5, 0.03, "zero everywhere", transform=axes.transAxes, color="white", ha="center")
    side = len(panel.image)
    if panel.region is not None:
        places = np.arange(-1, side + 1)  # with a border, so that the contour closes
        axes.contour(places, places, np.pad(panel.region, 1).astype(float), levels=[0.5], colors=OUTLINE, linewidths=1)
    axes.set(xlim=(-0.5, side - 0.5), ylim=(side - 0.5, -0.5))


def draw_overlay(picture: Path, panel: Panel) -> None:
    """Write one heat map over its image as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 4))
    _draw(figure.add_axes((0, 0, 1, 1)), panel)
    figure.savefig(picture, dpi=max(100, len(panel.image) / 4))


def draw_grid(picture: Path, title: str, panels: Mapping[str, Sequence[Panel]]) -> None:
    """Draw each of N images in a row with the heat map of every model (model → N panels), as in Fig. 2 of the paper."""
    from matplotlib.figure import Figure

    rows = list(zip(*panels.values(), strict=True))
    figure = Figure(figsize=(2.4 * (1 + len(panels)), 2.4 * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), 1 + len(panels), squeeze=False)
    for axes, row in zip(grid, rows, strict=True):
        _draw(axes[0], row[0], heat=False)
        for place, panel in zip(axes[1:], row, strict=True):
            _draw(place, panel)
    for place, name in zip(grid[0], ("image", *panels), strict=True):
        place.set_title(name)
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)
