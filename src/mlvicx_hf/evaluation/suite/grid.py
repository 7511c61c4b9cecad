"""The suite: a grid of fine-tuning runs, read from one YAML file.

The grid is models × protocols × label fractions × seeds × tasks. A cell is one ordinary fine-tuning run.
"""

import difflib
import functools
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from mlvicx_hf.common.arguments import names_of
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import read_json, read_yaml, sha256
from mlvicx_hf.common.text import some
from mlvicx_hf.data.cache.cache import MANIFEST
from mlvicx_hf.encoders.external import ADAPTERS, is_external
from mlvicx_hf.finetuning.arguments import CLASSIFICATION_SECTIONS, SEGMENTATION_SECTIONS
from mlvicx_hf.finetuning.linear_probe import NOT_FOLLOWED, PLATEAU
from mlvicx_hf.recipes import fill_sections, find_recipe, load_recipe

from .paper import paper_tables

TASK_SECTIONS: dict[str, tuple[type, ...]] = {  # kind of task → dataclasses of its arguments
    "classification": CLASSIFICATION_SECTIONS,
    "segmentation": SEGMENTATION_SECTIONS,
}
TASK_METRICS = {  # kind of task → the scores that tables and curves can show, the usual one first
    "classification": ("auroc_macro", "auprc_macro", "accuracy"),
    "segmentation": ("dice", "dice_positive"),
}
PROTOCOL_FLAGS: dict[str, dict[str, Any]] = {
    "frozen": {"freeze_backbone": True},
    "frozen_levels": {"freeze_backbone": True, "pooled_levels": "all"},
    "finetuned": {},
}
GRID_FLAGS = {  # that the grid sets itself
    *("model", "architecture", "dataset", "label_fraction", "seed", "output_dir", "freeze_backbone", "pooled_levels")
}
SEARCH = "search"  # precision of neighbours, which the same features give
SHORTCUTS = ("view", "sex", "source", SEARCH)
KEYS = (
    *("title", "tasks", "models", "protocols", "label_fractions", "seeds", "pair_seeds"),
    *("compare", "paper_tables", "shortcuts"),
    *TASK_METRICS,
)
TASK_KEYS = ("kind", "dataset", "metric", "paper")
SOURCES = ("weights", "random", "imagenet", *ADAPTERS)
WEIGHTS_FILE, CONFIGURATION_FILES = "model.safetensors", ("config.json", "preprocessor_config.json")


def _place_of(source: str) -> Path:
    """File or folder of a source, if it lies on this disk: also in `timm:NAME:FILE` and `hub:FOLDER`."""
    return Path(source.rpartition(":")[2] if source.startswith(("timm:", "hub:")) else source)


@functools.cache
def _hash_of(file: Path, changed: int) -> str:
    return sha256(file)


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    task: str  # name in the suite
    kind: str  # classification or segmentation
    dataset: str  # cache
    model: str  # name in the suite
    member: int  # which of the model's weights, such as the number of their pretraining
    weights: str  # folder or Hub name; "random"; "imagenet"; "timm:NAME" and the like
    architecture: str | None  # model that gives the configuration of random or ImageNet weights
    protocol: str  # frozen, frozen_levels (a linear layer on the pooled maps of all levels) or finetuned
    label_fraction: float  # share of the training patients
    seed: int  # of the head, the order of images and the label fraction
    options: dict[str, Any] = field(default_factory=dict)  # further flags of fine-tuning

    @property
    def weights_file(self) -> str:
        """The file of the weights, if they lie on this disk."""
        place = _place_of(self.weights)
        return str(place if place.is_file() else place / WEIGHTS_FILE)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of weights, configurations, cache and recipe, as far as they lie on this disk."""
        files = [Path(self.weights_file), Path(self.dataset, MANIFEST), Path(str(self.options.get("recipe", "")))]
        for place in [_place_of(source) for source in (self.weights, self.architecture) if source is not None]:
            files += [place / name for name in CONFIGURATION_FILES]
            files += sorted(place.glob("*.safetensors")) if place.is_dir() else []
        return {str(file): _hash_of(file, file.stat().st_mtime_ns) for file in files if file.is_file()}

    @property
    def arguments(self) -> dict[str, Any]:
        """All arguments of the run, but for the output folder; none if the file of the recipe is gone."""
        if not self._recipe_file.is_file():
            return {}
        filled = fill_sections(TASK_SECTIONS[self.kind], self.flags | {"output_dir": ""}, self.kind)
        return {name: value for section in filled for name, value in vars(section).items() if name != "output_dir"}

    @property
    def path(self) -> Path:
        """Folder of the run within that of the suite."""
        names = (self.task, self.model, self.member, self.protocol, f"{self.label_fraction:g}", self.seed)
        return Path("cells", *map(str, names))

    @property
    def error_path(self) -> Path:
        """File of the traceback of a failed run, beside its folder."""
        return self.path.with_name(f"{self.path.name}.error.txt")

    @property
    def lock_path(self) -> Path:
        """File that a process locks while it runs the cell. The system unlocks the files of dead processes."""
        return self.path.with_name(f".{self.path.name}.lock")

    @property
    def flags(self) -> dict[str, Any]:
        """Flags of the fine-tuning command, without the output folder."""
        found: dict[str, Any] = {"model": self.weights, "dataset": self.dataset}
        found |= {"label_fraction": self.label_fraction, "seed": self.seed}
        if self.architecture is not None:
            found["architecture"] = self.architecture
        found |= PROTOCOL_FLAGS[self.protocol]
        if self.kind == "classification" and self.protocol != "finetuned":
            usual = NOT_FOLLOWED | {"cache_features": True, "report_to": "none"}
            given = self._recipe | self.options
            found["fast_probe"] = given.get("lr_scheduler_type") != PLATEAU and all(
                given.get(name, value) == value for name, value in usual.items()
            )
        return found | self.options

    @property
    def _recipe(self) -> dict[str, Any]:
        """Content of the recipe; nothing if its file is gone."""
        return load_recipe(str(self._recipe_file), None, self.kind) if self._recipe_file.is_file() else {}

    @property
    def _recipe_file(self) -> Path:
        return find_recipe(str(self.options.get("recipe", "default")), self.kind)

    def describe(self) -> dict[str, Any]:
        """What is written of the cell, and what a finished cell must have been made with."""
        return asdict(self) | {"files": self.files, "arguments": self.arguments}

    def is_finished(self, output: Path) -> bool:
        """Whether the cell has its results in the folder of the suite.

        Raises:
            UserError: they were made with other settings or files. A file that is gone is no change.
        """
        file = output / self.path / "cell.json"
        if not file.is_file():
            return False
        found, wanted = read_json(file), json.loads(json.dumps(self.describe()))
        pairs = []
        for part in ("arguments", "files"):  # an earlier version may not have written all of them
            then, now = found.get(part, {}), wanted.pop(part)
            pairs += [(name, then[name], value) for name, value in now.items() if name in then]
        pairs[:0] = [(name, found.get(name), value) for name, value in wanted.items()]
        changed = "; ".join(f"{name}: {then} then, {now} now" for name, then, now in pairs if then != now)
        if changed:
            raise UserError(
                f"{file.parent} was made with other settings ({changed}); choose another --output, or remove it"
            )
        return True

    def failure(self, output: Path) -> str | None:
        """The error that ends the traceback, if the cell failed: the first line of its message."""
        error = output / self.error_path
        if not error.is_file():
            return None
        last = error.read_text(encoding="utf-8").rpartition("Traceback (most recent call last):\n")[2]
        return next((line for line in last.splitlines() if not line.startswith(" ")), last)


@dataclass(frozen=True)
class Suite:
    """A grid, and what its report shows."""

    title: str  # of the report
    path: Path  # the YAML file
    digest: str  # SHA-256 of the file
    cells: tuple[Cell, ...]  # of the grid; those that share features stand next to one another
    metrics: dict[str, str]  # task → score that its tables and curves show
    paper: dict[str, str]  # task → name of its data in the paper
    paper_tables: tuple[str, ...]  # tables of the paper that the report rebuilds
    compare: tuple[tuple[str, str], ...]  # pairs of models, each the first against the second
    shortcuts: tuple[str, ...]  # what the features are asked to tell: view, sex, source, search


def read_suite(path: Path) -> Suite:
    """Read the YAML file of a suite. Its keys are:

    - `tasks`: name → `{kind: classification | segmentation, dataset: CACHE}`, and if wanted `metric` (shown in tables),
      `paper` (name of this data in the paper) and flags of fine-tuning;
    - `models`: name → folder or Hub name, a list of them, or a mapping of `weights`, `random` or `imagenet` (the folder
      that gives the configuration), or of `timm`, `hub`, `xrv` or `callable` (an encoder of another library), and flags
      of fine-tuning;
    - `protocols`: a list, or name → flags of fine-tuning, which any other flag overrides;
    - `label_fractions`, `seeds`: lists; `pair_seeds`: give each of several weights of a model one seed, the one at its
      place, instead of all;
    - `classification`, `segmentation`: flags of fine-tuning;
    - `compare`: pairs of models, by default all against the first; `paper_tables`; `shortcuts`, by default all;
    - `title`.

    Raises:
        UserError: a key, kind, protocol, model or flag that does not exist, one that is missing, or a cell twice.
    """
    suite = read_yaml(path)
    _check_names(path, "key(s)", suite, KEYS)
    for key in ("tasks", "models"):
        if not isinstance(suite.get(key), dict) or not suite[key]:
            raise UserError(f"{path}: {key}: {suite.get(key)!r} found; expected a mapping with one entry at least")
        for name in suite[key]:
            if not _is_text(name) or Path(name).name != name or name in ("", ".."):  # a name is a folder of the results
                raise UserError(f"{path}: {key}: name {name!r} found; expected text without a slash")
    first, *others = suite["models"]
    usual: dict[str, Any] = {"protocols": ["frozen", "finetuned"], "label_fractions": [1.0], "seeds": [0]}
    usual |= {"pair_seeds": False, "paper_tables": (), "shortcuts": SHORTCUTS, "title": path.stem}
    suite = usual | {"compare": [[other, first] for other in others]} | suite
    _check_values(path, suite)
    _check_names(path, "protocols", suite["protocols"], PROTOCOL_FLAGS)
    _check_names(path, "paper_tables", suite["paper_tables"], paper_tables())
    _check_names(path, "shortcuts", suite["shortcuts"], SHORTCUTS)
    _check_names(path, "compare", itertools.chain(*suite["compare"]), suite["models"])
    metrics = {task: _metric(path, task, about) for task, about in suite["tasks"].items()}
    cells = tuple(_cells(path, suite))
    if twice := [str(place) for place, count in Counter(cell.path for cell in cells).items() if count > 1]:
        raise UserError(f"{path}: {some(twice)} found twice; expected every protocol, label fraction and seed once")
    return Suite(
        title=suite["title"],
        path=path,
        digest=sha256(path),
        cells=cells,
        metrics=metrics,
        paper={task: about["paper"] for task, about in suite["tasks"].items() if "paper" in about},
        paper_tables=tuple(suite["paper_tables"]),
        compare=tuple((ours, theirs) for ours, theirs in suite["compare"]),
        shortcuts=tuple(suite["shortcuts"]),
    )


def _check_values(path: Path, suite: Mapping[str, Any]) -> None:
    """Refuse values of another type than `read_suite` names."""
    names = "a list of names"
    checks: dict[str, tuple[Callable[[Any], bool], str]] = {
        "title": (lambda value: isinstance(value, str), "text"),
        "pair_seeds": (lambda value: isinstance(value, bool), "true or false"),
        "protocols": (_is_named_flags, "a list of names, or a mapping of names to flags"),
        "label_fractions": (_all(lambda x: _is_number(x) and 0 < x <= 1, 1), "a list of numbers above 0, up to 1"),
        "seeds": (_all(lambda x: _is_number(x, int) and x >= 0, 1), "a list of whole numbers from 0 on"),
        "compare": (_all(lambda pair: _all(_is_text)(pair) and len(pair) == len(set(pair)) == 2), "a list of pairs"),
        "paper_tables": (_all(_is_text), names),
        "shortcuts": (_all(_is_text), names),
        **dict.fromkeys(TASK_METRICS, (lambda value: isinstance(value, dict), "a mapping of flags")),
    }
    for key, (fits, expected) in checks.items():
        if key in suite and not fits(suite[key]):
            raise UserError(f"{path}: {key}: {suite[key]!r} found; expected {expected}")


def _all(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, (list, tuple)) and len(value) >= least and all(map(fits, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_named_flags(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(value) and all(flags is None or isinstance(flags, dict) for flags in value.values())
    return _all(_is_text, 1)(value)


def _metric(path: Path, task: str, about: Mapping[str, Any]) -> str:
    """The score that a task shows, after a check of its entry."""
    kinds = " or ".join(TASK_METRICS)
    if not isinstance(about, dict) or about.get("kind") not in TASK_METRICS or "dataset" not in about:
        raise UserError(f"{path}: task {task} {about} found; expected a kind ({kinds}) and a dataset")
    known = TASK_METRICS[about["kind"]]
    metric = str(about.get("metric", known[0]))
    _check_names(path, f"task {task}: metric", [metric], known)
    return metric


def _cells(path: Path, suite: Mapping[str, Any]) -> Iterator[Cell]:
    protocols, seeds = suite["protocols"], suite["seeds"]
    if not isinstance(protocols, dict):
        protocols = dict.fromkeys(protocols)
    models = {name: _members(path, name, entry) for name, entry in suite["models"].items()}
    members = [(name, number) for name, found in models.items() for number in range(len(found))]
    for (task, about), (name, number), (protocol, usual), fraction, seed in itertools.product(
        suite["tasks"].items(), members, protocols.items(), suite["label_fractions"], seeds
    ):
        kind = about["kind"]
        if protocol == "frozen_levels" and (kind == "segmentation" or is_external(models[name][number][0])):
            continue  # a decoder sees all levels anyway; encoders of other libraries have one
        if kind == "segmentation" and is_external(models[name][number][0]):
            continue  # a decoder needs maps
        if len(models[name]) > 1 and suite["pair_seeds"] and seed != seeds[number % len(seeds)]:
            continue
        weights, architecture, flags = models[name][number]
        own = {key: value for key, value in about.items() if key not in TASK_KEYS}
        options = (usual or {}) | suite.get(kind, {}) | own | flags
        _check_flags(path, f"task {task}, model {name}, {protocol}", kind, options)
        yield Cell(
            task=task,
            kind=kind,
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


def _check_names(path: Path, what: str, found: Iterable[Any], expected: Iterable[str]) -> None:
    unknown = sorted({str(name) for name in found} - set(expected))
    if unknown:
        raise UserError(f"{path}: {what} {', '.join(unknown)} found; expected some of {', '.join(expected)}")


def _check_flags(path: Path, where: str, kind: str, options: Iterable[str]) -> None:
    known = {"recipe"} | names_of([*TASK_SECTIONS[kind], TrainingArguments])
    for name in options:
        if name in GRID_FLAGS:
            raise UserError(f"{path}: {where}: flag {name} found; expected no flag that the grid sets itself")
        if name not in known:
            similar = ", ".join(difflib.get_close_matches(name, known)) or "a flag that the command lists under --help"
            raise UserError(f"{path}: {where}: {name} found, which is no flag of {kind}; expected {similar}")


def _members(path: Path, name: str, entry: Any) -> list[tuple[str, str | None, dict[str, Any]]]:
    """Weights, architecture and flags of each of the weights in a model's entry."""
    if not isinstance(entry, dict):
        entry = {"weights": entry}
    given = [source for source in SOURCES if source in entry]
    if len(given) != 1:
        raise UserError(
            f"{path}: model {name} {entry} found; expected a folder, a list of them, or a mapping with one of "
            f"{', '.join(SOURCES)}"
        )
    flags = {key: value for key, value in entry.items() if key not in SOURCES}
    if given[0] in ADAPTERS:
        return [(f"{given[0]}:{entry[given[0]]}", None, flags)]
    if given != ["weights"]:
        return [(given[0], str(entry[given[0]]), flags)]
    weights = entry["weights"] if isinstance(entry["weights"], list) else [entry["weights"]]
    if not _all(_is_text, 1)(weights):
        raise UserError(
            f"{path}: model {name}: weights {entry['weights']!r} found; expected a folder, or a list of them"
        )
    return [(source, None, flags) for source in weights]
