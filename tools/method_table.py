#!/usr/bin/env python
"""Every method of pretraining at three rates on the same images, then three seeds of the best rate.

    python tools/method_table.py train --core 0 &     # one for each core; stop and start them as you like
    python tools/method_table.py train --core 1 &
    python tools/method_table.py show                 # validation scores by rate, and what each method's best one is
    python tools/method_table.py suite > methods.yaml # the best rates with their three seeds, for mlvicx evaluate

`--data imagenet` (the default) starts from ImageNet's weights with recipe from_imagenet, the same for all, and
`imagenet_long` sees twice as many images; `random` starts from random weights with the recipe of each method;
`phantoms` does so for 300 steps on synthetic radiographs. `recipe` changes one thing of recipe from_imagenet at a
time. `caches/` holds pool, A, B and phantoms; docs/results/methods.md says how to make them, and pool500. Each
pretraining becomes a row of docs/results/methods_DATA.jsonl, and what has a row is never done again. Rates are chosen
on validation images.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CACHES = Path("caches")


@dataclass(frozen=True)
class Method:
    """A row: the base rate of a method's publication, its options for a short run, its recipe for random weights."""

    rate: float = 0.012  # of recipe from_imagenet
    flags: tuple[object, ...] = ()  # in place of those of the recipe
    options: tuple[str, ...] = ()
    lars: bool = False  # its publication warms up for 10 of hundreds of epochs
    recipe: str | None = None


# A copy that forgets after 1,000 steps would hardly move in 300.
QUEUE = ("queue_size={queue}", "scale_momentum=false", "key_momentum=0.99")
METHODS = {
    "mlvicx": Method(0.2, lars=True, recipe="small"),
    "vicreg": Method(0.2, lars=True),
    "barlow_twins": Method(0.2, options=("projector_dims=1024,1024,1024",), lars=True),
    "simclr": Method(0.3, lars=True),
    "byol": Method(0.3, options=("scale_momentum=false",), lars=True),
    "simsiam": Method(0.05),
    "moco_v2": Method(0.03, options=QUEUE),
    "inter_moco": Method(0.12, options=QUEUE),
    "caid": Method(0.03, options=QUEUE),
    "pcrl_v1": Method(0.004, options=QUEUE),
    "pcrl_v2": Method(0.04, options=("local_size={local}",)),
}

# One thing of recipe from_imagenet changed at a time, MLVICX.
RECIPE = {
    "base": Method(),
    "pool-500": Method(flags=("--dataset", CACHES / "pool500", "--epochs", 22)),  # as many steps
    "epochs-6": Method(flags=("--epochs", 6)),
    "gates-middle": Method(flags=("--use_context", "true", "--context_gain", 2)),
    "gates-drawn": Method(flags=("--use_context", "true", "--context_gain", 2, "--context_init_scale", 1)),
    "crop-0.08": Method(flags=("--crop_area", 0.08, 1)),
    "crop-0.4": Method(flags=("--crop_area", 0.4, 1)),
    "lambda-0.25": Method(flags=("--multi_level_weight", 0.25)),
    "lambda-4": Method(flags=("--multi_level_weight", 4)),
    "width-512": Method(flags=("--expander_dims", 512, 512, 512)),
    "width-2048": Method(flags=("--expander_dims", 2048, 2048, 2048)),
    "aggregation-1": Method(flags=("--aggregation_size", 1)),
    "aggregation-7": Method(flags=("--aggregation_size", 7)),
    "no-rotation": Method(flags=("--rotation", 0)),
    "no-solarisation": Method(flags=("--solarize", 0, 0)),
    "no-flip": Method(flags=("--flip", 0)),
    "same-patient": Method(flags=("--positives", "same_patient")),
    "lars": Method(1.6, flags=("--optimizer", "lars", "--backbone_learning_rate_ratio", 1)),
    **{
        f"without-level-{level}": Method(flags=("--aggregation_levels", *(x for x in range(5) if x != level)))
        for level in range(5)
    },
}


@dataclass(frozen=True)
class Data:
    """What all methods see and how they are scored."""

    words: tuple[object, ...]
    pool: str = "pool"
    tasks: tuple[str, ...] = ("A", "B")
    factors: tuple[float, ...] = (10, 3, 1)  # of the rate; short runs want much, so the highest goes first
    seeds: tuple[int, ...] = (0, 1, 2)
    queue: int = 1152  # a quarter of the images at most
    local_size: int = 41  # 3/7 of the image, as published
    rate: float | None = None  # of all methods; otherwise each has its own
    start: Path | None = None  # weights that all methods start from; otherwise random ones
    methods: Mapping[str, Method] = field(default_factory=lambda: METHODS)


IMAGENET = Path("runs/start/lite0")
FROM_IMAGENET = ("--recipe", "from_imagenet", "--backbone", "tf_efficientnet_lite0", "--init_from", IMAGENET)
DATA = {
    "imagenet": Data(words=FROM_IMAGENET, factors=(1, 3, 0.3), rate=0.012, start=IMAGENET),
    "imagenet_long": Data(words=(*FROM_IMAGENET, "--epochs", 4.07), factors=(1, 0.3, 3), rate=0.012, start=IMAGENET),
    "random": Data(
        words=("--image_size", 96, "--batch_size", 64, "--epochs", 4.07, "--mixed_precision", "bf16"),
    ),
    "recipe": Data(words=FROM_IMAGENET, factors=(1,), methods=RECIPE, start=IMAGENET),
    "phantoms": Data(
        words=("--backbone", "test_resnet", "--image_size", 64, "--batch_size", 32, "--epochs", 10),
        pool="phantoms",
        tasks=("phantoms",),
        seeds=(0,),
        queue=192,
        local_size=27,
    ),
}


def main() -> None:
    """Train, show, or print a suite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "show", "suite"))
    parser.add_argument("--data", choices=list(DATA), default="imagenet")
    parser.add_argument("--core", type=int, help="run on this core alone, with one thread")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="only these rows")
    parser.add_argument("--seeds_first", action="store_true", help="more seeds of the best rate so far, then rates")
    parser.add_argument("--remake", action="store_true", help="the best rates whose weights are not on this disk, too")
    arguments = parser.parse_args()
    table = Table(arguments.data, arguments.seeds_first, arguments.remake)
    methods = arguments.methods or list(table.data.methods)
    if unknown := sorted(set(methods) - set(table.data.methods)):
        parser.error(f"--methods {', '.join(unknown)} found; expected {', '.join(table.data.methods)}")
    if arguments.action == "train":
        if arguments.core is not None:
            os.sched_setaffinity(0, {arguments.core})
        table.runs.mkdir(parents=True, exist_ok=True)
        while table.train_next(methods):
            pass
    elif arguments.action == "show":
        table.show()
    elif table.data.methods is not METHODS:
        parser.error(f"suite of --data {arguments.data} found; expected data that compare methods")
    else:
        print(yaml.safe_dump(table.suite(), sort_keys=False), end="")


Cell = tuple[str, float, int]  # method, factor of its rate, seed; the weights of the start have factor 0


def cell_of(row: Mapping[str, Any]) -> Cell:
    """What pretraining a row tells of."""
    return row["method"], row["factor"], row["seed"]


class Table:
    """The pretrainings on one collection and what is known of them."""

    def __init__(self, name: str, seeds_first: bool = False, remake: bool = False) -> None:
        self.name, self.data, self.seeds_first, self.remake = name, DATA[name], seeds_first, remake
        self.start = "imagenet" if self.data.start else "random"
        self.runs, self.file = Path(f"runs/methods_{name}"), Path(f"docs/results/methods_{name}.jsonl")

    def rows(self) -> list[dict[str, Any]]:
        """What is done."""
        return [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []

    def best_factor(self, method: str) -> float | None:
        """Which of the rates is best for seed 0; None while one is missing, unless seeds go first."""
        tried = [row for row in self.rows() if (row["method"], row["seed"]) == (method, 0)]
        enough = bool(tried) if self.seeds_first else len(tried) == len(self.data.factors)
        return max(tried, key=score)["factor"] if enough else None

    def wanted(self, methods: list[str]) -> list[Cell]:
        """Every pretraining that can be begun: rates, the weights of the start, the seeds of the best rates."""
        rates = [(method, factor, 0) for factor in self.data.factors for method in methods]
        if self.data.methods is METHODS:
            rates += [(self.start, 0, seed) for seed in self.data.seeds]
        best = {method: factor for method in methods if (factor := self.best_factor(method)) is not None}
        seeds = [(method, factor, seed) for method, factor in best.items() for seed in self.data.seeds]
        cells = [*seeds, *rates] if self.seeds_first else [*rates, *seeds]
        done = set(map(cell_of, self.rows()))
        if self.remake:
            done -= {cell for cell in seeds if not self.weights(*cell).exists()}
        return [cell for cell in cells if cell not in done]

    def folder(self, method: str, factor: float, seed: int) -> Path:
        """Of one pretraining."""
        return self.runs / f"{method}-x{factor}-{seed}"

    def weights(self, method: str, factor: float, seed: int) -> Path:
        """The file that ends a pretraining."""
        return self.folder(method, factor, seed) / "model.safetensors"

    def architecture(self) -> Path:
        """A pretraining that gives random weights their configuration: VICReg's, which has no context bottlenecks."""
        folders = [self.folder("vicreg", factor, 0) for factor in self.data.factors]
        return next((folder for folder in folders if (folder / "config.json").exists()), folders[0])

    def keep(self, row: dict[str, Any]) -> None:
        """Put a row in the place of an earlier one of the same pretraining, or behind the others."""
        with open(self.runs / "rows.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = {cell_of(row): row for row in [*self.rows(), row]}
            new = self.file.with_suffix(".new")
            new.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
            new.replace(self.file)

    def train_next(self, methods: list[str]) -> bool:
        """Pretrain and score the first cell that no other process has; False if there is none."""
        for cell in self.wanted(methods):
            with open(f"{self.folder(*cell)}.lock", "w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                if cell in self.wanted(methods):  # it was not done meanwhile
                    self.keep(self.train(*cell))
                return True
        return False

    def train(self, method: str, factor: float, seed: int) -> dict[str, Any]:
        """Pretrain, fit a linear layer for every task, and say what validation says.

        Raises:
            RuntimeError: a command failed for another reason than a loss that is not finite.
        """
        cell = (method, factor, seed)
        output = self.folder(*cell)
        row: dict[str, Any] = {"method": method, "factor": factor, "seed": seed}
        model: tuple[object, ...] = ("--model", output)
        if method == self.start:
            random = ("random", "--architecture", self.architecture())
            model = ("--model", *((self.data.start, "--image_size", 96) if self.data.start else random))
        else:
            rate = row["base_learning_rate"] = (self.data.rate or self.data.methods[method].rate) * factor
            words = [*self.words(method), "--seed", seed, "--base_learning_rate", rate, "--output_dir", output]
            begin = time.time()
            begun = not self.weights(*cell).exists()
            failure = run("pretrain", *words, log=output) if begun else ""
            row["seconds"] = round(time.time() - begin)
            if begun:  # scores of earlier weights say nothing of these
                for task in self.data.tasks:
                    shutil.rmtree(output.with_name(f"{output.name}-{task}"), ignore_errors=True)
            if failure and not any(sign in failure for sign in ("FloatingPointError", "loss nan", "loss inf")):
                raise RuntimeError(f"{output}: {failure}")
            made = json.loads((output / "run.json").read_text())
            row |= {"pool": made["data"]["data_hash"], "pretrained_by": made["code"]["commit"]}
            if failure:
                return row | {"validation": {}, "failure": failure.splitlines()[-1]}
            last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
            row |= {"images": last["images"], "loss": last["loss"]}
            row["rankme"] = {name: round(value, 2) for name, value in last.items() if name.endswith("rankme")}
        row["validation"], row["data"] = {}, {}
        for task in self.data.tasks:
            scored = output.with_name(f"{output.name}-{task}")
            words = [*model, "--dataset", CACHES / task, "--freeze_backbone", "--seed", seed, "--output_dir", scored]
            if not (scored / "results.json").exists() and (failure := run("classify", *words, log=scored)):
                raise RuntimeError(f"{scored}: {failure}")
            results = json.loads((scored / "results.json").read_text())
            row["validation"][task] = round(results["validation"]["auroc_macro"], 4)
            row["data"][task] = results["data"]["data_hash"]
        return row | {"scored_by": results["code"]["commit"], "hardware": results["hardware"]["name"]}

    def words(self, method: str) -> list[object]:
        """Flags of a pretraining but for its rate, seed and folder."""
        setting, data = self.data.methods[method], self.data
        words: list[object] = [*data.words, "--dataset", CACHES / data.pool, "--num_workers", 1]
        words += ["--checkpoint_steps", 78, "--resume"]
        options = [option.format(queue=data.queue, local=data.local_size) for option in setting.options]
        if self.data.methods is not METHODS:
            return [*words, *setting.flags]
        if self.data.start:
            if method == "vicreg":
                return [*words, "--multi_level_weight", 0]
            words += ["--objective", method]
            words += ["--crop_area", 1, 1, "--flip", 0] if method == "inter_moco" else []
        else:
            words += ["--recipe", setting.recipe or method]
            words += ["--warmup_epochs", 0.5] if setting.lars else []
            words += ["--expander_dims", 1024, 1024, 1024] if method == "vicreg" else []
        return [*words, "--objective_options", *options] if options else words

    def show(self) -> None:
        """Print validation scores by rate, and the mean and the best of them."""
        tasks = self.data.tasks
        print("| method | rate | seed |", " | ".join((*tasks, "mean", "minutes")), "|")
        print("|---|---:|---" + "|---:" * (2 + len(tasks)) + "|")
        order = [self.start, *self.data.methods]
        for row in sorted(self.rows(), key=lambda row: (order.index(row["method"]), row["factor"], row["seed"])):
            chosen = "**" if row["factor"] == self.best_factor(row["method"]) and row["factor"] else ""
            scores = [f"{row['validation'][task]:.3f}" if row["validation"] else "failed" for task in tasks]
            cells = [row["method"], f"{chosen}×{row['factor']}{chosen}", row["seed"], *scores, f"{score(row):.3f}"]
            print("|", " | ".join(map(str, [*cells, round(row.get("seconds", 0) / 60)])), "|")

    def suite(self) -> dict[str, Any]:
        """The frozen protocol for the start and the methods whose seeds are done, each compared with MLVICX."""
        random = {"random": str(self.architecture())}
        models: dict[str, Any] = {
            self.start: {"weights": str(self.data.start), "image_size": 96} if self.data.start else random
        }
        for method in self.data.methods:
            if (factor := self.best_factor(method)) is not None:
                cells = [(method, factor, seed) for seed in self.data.seeds]
                if all(self.weights(*cell).exists() for cell in cells):
                    models[method] = [str(self.folder(*cell)) for cell in cells]
        return {
            "title": "The methods of the paper's tables, real radiographs",
            "tasks": {task: {"kind": "classification", "dataset": str(CACHES / task)} for task in self.data.tasks},
            "models": models,
            "protocols": ["frozen"],
            "label_fractions": [0.1, 0.3, 1],
            "seeds": list(self.data.seeds),
            "pair_seeds": True,
            "compare": [["mlvicx", name] for name in models if "mlvicx" in models and name != "mlvicx"],
            "shortcuts": [],
        }


def score(row: dict[str, Any]) -> float:
    """Mean macro AUROC over the tasks, on validation; the worst where training failed."""
    return statistics.mean(row["validation"].values()) if row["validation"] else 0.0


def run(command: str, *words: object, log: Path) -> str:
    """One command of the package with one thread: the last lines of what it says if it fails, otherwise nothing."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command_line = [sys.executable, "-m", "mlvicx_hf.commands", command, *map(str, words)]
    done = subprocess.run(command_line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log.with_name(log.name + ".log").write_text(done.stdout)
    return done.stdout[-2000:] if done.returncode else ""


if __name__ == "__main__":
    main()
