"""Pictures of a suite's report: label efficiency, differences with intervals, reliability."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mlvicx_hf.scoring.calibration import CALIBRATION_BINS
from mlvicx_hf.scoring.labels import NOT_SCORED

PROTOCOL_TITLES = {"frozen": "frozen", "frozen_levels": "frozen, all levels", "finetuned": "fine-tuned"}


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure and its panels, at most three in a row."""
    from matplotlib.figure import Figure

    columns = min(3, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_axis_off()
    return figure, axes[:panels]


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return buffer.getvalue()


def label_efficiency(settings: Sequence[dict[str, Any]], metrics: dict[str, str]) -> bytes:
    """Draw the main score over the share of labels: a panel for each task and protocol, a line for each model.

    `metrics` maps a task to its main score.
    """
    panels = list(dict.fromkeys((row["task"], row["protocol"]) for row in settings))
    models = list(dict.fromkeys(row["model"] for row in settings))
    figure, axes = _figure(len(panels), 4.2, 3.4)
    for (task, protocol), panel in zip(panels, axes, strict=True):
        for number, model in enumerate(models):
            points = []
            for row in settings:
                score = row["scores"].get(metrics[task], {})
                if (row["task"], row["protocol"], row["model"]) == (task, protocol, model) and _is_whole(score):
                    points.append((100 * row["label_fraction"], score["mean"], score["low"], score["high"]))
            if points:
                shift = 1.03 ** (number - len(models) / 2)  # so that the bars lie side by side
                percent, mean, low, high = np.array(sorted(points)).T
                look = {"color": f"C{number}", "marker": "o", "markersize": 4, "capsize": 2, "lw": 1.2}
                panel.errorbar(shift * percent, mean, [mean - low, high - mean], label=model, **look)
        fractions = sorted({100 * row["label_fraction"] for row in settings if row["task"] == task})
        panel.set(xscale="log", xlabel="labels, %", title=f"{task}, {PROTOCOL_TITLES[protocol]}", ylabel=metrics[task])
        panel.set_xticks(fractions, [f"{value:g}" for value in fractions])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    drawn = [zip(*panel.get_legend_handles_labels(), strict=True) for panel in axes]
    handles = {model: handle for panel in drawn for handle, model in panel}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize="small")
    return _png(figure)


def forest(comparisons: Sequence[dict[str, Any]]) -> bytes:
    """Draw each difference with its interval on a line of its own."""
    shown = [row for row in comparisons if _is_whole(row, ("difference", "low", "high"))]
    figure, (panel,) = _figure(1, 8.5, 0.8 + 0.26 * max(1, len(shown)))
    names = []
    for place, row in enumerate(shown):
        clear = row["low"] > 0 or row["high"] < 0
        panel.plot([row["low"], row["high"]], [place, place], color="C0" if clear else "0.6", lw=2)
        panel.plot(row["difference"], place, "o", color="C0" if clear else "0.4", markersize=5)
        how = PROTOCOL_TITLES[row["protocol"]]
        names.append(f"{row['model']} − {row['baseline']}: {row['task']}, {how}, {100 * row['label_fraction']:g} %")
    panel.axvline(0, color="0.3", lw=0.8)
    panel.set_yticks(range(len(shown)), names, fontsize="small")
    panel.set(xlabel="difference of the score, 95 % interval over patients", ylim=(len(shown) - 0.4, -0.6))
    panel.grid(axis="x", alpha=0.3)
    return _png(figure)


def reliability(settings: Sequence[dict[str, Any]]) -> bytes | None:
    """Draw frequency over probability at the largest share of labels, a panel for each task and protocol.

    None if no setting has a calibration.
    """
    calibrated = [row for row in settings if "calibration" in row]
    panels = list(dict.fromkeys((row["task"], row["protocol"]) for row in calibrated))
    if not panels:
        return None
    models = list(dict.fromkeys(row["model"] for row in settings))
    figure, axes = _figure(len(panels), 3.6, 3.4)
    for (task, protocol), panel in zip(panels, axes, strict=True):
        rows = [row for row in calibrated if (row["task"], row["protocol"]) == (task, protocol)]
        most = max(row["label_fraction"] for row in rows)
        panel.plot([0, 1], [0, 1], color="0.6", lw=0.8)
        for row in (row for row in rows if row["label_fraction"] == most):
            name = f"{row['model']}, ECE {row['calibration']['ece_macro']:.3f}"
            points, colour = _pooled_bins(row["calibration"]), f"C{models.index(row['model'])}"
            panel.plot(*points.to_numpy().T, marker="o", markersize=4, lw=1.2, color=colour, label=name)
        panel.set(xlabel="probability", ylabel="frequency", xlim=(0, 1), ylim=(0, 1))
        panel.set_title(f"{task}, {PROTOCOL_TITLES[protocol]}, {100 * most:g} %", fontsize="medium")
        panel.legend(fontsize="x-small", framealpha=0.6)
    return _png(figure)


def _pooled_bins(calibration: dict[str, Any]) -> pd.DataFrame:
    """Mean probability and frequency of every bin over all labels."""
    rows = pd.DataFrame([row for label in calibration["labels"].values() for row in label["bins"]])
    bins = (rows["probability"] * CALIBRATION_BINS).astype(int).clip(upper=CALIBRATION_BINS - 1)
    sums = rows[["probability", "frequency"]].mul(rows["images"], axis=0).groupby(bins).sum()
    return sums.div(rows["images"].groupby(bins).sum(), axis=0)


def _is_whole(score: dict[str, Any], names: Sequence[str] = ("mean", "low", "high")) -> bool:
    return all(name in score and score[name] != NOT_SCORED for name in names)
