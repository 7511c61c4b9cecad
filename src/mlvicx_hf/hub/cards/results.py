"""Read the files that a model card is made from, check every field, and word what they say."""

import json
import math
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import RESULTS_FILE, json_field, read_json
from mlvicx_hf.common.provenance import describe_commit
from mlvicx_hf.scoring.labels import NOT_SCORED

NUMBER = (int, float)
PROTOCOL_NAMES = {"frozen": "frozen encoder", "finetuned": "fine-tuned"}


@dataclass(frozen=True)
class ScoreNames:
    """The names of a task's scores."""

    tag: str  # of the Hub's tasks
    scores: dict[str, str]  # field of a split's scores → its name; the first is the score that subgroups have
    metrics: dict[str, str]  # field → identifier of the metric in `evaluate`
    per_class: str  # field with a score for every class
    class_score: str  # name of that score

    @property
    def main(self) -> str:
        """Field of the score that subgroups have."""
        return next(iter(self.scores))


TASKS = {
    "classification": ScoreNames(
        "image-classification",
        {"auroc_macro": "macro AUROC", "accuracy": "accuracy"},
        {"auroc_macro": "roc_auc", "accuracy": "accuracy"},
        "auroc",
        "AUROC",
    ),
    "segmentation": ScoreNames(
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
    "hyperparameters": dict, "epochs_trained": NUMBER, "code.mlvicx_hf": str, "code.commit": str, "test": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A checked `results.json`."""

    path: Path
    content: dict[str, Any]

    @property
    def task(self) -> ScoreNames:
        """Names of its scores."""
        return TASKS[self.content["task"]]

    @property
    def data(self) -> Hashable:
        """What results in one table have in common."""
        data, counts = self.content["data"], self.content["counts"]
        evaluated = canonical([self.content["labels"], counts["validation"], counts["test"]])
        labels = data.get("label_hash"), canonical(data.get("policy"))  # None in files of earlier versions
        return self.content["task"], data["data_hash"], data["split_hash"], labels, evaluated

    def setting(self, model: bool = True) -> Hashable:
        """What runs that differ only in their seed have in common; without the model, what a fair comparison has."""
        c = self.content
        images = float(c["label_fraction"]), c.get("max_train_samples")
        protocol = (c["protocol"], images, canonical(c["hyperparameters"]), c.get("image_size"))
        if not model:
            return protocol
        weights = canonical(c.get("weights_sha256") or {})
        return (*protocol, c["model"], weights, c.get("architecture"), bool(c.get("drop_context")))

    @property
    def test(self) -> dict[str, Any]:
        """Scores of the test split."""
        return dict(self.content["test"])

    @property
    def subgroups(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Scores of parts of the test split, by kind and name of the subgroup."""
        return dict(self.test.get("subgroups", {}))

    @property
    def images_positive(self) -> dict[str, int]:
        """Number of test images that show a structure."""
        per_label = {name: scores["images_positive"] for name, scores in self.test.get("per_label", {}).items()}
        return dict(self.test.get("images_positive", per_label))

    @property
    def empty_masks(self) -> str:
        """What an image without a structure counts."""
        return str(self.test.get("empty_mask_convention", self.content.get("empty_mask_convention", "")))


def read_results(paths: Iterable[Path]) -> list[Result]:
    """Read the results of fine-tuned runs. A result that is named twice, or copied, counts once.

    Raises:
        FileNotFoundError: no such file.
        UserError: another kind of file, or a field that is absent or no figure; the message names both.
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
    if json_field(content, "task", str, file) not in TASKS:
        raise UserError(f"{file}: task={content['task']!r} found; expected {' or '.join(TASKS)}")
    for name, kind in FIELDS.items():
        json_field(content, name, kind, file)
    if content["protocol"] not in PROTOCOL_NAMES:
        raise UserError(f"{file}: protocol={content['protocol']!r} found; expected {' or '.join(PROTOCOL_NAMES)}")
    task = result.task
    classes = json_field(content, f"test.{task.per_class}", dict, file)
    if sorted(classes) != sorted(content["labels"]):
        listed = ", ".join(map(str, content["labels"]))
        raise UserError(f"{file}: test.{task.per_class} of {', '.join(classes)} found; expected {listed}, the labels")
    scores = {f"test.{name}": json_field(content, f"test.{name}", (*NUMBER, str), file) for name in task.scores}
    scores |= {f"test.{task.per_class}.{name}": value for name, value in classes.items()}
    for division, groups in result.subgroups.items():
        for name, group in groups.items():
            place = f"test.subgroups.{division}.{name}"
            for what in ("images", "patients", task.main):
                if what not in group:
                    raise UserError(f"{file}: no field '{place}.{what}' found; expected {RESULTS_FILE}")
            scores[f"{place}.{task.main}"] = group[task.main]
    for name, value in scores.items():
        if value != NOT_SCORED and not (isinstance(value, NUMBER) and math.isfinite(value)):
            raise UserError(f"{file}: {name}={value!r} found; expected a number or {NOT_SCORED!r}")
    if content["task"] == "segmentation" and not (result.empty_masks and result.images_positive):
        missing = "images_positive" if result.empty_masks else "empty_mask_convention"
        raise UserError(f"{file}: no field {missing!r} found; expected {RESULTS_FILE}")


# -- words -------------------------------------------------------------------------------------------------------------


def last_part(path: str) -> str:
    """The last component of a path or of a name on the Hub: all that a card says of it."""
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def canonical(value: Any) -> str:
    """A value as text that is the same for equal values."""
    return json.dumps(value, sort_keys=True)


def count(number: int, one: str, many: str) -> str:
    """A number and its noun."""
    return f"{number:,} {one if number == 1 else many}"


def describe_machine(content: dict[str, Any]) -> str:
    """Word what a run computed on. Files of older versions say less, or nothing."""
    if "hardware" in content:
        found = content["hardware"]
        processes = count(found["processes"], "process", "processes")
        return f"{found['name']} ({found['device']}), {count(found['cores'], 'CPU core', 'CPU cores')}, {processes}"
    if "device" in content:
        processes = count(content["num_processes"], "process", "processes")
        return f"{content['device']}, {processes}; the make of the machine was not recorded"
    return "not recorded"


def describe_code(code: dict[str, str]) -> str:
    """Word which versions and which commit made a result."""
    libraries = "".join(f", {name} {code[name]}" for name in ("torch", "transformers") if name in code)
    return f"mlvicx_hf {code['mlvicx_hf']}, {describe_commit(code['commit'])}{libraries}"
