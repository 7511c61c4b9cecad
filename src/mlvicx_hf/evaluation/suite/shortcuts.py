"""Shortcut audit: how well the frozen features that classify findings also tell view, sex and source; and search."""

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers.trainer_utils import set_seed

from mlvicx_hf.common.files import read_json, write_json
from mlvicx_hf.common.machine import choose_device, use_cpu_threads
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.text import some
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.finetuning.arguments import EncoderArguments
from mlvicx_hf.finetuning.data import LabelledImages
from mlvicx_hf.finetuning.heads import load_config, load_for_task
from mlvicx_hf.finetuning.linear_probe import FeatureStore
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification
from mlvicx_hf.scoring.bootstrap import draw_patients, weighted_areas
from mlvicx_hf.scoring.neighbours import mean_precision, precision_of_neighbours
from mlvicx_hf.scoring.probes import linear_scores

from ..statistics import defined, interval
from .grid import SEARCH, Cell, Suite

FITTED, ASKED = "train", "test"  # splits
BATCH_SIZE = 64
FEWEST = 10  # images of a value in train and in test; rarer values are left out
FOLDER = "shortcuts"
Audit = list[dict[str, Any]]  # what `probe_shortcuts` gives


def audit_shortcuts(suite: Suite, cells: Sequence[Cell], output: Path, store: FeatureStore) -> None:
    """Audit the weights of all finished cells into `OUTPUT/shortcuts/MODEL/MEMBER.json`.

    Keep an audit that was made of the same weights, seed, data and kinds. `store` holds features that the cells have
    computed.
    """
    if not suite.shortcuts:
        return
    finished = {(cell.model, cell.member) for cell in cells}
    members = {(cell.model, cell.member): cell for cell in reversed(suite.cells)}  # the first of each
    places = dict.fromkeys(cell.dataset for cell in cells)
    if gone := [path for path in places if not Path(path).is_dir()]:
        print(f"no audit of shortcuts: {some(gone)} is gone; earlier audits stay", file=sys.stderr)
        return
    caches = [load_cache(path) for path in places]
    data = {str(cache.path): cache.digest for cache in caches}
    with progress_bar(len(finished), "shortcuts", "model") as bar:
        for key in sorted(finished):
            cell, file = members[key], _file(output, *key)
            made_of = {name: getattr(cell, name) for name in ("weights", "architecture", "seed", "files")}
            made_of |= {"drop_context": bool(cell.options.get("drop_context"))}
            made_of |= {"image_size": cell.options.get("image_size")} if "image_size" in cell.options else {}
            made_of |= {"data": data, "kinds": list(suite.shortcuts)}
            if not file.is_file() or read_json(file)["made_of"] != made_of:
                file.parent.mkdir(parents=True, exist_ok=True)
                found = probe_shortcuts(cell, caches, suite.shortcuts, store)
                write_json(file, {"made_of": made_of, "found": found})
            bar.update()


def read_audits(suite: Suite, output: Path) -> dict[str, list[Audit]]:
    """Read the audits: model → for each of its weights what `probe_shortcuts` gave."""
    found: dict[str, list[Audit]] = {}
    for model, member in dict.fromkeys((cell.model, cell.member) for cell in suite.cells if suite.shortcuts):
        file = _file(output, model, member)
        if file.is_file():
            found.setdefault(model, []).append(read_json(file)["found"])
    return found


def _file(output: Path, model: str, member: int) -> Path:
    return output / FOLDER / model / f"{member}.json"


def probe_shortcuts(
    cell: Cell, caches: Sequence[Cache], kinds: Sequence[str], store: FeatureStore
) -> list[dict[str, Any]]:
    """Fit a linear probe for each kind on the features of train, and score it on the images of test.

    The weights are those of `cell`. View and sex are told in each cache, source over all of them.

    Returns:
        A row for each kind and data with two or more values: `kind`, `data`, `classes`, `images`, `auroc` (mean of one
        value against the rest; 0.5 is no knowledge) and its interval over patients, `low`, `high`, "n/a" for a single
        patient. There is no row for the source of caches that share images. Rows of the kind "search" are those of
        `_search`.
    """
    device = choose_device(None)
    if device.type == "cpu":
        use_cpu_threads()
    caches = [cache for cache in caches if {FITTED, ASKED} <= set(cache.datasets)]
    encoder, processor = _encoder(cell, caches[0])
    encoder.to(device)
    names = [cache.path.name for cache in caches]
    if len(set(names)) < len(names):
        names = [str(cache.path) for cache in caches]
    train, test = (
        [
            _encode(encoder, processor, cache, name, split, store, device)
            for cache, name in zip(caches, names, strict=True)
        ]
        for split in (FITTED, ASKED)
    )
    groups = [([number], kind) for kind in ("view", "sex") for number in range(len(caches))]
    groups += [(list(range(len(caches))), "source")] if len(caches) > 1 and not _share_images(caches) else []
    found = []
    for numbers, kind in groups:
        if kind in kinds:
            row = _tell(_joined([train[i] for i in numbers]), _joined([test[i] for i in numbers]), kind)
            data = ", ".join(names[number] for number in numbers)
            found += [{"kind": kind, "data": data} | row] if row else []
    if SEARCH in kinds:
        labelled = (parts for parts in zip(train, test, caches, names, strict=True) if parts[2].label_names)
        found += [_search(*parts) for parts in labelled]
    return found


def _share_images(caches: Sequence[Cache]) -> bool:
    """Whether an image is in two caches. No feature could tell where such an image is from."""
    files = [{file for split in (FITTED, ASKED) for file in cache.datasets[split]["sha256"]} for cache in caches]
    return sum(map(len, files)) > len(set().union(*files))


class Encoded(NamedTuple):
    """Features [N, C] of images, and a row for each image with its view, sex, source, patient and labels (a list)."""

    features: Tensor
    about: pd.DataFrame


def _encode(
    encoder: Any,
    processor: MLVICXImageProcessor,
    cache: Cache,
    name: str,
    split: str,
    store: FeatureStore,
    device: torch.device,
) -> Encoded:
    images = cache.datasets[split]
    processor = copy.copy(processor)  # squares of another size are shrunk in another way
    processor.prepared_size, processor.fit = cache.square
    rows = LabelledImages(images, processor, exclusive=False, digest=cache.digest)
    about = pd.DataFrame({"view": images["view"][:], "sex": images["sex"][:]}, dtype=object)
    about["source"] = name
    about["patient"] = [f"{cache.path} {patient}" for patient in images["patient_id"]]
    about["labels"] = images["labels"][:]
    return Encoded(store.encode(encoder, rows, BATCH_SIZE, device)["features"], about)


def _joined(parts: Sequence[Encoded]) -> Encoded:
    features, tables = zip(*parts, strict=True)
    return Encoded(torch.cat(features), pd.concat(tables))


def _encoder(cell: Cell, cache: Cache) -> tuple[Any, MLVICXImageProcessor]:
    arguments = EncoderArguments(cell.weights, cell.architecture, drop_context=bool(cell.options.get("drop_context")))
    config = load_config(arguments)
    config.pooled_levels = "last"
    set_seed(cell.seed)
    side = cell.options.get("image_size")
    model, processor = load_for_task(MLVICXForImageClassification, config, arguments, cache.square, side)
    return model.mlvicx, processor


def _search(train: Encoded, test: Encoded, cache: Cache, name: str) -> dict[str, Any]:
    """Precision among the nearest training images of the test images with a finding, by cosine of the features.

    Returns:
        `kind`, `data`, `labels` (label → result of `precision_of_neighbours`), and `precision` and `chance`, their
        means over the labels that have queries; None without one.
    """
    codes, _ = pd.factorize(pd.concat([train.about["patient"], test.about["patient"]]))
    groups = torch.from_numpy(codes).split([len(train.about), len(test.about)])
    known, wanted = (np.array(part.about["labels"].tolist(), dtype=np.float64) for part in (train, test))
    units = nn.functional.normalize(train.features, dim=1)
    scores = precision_of_neighbours(units, known, test.features, wanted, (groups[0], groups[1]))
    labels = dict(zip(cache.label_names, scores, strict=True))
    return {"kind": SEARCH, "data": name, "labels": labels} | mean_precision(scores)


def _tell(train: Encoded, test: Encoded, kind: str) -> dict[str, Any] | None:
    """Score a probe for the values that are frequent enough; None if there are fewer than two."""
    values, asked = (part.about[kind].to_numpy(object) for part in (train, test))
    names = sorted(set(values) - {"", "UNKNOWN"})
    classes = [name for name in names if min((values == name).sum(), (asked == name).sum()) >= FEWEST]
    if len(classes) < 2:
        return None
    fitted, scored = np.isin(values, classes), np.isin(asked, classes)
    labels, truth = (
        np.stack([part == name for name in classes], 1).astype(float) for part in (values[fitted], asked[scored])
    )
    scores = linear_scores(train.features[fitted], labels, test.features[scored])

    def macro(weights: np.ndarray) -> np.ndarray:
        return np.mean([weighted_areas(*pair, weights)[0] for pair in zip(truth.T, scores.T, strict=True)], axis=0)

    draws = np.concatenate([macro(weights) for weights in draw_patients(test.about["patient"].to_numpy(str)[scored])])
    auroc = float(macro(np.ones((1, len(truth))))[0])
    low, high = interval(draws, auroc)
    return {"classes": classes, "images": len(truth), "auroc": auroc} | defined({"low": low, "high": high})
