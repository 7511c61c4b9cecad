# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""A grid of fine-tuning runs from one YAML file: what is finished is never done again, what fails is reported.

The grid is models × protocols × label fractions × seeds × tasks. A cell is one run of the ordinary fine-tuning, in a
folder that is there as a whole or not at all, so a grid that was killed goes on with the same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from .. import classification, segmentation
from ..finetuning import DataArguments, ModelArguments, parse_arguments
from ..integrity_mlvicx import sha256
from ..linear_probe import FeatureStore
from ..metrics import NOT_SCORED
from ..progress import progress_bar
from ..provenance import new_file, new_folder, write_json

KINDS = {"classification": "auroc_macro", "segmentation": "dice"}
PROTOCOLS = ("frozen", "finetuned")
KEYS = ("tasks", "models", "protocols", "label_fractions", "seeds", *KINDS)


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        task: its name in the suite.
        kind: classification or segmentation.
        dataset: cache.
        model: its name in the suite.
        member: which of the model's weights, such as the seed of their pretraining.
        weights: folder or Hub name; "random".
        architecture: whose configuration random weights have.
        protocol: frozen or finetuned.
        label_fraction: share of the training patients.
        seed: of the head, the order of images and the label fraction.
        options: further flags of fine-tuning.
        weights_hash: SHA-256 of the weights, where they lie in a folder.
    """

    task: str
    kind: str
    dataset: str
    model: str
    member: int
    weights: str
    architecture: str | None
    protocol: str
    label_fraction: float
    seed: int
    options: dict[str, Any] = field(default_factory=dict)
    weights_hash: str | None = None

    @property
    def path(self) -> Path:
        """Of its folder, in that of the suite."""
        names = (self.task, self.model, self.member, self.protocol, f"{self.label_fraction:g}", self.seed)
        return Path("cells", *map(str, names))

    def words(self, output: Path) -> list[str]:
        """The flags of the fine-tuning command."""
        flags = {
            "model": self.weights,
            "dataset": self.dataset,
            "label_fraction": self.label_fraction,
            "seed": self.seed,
            "freeze_backbone": self.protocol == "frozen",
            "output_dir": output,
        }
        if self.architecture is not None:
            flags["architecture"] = self.architecture
        if self.kind == "classification" and self.protocol == "frozen":
            flags["fast_probe"] = True
        flags |= self.options
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def read_suite(path: Path) -> list[Cell]:
    """The cells of a suite, those that share features next to one another.

    Args:
        path: a YAML file. `tasks`: by name `{kind: classification | segmentation, dataset: CACHE}`; `models`: by name a
            folder or Hub name, a list of them, or `{random: FOLDER}` for random weights of that model's configuration;
            `protocols`, `label_fractions`, `seeds`: lists; `classification`, `segmentation`: flags of fine-tuning.

    Raises:
        ValueError: a key, kind or protocol that does not exist, or one that is missing.
    """
    suite = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(suite, dict) or not {"tasks", "models"} <= set(suite):
        raise ValueError(f"{path}: expected a mapping with tasks and models at least")
    unknown = sorted(set(suite) - set(KEYS))
    if unknown:
        raise ValueError(f"{path} has the key(s) {', '.join(map(str, unknown))}; expected some of {', '.join(KEYS)}")
    protocols = suite.get("protocols", list(PROTOCOLS))
    if not set(protocols) <= set(PROTOCOLS):
        raise ValueError(f"{path}: protocols {protocols} found; expected some of {', '.join(PROTOCOLS)}")
    for task, about in suite["tasks"].items():
        if about.get("kind") not in KINDS or "dataset" not in about:
            raise ValueError(f"{path}: task {task} {about} found; expected a kind ({' or '.join(KINDS)}) and a dataset")
    axes = (
        suite["tasks"].items(),
        [(name, *member) for name, entry in suite["models"].items() for member in _members(path, name, entry)],
        protocols,
        suite.get("label_fractions", [1.0]),
        suite.get("seeds", [0]),
    )
    cells = []
    for (task, about), member, protocol, fraction, seed in itertools.product(*axes):
        name, number, weights, architecture, digest = member
        options = suite.get(about["kind"], {}) | {k: v for k, v in about.items() if k not in ("kind", "dataset")}
        cells.append(
            Cell(
                task=task,
                kind=about["kind"],
                dataset=str(about["dataset"]),
                model=name,
                member=number,
                weights=weights,
                architecture=architecture,
                protocol=protocol,
                label_fraction=float(fraction),
                seed=int(seed),
                options=options,
                weights_hash=digest,
            )
        )
    return cells


def _members(path: Path, name: str, entry: Any) -> list[tuple[int, str, str | None, str | None]]:
    """Number, weights, architecture and hash of the weights of a model's entry."""
    if isinstance(entry, dict):
        if set(entry) != {"random"}:
            raise ValueError(f"{path}: model {name} {entry} found; expected a folder, a list, or {{random: FOLDER}}")
        return [(0, "random", str(entry["random"]), None)]
    members: list[tuple[int, str, str | None, str | None]] = []
    for number, weights in enumerate(entry if isinstance(entry, list) else [entry]):
        file = Path(weights, "model.safetensors")
        members.append((number, str(weights), None, sha256(file) if file.is_file() else None))
    return members


def run_suite(cells: Sequence[Cell], output: Path, keep_models: bool = False) -> list[Cell]:
    """Run the cells that are not finished.

    Args:
        cells: of a suite.
        output: folder of the suite.
        keep_models: leave the weights of every cell in its folder.

    Returns:
        Those that failed; each has a `.error.txt` beside its folder.

    Raises:
        ValueError: a finished cell that was run with other settings.
    """
    waiting = [cell for cell in cells if not is_finished(cell, output)]
    failed = []
    store = FeatureStore()
    with progress_bar(len(cells), "suite", "cell", initial=len(cells) - len(waiting)) as bar:
        for cell in waiting:
            error = output / cell.path.with_name(f"{cell.path.name}.error.txt")
            error.unlink(missing_ok=True)
            try:
                _run(cell, output / cell.path, store, keep_models)
            except Exception:  # of whatever kind: the others go on
                failed.append(cell)
                with new_file(error) as temporary:
                    temporary.write_text(traceback.format_exc(), encoding="utf-8")
                bar.write(f"failed: {cell.path}, see {error}", file=sys.stderr)
            bar.update()
    return failed


def is_finished(cell: Cell, output: Path) -> bool:
    """Whether a cell has its results.

    Raises:
        ValueError: they were made with other settings.
    """
    file = output / cell.path / "cell.json"
    if not file.is_file():
        return False
    found, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(asdict(cell)))
    changed = [key for key in wanted if found.get(key) != wanted[key]]
    if changed:
        listed = "; ".join(f"{key}: {found.get(key)} then, {wanted[key]} now" for key in changed)
        raise ValueError(
            f"{file.parent} was made with other settings ({listed}); choose another --output, or remove it"
        )
    return True


def _run(cell: Cell, folder: Path, store: FeatureStore, keep_model: bool) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as temporary:
        if cell.kind == "classification":
            sections: tuple[type, ...] = (
                classification.ClassifierArguments,
                DataArguments,
                classification.ClassificationArguments,
            )
            model, data, arguments = parse_arguments(cell.kind, sections, cell.words(temporary))
            classification.finetune(model, data, arguments, store)
        else:
            sections = (ModelArguments, segmentation.SegmentationDataArguments, segmentation.SegmentationArguments)
            segmentation.finetune(*parse_arguments(cell.kind, sections, cell.words(temporary)))
        if not keep_model:
            (temporary / "model.safetensors").unlink()
        write_json(temporary / "cell.json", asdict(cell))


def summarise(cells: Sequence[Cell], output: Path) -> pd.DataFrame:
    """Test scores of the finished cells, in the order of the suite.

    Returns:
        One row a cell: task, model, member, protocol, label_fraction, seed, metric, test.
    """
    rows = []
    for cell in cells:
        file = output / cell.path / "results.json"
        if file.is_file():
            metric = KINDS[cell.kind]
            score = json.loads(file.read_text(encoding="utf-8"))["test"][metric]
            keys = ("task", "model", "member", "protocol", "label_fraction", "seed")
            row = {key: getattr(cell, key) for key in keys}
            rows.append(row | {"metric": metric, "test": float("nan") if score == NOT_SCORED else score})
    return pd.DataFrame(rows)


def main() -> None:
    """The command `scripts/evaluate_suite.py`.

    Raises:
        SystemExit: with code 1 when a cell failed.
    """
    parser = argparse.ArgumentParser(description="Run a grid of fine-tuning runs, and go on where it was stopped.")
    parser.add_argument("suite", type=Path, help="YAML file of tasks, models, protocols, label fractions and seeds")
    parser.add_argument("--output", type=Path, required=True, help="folder of the cells and their summary")
    parser.add_argument(
        "--keep_models", action="store_true", help="keep the weights of every cell: 45 MB with ResNet-18"
    )
    arguments = parser.parse_args()
    cells = read_suite(arguments.suite)
    failed = run_suite(cells, arguments.output, arguments.keep_models)
    table = summarise(cells, arguments.output)
    if len(table):
        with new_file(arguments.output / "summary.csv") as temporary:
            table.to_csv(temporary, index=False)
        groups = table.groupby(["task", "protocol", "label_fraction", "model"], sort=False)["test"]
        for (task, protocol, fraction, model), scores in groups:
            print(
                f"{task}, {protocol}, {fraction:g} of the labels, {model}: {scores.mean():.4f} "
                f"(SD {scores.std(ddof=0):.4f}, {len(scores)} runs)"
            )
    print(f"{len(table)} of {len(cells)} cells finished, {len(failed)} failed")
    if failed:
        raise SystemExit(1)
