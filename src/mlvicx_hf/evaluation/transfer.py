"""Score a saved classifier on a prepared cache of its own or another collection. Labels are matched by meaning."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from scipy.special import logit, softmax
from torch.utils.data import DataLoader

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import write_json
from mlvicx_hf.common.machine import choose_device
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import made_by
from mlvicx_hf.common.text import NOTICE, some
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.options import check_choice, check_least
from mlvicx_hf.data.vocabulary import COLLECTIONS, Match, Matching, match, normalize
from mlvicx_hf.encoders.inference import LoadedModel, infer, load
from mlvicx_hf.finetuning.classification import Classified, write_predictions
from mlvicx_hf.finetuning.data import LabelledImages, keep_known, with_splits
from mlvicx_hf.finetuning.results import score_subgroups
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification
from mlvicx_hf.scoring.labels import NOT_SCORED

from .overlap import check_overlap, read_training
from .runs import Predictions

# Of a cache. Those of an earlier version do not tell all.
DATA_FIELDS = ("collection", "synthetic", "policy", "fit", "size", "data_hash", "split_hash", "patients_known")
PROBABILITY_MARGIN = 1e-15  # distance of a class's probability from 0 and 1, so that its log-odds stay finite


def evaluate(
    model_source: str,
    dataset: str | Path,
    output: str | Path,
    *,
    split: str = "test",
    collection: str | None = None,
    findings: Sequence[str] | None = None,
    batch_size: int = 64,
    num_workers: int = 2,
    device: str | None = None,
    revision: str | None = None,
    allow_overlap: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score a classifier on every image of a split, once and without random transforms, and return the results.

    Labels are matched by `data.vocabulary`. The score of a finding that is the union of several outputs is the highest
    of their logits, which assumes nothing of their dependence, or the sum of their probabilities if the model's classes
    are exclusive. A finding that is the union of several labels is present if one of them is, absent if all are, and
    else unknown. Exclusive classes are scored as such, with accuracy, only if model and images have the same ones.
    Else each is scored against the rest, and the accuracy of a model of exclusive classes is not defined.

    Arguments that are not listed are those of `prediction.predict`.

    Args:
        model_source: folder or Hub name.
        dataset: prepared cache.
        output: JSON file of the results. `test_predictions.csv` is written beside it, whatever the split.
        split: of the cache.
        collection: whose labels the model knows; by default what the `results.json` beside it says, or else none.
        findings: score only these, by their common names.
        allow_overlap: go on although the model has seen some of the images; see `check_overlap`.

    Raises:
        FileExistsError: results that are there already.
        UserError: arguments, a model or labels that do not fit, or images that the model was trained on.
        OSError: a model or cache that is absent or damaged.
        FloatingPointError: a model whose results are not finite.
    """
    check_least(1, batch_size=batch_size)
    check_least(0, num_workers=num_workers)
    if collection is not None:
        check_choice("collection", collection, COLLECTIONS)
    output = Path(output)
    table = output.parent / Predictions.file
    _check_places(output, table)
    cache = load_cache(dataset, [split])
    loaded = load(model_source, revision, choose_device(device), MLVICXForImageClassification)
    training = read_training(loaded)
    collection = collection or training.collection
    matching = match_labels(loaded, collection, cache, findings)
    overlap = check_overlap(training, cache, split, allow_overlap, progress)
    exclusive = same_classes(loaded, cache, matching)
    common = rename_labels(cache, split, matching.matches, exclusive)
    images = common.datasets["test"]
    logits = compute_logits(loaded, images, batch_size, num_workers, progress)
    labels = np.array(images["labels"], dtype=np.float64)
    labels = labels.argmax(1) if exclusive else labels
    found = Classified(combine_logits(loaded, logits, matching, exclusive), labels, common.label_names, exclusive)
    results = {
        "task": "classification",
        "protocol": "evaluation",
        "labels": list(common.label_names),
        "test": _score(found, images, decided=exclusive or not _is_exclusive(loaded)),
        "counts": {split: {"images": len(images), "patients": len(set(images["patient_id"]))}},
        "matching": {"model_collection": collection} | _describe(matching, loaded, cache),
        "overlap": overlap,
        **loaded.describe(),
        "training": vars(training),
        "data": {"cache": str(dataset), "split": split} | {name: cache.manifest.get(name) for name in DATA_FIELDS},
        "settings": {"batch_size": batch_size, "scores": _describe_scores(loaded, exclusive)},
        **made_by(loaded.model.device),
        "notice": NOTICE,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    _check_places(output, table)  # again, because somebody else may have written there meanwhile
    write_predictions(table, common, found.probabilities)
    try:
        write_json(output, results)
    except BaseException:  # nothing half-written stays
        table.unlink()
        raise
    return results


def _check_places(output: Path, table: Path) -> None:
    if output.suffix != ".json":
        raise UserError(f"output={str(output)!r} found; expected a .json file")
    for path in (output, table):
        if path.exists():
            raise FileExistsError(f"{path} is there already; expected an output in another folder")


def match_labels(loaded: LoadedModel, collection: str | None, cache: Cache, findings: Sequence[str] | None) -> Matching:
    """Find what model and cache have in common, or the chosen part of it.

    Raises:
        UserError: a cache without labels, nothing in common, or findings that are not in common.
    """
    cache.require_labels()
    matching = match(collection, loaded.labels, cache.manifest["collection"], cache.label_names)
    if not matching.matches:
        raise UserError(
            f"no label in common: {loaded.source} ({collection or 'collection unknown'}) has "
            f"{some(loaded.labels, 30)}; {cache.path} ({cache.manifest['collection']}) has "
            f"{some(cache.label_names, 30)}"
        )
    if findings is None:
        return matching
    names = {normalize(found.name): found for found in matching.matches}
    absent = [name for name in findings if normalize(name) not in names]
    if absent:
        listed = ", ".join(found.name for found in matching.matches)
        raise UserError(f"findings {', '.join(absent)} found; expected some of {listed}")
    chosen = {normalize(name) for name in findings}
    return replace(matching, matches=tuple(found for name, found in names.items() if name in chosen))


def _is_exclusive(loaded: LoadedModel) -> bool:
    return loaded.model.config.problem_type == "single_label_classification"


def same_classes(loaded: LoadedModel, cache: Cache, matching: Matching) -> bool:
    """Whether model and cache have the same exclusive classes."""
    pairs = [(found.model_columns, found.data_columns) for found in matching.matches]
    alone = all(len(ours) == len(theirs) == 1 for ours, theirs in pairs)
    complete = len(pairs) == len(loaded.labels) == len(cache.label_names)
    return _is_exclusive(loaded) and cache.exclusive and alone and complete


def combine_labels(labels: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """Unite some columns of labels [N, L] in one [N]: 1 if one is 1, 0 if all are 0, else NaN."""
    chosen = labels[:, list(columns)]
    return np.where((chosen == 1).any(1), 1.0, np.where((chosen == 0).all(1), 0.0, np.nan))


def rename_labels(cache: Cache, split: str, matches: Sequence[Match], exclusive: bool) -> Cache:
    """Make a cache of one split, "test", whose labels are the matched findings.

    If these are exclusive classes, leave out the images whose class is unknown.
    """
    images = cache.datasets[split]
    labels = np.array(images["labels"], dtype=np.float64)  # [N, L]
    table = np.stack([combine_labels(labels, found.data_columns) for found in matches], 1)  # [N, M]
    feature = datasets.List(datasets.Value("float32"))
    images = images.remove_columns("labels").add_column("labels", table.tolist(), feature=feature)
    cache = with_splits(cache, {split: images})
    if exclusive:
        cache = keep_known(cache, {split: np.flatnonzero(~np.isnan(table[:, 0])).tolist()}, "class")
    names, manifest = tuple(found.name for found in matches), cache.manifest | {"exclusive": exclusive}
    return Cache(datasets.DatasetDict({"test": cache.datasets[split]}), names, manifest, cache.path)


def compute_logits(loaded: LoadedModel, images: Any, batch_size: int, num_workers: int, progress: bool) -> np.ndarray:
    """Logits [N, K] of a split of a cache, in order."""
    rows = LabelledImages(images, loaded.processor, exclusive=False)
    loader = DataLoader(rows, batch_size, num_workers=min(num_workers, math.ceil(len(rows) / batch_size)))
    logits = []
    with progress_bar(len(rows), "evaluating", "img", show=progress) as bar:
        for batch in loader:
            logits.append(infer(loaded, batch["pixel_values"], embed=False)[0].cpu())
            bar.update(len(logits[-1]))
    return torch.cat(logits).numpy()


def combine_logits(loaded: LoadedModel, logits: np.ndarray, matching: Matching, exclusive: bool) -> np.ndarray:
    """Make logits [N, M] of the matched findings from those of the model, [N, K].

    `exclusive` says that the findings are the model's own exclusive classes.
    """
    columns = [list(found.model_columns) for found in matching.matches]
    if exclusive or not _is_exclusive(loaded):
        return np.stack([logits[:, chosen].max(1) for chosen in columns], 1)
    classes = softmax(logits.astype(np.float64), axis=1)
    probabilities = np.stack([classes[:, chosen].sum(1) for chosen in columns], 1)
    return logit(probabilities.clip(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN))


def _describe_scores(loaded: LoadedModel, exclusive: bool) -> str:
    """How `combine_logits` makes scores, for the results."""
    if exclusive:
        return "probability of each class"
    if _is_exclusive(loaded):
        return "probability of a class, or sum of several, against the rest; the model's classes exclude each other"
    return "logit, or the highest of several"


def _score(found: Classified, images: Any, decided: bool) -> dict[str, Any]:
    """Score what was found of images, and their subgroups.

    `decided` says that the signs of the logits, or the highest of exclusive ones, are decisions with an accuracy.
    """
    undecided = {} if decided else {"accuracy": NOT_SCORED}
    subgroups = score_subgroups(images, lambda rows: found.scores(rows) | undecided)
    return found.scores() | undecided | {"subgroups": subgroups}


def _describe(matching: Matching, loaded: LoadedModel, cache: Cache) -> dict[str, Any]:
    """Name the labels that were matched, what is lost by that, and those without a counterpart."""
    matched = {
        found.name: {
            "model": [loaded.labels[column] for column in found.model_columns],
            "data": [cache.label_names[column] for column in found.data_columns],
            "lost": list(found.lost),
        }
        for found in matching.matches
    }
    return {"matched": matched, "model_only": dict(matching.model_only), "data_only": dict(matching.data_only)}
