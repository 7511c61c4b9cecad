"""Say in tables what the results of a model card say: which of them belong together, their means, their differences.

Results of different data never share a table. Several seeds of otherwise equal runs become a mean and a standard
deviation; where a seed occurs twice, the runs are listed one by one.
"""

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, TypeVar

from huggingface_hub import EvalResult

from mlvicx_hf.common.provenance import describe_commit
from mlvicx_hf.common.text import markdown_table, number, number_range
from mlvicx_hf.scoring.labels import NOT_SCORED

from .results import PROTOCOL_NAMES, Result, ScoreNames, canonical, count, last_part

SETTINGS_A_TABLE = 3  # of classes, so that the table stays narrow enough to read
T = TypeVar("T")


@dataclass(frozen=True)
class Setting:
    """The runs of one setting, one a seed: a row of a table."""

    name: str  # of the encoder and of how it was trained
    training: str  # how it was trained
    results: tuple[Result, ...]  # of the runs, by seed
    mine: bool  # whether the card's model is the encoder (backbone) or among the runs (head)

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
        return [result.test[name] for result in self.results]

    @property
    def is_random(self) -> bool:
        """Whether the encoder was not pretrained."""
        return bool(self.results[0].content["model"] == "random")


@dataclass(frozen=True)
class Table:
    """Everything measured on one test split, as Markdown."""

    title: str  # task and data
    facts: str  # one sentence each on the data, the counts and the code
    synthetic: bool  # whether the images were drawn
    scores: str  # a row for every setting
    differences: list[str]  # this model against random weights, where both have the same seeds
    classes: list[str]  # scores by class, some settings a table
    subgroups: dict[str, str]  # kind → table of its scores
    empty_masks: str  # of segmentation: what an image without a structure counts; else empty
    settings: tuple[Setting, ...]  # what the tables were made of


def build_tables(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> list[Table]:
    """Make a table for every task, data and split.

    `encoder` are the names by which the results call the card's encoder. `own` is the result of the card's head, None
    for a backbone.
    """
    return [_table(group, encoder, own) for group in _grouped(results, lambda result: result.data)]


def _table(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> Table:
    grouped, first = _settings(results, encoder, own), results[0]
    rows = grouped if own is None else _own_first(grouped, own)
    task, data, counts = first.task, first.content["data"], first.content["counts"]
    known = data.get("patients_known") is not False
    images = [number_range([result.content["counts"]["train"]["images"] for result in row.results]) for row in rows]
    lines = [
        [row.name, trained_on, row.list_seeds(), *(_mean(row.scores(name)) for name in task.scores)]
        for row, trained_on in zip(rows, images, strict=True)
    ]
    commits = dict.fromkeys(describe_commit(r.content["code"]["commit"]) for row in rows for r in row.results)
    return Table(
        title=f"{first.content['task'].capitalize()}, `{last_part(data['cache'])}`",
        facts=f"Test split: {_counts(counts['test'], known)}; validation: {_counts(counts['validation'], known)}. "
        f"Collection `{data['collection']}`, data `{data['data_hash'][:12]}`, split `{data['split_hash'][:12]}`. "
        f"Made by {', '.join(commits)}.{_leak(data)}",
        synthetic=data["synthetic"],
        scores=markdown_table(["encoder, training", "training images", "seeds", *task.scores.values()], lines),
        differences=_differences(grouped, encoder),
        classes=_class_tables(rows, first),
        subgroups={kind: _subgroup_table(rows, kind, task) for result in results for kind in result.subgroups},
        empty_masks=first.empty_masks,
        settings=tuple(rows),
    )


# -- which results belong together -------------------------------------------------------------------------------------


def _grouped(values: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for value in values:
        groups.setdefault(key(value), []).append(value)
    return list(groups.values())


def _settings(results: Sequence[Result], encoder: Collection[str], own: Result | None) -> list[Setting]:
    """One row a setting, or a run where a seed of the setting occurs twice; this model's first."""
    rows = []
    for group in _grouped(results, lambda result: result.setting()):
        training = _training_name(group[0], results)
        seeds = [result.content["seed"] for result in group]
        for runs in [group] if len(set(seeds)) == len(seeds) else [[run] for run in group]:
            ordered = tuple(sorted(runs, key=lambda result: int(result.content["seed"])))
            if own is None:
                mine = last_part(runs[0].content["model"]) in encoder
            else:
                mine = any(run.content == own.content for run in runs)
            rows.append(Setting(f"{_encoder_name(ordered[0], own, encoder)}, {training}", training, ordered, mine))
    often = Counter(row.name for row in rows)
    for place, row in enumerate(rows):
        if often[row.name] > 1:
            runs_named = ", ".join(f"`{result.path.resolve().parent.name}`" for result in row.results)
            rows[place] = replace(row, name=f"{row.name}, run {runs_named}")
    return sorted(rows, key=lambda row: not row.mine)


def _own_first(rows: Sequence[Setting], own: Result) -> list[Setting]:
    """The head that the card is of as a row of its own, before the mean of its setting."""
    shown = []
    for row in rows:
        if row.mine:
            shown.append(Setting(f"**this model** ({row.name})", row.training, (own,), True))
        if not row.mine or len(row.results) > 1:
            shown.append(replace(row, mine=False))
    return shown


def _training_name(result: Result, results: Sequence[Result]) -> str:
    """How a result was trained, with the hyper-parameters in which the runs of its protocol differ."""
    content = result.content
    rivals = [r.content["hyperparameters"] for r in results if r.content["protocol"] == content["protocol"]]
    names = dict.fromkeys(name for settings in rivals for name in settings)
    varying = [name for name in names if len({canonical(settings.get(name)) for settings in rivals}) > 1]
    share = "" if content["label_fraction"] == 1 else f", {100 * content['label_fraction']:g} % of the labels"
    share += f", at most {content['max_train_samples']:,} images" if content.get("max_train_samples") else ""
    settings = [f", `{name}={content['hyperparameters'].get(name)}`" for name in varying]
    return PROTOCOL_NAMES[content["protocol"]] + share + "".join(settings)


def _encoder_name(result: Result, own: Result | None, encoder: Collection[str]) -> str:
    model, architecture = result.content["model"], result.content.get("architecture")
    if model == "random":
        of = "the default architecture" if architecture is None else f"`{last_part(architecture)}`"
        return "random weights" + ("" if _same_architecture(result, encoder) else f" of {of}")
    dropped = " without context blocks" if result.content.get("drop_context") else ""
    return ("pretrained" if own is None else f"`{last_part(model)}`") + dropped


def _same_architecture(result: Result, encoder: Collection[str]) -> bool:
    found = result.content.get("architecture")
    return found is not None and last_part(found) in encoder


# -- tables ------------------------------------------------------------------------------------------------------------


def _differences(rows: Sequence[Setting], encoder: Collection[str]) -> list[str]:
    """A sentence for every training that this model and random weights share."""
    fair = [row for row in rows if row.is_random and _same_architecture(row.results[0], encoder)]
    pretrained = [row for row in rows if row.mine and not row.is_random]
    sentences = []
    for ours in _grouped(pretrained, lambda row: row.results[0].setting(model=False)):
        protocol = ours[0].results[0].setting(model=False)
        theirs = [row for row in fair if row.results[0].setting(model=False) == protocol]
        if len(ours) == len(theirs) == 1 and ours[0].seeds == theirs[0].seeds:
            sentences.append(_difference(ours[0], theirs[0]))
        elif theirs:
            seeds = " against ".join(" and ".join(row.list_seeds() for row in group) for group in (ours, theirs))
            sentences.append(
                f"Pretrained against random weights ({ours[0].training}): no difference is given, because the seeds do "
                f"not match or occur twice: {seeds}."
            )
    return sentences


def _difference(row: Setting, baseline: Setting) -> str:
    parts = []
    for name, title in row.results[0].task.scores.items():
        pairs = list(zip(row.scores(name), baseline.scores(name), strict=True))
        scored = [a - b for a, b in pairs if not isinstance(a, str) and not isinstance(b, str)]
        parts.append(f"{title} {f'{fmean(scored):+.3f}' if len(scored) == len(pairs) else NOT_SCORED}")
    seeds = f"{'mean over the seeds' if len(row.seeds) > 1 else 'seed'} {row.list_seeds()}"
    return f"Pretrained minus random weights ({row.training}): {', '.join(parts)}; {seeds}."


def _class_tables(rows: Sequence[Setting], first: Result) -> list[str]:
    """The score of every class, of a few settings a table."""
    task, shows_counts = first.task, first.content["task"] == "segmentation"
    tables = []
    for start in range(0, len(rows), SETTINGS_A_TABLE):
        chosen = rows[start : start + SETTINGS_A_TABLE]
        lines = []
        for name in first.content["labels"]:
            counted = [f"{first.images_positive[name]:,}"] if shows_counts else []
            scores = [_mean([result.test[task.per_class][name] for result in row.results]) for row in chosen]
            lines.append([name, *counted, *scores])
        counted = ["images with it"] if shows_counts else []
        tables.append(markdown_table([f"{task.class_score}, test", *counted, *(row.name for row in chosen)], lines))
    return tables


def calibration_table(own: Result) -> str:
    """Calibration error and Brier score of a classifier by class, before and after calibration, and its answers.

    Empty for results without calibration.
    """
    if "calibration" not in own.test:
        return ""
    found, answers = own.test["calibration"], own.test["answers"]["labels"]
    lines = []
    for name in own.content["labels"]:
        both = [[number(found[when][score][name], ".3f") for when in ("before", "after")] for score in ("ece", "brier")]
        answered = [number(answers[name][s], ".3f") if name in answers else "no band" for s in ("unsure", "error")]
        lines.append([name, *(" → ".join(pair) for pair in both), *answered])
    return markdown_table(["class", "ECE", "Brier score", "unsure", "error"], lines)


def _subgroup_table(rows: Sequence[Setting], kind: str, task: ScoreNames) -> str:
    """Scores of the parts of the test split, of the runs that have them."""
    lines, shared = [], dict[str, None]()
    for row in rows:
        known = [result for result in row.results if kind in result.subgroups]
        part = replace(row, results=tuple(known))
        for name in dict.fromkeys(name for result in known for name in result.subgroups[kind]):
            groups = [result.subgroups[kind][name] for result in known if name in result.subgroups[kind]]
            counts = [number_range([group[what] for group in groups]) for what in ("images", "patients")]
            lines.append([name, row.name, part.list_seeds(), *counts, _mean([group[task.main] for group in groups])])
            shared |= {", ".join(group["macro_labels"]): None for group in groups if "macro_labels" in group}
    table = markdown_table([kind, "encoder, training", "seeds", "images", "patients", task.scores[task.main]], lines)
    return table + "".join(f"\n\nMean over what every group can score: {labels or 'nothing'}." for labels in shared)


def evaluation_results(tables: Sequence[Table], repo_id: str) -> list[EvalResult]:
    """The Hub's metadata: a head's own figures, or a backbone's means over seeds."""
    found = []
    for row in (row for table in tables for row in table.settings if row.mine):
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
                    dataset_args=_known_counts(content),
                    metric_type=metric,
                    metric_name=f"{task.scores[key]}, {name}{mean}",
                    metric_value=round(fmean(values), 6),
                    metric_args={"seeds": row.seeds, "label_fraction": content["label_fraction"]},
                    source_name=f"results.json of mlvicx_hf {content['code']['mlvicx_hf']}",
                    source_url=f"https://huggingface.co/{repo_id}",
                )
            )
    return found


def _mean(values: Sequence[Any]) -> str:
    """Mean, and the sample standard deviation where there are several; "n/a" as soon as one was not scored."""
    if any(isinstance(value, str) for value in values):
        return NOT_SCORED
    return f"{fmean(values):.3f}" + (f" (SD {stdev(values):.3f})" if len(values) > 1 else "")


def _known_counts(content: dict[str, Any]) -> dict[str, int]:
    """Images and patients of the test split, without the patients where they are not known."""
    counts = dict(content["counts"]["test"])
    if content["data"].get("patients_known") is False:
        del counts["patients"]
    return counts


def _counts(split: dict[str, int], patients_known: bool) -> str:
    patients = count(split["patients"], "patient", "patients") if patients_known else "an unknown number of patients"
    return f"{count(split['images'], 'image', 'images')} of {patients}"


def _leak(data: dict[str, Any]) -> str:
    pairs = data.get("copies_across_splits")
    return f" **Copies of an image are in two splits, {pairs:,} pairs: scores may be too good.**" if pairs else ""
