"""Draw label_efficiency.png from the table in results/real_radiographs.md: python docs/draw_label_efficiency.py."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
METHODS = ("random", "VICReg", "MLVICX")
SCORE = re.compile(r"(\d\.\d+)\W+± (\d\.\d+)")


def main() -> None:
    """Two panels, tasks A and B with a frozen encoder: mean and standard deviation of three pretrainings."""
    text = (FOLDER / "results" / "real_radiographs.md").read_text()
    frozen = text[text.index("*frozen encoder, linear layer*") : text.index("*fine-tuned*")]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, task in zip(axes, "AB", strict=True):
        rows = re.findall(rf"^\| {task}, (\d+) % \|(.*)$", frozen, re.MULTILINE)
        for number, method in enumerate(METHODS):
            scores = [SCORE.findall(cells)[number] for _, cells in rows]
            means, deviations = ([float(score[i]) for score in scores] for i in range(2))
            label = "random weights" if method == "random" else method
            axis.errorbar([int(percent) for percent, _ in rows], means, deviations, marker="o", capsize=3, label=label)
        axis.set(
            title=f"task {task}, frozen encoder", xlabel="labels used (%)", ylabel="macro AUROC, test", xscale="log"
        )
        axis.set_xticks([10, 30, 100], ["10", "30", "100"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].legend(loc="lower right")
    figure.savefig(FOLDER / "label_efficiency.png", dpi=120)


if __name__ == "__main__":
    main()
