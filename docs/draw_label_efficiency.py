"""Draw label_efficiency.png from the table in results/worth.md: python docs/draw_label_efficiency.py."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
MODELS = {
    "random weights": ("C0", "--"),
    "random + VICReg": ("C1", "--"),
    "random + MLVICX": ("C2", "--"),
    "ImageNet": ("C0", "-"),
    "ImageNet + VICReg": ("C1", "-"),
    "ImageNet + MLVICX": ("C2", "-"),
}


def main() -> None:
    """Two panels, tasks A and B with a frozen encoder: means of three pretrainings, by their first weights."""
    text = (FOLDER / "results" / "worth.md").read_text()
    frozen = text[text.index("*frozen encoder, linear layer") : text.index("*fine-tuned")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axis, task in zip(axes, "AB", strict=True):
        rows = re.findall(rf"^\| {task}, (\d+) % \|(.*)$", frozen, re.MULTILINE)
        shares = [int(percent) for percent, _ in rows]
        scores = [[float(score) for score in re.findall(r"0\.\d+", cells)] for _, cells in rows]
        for (label, (color, style)), means in zip(MODELS.items(), zip(*scores, strict=True), strict=True):
            axis.plot(shares, means, style, color=color, marker="o", label=label)
        axis.set(
            title=f"task {task}, frozen encoder", xlabel="labels used (%)", ylabel="macro AUROC, test", xscale="log"
        )
        axis.set_xticks([10, 30, 100], ["10", "30", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(loc="lower right", fontsize="small")
    figure.savefig(FOLDER / "label_efficiency.png", dpi=120)


if __name__ == "__main__":
    main()
