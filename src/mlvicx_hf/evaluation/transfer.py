# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""A saved classifier on a prepared cache, of its own or another collection: labels are matched by what they mean."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from scipy.special import logit, softmax
from torch.utils.data import DataLoader

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import write_json
from mlvicx_hf.common.machine import choose_device, describe_hardware, use_cpu_threads
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.common.text import NOTICE, some
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.vocabulary import COLLECTIONS, Match, Matching, match, normalize
from mlvicx_hf.encoders.inference import LoadedModel, infer, load
from mlvicx_hf.finetuning.classification import LabelledImages, Scorer, write_predictions
from mlvicx_hf.finetuning.training import score_subgroups
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification
from mlvicx_hf.scoring.labels import NOT_SCORED

from .overlap import check_overlap, read_training
from .runs import Predictions

SMALLEST = 1e-15  # distance of a class's probability from 0 and 1, so that its log-odds stay finite

logger = logging.getLogger(__name__)


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
    """Score a classifier on every image of a split, once and without random transforms.

    Labels are matched by `data.vocabulary`. Where a finding is the union of several outputs its score is the highest
    of their logits, which assumes nothing of their dependence; of exclusive classes it is the sum of their
    probabilities. Where several labels of the images are one finding, it is present if one of them is, absent if all
    are absent, and else unknown. Exclusive classes are scored as such, with accuracy, only where model and images have
    the same ones; else each is scored against the rest, and for a model of exclusive classes accuracy is not defined.

    Args:
        model_source: folder or Hub name.
        dataset: cache written by `prepare_data.py`.
        output: JSON file of the results; `test_predictions.csv` is written beside it, whatever the split.
        split: of the cache.
        collection: whose labels the model knows; by default what the `results.json` beside it says, or else none.
        findings: score only these, by their common names.
        batch_size: images a forward pass.
        num_workers: processes that read images; 0 reads them in this one.
        device: of torch; by default a GPU where there is one.
        revision: branch, tag or commit of a model on the Hub.
        allow_overlap: go on although the model has seen some of the images, see `check_overlap`.
        progress: show a bar.

    Returns:
        The content of the results file.

    Raises:
        FileExistsError: results that are there already.
        ValueError: arguments, a model or labels that do not fit, or images that the model was trained on.
        OSError: a model or cache that is absent or damaged.
        FloatingPointError: a model whose results are not finite.
    """
    if batch_size < 1 or num_workers < 0:
        raise UserError(f"batch_size={batch_size}, num_workers={num_workers} found; expected at least 1 and 0")
    if collection is not None and collection not in COLLECTIONS:
        raise UserError(f"collection={collection!r} found; expected one of {', '.join(COLLECTIONS)}")
    output, table = check_outputs(Path(output))
    cache = load_cache(dataset, [split])
    loaded = load_classifier(model_source, revision, device)
    training = read_training(loaded)
    collection = collection or training.collection
    matching = match_labels(loaded, collection, cache, findings)
    overlap = check_overlap(training, cache, split, allow_overlap, progress)
    exclusive = same_classes(loaded, cache, matching)
    common = rename_labels(cache, split, matching.matches, exclusive)
    images = common.datasets["test"]
    logits = combine_logits(
        loaded, compute_logits(loaded, images, batch_size, num_workers, progress), matching, exclusive
    )
    results = {
        "task": "classification",
        "protocol": "evaluation",
        "labels": list(common.label_names),
        "test": score(common, logits, decided=exclusive or not _is_exclusive(loaded)),
        "counts": {split: {"images": len(images), "patients": len(set(images["patient_id"]))}},
        "matching": _describe_matching(matching, loaded.labels, cache.label_names, collection),
        "overlap": overlap,
        "model": model_source,
        "revision": loaded.revision,
        "weights_sha256": loaded.weights,
        "training": vars(training),
        "data": {"cache": str(dataset), "split": split}
        | {
            name: cache.manifest[name]
            for name in ("collection", "synthetic", "policy", "fit", "size", "data_hash", "split_hash")
        },
        "settings": {"batch_size": batch_size, "scores": describe_scores(loaded, exclusive)},
        "hardware": describe_hardware(loaded.model.device),
        "code": code_version(),
        "notice": NOTICE,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(table, common, logits)
    write_json(output, results)
    return results


def check_outputs(output: Path) -> tuple[Path, Path]:
    """The results file and the predictions beside it.

    Raises:
        FileExistsError: one of them is there already.
        ValueError: no .json file.
    """
    if output.suffix != ".json":
        raise UserError(f"output={str(output)!r} found; expected a .json file")
    table = output.parent / Predictions.file
    for path in (output, table):
        if path.exists():
            raise FileExistsError(f"{path} is there already; expected an output in another folder")
    return output, table


def load_classifier(source: str, revision: str | None, device: str | None) -> LoadedModel:
    """A saved classifier.

    Raises:
        ValueError: a model of another kind.
    """
    loaded = load(source, revision, choose_device(device))
    if not isinstance(loaded.model, MLVICXForImageClassification):
        raise UserError(f"{source}: {type(loaded.model).__name__} found; expected a MLVICXForImageClassification")
    return loaded


def match_labels(loaded: LoadedModel, collection: str | None, cache: Cache, findings: Sequence[str] | None) -> Matching:
    """What model and cache have in common, or the chosen part of it.

    Raises:
        ValueError: a cache without labels, nothing in common, or findings that are not in common.
    """
    if not cache.label_names:
        raise UserError(f"{cache.path} has no labels; expected some: prepare it with --metadata that has label columns")
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
    """Union [N] of some columns of labels [N, L]: 1 if one is 1, 0 if all are 0, else NaN."""
    chosen = labels[:, list(columns)]
    return np.where((chosen == 1).any(1), 1.0, np.where((chosen == 0).all(1), 0.0, np.nan))


def rename_labels(cache: Cache, split: str, matches: Sequence[Match], exclusive: bool) -> Cache:
    """A cache of one split, "test", with the matched findings for labels.

    Args:
        cache: with the split.
        split: its name.
        matches: columns of the new labels.
        exclusive: the labels are classes; images whose class is unknown are left out.
    """
    images = cache.datasets[split]
    labels = np.array(images["labels"], dtype=np.float64)  # [N, L]
    table = np.stack([combine_labels(labels, found.data_columns) for found in matches], 1)  # [N, M]
    feature = datasets.List(datasets.Value("float32"))
    images = images.remove_columns("labels").add_column("labels", table.tolist(), feature=feature)
    if exclusive:
        known = [row for row, values in enumerate(table) if not math.isnan(values[0])]
        if len(known) < len(table):
            logger.warning("%d images of %s have no class and are left out", len(table) - len(known), split)
        if not known:
            raise UserError(f"{cache.path}: no image of {split} has a known class")
        images = images.select(known)
    names = tuple(found.name for found in matches)
    return Cache(datasets.DatasetDict({"test": images}), names, cache.manifest | {"exclusive": exclusive}, cache.path)


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
    """Logits [N, M] of the matched findings from those of the model, [N, K].

    Args:
        loaded: the model.
        logits: of its outputs.
        matching: with the columns.
        exclusive: the findings are the model's own exclusive classes.
    """
    columns = [list(found.model_columns) for found in matching.matches]
    if exclusive or not _is_exclusive(loaded):
        return np.stack([logits[:, chosen].max(1) for chosen in columns], 1)
    classes = softmax(logits.astype(np.float64), axis=1)
    probabilities = np.stack([classes[:, chosen].sum(1) for chosen in columns], 1)
    return logit(probabilities.clip(SMALLEST, 1 - SMALLEST))


def describe_scores(loaded: LoadedModel, exclusive: bool) -> str:
    """How `combine_logits` makes scores, for the results."""
    if exclusive:
        return "probability of each class"
    if _is_exclusive(loaded):
        return "probability of a class, or sum of several, against the rest; the model's classes exclude each other"
    return "logit, or the highest of several"


def score(cache: Cache, logits: np.ndarray, decided: bool) -> dict[str, Any]:
    """Scores of the split "test", and of its views.

    Args:
        cache: as `rename_labels` gives it.
        logits: [N, M].
        decided: the logits' signs, or the highest of exclusive ones, are decisions: accuracy is defined.
    """
    images = cache.datasets["test"]
    table = np.array(images["labels"], dtype=np.float64)
    labels = table.argmax(1) if cache.exclusive else table
    scorer = Scorer(cache.label_names, cache.exclusive)

    def score_rows(rows: Any) -> dict[str, Any]:
        return scorer(logits[rows], labels[rows]) | ({} if decided else {"accuracy": NOT_SCORED})

    return score_rows(slice(None)) | {"subgroups": score_subgroups(images, score_rows)}


def _describe_matching(
    matching: Matching, model_labels: Sequence[str], data_labels: Sequence[str], collection: str | None
) -> dict[str, Any]:
    matched = {
        found.name: {
            "model": [model_labels[column] for column in found.model_columns],
            "data": [data_labels[column] for column in found.data_columns],
            "lost": list(found.lost),
        }
        for found in matching.matches
    }
    return {
        "model_collection": collection,
        "matched": matched,
        "model_only": dict(matching.model_only),
        "data_only": dict(matching.data_only),
    }


def _report(results: dict[str, Any]) -> None:
    """Print what was matched, what was lost, and the scores."""
    matching, test = results["matching"], results["test"]
    for name, found in matching["matched"].items():
        print(f"{name}: {', '.join(found['model'])} of the model, {', '.join(found['data'])} of the images")
        for note in found["lost"]:
            print(f"  {note}")
    for side, labels in (("the model", matching["model_only"]), ("the images", matching["data_only"])):
        if labels:
            print(f"without a counterpart, of {side}: {', '.join(labels)}")
    for name, value in [("macro", test["auroc_macro"]), *test["auroc"].items()]:
        print(f"test AUROC {name:24s} {value if isinstance(value, str) else f'{value:.4f}'}")
    if NOT_SCORED in test["auroc"].values():
        print(f"{NOT_SCORED}: all known images of this split have one value")


def main() -> None:
    """The command `scripts/evaluate_classifier.py`."""
    parser = argparse.ArgumentParser(
        description="Score a saved classifier on a prepared cache, of its own or another collection.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", required=True, help="folder or Hub name of a classifier")
    parser.add_argument("--dataset", required=True, help="cache written by prepare_data.py, labelled")
    parser.add_argument("--output", required=True, type=Path, help="results (.json); test_predictions.csv comes beside")
    parser.add_argument("--split", default="test", help="of the cache (default test)")
    parser.add_argument(
        "--collection", help=f"whose labels the model knows, if its results.json does not say: {', '.join(COLLECTIONS)}"
    )
    parser.add_argument("--findings", nargs="+", help="score only these, by their common names")
    parser.add_argument("--batch_size", type=int, default=64, help="images a forward pass (default 64)")
    parser.add_argument("--num_workers", type=int, default=2, help="processes that read images (default 2)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default a GPU where there is one)")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--allow_overlap", action="store_true", help="go on with images that the model has seen")
    arguments = vars(parser.parse_args())
    transformers.utils.logging.disable_progress_bar()  # of loading a file
    if choose_device(arguments["device"]).type == "cpu":
        use_cpu_threads()
    _report(evaluate(arguments.pop("model"), arguments.pop("dataset"), arguments.pop("output"), **arguments))
