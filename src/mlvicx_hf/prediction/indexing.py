"""Make an index of the images of a prepared cache, or add them to an index."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import check_output, new_output, write_json
from mlvicx_hf.common.machine import choose_device
from mlvicx_hf.common.provenance import made_by
from mlvicx_hf.common.text import NOTICE, some
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.cache.summary import column
from mlvicx_hf.data.options import check_least
from mlvicx_hf.encoders.features import encode, prepared_images
from mlvicx_hf.encoders.inference import LoadedModel, exact_convolutions, load
from mlvicx_hf.scoring.neighbours import PRECISION_TOP, mean_precision, nearest_rows, precision_of_neighbours

from .search import (
    EMBEDDINGS_FILE,
    GRAPH_FILE,
    HASHES,
    INDEX_FILE,
    INDEX_FORMAT,
    ITEM_COLUMNS,
    ITEMS_FILES,
    LABEL_PREFIX,
    ImageIndex,
    IndexedImages,
    write_graph,
)

VALIDATION = "validation"
UNLIKE_QUANTILE = 0.05  # so large a share of the validation images is unlike the indexed ones


def build_index(
    model_source: str,
    dataset: str | Path,
    output: str | Path,
    *,
    splits: Sequence[str] = ("train",),
    add_to: str | Path | None = None,
    approximate: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Encode the images of a cache and write an index of them, a folder that is whole or absent.

    The threshold for images unlike all indexed ones, and precision@5, are measured on the validation split. The index
    keeps the embeddings of that split, so that both are measured anew, on the validation images of all caches, when
    images are added. Arguments that are not listed are those of `predict`.

    Args:
        model_source: folder or Hub name of an encoder, a pretraining, a classifier or a segmenter.
        dataset: prepared cache.
        output: new or empty folder.
        splits: splits of the cache to index.
        add_to: an index, which stays as it is; the new index has its images first.
        approximate: also write a graph for approximate searches (extra "search").

    Returns:
        The content of `index.json`.

    Raises:
        FileExistsError: the output holds something.
        UserError: an index of another model, images that are in it already, splits that the cache lacks, no extra.
        OSError: a model, a cache or an index that is absent or damaged.
        FloatingPointError: an embedding that is not finite, or of length 0.
    """
    folder = check_output(Path(output))
    check_least(1, batch_size=batch_size)
    if approximate:
        require("--approximate", "search", "faiss")
    splits = list(dict.fromkeys(splits))
    load_cache(dataset, splits, check=False)  # refuses splits that are absent
    cache = load_cache(dataset)
    earlier = None if add_to is None else ImageIndex(add_to)
    if earlier is not None:
        _check_added(earlier, cache, splits)
    loaded = load(model_source, revision, choose_device(device))
    number = 0
    if earlier is not None:
        earlier.check_model(loaded)
        number = len(earlier.content["caches"])
    measured = [VALIDATION] if VALIDATION in cache.datasets else []
    parts = {
        split: _encode_split(loaded, cache, split, number, batch_size, progress)
        for split in dict.fromkeys(splits + measured)
    }
    old = [] if earlier is None else [IndexedImages(earlier.embeddings, earlier.items)]
    images = _join([*old, *(parts[split] for split in splits)])
    nothing = IndexedImages(images.embeddings[:0], images.items[:0])
    known = nothing if earlier is None else earlier.validation
    validation = _join([nothing, known, *(_without(parts[split], known) for split in measured)])
    caches = ([] if earlier is None else earlier.content["caches"]) + [_describe_cache(cache, splits)]
    validation = _without_copies(validation, images, caches)
    content = _describe(loaded, caches, images, validation) | {"approximate": approximate}
    with new_output(folder) as temporary:
        tensors = {"embeddings": images.embeddings, "validation": validation.embeddings}
        save_file(tensors, temporary / EMBEDDINGS_FILE)
        for name, part in (("embeddings", images), ("validation", validation)):
            part.items.to_parquet(temporary / ITEMS_FILES[name], index=False)
        if approximate:
            write_graph(images.embeddings, temporary / GRAPH_FILE)
        write_json(temporary / INDEX_FILE, content)
    return content


def _check_added(earlier: ImageIndex, cache: Cache, splits: Sequence[str]) -> None:
    """Refuse images of another size or fit, and images whose original files are in the index already."""
    if cache.square != earlier.square:
        raise UserError(
            f"{cache.path}: size and fit {cache.square} found; expected {earlier.square}, as of {earlier.folder}"
        )
    known = set(earlier.items["sha256"])
    again = [
        source
        for split in splits
        for source, digest in zip(*(column(cache.datasets[split], n) for n in ("source", "sha256")), strict=True)
        if digest in known
    ]
    if again:
        raise UserError(
            f"{len(again)} images of {cache.path} are in the index {earlier.folder} already: {some(again)}; "
            "expected images whose files (SHA-256) are new"
        )


def _encode_split(
    loaded: LoadedModel, cache: Cache, split: str, number: int, batch_size: int, progress: bool
) -> IndexedImages:
    """Encode a split of the cache with this number, and tabulate its images."""
    dataset, encoder = cache.datasets[split], loaded.model.base_model
    images = prepared_images(dataset, loaded.processor)
    with exact_convolutions():  # as `infer` does for queries
        features = encode(encoder, images, batch_size, encoder.device, progress)["features"]
    lengths = features.norm(dim=1, keepdim=True)
    wrong = (~(lengths.isfinite() & (lengths > 0))).flatten().nonzero()
    if len(wrong):
        source = dataset[int(wrong[0])]["source"]
        raise FloatingPointError(
            f"{loaded.source} gives an embedding of length {float(lengths[wrong[0]])} for {source}; "
            "expected a trained model"
        )
    columns: dict[str, Any] = {name: column(dataset, name) for name in ITEM_COLUMNS if name in dataset.features}
    columns |= {"split": split, "cache": number, "row": np.arange(len(dataset))}
    labels = np.array(column(dataset, "labels"), np.float32).reshape(len(dataset), len(cache.label_names))
    columns |= {LABEL_PREFIX + name: values for name, values in zip(cache.label_names, labels.T, strict=True)}
    return IndexedImages(features / lengths, pd.DataFrame(columns))


def _without(images: IndexedImages, known: IndexedImages) -> IndexedImages:
    """The images whose original files are not among the known ones."""
    new = ~images.items["sha256"].isin(known.items["sha256"]).to_numpy(bool)
    return IndexedImages(images.embeddings[torch.from_numpy(new)], images.items[new])


def _without_copies(validation: IndexedImages, images: IndexedImages, caches: list[dict[str, Any]]) -> IndexedImages:
    """Leave out images whose files are indexed under another patient, as of another cache: each would find itself."""
    indexed, own = _patients(caches, images.items, validation.items)
    patients: dict[str, set[int]] = defaultdict(set)
    for digest, patient in zip(images.items["sha256"], indexed.tolist(), strict=True):
        patients[digest].add(patient)
    pairs = zip(validation.items["sha256"], own.tolist(), strict=True)
    kept = np.array([patients.get(digest, set()) <= {patient} for digest, patient in pairs], bool)
    return IndexedImages(validation.embeddings[torch.from_numpy(kept)], validation.items[kept])


def _join(parts: Sequence[IndexedImages]) -> IndexedImages:
    """Put images one after another; a label that a part lacks is unknown of its images."""
    items = pd.concat([part.items for part in parts], ignore_index=True)
    return IndexedImages(torch.cat([part.embeddings for part in parts]), items)


def _describe_cache(cache: Cache, splits: Sequence[str]) -> dict[str, Any]:
    return {
        "path": str(cache.path.resolve()),
        **{name: cache.manifest[name] for name in ("collection", "size", "fit", *HASHES)},
        "splits": {split: len(cache.datasets[split]) for split in splits},
        "label_names": list(cache.label_names),
    }


def _describe(
    loaded: LoadedModel, caches: list[dict[str, Any]], images: IndexedImages, validation: IndexedImages
) -> dict[str, Any]:
    """The content of `index.json`, with what is measured on the validation images."""
    names = list(dict.fromkeys(name for cache in caches for name in cache["label_names"]))
    groups = _patients(caches, images.items, validation.items)
    cosines = nearest_rows(images.embeddings, validation.embeddings, 1, groups)[0].flatten()
    cosines = cosines[cosines > -torch.inf]  # an image has no neighbour if all indexed ones are of its own patient
    tables = [part.items[[LABEL_PREFIX + name for name in names]].to_numpy(np.float32) for part in (images, validation)]
    scores = precision_of_neighbours(images.embeddings, tables[0], validation.embeddings, tables[1], groups)
    return {
        "notice": NOTICE,
        "format": INDEX_FORMAT,
        **loaded.describe(),
        "model": str(Path(loaded.source).resolve()) if Path(loaded.source).is_dir() else loaded.source,
        "preprocessing": loaded.processor.to_dict(),
        "images": len(images.items),
        "dimensions": images.embeddings.shape[1],
        "caches": caches,
        "label_names": names,
        "unlike_threshold": float(np.quantile(cosines.numpy(), UNLIKE_QUANTILE)) if len(cosines) else None,
        "validation": {
            "images": len(validation.items),
            "with_neighbours": len(cosines),
            "quantile": UNLIKE_QUANTILE,
            "own_patient_left_out": bool(np.isin(groups[1].numpy(), groups[0].numpy()).any()),
        },
        f"precision_at_{PRECISION_TOP}": {
            "labels": dict(zip(names, scores, strict=True)),
            "macro": mean_precision(scores),
        },
        **made_by(loaded.model.device),
    }


def _patients(caches: list[dict[str, Any]], *tables: pd.DataFrame) -> tuple[Tensor, Tensor]:
    """Number the patients of both tables alike. Patients of one name in two collections are two patients."""
    both = pd.concat(tables)
    collections = both["cache"].map(dict(enumerate(cache["collection"] for cache in caches)))
    numbers = torch.from_numpy(pd.MultiIndex.from_arrays([collections, both["patient_id"]]).factorize()[0])
    return numbers[: len(tables[0])], numbers[len(tables[0]) :]
