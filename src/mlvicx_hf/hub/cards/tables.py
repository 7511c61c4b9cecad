"""What a model card says of results: which of them belong together, their means and their tables.

Results of different data never share a table. Several seeds of otherwise equal runs become a mean and a standard
deviation; where a seed occurs twice, the runs are listed one by one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, TypeVar

from huggingface_hub import EvalResult

from mlvicx_hf.common.provenance import describe_commit
from mlvicx_hf.common.text import markdown_table
from mlvicx_hf.scoring.labels import NOT_SCORED

from .results import PROTOCOLS, Result, Task, canonical, count, last_part

COLUMNS = 3  # of settings in a table of classes, so that it stays narrow enough to read
T = TypeVar("T")


# -- which results belong together -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """Runs of one setting, one a seed.

    Attributes:
        name: of the encoder and of how it was trained.
        training: how it was trained.
        results: of the runs, by seed.
        mine: whether the card's model is the encoder (backbone) or among the runs (head).
    """

    name: str
    training: str
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
    grouped, first = _rows(results, encoder, own), results[0]
    rows = grouped if own is None else _own_first(grouped, own)
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
    commits = ", ".join(
        dict.fromkeys(describe_commit(r.content["code"]["commit"]) for row in rows for r in row.results)
    )
    kinds = dict.fromkeys(kind for result in results for kind in result.subgroups)
    return Table(
        title=f"{first.content['task'].capitalize()}, `{last_part(data['cache'])}`",
        facts=f"Test split: {_counts(counts['test'])}; validation: {_counts(counts['validation'])}. "
        f"Collection `{data['collection']}`, data `{data['data_hash'][:12]}`, split `{data['split_hash'][:12]}`. "
        f"Made by {commits}.",
        synthetic=data["synthetic"],
        scores=markdown_table(head, lines),
        differences=_differences(grouped, encoder),
        classes=_class_tables(rows, first),
        subgroups={kind: _subgroup_table(rows, kind, task) for kind in kinds},
        empty_masks=first.empty_masks,
        rows=tuple(rows),
    )


def _rows(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> list[Row]:
    """One row a setting, or a run where a seed of the setting occurs twice; this model's first."""
    rows = []
    for group in _grouped(results, lambda result: result.setting()):
        rivals = [r.content for r in results if r.content["protocol"] == group[0].content["protocol"]]
        training = _training_name(group[0], _varying([content["hyperparameters"] for content in rivals]))
        seeds = [result.content["seed"] for result in group]
        for runs in [group] if len(set(seeds)) == len(seeds) else [[run] for run in group]:
            ordered = tuple(sorted(runs, key=lambda result: int(result.content["seed"])))
            if own is None:
                mine = last_part(runs[0].content["model"]) in encoder
            else:
                mine = any(run.content == own.content for run in runs)
            name = f"{_encoder_name(ordered[0], own, encoder)}, {training}"
            rows.append(Row(name, training, ordered, mine))
    often = Counter(row.name for row in rows)
    named = [replace(row, name=row.name + _run_names(row)) if often[row.name] > 1 else row for row in rows]
    return sorted(named, key=lambda row: not row.mine)


def _own_first(rows: Sequence[Row], own: Result) -> list[Row]:
    """The head that the card is of as a row of its own, before the mean of its setting."""
    shown = []
    for row in rows:
        if row.mine:
            shown.append(Row(f"**this model** ({row.name})", row.training, (own,), True))
        if not row.mine or len(row.results) > 1:
            shown.append(replace(row, mine=False))
    return shown


def _varying(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Names of the hyper-parameters that are not the same in all runs."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({canonical(setting.get(name)) for setting in settings}) > 1]


def _training_name(result: Result, varying: Sequence[str]) -> str:
    content = result.content
    share = "" if content["label_fraction"] == 1 else f", {100 * content['label_fraction']:g} % of the labels"
    settings = [f", `{name}={content['hyperparameters'].get(name)}`" for name in varying]
    return PROTOCOLS[content["protocol"]] + share + "".join(settings)


def _encoder_name(result: Result, own: Result | None, encoder: Collection[str]) -> str:
    model = result.content["model"]
    if model == "random":
        return "random weights" + ("" if _same_architecture(result, encoder) else f" of {_architecture(result)}")
    dropped = " without context blocks" if result.content.get("drop_context") else ""
    return ("pretrained" if own is None else f"`{last_part(model)}`") + dropped


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
    """A sentence for every training that this model and random weights share."""
    fair = [row for row in rows if _is_random(row) and _same_architecture(row.results[0], encoder)]
    pretrained = [row for row in rows if row.mine and not _is_random(row)]
    sentences = []
    for ours in _grouped(pretrained, lambda row: row.results[0].setting(model=False)):
        theirs = [row for row in fair if row.results[0].setting(model=False) == ours[0].results[0].setting(model=False)]
        if not theirs:
            continue
        if len(ours) == len(theirs) == 1 and ours[0].seeds == theirs[0].seeds:
            sentences.append(_difference(ours[0], theirs[0]))
            continue
        seeds = " against ".join(" and ".join(row.list_seeds() for row in group) for group in (ours, theirs))
        sentences.append(
            f"Pretrained against random weights ({ours[0].training}): no difference is given, because the seeds do not "
            f"match or occur twice: {seeds}."
        )
    return sentences


def _difference(row: Row, baseline: Row) -> str:
    parts = []
    for name, title in row.results[0].task.scores.items():
        pairs = list(zip(row.scores(name), baseline.scores(name), strict=True))
        scored = [a - b for a, b in pairs if not isinstance(a, str) and not isinstance(b, str)]
        parts.append(f"{title} {_mean(scored, signed=True) if len(scored) == len(pairs) else NOT_SCORED}")
    seeds = f"{'mean over the seeds' if len(row.seeds) > 1 else 'seed'} {row.list_seeds()}"
    return f"Pretrained minus random weights ({row.training}): {', '.join(parts)}; {seeds}."


def _is_random(row: Row) -> bool:
    return bool(row.results[0].content["model"] == "random")


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
        part = replace(row, results=tuple(known))
        for name in dict.fromkeys(name for result in known for name in result.subgroups[kind]):
            groups = [result.subgroups[kind][name] for result in known if name in result.subgroups[kind]]
            counts = [_range([group[what] for group in groups]) for what in ("images", "patients")]
            lines.append([name, row.name, part.list_seeds(), *counts, _mean([group[task.main] for group in groups])])
    return markdown_table([kind, "encoder, training", "seeds", "images", "patients", task.scores[task.main]], lines)


def evaluation_results(tables: Sequence[Table], repo_id: str) -> list[EvalResult]:
    """The Hub's metadata: a head's own figures, or a backbone's means over seeds.

    Args:
        tables: of the card.
        repo_id: name on the Hub.
    """
    found = []
    for row in (row for table in tables for row in table.rows if row.mine):
        content, task = row.results[0].content, row.results[0].task
        name = row.name.replace("**", "").replace("`", "")
        for key, metric in task.metrics.items():
            values = [value for value in row.scores(key) if not isinstance(value, str)]
            if len(values) < len(row.results):
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
                    metric_args={"seeds": row.seeds, "label_fraction": content["label_fraction"]},
                    source_name=f"results.json of mlvicx_hf {content['code']['mlvicx_hf']}",
                    source_url=f"https://huggingface.co/{repo_id}",
                )
            )
    return found


# -- words and figures ------------------------------------------------------------------------------------------------


def _mean(values: Sequence[float | str], signed: bool = False) -> str:
    """Mean, and the sample standard deviation where there are several; "n/a" as soon as one was not scored."""
    numbers = [value for value in values if not isinstance(value, str)]
    if len(numbers) < len(values):
        return NOT_SCORED
    mean = f"{fmean(numbers):{'+' if signed else ''}.3f}"
    return mean if signed or len(numbers) == 1 else f"{mean} (SD {stdev(numbers):.3f})"


def _counts(split: dict[str, int]) -> str:
    return f"{count(split['images'], 'image', 'images')} of {count(split['patients'], 'patient', 'patients')}"


def _range(values: Collection[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
