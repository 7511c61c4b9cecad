#!/usr/bin/env python
"""Every method of pretraining at three rates on the same images, then three seeds of the best rate.

    python tools/method_table.py train --core 0 &     # one for each core; stop and start them as you like
    python tools/method_table.py train --core 1 &
    python tools/method_table.py show                 # validation scores by rate, and what each method's best one is
    python tools/method_table.py suite > methods.yaml # the best rates with their three seeds, for mlvicx evaluate

`caches/` holds pool, A and B; docs/results/real_radiographs.md says how to make them. Each pretraining becomes a row of
docs/results/methods.jsonl, and what has a row is never done again. Rates are chosen on validation images.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RUNS, CACHES, ROWS = Path("runs/methods"), Path("caches"), Path("docs/results/methods.jsonl")
FACTORS = (10, 3, 1)  # of the rate that the publication's rule gives; short runs want much, so the highest goes first
SEEDS = (0, 1, 2)
TASKS = ("A", "B")
COMMON = ("--image_size", 96, "--batch_size", 64, "--epochs", 4.07, "--checkpoint_steps", 100, "--num_workers", 1)
LARS = ("--warmup_epochs", 0.5)  # published are 10 of hundreds of epochs
NARROW = ("--expander_dims", 1024, 1024, 1024)
# A copy that forgets after 1,000 steps would hardly move in 313, and a queue holds a quarter of the images at most.
SHORT = ("scale_momentum=false", "key_momentum=0.99")
QUEUE = ("--objective_options", "queue_size=1216", *SHORT)


@dataclass(frozen=True)
class Method:
    """A method from random weights: the base rate of its publication, its recipe, and what a short run needs."""

    rate: float
    words: tuple[object, ...]
    recipe: str | None = None


METHODS = {
    "mlvicx": Method(0.2, LARS, "small"),
    "vicreg": Method(0.2, (*LARS, *NARROW)),
    "barlow_twins": Method(0.2, (*LARS, "--objective_options", "projector_dims=1024,1024,1024")),
    "simclr": Method(0.3, LARS),
    "byol": Method(0.3, (*LARS, "--objective_options", "scale_momentum=false")),
    "simsiam": Method(0.05, ()),
    "moco_v2": Method(0.03, QUEUE),
    "inter_moco": Method(0.12, QUEUE),
    "caid": Method(0.03, QUEUE),
    "pcrl_v1": Method(0.004, ("--objective_options", "queue_size=1152", *SHORT)),
    "pcrl_v2": Method(0.04, ("--objective_options", "local_size=41")),
}


def main() -> None:
    """Train, show, or print a suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "show", "suite"))
    parser.add_argument("--core", type=int, help="run on this core alone, with one thread")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    arguments = parser.parse_args()
    if arguments.action == "train":
        if arguments.core is not None:
            os.sched_setaffinity(0, {arguments.core})
        RUNS.mkdir(parents=True, exist_ok=True)
        while train_next(arguments.methods):
            pass
    elif arguments.action == "show":
        show()
    else:
        print(yaml.safe_dump(suite(), sort_keys=False), end="")


def rows() -> list[dict[str, Any]]:
    """What is done."""
    return [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []


def score(row: dict[str, Any]) -> float:
    """Mean macro AUROC over the tasks, on validation; the worst where training failed."""
    return statistics.mean(row["validation"].values()) if row["validation"] else 0.0


def best_factor(method: str) -> int | None:
    """Which of the rates is best for seed 0; None while one is missing."""
    tried = [row for row in rows() if (row["method"], row["seed"]) == (method, 0)]
    return max(tried, key=score)["factor"] if len(tried) == len(FACTORS) else None


def wanted(methods: list[str]) -> list[tuple[str, int, int]]:
    """(method, factor, seed) of every pretraining that can be begun: rates first, then the seeds of the best."""
    cells = [(method, factor, 0) for factor in FACTORS for method in methods]
    best = {method: factor for method in methods if (factor := best_factor(method)) is not None}
    cells += [(method, factor, seed) for seed in SEEDS[1:] for method, factor in best.items()]
    done = {(row["method"], row["factor"], row["seed"]) for row in rows()}
    return [cell for cell in cells if cell not in done]


def folder(method: str, factor: int, seed: int) -> Path:
    """Of one pretraining."""
    return RUNS / f"{method}-x{factor}-{seed}"


def train_next(methods: list[str]) -> bool:
    """Pretrain and score the first cell that no other process has; False if there is none."""
    for cell in wanted(methods):
        with open(f"{folder(*cell)}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            if cell in wanted(methods):  # it was not done meanwhile
                row = train(*cell)
                with ROWS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            return True
    return False


def train(method: str, factor: int, seed: int) -> dict[str, Any]:
    """Pretrain, fit a linear layer for every task, and say what validation says.

    Raises:
        RuntimeError: a command failed for another reason than a loss that is not finite.
    """
    output, setting = folder(method, factor, seed), METHODS[method]
    rate = setting.rate * factor
    words = [
        "--recipe",
        setting.recipe or method,
        *COMMON,
        *setting.words,
        "--seed",
        seed,
        "--base_learning_rate",
        rate,
    ]
    row: dict[str, Any] = {"method": method, "factor": factor, "seed": seed, "base_learning_rate": rate}
    begin = time.time()
    failure = run("pretrain", *words, "--dataset", CACHES / "pool", "--output_dir", output, "--resume", log=output)
    row["seconds"] = round(time.time() - begin)
    if failure:
        if "FloatingPointError" not in failure and "loss nan" not in failure:
            raise RuntimeError(f"{output}: {failure}")
        return row | {"validation": {}, "failure": failure.splitlines()[-1]}
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    row |= {"images": last["images"], "loss": last["loss"]}
    row["rankme"] = {name: round(value, 2) for name, value in last.items() if name.endswith("rankme")}
    row["validation"], row["data"] = {}, {}
    for task in TASKS:
        scored = output.with_name(f"{output.name}-{task}")
        words = ["--model", output, "--dataset", CACHES / task, "--freeze_backbone", "--output_dir", scored]
        if not (scored / "results.json").exists() and (failure := run("classify", *words, log=scored)):
            raise RuntimeError(f"{scored}: {failure}")
        results = json.loads((scored / "results.json").read_text())
        row["validation"][task] = round(results["validation"]["auroc_macro"], 4)
        row["data"][task] = results["data"]["data_hash"]
    made = json.loads((output / "run.json").read_text())
    return row | {"code": made["code"]["commit"], "hardware": made["hardware"]["name"]}


def run(command: str, *words: object, log: Path) -> str:
    """One command of the package with one thread: the last lines of what it says if it fails, otherwise nothing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command_line = [sys.executable, "-m", "mlvicx_hf.commands", command, *map(str, words)]
    done = subprocess.run(command_line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log.with_name(log.name + ".log").write_text(done.stdout)
    return done.stdout[-2000:] if done.returncode else ""


def show() -> None:
    """Print validation scores by rate, and the mean and the best of them."""
    print("| method | rate | seed | A | B | mean | minutes |\n|---|---:|---|---|---|---|---:|")
    for row in sorted(rows(), key=lambda row: (list(METHODS).index(row["method"]), row["factor"], row["seed"])):
        chosen = "**" if row["factor"] == best_factor(row["method"]) else ""
        scores = [f"{value:.3f}" for value in row["validation"].values()] or ["failed", "failed"]
        cells = [row["method"], f"{chosen}×{row['factor']}{chosen}", row["seed"], *scores, f"{score(row):.3f}"]
        print("|", " | ".join(map(str, [*cells, round(row["seconds"] / 60)])), "|")


def suite() -> dict[str, Any]:
    """The frozen protocol for random weights and every method at its best rate, MLVICX being the one compared."""
    best = {method: best_factor(method) for method in METHODS}
    models: dict[str, Any] = {"random": {"random": str(folder("vicreg", 1, 0))}}
    for method, factor in best.items():
        if factor is not None:
            models[method] = [str(folder(method, factor, seed)) for seed in SEEDS]
    return {
        "title": "The methods of the paper's tables, real radiographs",
        "tasks": {task: {"kind": "classification", "dataset": str(CACHES / task)} for task in TASKS},
        "models": models,
        "protocols": ["frozen"],
        "label_fractions": [0.1, 0.3, 1],
        "seeds": list(SEEDS),
        "pair_seeds": True,
        "compare": [["mlvicx", name] for name in models if name != "mlvicx"],
        "shortcuts": [],
    }


if __name__ == "__main__":
    main()
