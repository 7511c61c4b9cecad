# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""A grid of fine-tuning runs from one YAML file: what is finished is never done again, what fails is reported.

The grid is models × protocols × label fractions × seeds × tasks. A cell is one run of the ordinary fine-tuning, in a
folder that is there as a whole or not at all, so a grid that was killed goes on with the same command.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import itertools
import json
import sys
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from mlvicx_hf import recipes
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_file, new_folder, sha256, write_json
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.data.cache.cache import MANIFEST
from mlvicx_hf.finetuning import classification, segmentation
from mlvicx_hf.finetuning.linear_probe import FeatureStore
from mlvicx_hf.finetuning.training import parse_arguments
from mlvicx_hf.recipes import recipe_names

KINDS = {  # of tasks, and the scores that tables and curves can show, the usual one first
    "classification": ("auroc_macro", "auprc_macro", "accuracy"),
    "segmentation": ("dice", "dice_positive"),
}
PAPER_TABLES = ("I", "II", "III", "IV")
SECTIONS: dict[str, tuple[type, ...]] = {
    "classification": classification.SECTIONS,
    "segmentation": segmentation.SECTIONS,
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "frozen": {"freeze_backbone": True},
    "frozen_levels": {"freeze_backbone": True, "pooled_levels": "all"},
    "finetuned": {},
}
SHORTCUTS = ("view", "sex", "source")
KEYS = (
    *("title", "tasks", "models", "protocols", "label_fractions", "seeds", "pair_seeds"),
    *("compare", "paper_tables", "shortcuts"),
    *KINDS,
)
TASK_KEYS = ("kind", "dataset", "metric", "paper")
SOURCES = ("weights", "random", "imagenet")
WEIGHTS, CONFIGURATIONS = "model.safetensors", ("config.json", "preprocessor_config.json")
AXES = ("model", "architecture", "dataset", "label_fraction", "seed", "output_dir", "freeze_backbone", "pooled_levels")


@functools.cache
def _hash_of(file: Path, changed: int) -> str:
    return sha256(file)


@dataclass(frozen=True)
class Cell:
    """One run.

    Args:
        task: its name in the suite.
        kind: classification or segmentation.
        dataset: cache.
        model: its name in the suite.
        member: which of the model's weights, such as the seed of their pretraining.
        weights: folder or Hub name; "random"; "imagenet".
        architecture: whose configuration random or ImageNet weights have.
        protocol: frozen, frozen_levels (a linear layer on the pooled maps of all levels) or finetuned.
        label_fraction: share of the training patients.
        seed: of the head, the order of images and the label fraction.
        options: further flags of fine-tuning.
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

    @property
    def weights_file(self) -> str:
        """Where its weights lie, if they lie in a folder."""
        return str(Path(self.weights, WEIGHTS))

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of weights, configurations, cache and recipe, of those that lie on this disk."""
        files = [Path(self.weights_file), Path(self.dataset, MANIFEST), Path(str(self.options.get("recipe", "")))]
        folders = [folder for folder in (self.weights, self.architecture) if folder is not None]
        files += [Path(folder, name) for folder in folders for name in CONFIGURATIONS]
        return {str(file): _hash_of(file, file.stat().st_mtime_ns) for file in files if file.is_file()}

    def describe(self) -> dict[str, Any]:
        """What is written of it, and what a finished cell must have been made with."""
        return asdict(self) | {"files": self.files}

    @property
    def path(self) -> Path:
        """Of its folder, in that of the suite."""
        names = (self.task, self.model, self.member, self.protocol, f"{self.label_fraction:g}", self.seed)
        return Path("cells", *map(str, names))

    @property
    def error_path(self) -> Path:
        """Of the traceback, beside the folder, when it failed."""
        return self.path.with_name(f"{self.path.name}.error.txt")

    @property
    def lock_path(self) -> Path:
        """Of the file that a process locks while it runs the cell; the system unlocks those of the dead."""
        return self.path.with_name(f".{self.path.name}.lock")

    def words(self, output: Path) -> list[str]:
        """The flags of the fine-tuning command."""
        flags: dict[str, Any] = {
            "model": self.weights,
            "dataset": self.dataset,
            "label_fraction": self.label_fraction,
            "seed": self.seed,
            "output_dir": output,
        }
        if self.architecture is not None:
            flags["architecture"] = self.architecture
        flags |= PROTOCOLS[self.protocol]
        if self.kind == "classification" and self.protocol != "finetuned":
            flags["fast_probe"] = True
        flags |= self.options
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class Suite:
    """A grid, and what its report shows.

    Attributes:
        title: of the report.
        path: the YAML file.
        digest: its SHA-256.
        cells: of the grid, those that share features next to one another.
        metrics: task → the score that its tables and curves show.
        paper: task → what the paper calls its data.
        paper_tables: of the paper, to be rebuilt.
        compare: pairs of models, each the first against the second.
        shortcuts: what features are asked to tell, of view, sex and source.
    """

    title: str
    path: Path
    digest: str
    cells: tuple[Cell, ...]
    metrics: dict[str, str]
    paper: dict[str, str]
    paper_tables: tuple[str, ...]
    compare: tuple[tuple[str, str], ...]
    shortcuts: tuple[str, ...]


def suite_names() -> list[str]:
    """Suites that come with the package."""
    return recipe_names("suite")


def find_suite(name: str) -> Path:
    """The file of a suite that comes with the package, or the path of another one.

    Raises:
        ValueError: neither.
    """
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in suite_names():
        raise UserError(f"suite {name!r} found; expected {', '.join(suite_names())}, or the path of a .yaml file")
    return Path(str(files(recipes) / "suite" / f"{name}.yaml"))


def read_suite(path: Path) -> Suite:
    """Read the YAML file of a suite.

    Args:
        path: `tasks`: by name `{kind: classification | segmentation, dataset: CACHE}`, and where wanted `metric` (that
            tables show), `paper` (what the paper calls this data) and flags of fine-tuning; `models`: by name a folder
            or Hub name, a list of them, or a mapping of `weights`, `random` or `imagenet` (the folder whose
            configuration they have) and flags of fine-tuning; `protocols`: a list, or by name flags of fine-tuning that
            give way to all others; `label_fractions`, `seeds`: lists; `pair_seeds`: whether each of several weights of
            a model has one seed, the one at its place, instead of all; `classification`, `segmentation`: flags of
            fine-tuning; `compare`: pairs of models, by default all against the first; `paper_tables`; `shortcuts`, by
            default all; `title`.

    Raises:
        ValueError: a key, kind, protocol, model or flag that does not exist, or one that is missing.
    """
    text = path.read_text(encoding="utf-8")
    suite = yaml.safe_load(text)
    if not isinstance(suite, dict) or not {"tasks", "models"} <= set(suite):
        raise UserError(f"{path}: expected a mapping with tasks and models at least")
    _check_names(path, "key(s)", suite, KEYS)
    protocols = suite.get("protocols", ["frozen", "finetuned"])
    if not isinstance(protocols, dict):
        protocols = dict.fromkeys(protocols)
    _check_names(path, "protocols", protocols, PROTOCOLS)
    _check_names(path, "paper_tables", suite.get("paper_tables", ()), PAPER_TABLES)
    _check_names(path, "shortcuts", suite.get("shortcuts", SHORTCUTS), SHORTCUTS)
    for task, about in suite["tasks"].items():
        if about.get("kind") not in KINDS or "dataset" not in about:
            raise UserError(f"{path}: task {task} {about} found; expected a kind ({' or '.join(KINDS)}) and a dataset")
        _check_names(path, f"task {task}: metric", [about.get("metric", KINDS[about["kind"]][0])], KINDS[about["kind"]])
    seeds = suite.get("seeds", [0])
    members = [(name, *member) for name, entry in suite["models"].items() for member in _members(path, name, entry)]
    cells = []
    for (task, about), member, (protocol, usual), fraction, seed in itertools.product(
        suite["tasks"].items(), members, protocols.items(), suite.get("label_fractions", [1.0]), seeds
    ):
        if about["kind"] == "segmentation" and protocol == "frozen_levels":
            continue  # a decoder sees all levels anyway
        name, number, weights, architecture, flags = member
        several = sum(other[0] == name for other in members) > 1
        if several and suite.get("pair_seeds", False) and seed != seeds[number % len(seeds)]:
            continue
        own = {key: value for key, value in about.items() if key not in TASK_KEYS}
        options = (usual or {}) | suite.get(about["kind"], {}) | own | flags
        _check_flags(path, f"task {task}, model {name}, {protocol}", about["kind"], options)
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
            )
        )
    first, *others = suite["models"]
    pairs = suite.get("compare", [[other, first] for other in others])
    _check_names(path, "compare", itertools.chain(*pairs), suite["models"])
    return Suite(
        title=suite.get("title", path.stem),
        path=path,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        cells=tuple(cells),
        metrics={task: about.get("metric", KINDS[about["kind"]][0]) for task, about in suite["tasks"].items()},
        paper={task: about["paper"] for task, about in suite["tasks"].items() if "paper" in about},
        paper_tables=tuple(suite.get("paper_tables", ())),
        compare=tuple((ours, theirs) for ours, theirs in pairs),
        shortcuts=tuple(suite.get("shortcuts", SHORTCUTS)),
    )


def _check_names(path: Path, what: str, found: Iterable[Any], expected: Iterable[str]) -> None:
    unknown = sorted({str(name) for name in found} - set(expected))
    if unknown:
        raise UserError(f"{path}: {what} {', '.join(unknown)} found; expected some of {', '.join(expected)}")


def _check_flags(path: Path, where: str, kind: str, options: Iterable[str]) -> None:
    known = {"recipe", *(each.name for section in SECTIONS[kind] for each in fields(section))}
    for name in options:
        if name in AXES:
            raise UserError(f"{path}: {where}: flag {name} found, which is up to the grid; expected no such flag")
        if name not in known:
            similar = ", ".join(difflib.get_close_matches(name, known)) or f"those of finetune_{kind}.py --help"
            raise UserError(f"{path}: {where}: {name} found, which is no flag of {kind}; expected {similar}")


def _members(path: Path, name: str, entry: Any) -> list[tuple[int, str, str | None, dict[str, Any]]]:
    """Number, weights, architecture and flags of the weights of a model's entry."""
    if not isinstance(entry, dict):
        entry = {"weights": entry}
    given = [source for source in SOURCES if source in entry]
    if len(given) != 1:
        raise UserError(
            f"{path}: model {name} {entry} found; expected a folder, a list of them, or a mapping with one of "
            f"{', '.join(SOURCES)}"
        )
    flags = {key: value for key, value in entry.items() if key not in SOURCES}
    if given != ["weights"]:
        return [(0, given[0], str(entry[given[0]]), flags)]
    weights = entry["weights"] if isinstance(entry["weights"], list) else [entry["weights"]]
    return [(number, str(source), None, flags) for number, source in enumerate(weights)]


def run_suite(
    cells: Sequence[Cell], output: Path, keep_models: bool = False, store: FeatureStore | None = None
) -> list[Cell]:
    """Run the cells that are not finished, and that no other process is running in the same folder.

    Args:
        cells: of a suite.
        output: folder of the suite.
        keep_models: leave the weights of every cell in its folder.
        store: features that the cells share.

    Returns:
        Those that failed; each has a `.error.txt` beside its folder.

    Raises:
        ValueError: a finished cell that was run with other settings.
    """
    waiting = [cell for cell in cells if not is_finished(cell, output)]
    failed = []
    store = FeatureStore() if store is None else store
    with progress_bar(len(cells), "suite", "cell", initial=len(cells) - len(waiting)) as bar:
        for cell in waiting:
            lock = output / cell.lock_path
            lock.parent.mkdir(parents=True, exist_ok=True)
            with suppress(Timeout), FileLock(lock, blocking=False):  # else another process is at it
                if not is_finished(cell, output) and not _succeeds(cell, output, store, keep_models):
                    failed.append(cell)
                    error = output / cell.error_path
                    bar.write(f"failed: {cell.path}: {read_reason(error)}; traceback in {error}", file=sys.stderr)
            bar.update()
    return failed


def _succeeds(cell: Cell, output: Path, store: FeatureStore, keep_model: bool) -> bool:
    """Run a cell; whether it came to its end: else its traceback is in its error file."""
    error = output / cell.error_path
    error.unlink(missing_ok=True)
    try:
        _run(cell, output / cell.path, store, keep_model)
    except Exception:  # of whatever kind, a flag's impossible value among them: the others go on
        with new_file(error) as temporary:
            temporary.write_text(traceback.format_exc(), encoding="utf-8")
        return False
    return True


def read_reason(error: Path) -> str:
    """The last line of the traceback of a failed cell: what was wrong."""
    return error.read_text(encoding="utf-8").strip().splitlines()[-1]


def is_finished(cell: Cell, output: Path) -> bool:
    """Whether a cell has its results.

    Raises:
        ValueError: they were made with other settings or files. A file that is not there any more is no change.
    """
    file = output / cell.path / "cell.json"
    if not file.is_file():
        return False
    found, wanted = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(cell.describe()))
    files = {file: digest for file, digest in wanted.pop("files").items() if file in found["files"]}
    then, now = found | found["files"], wanted | files
    changed = [key for key in now if then.get(key) != now[key]]
    if changed:
        listed = "; ".join(f"{key}: {then.get(key)} then, {now[key]} now" for key in changed)
        raise UserError(f"{file.parent} was made with other settings ({listed}); choose another --output, or remove it")
    return True


def _run(cell: Cell, folder: Path, store: FeatureStore, keep_model: bool) -> None:
    with new_folder(folder) as temporary:
        if cell.kind == "classification":
            model, data, arguments = parse_arguments(cell.kind, SECTIONS[cell.kind], cell.words(temporary))
            classification.finetune(model, data, arguments, store)
        else:
            segmentation.finetune(*parse_arguments(cell.kind, SECTIONS[cell.kind], cell.words(temporary)))
        if not keep_model:
            (temporary / "model.safetensors").unlink()
        write_json(temporary / "cell.json", cell.describe())
