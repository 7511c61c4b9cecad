"""What a model card says of `results.json` files: which of them belong together, their means and their tables.

Results of different data never share a table. Several seeds of otherwise equal runs become a mean and a standard
deviation; where a seed occurs twice, the runs are listed one by one.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, TypeVar

from huggingface_hub import EvalResult

from .metrics import NOT_SCORED

NUMBER = (int, float)
SCORE = (int, float, str)
RESULTS_FILE = "the results.json of a fine-tuning"
COLUMNS = 3  # of runs in a table of classes, so that it stays narrow enough to read
PROTOCOLS = {"frozen": "frozen encoder", "finetuned": "fine-tuned"}
T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """How the scores of a task are called.

    Attributes:
        tag: of the Hub's tasks.
        scores: field of a split's scores → its name.
        metrics: field → identifier of the metric in `evaluate`.
        per_class: field with a score for every class.
        class_score: name of that.
    """

    tag: str
    scores: dict[str, str]
    metrics: dict[str, str]
    per_class: str
    class_score: str

    @property
    def main(self) -> str:
        """Field of the score that subgroups have."""
        return next(iter(self.scores))


TASKS = {
    "classification": Task(
        "image-classification",
        {"auroc_macro": "macro AUROC", "accuracy": "accuracy"},
        {"auroc_macro": "roc_auc", "accuracy": "accuracy"},
        "auroc",
        "AUROC",
    ),
    "segmentation": Task(
        "image-segmentation",
        {"dice": "Dice", "dice_positive": "Dice, present", "iou": "IoU", "iou_positive": "IoU, present"},
        {"dice": "dice", "iou": "mean_iou"},
        "dice_per_class",
        "Dice",
    ),
}
FIELDS: dict[str, type | tuple[type, ...]] = {
    "protocol": str, "labels": list, "model": str, "label_fraction": NUMBER, "seed": int,
    **{f"counts.{split}.{what}": int for split in ("train", "validation", "test") for what in ("images", "patients")},
    "data.cache": str, "data.collection": str, "data.synthetic": bool, "data.data_hash": str, "data.split_hash": str,
    "hyperparameters": dict, "epochs_trained": NUMBER, "code.mlvicx_hf": str, "code.commit": str,
}  # fmt: skip


# -- files -------------------------------------------------------------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: anything else in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected one that a run wrote")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}; expected JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: {type(content).__name__} found; expected a JSON object")
    return content


def field(
    content: dict[str, Any], name: str, kind: type | tuple[type, ...], file: Path, expected: str = RESULTS_FILE
) -> Any:
    """A field, by its name with dots, of the right type.

    Raises:
        ValueError: naming file and field.
    """
    value: Any = content
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            raise ValueError(f"{file}: no field {name!r} found; expected {expected}")
        value = value[part]
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise ValueError(f"{file}: {name}={value!r} found; expected {' or '.join(k.__name__ for k in kinds)}")
    return value


def last_part(path: str) -> str:
    """The last component of a path or of a name on the Hub: all that a card says of it."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _same(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class Result:
    """A checked `results.json`."""

    path: Path
    content: dict[str, Any]

    @property
    def task(self) -> Task:
        """What its scores are called."""
        return TASKS[self.content["task"]]

    @property
    def data(self) -> Hashable:
        """What results in one table have in common."""
        data, counts = self.content["data"], self.content["counts"]
        evaluated = _same([self.content["labels"], counts["validation"], counts["test"]])
        return self.content["task"], data["data_hash"], data["split_hash"], evaluated

    def setting(self, model: bool = True) -> Hashable:
        """What runs that differ only in their seed have in common; without the model, what a fair comparison has."""
        c = self.content
        protocol = (c["protocol"], float(c["label_fraction"]), _same(c["hyperparameters"]))
        return (*protocol, c["model"], c.get("architecture")) if model else protocol

    def score(self, name: str) -> float | str:
        """A score of the test split."""
        value: float | str = self.content["test"][name]
        return value

    @property
    def subgroups(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Scores of parts of the test split by kind and name of subgroup."""
        groups: dict[str, dict[str, dict[str, Any]]] = self.content["test"].get("subgroups", {})
        return groups

    @property
    def images_positive(self) -> dict[str, int]:
        """Test images that show a structure."""
        test = self.content["test"]
        per_label = {name: scores["images_positive"] for name, scores in test.get("per_label", {}).items()}
        return dict(test.get("images_positive", per_label))

    @property
    def empty_masks(self) -> str:
        """What an image without a structure counts."""
        test: dict[str, str] = self.content["test"]
        return str(test.get("empty_mask_convention", self.content.get("empty_mask_convention", "")))


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Results of fine-tuned runs, each once however often it is named or copied.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file of another kind, or a field that is absent or no figure; both are named.
    """
    results: list[Result] = []
    for path in paths:
        result = Result(path, read_json(path))
        _check(result)
        if all(result.content != other.content for other in results):
            results.append(result)
    return results


def _check(result: Result) -> None:
    content, file = result.content, result.path
    if field(content, "task", str, file) not in TASKS:
        raise ValueError(f"{file}: task={content['task']!r} found; expected {' or '.join(TASKS)}")
    for name, kind in FIELDS.items():
        field(content, name, kind, file)
    if content["protocol"] not in PROTOCOLS:
        raise ValueError(f"{file}: protocol={content['protocol']!r} found; expected {' or '.join(PROTOCOLS)}")
    task, test = result.task, field(content, "test", dict, file)
    scores = {name: field(content, name, SCORE, file) for name in (f"test.{score}" for score in task.scores)}
    classes = field(content, f"test.{task.per_class}", dict, file)
    if sorted(classes) != sorted(content["labels"]):
        listed = ", ".join(map(str, content["labels"]))
        raise ValueError(f"{file}: test.{task.per_class} of {', '.join(classes)} found; expected {listed}, the labels")
    scores |= {f"test.{task.per_class}.{name}": value for name, value in classes.items()}
    for kind, groups in test.get("subgroups", {}).items():
        for name, group in groups.items():
            place = f"test.subgroups.{kind}.{name}"
            for what in ("images", "patients", task.main):
                if what not in group:
                    raise ValueError(f"{file}: no field '{place}.{what}' found; expected {RESULTS_FILE}")
            scores[f"{place}.{task.main}"] = group[task.main]
    for name, value in scores.items():
        if value != NOT_SCORED and not (isinstance(value, NUMBER) and math.isfinite(value)):
            raise ValueError(f"{file}: {name}={value!r} found; expected a number or {NOT_SCORED!r}")
    if content["task"] == "segmentation" and not (result.empty_masks and result.images_positive):
        missing = "images_positive" if result.empty_masks else "empty_mask_convention"
        raise ValueError(f"{file}: no field {missing!r} found; expected {RESULTS_FILE}")


# -- words -------------------------------------------------------------------------------------------------------------


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, its first column to the left and the others to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def describe_machine(content: dict[str, Any], file: Path) -> str:
    """What a run computed on; files of older versions say less, or nothing."""
    if "hardware" in content:
        kinds = {"name": str, "device": str, "cores": int, "processes": int}
        found = {key: field(content, f"hardware.{key}", kind, file) for key, kind in kinds.items()}
        processes = _count(found["processes"], "process", "processes")
        return f"{found['name']} ({found['device']}), {_count(found['cores'], 'CPU core', 'CPU cores')}, {processes}"
    if "device" in content:
        processes = _count(field(content, "num_processes", int, file), "process", "processes")
        return f"{content['device']}, {processes}; the make of the machine was not recorded"
    return "not recorded"


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def describe_code(code: dict[str, str]) -> str:
    """Versions and commit that made a result."""
    libraries = "".join(f", {name} {code[name]}" for name in ("torch", "transformers") if name in code)
    return f"mlvicx_hf {code['mlvicx_hf']}, {_commit(code['commit'])}{libraries}"


def _commit(commit: str) -> str:
    plain = commit.removesuffix("+changes")
    return f"commit `{plain[:12]}`" + (" with local changes" if plain != commit else "")


def _mean(values: Sequence[float | str], signed: bool = False) -> str:
    """Mean, and the standard deviation where there are several; "n/a" as soon as one was not scored."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return NOT_SCORED
    mean = f"{fmean(numbers):{'+' if signed else ''}.3f}"
    return mean if signed or len(numbers) == 1 else f"{mean} (SD {pstdev(numbers):.3f})"


def _range(values: Collection[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


# -- which results belong together -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Runs of one setting, one a seed.

    Attributes:
        name: of the encoder and of how it was trained.
        results: of the runs, by seed.
        mine: whether the card's model is the encoder (backbone) or one of the runs (head).
    """

    name: str
    results: tuple[Result, ...]
    mine: bool

    @property
    def seeds(self) -> list[int]:
        """Seeds of the runs."""
        return [result.content["seed"] for result in self.results]

    def list_seeds(self) -> str:
        """Seeds, and how many where there are several."""
        listed = ", ".join(map(str, self.seeds))
        return listed if len(self.seeds) == 1 else f"{listed} (n = {len(self.seeds)})"

    def scores(self, name: str) -> list[float | str]:
        """A score of every run."""
        return [result.score(name) for result in self.results]


@dataclass(frozen=True)
class Table:
    """Everything measured on one test split, as Markdown.

    Attributes:
        title: task and data.
        facts: one sentence each on the data, the counts and the code.
        synthetic: whether the images were drawn.
        scores: a row for every setting.
        differences: this model against random weights, where both have the same seeds.
        classes: scores by class, some settings a table.
        subgroups: kind → table of its scores.
        empty_masks: of segmentation: what an image without a structure counts; else empty.
        rows: what the tables were made of.
    """

    title: str
    facts: str
    synthetic: bool
    scores: str
    differences: list[str]
    classes: list[str]
    subgroups: dict[str, str]
    empty_masks: str
    rows: tuple[Row, ...]


def _grouped(values: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return list(groups.values())


def build_tables(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> list[Table]:
    """Tables of an evaluation, one for every task, data and split.

    Args:
        results: of all runs.
        encoder: names that results call the card's encoder by.
        own: result of the head that the card is of; None for a backbone.
    """
    return [_table(group, encoder, own) for group in _grouped(results, lambda result: result.data)]


def _table(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> Table:
    rows, first = _rows(results, encoder, own), results[0]
    task, data, counts = first.task, first.content["data"], first.content["counts"]
    head = ["encoder, training", "training images", "seeds", *task.scores.values()]
    lines = [
        [
            row.name,
            _range([result.content["counts"]["train"]["images"] for result in row.results]),
            row.list_seeds(),
            *(_mean(row.scores(name)) for name in task.scores),
        ]
        for row in rows
    ]
    commits = ", ".join(dict.fromkeys(_commit(r.content["code"]["commit"]) for row in rows for r in row.results))
    kinds = dict.fromkeys(kind for result in results for kind in result.subgroups)
    return Table(
        title=f"{first.content['task'].capitalize()}, `{last_part(data['cache'])}`",
        facts=f"Test split: {counts['test']['images']:,} images of {counts['test']['patients']:,} patients; validation: "
        f"{counts['validation']['images']:,} of {counts['validation']['patients']:,}. Collection `{data['collection']}`, "
        f"data `{data['data_hash'][:12]}`, split `{data['split_hash'][:12]}`. Made by {commits}.",
        synthetic=data["synthetic"],
        scores=markdown_table(head, lines),
        differences=_differences(rows, encoder),
        classes=_class_tables(rows, first),
        subgroups={kind: _subgroup_table(rows, kind, task) for kind in kinds},
        empty_masks=first.empty_masks,
        rows=tuple(rows),
    )


def _rows(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> list[Row]:
    """One row a setting, or a run where a seed of the setting occurs twice; this model's first."""
    varying = _varying([result.content["hyperparameters"] for result in results])
    rows = []
    for group in _grouped(results, lambda result: result.setting()):
        seeds = [result.content["seed"] for result in group]
        for runs in [group] if len(set(seeds)) == len(seeds) else [[run] for run in group]:
            ordered = tuple(sorted(runs, key=lambda result: int(result.content["seed"])))
            if own is None:
                mine = last_part(runs[0].content["model"]) in encoder
            else:
                mine = any(run.content == own.content for run in runs)
            rows.append(Row(_row_name(ordered[0], mine, own, encoder, varying), ordered, mine))
    often = Counter(row.name for row in rows)
    named = [Row(r.name + (_run_names(r) if often[r.name] > 1 else ""), r.results, r.mine) for r in rows]
    return sorted(named, key=lambda row: not row.mine)


def _varying(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Hyper-parameters that are not the same in all runs of a table."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({_same(setting.get(name)) for setting in settings}) > 1]


def _row_name(
    result: Result, mine: bool, own: Result | None, encoder: Collection[str], varying: Sequence[str]
) -> str:
    content = result.content
    if content["model"] == "random":
        name = "random weights" + ("" if _same_architecture(result, encoder) else f" of {_architecture(result)}")
    elif own is None:
        name = "pretrained"
    else:
        name = f"`{last_part(content['model'])}`"
    name = f"{'**this model**: ' if mine and own else ''}{name}, {PROTOCOLS[content['protocol']]}"
    name += "" if content["label_fraction"] == 1 else f", {100 * content['label_fraction']:g} % of the labels"
    return name + "".join(f", `{key}={content['hyperparameters'].get(key)}`" for key in varying)


def _run_names(row: Row) -> str:
    return ", run " + ", ".join(f"`{result.path.resolve().parent.name}`" for result in row.results)


def _architecture(result: Result) -> str:
    found = result.content.get("architecture")
    return "the default architecture" if found is None else f"`{last_part(found)}`"


def _same_architecture(result: Result, encoder: Collection[str]) -> bool:
    found = result.content.get("architecture")
    return found is not None and last_part(found) in encoder


# -- tables ------------------------------------------------------------------------------------------------------------


def _differences(rows: Sequence[Row], encoder: Collection[str]) -> list[str]:
    """A sentence for every setting that this model and random weights share."""
    baselines = [
        r for r in rows if r.results[0].content["model"] == "random" and _same_architecture(r.results[0], encoder)
    ]
    sentences = []
    for row in (row for row in rows if row.mine and row not in baselines):
        content, task = row.results[0].content, row.results[0].task
        setting = row.results[0].setting(model=False)
        same = [b for b in baselines if b.results[0].setting(model=False) == setting]
        alike = [b for b in same if b.seeds == row.seeds]
        what = f"{PROTOCOLS[content['protocol']]}, {100 * content['label_fraction']:g} % of the labels"
        if len(alike) == 1:
            (baseline,) = alike
            parts = []
            for name, title in task.scores.items():
                pairs = list(zip(row.scores(name), baseline.scores(name), strict=True))
                scored = [a - b for a, b in pairs if not isinstance(a, str) and not isinstance(b, str)]
                parts.append(f"{title} {_mean(scored, signed=True) if len(scored) == len(pairs) else NOT_SCORED}")
            seeds = "mean over the seeds" if len(row.seeds) > 1 else "seed"
            sentences.append(f"Pretrained less random weights ({what}): {', '.join(parts)}; {seeds} {row.list_seeds()}.")
        elif same:
            theirs = " and ".join(b.list_seeds() for b in same)
            sentences.append(
                f"Pretrained against random weights ({what}): no difference is given, because the seeds do not match: "
                f"{row.list_seeds()} against {theirs}."
            )
    return sentences


def _class_tables(rows: Sequence[Row], first: Result) -> list[str]:
    """The score of every class, with at most `COLUMNS` settings a table."""
    task = first.task
    tables = []
    for start in range(0, len(rows), COLUMNS):
        chosen = rows[start : start + COLUMNS]
        head = [f"{task.class_score}, test", *(row.name for row in chosen)]
        lines = [
            [name, *(_mean([r.content["test"][task.per_class][name] for r in row.results]) for row in chosen)]
            for name in first.content["labels"]
        ]
        if first.content["task"] == "segmentation":
            head.insert(1, "images with it")
            lines = [[name, f"{first.images_positive[name]:,}", *rest] for name, *rest in lines]
        tables.append(markdown_table(head, lines))
    return tables


def _subgroup_table(rows: Sequence[Row], kind: str, task: Task) -> str:
    """Scores of the parts of the test split, of the runs that have them."""
    lines = []
    for row in rows:
        known = [result for result in row.results if kind in result.subgroups]
        part = Row(row.name, tuple(known), row.mine)
        for name in dict.fromkeys(name for result in known for name in result.subgroups[kind]):
            groups = [result.subgroups[kind][name] for result in known if name in result.subgroups[kind]]
            counts = [_range([group[what] for group in groups]) for what in ("images", "patients")]
            lines.append([name, row.name, part.list_seeds(), *counts, _mean([group[task.main] for group in groups])])
    return markdown_table([kind, "encoder, training", "seeds", "images", "patients", task.scores[task.main]], lines)


def evaluation_results(tables: Sequence[Table], own: Result | None, repo_id: str) -> list[EvalResult]:
    """The Hub's metadata: a head's own figures, or a backbone's means over seeds.

    Args:
        tables: of the card.
        own: result of the head that the card is of; None for a backbone.
        repo_id: name on the Hub.
    """
    found = []
    for row in (row for table in tables for row in table.rows if row.mine):
        results = row.results if own is None else tuple(r for r in row.results if r.content == own.content)
        if not results:
            continue
        content, task = results[0].content, results[0].task
        seeds = [result.content["seed"] for result in results]
        name = row.name.removeprefix("**this model**: ").replace("`", "")
        for key, metric in task.metrics.items():
            values = [value for value in (r.score(key) for r in results) if not isinstance(value, str)]
            if len(values) < len(results):
                continue
            mean = "" if len(values) == 1 else f", mean of {len(values)} seeds"
            found.append(
                EvalResult(
                    task_type=task.tag,
                    dataset_type=content["data"]["collection"],
                    dataset_name=last_part(content["data"]["cache"]),
                    dataset_config=content["data"]["split_hash"],
                    dataset_split="test",
                    dataset_revision=content["data"]["data_hash"],
                    dataset_args=dict(content["counts"]["test"]),
                    metric_type=metric,
                    metric_name=f"{task.scores[key]}, {name}{mean}",
                    metric_value=round(fmean(values), 6),
                    metric_args={"seeds": seeds, "label_fraction": content["label_fraction"]},
                    source_name=f"results.json of mlvicx_hf {content['code']['mlvicx_hf']}",
                    source_url=f"https://huggingface.co/{repo_id}",
                )
            )
    return found
