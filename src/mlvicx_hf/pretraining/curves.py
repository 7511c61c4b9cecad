"""Pictures of a run: its curves, and the views of its images."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.data.images.pictures import contact_sheet

from .views import TwoViewAugmentation, view_draws

# Panels of `plot_curves`: title, and the pattern of the keys of metrics.jsonl in it. Terms in no panel share one more.
PANELS = {
    "loss": r"(\w+_)?loss",
    "learning rate": r"learning_rate",
    "probes: AUROC on validation": r"probe_\w+_auroc",
    "invariance": r"(\w+_)?invariance",
    "variance": r"(\w+_)?variance",
    "covariance": r"(\w+_)?covariance",
    "RankMe of a batch": r"\w+_rankme",
    "mean standard deviation of a batch": r"\w+_deviation",
    "mean |correlation| of a batch": r"\w+_correlation",
}
LOSS_AND_RANK = {"loss": r"\w+_loss", "RankMe of a batch's embeddings": r"\w+_embeddings_rankme"}
# Keys such as global_loss, global_variance and global_embeddings_rankme belong to the branch "global".
BRANCH = re.compile(
    r"(?!level_\d|probe_)(\w+?)_(?:embeddings_)?(?:loss|(?:in|co)?variance|rankme|deviation|correlation)$"
)
COUNTERS = ("step", "epoch", "images")
LOGARITHMIC = ("deviation",)  # embeddings and levels differ by orders of magnitude


def plot_curves(metrics: Path, picture: Path, title: str = "", panels: Mapping[str, str] = PANELS) -> None:
    """Draw what a pretraining run logged in `metrics.jsonl` into a PNG file.

    There is a panel for each kind of figure that the run logged; `panels` maps its title to the pattern of its keys.

    Raises:
        ImportError: without matplotlib, naming the extra that brings it.
        UserError: a file in which nothing can be drawn.
    """
    require("a plot", "report", "matplotlib")
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shown = {name: [key for key in keys if re.fullmatch(pattern, key)] for name, pattern in panels.items()}
    if panels is PANELS:
        drawn = {key for matching in shown.values() for key in matching}
        shown["other terms"] = [key for key in keys if key not in drawn and key not in COUNTERS and "/" not in key]
    shown = {name: matching for name, matching in shown.items() if matching}
    if not shown:
        raise UserError(f"{metrics} holds {len(rows)} lines and none of the figures to draw; expected a run's metrics")
    branches = list(dict.fromkeys(found[1] for key in keys if (found := BRANCH.match(key))))
    columns = min(3, len(shown))
    height = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(4.4 * columns, 3.1 * height), layout="constrained")
    grid = figure.subplots(height, columns, squeeze=False).flat
    for (name, matching), axes in zip(shown.items(), grid, strict=False):
        for key in matching:
            kept = [row for row in rows if key in row]
            axes.plot([row["step"] for row in kept], [row[key] for row in kept], **_line(key, len(kept), branches))
        axes.set(xlabel="step", title=name, yscale="log" if any(word in name for word in LOGARITHMIC) else "linear")
        axes.grid(alpha=0.3)
        if len(matching) > 1:
            axes.legend(framealpha=0.6, edgecolor="none", fontsize="small", ncols=2 if len(matching) > 3 else 1)
    for axes in list(grid):  # what the panels left over
        axes.set_axis_off()
    figure.suptitle(title)
    figure.savefig(picture, dpi=120)


def _line(key: str, points: int, branches: list[str]) -> dict[str, Any]:
    """Name and looks of a curve: each branch of the loss in one colour throughout, levels dashed."""
    level, branch = re.match(r"level_(\d+)", key), BRANCH.match(key)
    if level:
        look: dict[str, Any] = {"label": f"level {level[1]}", "color": f"C{int(level[1]) + 3}", "linestyle": "--"}
    elif key.startswith("probe_"):
        look = {"label": {"probe_knn_auroc": "nearest neighbours", "probe_linear_auroc": "linear probe"}.get(key, key)}
    elif branch:
        number = branches.index(branch[1])
        look = {"label": branch[1].replace("_", "-"), "color": f"C{number if number < 2 else number + 6}"}
    else:
        look = {"label": "total" if key == "loss" else key.replace("_", " "), "color": "C2"}
    return look | {"marker": "o" if points < 10 else None, "markersize": 3}


def view_sheet(images: list[Image.Image], augment: TwoViewAugmentation, picture: Path, seed: int = 0) -> None:
    """Draw images (grey squares), each beside its two views, into a PNG file; two of them make a row."""
    batch = torch.from_numpy(np.stack([np.asarray(image, dtype=np.uint8) for image in images]))[:, None]
    views = augment(batch, view_draws(seed, 0, range(len(images))))
    size = (augment.image_size, augment.image_size)
    mean, std = (each[0] if isinstance(each, list) else each for each in (augment.mean, augment.std))
    gray = [((view[:, 0] * std + mean).clamp(0, 1) * 255).round().to(torch.uint8) for view in views]
    columns = ([np.asarray(image.resize(size)) for image in images], *(view.numpy() for view in gray))
    tiles = [tile for row in zip(*columns, strict=True) for tile in row]
    contact_sheet(tiles, 6, ["image", "view 1", "view 2"] * len(images)).save(picture)
