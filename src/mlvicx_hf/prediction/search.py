"""An index of images: their embeddings, what is known of them, and the search for the nearest ones."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyarrow
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import json_field, read_json
from mlvicx_hf.data.cache.cache import MANIFEST, Cache, load_cache
from mlvicx_hf.encoders.inference import LoadedModel
from mlvicx_hf.scoring.neighbours import nearest_rows

INDEX_FORMAT = 1
INDEX_FILE = "index.json"
EMBEDDINGS_FILE = "embeddings.safetensors"
GRAPH_FILE = "hnsw.faiss"
ITEMS_FILES = {"embeddings": "items.parquet", "validation": "validation.parquet"}  # by tensor of EMBEDDINGS_FILE
ITEM_COLUMNS = ("source", "patient_id", "view", "split", "cache", "row", "sha256")  # and one column a label
LABEL_PREFIX = "label:"
HASHES = ("data_hash", "split_hash")  # of a cache: which images it holds, and which split each is in
EXPECTED = f"the {INDEX_FILE} of `mlvicx index`"
LINKS = 32  # of an image in the graph of an approximate search, as faiss advises
VISITED = 128  # images that an approximate search keeps in sight


class IndexedImages(NamedTuple):
    """Embeddings of length 1, float32 [N, C], and a table of N rows: `ITEM_COLUMNS` and "label:NAME" (1, 0 or NaN)."""

    embeddings: Tensor
    items: pd.DataFrame


class ImageIndex:
    """An index that `mlvicx index` wrote. Its files are checked to belong together.

    Args:
        folder: of the index.

    Attributes:
        folder: of the index.
        content: of `index.json`.
        label_names: names of the labels.
        unlike_threshold: an image whose nearest indexed image has a smaller cosine is unlike all of them; None if the
            caches had no validation split.
        embeddings: [N, C], a memory map.
        items: table of N rows, see `IndexedImages`. `cache` counts the caches of `index.json` from 0; `row` counts the
            rows of their split.

    Raises:
        FileNotFoundError: one of its files is absent.
        UserError: one of its files is damaged or of something else.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        file = self.folder / INDEX_FILE
        self.content = read_json(file)
        form = json_field(self.content, "format", int, file, EXPECTED)
        if form != INDEX_FORMAT:
            raise UserError(f"{file}: format={form} found; expected {INDEX_FORMAT}")
        for name, kind in (("model", str), ("weights_sha256", dict), ("caches", list), ("validation.images", int)):
            json_field(self.content, name, kind, file, EXPECTED)
        if not self.content["caches"]:
            raise UserError(f"{file}: caches=[] found; expected the cache of every image")
        for cache in self.content["caches"]:
            for name in ("path", "fit", *HASHES):
                json_field(cache, name, str, file, EXPECTED)
            json_field(cache, "size", int, file, EXPECTED)
        self.label_names: list[str] = json_field(self.content, "label_names", list, file, EXPECTED)
        numbers = (float, int, type(None))
        self.unlike_threshold: float | None = json_field(self.content, "unlike_threshold", numbers, file, EXPECTED)
        self.embeddings, self.items = self._read("embeddings", json_field(self.content, "images", int, file, EXPECTED))

    @property
    def square(self) -> tuple[int, str]:
        """Size and fit of the indexed images. Bring a file into this form first: a sharper image is less alike."""
        cache = self.content["caches"][0]
        return cache["size"], cache["fit"]

    @property
    def validation(self) -> IndexedImages:
        """The images that the threshold was measured on."""
        return self._read("validation", self.content["validation"]["images"])

    def _read(self, name: str, images: int) -> IndexedImages:
        """Read a tensor of the embeddings and the table of its images, and check them against `index.json`."""
        file, table = self.folder / EMBEDDINGS_FILE, self.folder / ITEMS_FILES[name]
        for path in (file, table):
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file; expected the index that {INDEX_FILE} describes")
        try:
            with safe_open(file, "pt") as opened:
                embeddings = opened.get_tensor(name)
        except SafetensorError as error:
            raise UserError(f"{file}: {error}; expected a whole file with the tensor {name!r}") from error
        shape = (images, json_field(self.content, "dimensions", int, self.folder / INDEX_FILE, EXPECTED))
        if embeddings.dtype != torch.float32 or embeddings.shape != shape:
            raise UserError(
                f"{file}: tensor {name!r} {embeddings.dtype} {list(embeddings.shape)} found; "
                f"expected torch.float32 {list(shape)}, as {INDEX_FILE} says"
            )
        try:
            items = pd.read_parquet(table)
        except pyarrow.ArrowException as error:
            raise UserError(f"{table}: {error}; expected a whole parquet file") from error
        absent = {*ITEM_COLUMNS, *(LABEL_PREFIX + label for label in self.label_names)} - {*items.columns}
        if absent or len(items) != images:
            lack = f" without {', '.join(sorted(absent))}" if absent else ""
            raise UserError(f"{table}: {len(items)} rows{lack} found; expected {images} rows, as {INDEX_FILE} says")
        return IndexedImages(embeddings, items)

    def check_model(self, loaded: LoadedModel) -> None:
        """Refuse a model that did not make the index, or that prepares images otherwise than it did then.

        Raises:
            UserError: its weights or settings of its image processor are others.
        """
        if loaded.weights != self.content["weights_sha256"]:
            found, expected = (" ".join(sorted(w.values())) for w in (loaded.weights, self.content["weights_sha256"]))
            raise UserError(
                f"{loaded.source} with weights of SHA-256 {found} found; expected {self.content['model']} with "
                f"{expected}, which made the index {self.folder}"
            )
        then = self.content.get("preprocessing", {})  # earlier versions did not write it
        for name, value in loaded.processor.to_dict().items():
            if then.get(name, value) != value:
                raise UserError(
                    f"{loaded.source}: {name}={value} of the image processor found; expected {then[name]}, as when it "
                    f"made the index {self.folder}"
                )

    def nearest(self, embeddings: Tensor, top: int, approximate: bool = False) -> tuple[Tensor, Tensor]:
        """Find the nearest indexed images.

        Args:
            embeddings: of the model of the index, of any length, [Q, C].
            top: neighbours wanted of each; K is this, or the number of indexed images.
            approximate: search the graph that `mlvicx index --approximate` wrote, which may miss neighbours.

        Returns:
            Cosines [Q, K], greatest first, and rows [Q, K] of `items`; row -1 where the graph leads to fewer images.

        Raises:
            UserError: embeddings of another length, a damaged index, or no graph.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.embeddings.shape[1]:
            raise UserError(f"embeddings {list(embeddings.shape)} found; expected [Q, {self.embeddings.shape[1]}]")
        if approximate:
            units = nn.functional.normalize(embeddings.float(), dim=1)
            found = self._graph.search(units.numpy(), min(top, len(self.items)))
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])
        cosines, rows = nearest_rows(self.embeddings, embeddings, top)
        wrong = ~(cosines < 1.001)  # also NaN; these rows come first
        if wrong.any():
            raise UserError(
                f"{self.folder / EMBEDDINGS_FILE}: cosine {float(cosines[wrong][0])} found with row "
                f"{int(rows[wrong][0])} of 'embeddings'; expected finite numbers and rows of length 1"
            )
        return cosines, rows

    @cached_property
    def _graph(self) -> Any:
        require("an approximate search", "search", "faiss")
        import faiss

        path = self.folder / GRAPH_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected an index of `mlvicx index --approximate`")
        try:
            graph = faiss.read_index(str(path))
        except RuntimeError as error:
            raise UserError(f"{path}: {str(error)[:200]}; expected a whole file of faiss") from error
        if (graph.ntotal, graph.d) != tuple(self.embeddings.shape):
            shape = list(self.embeddings.shape)
            raise UserError(f"{path}: graph of [{graph.ntotal}, {graph.d}] found; expected {shape}")
        graph.hnsw.efSearch = VISITED
        return graph

    def picture(self, row: int) -> Image.Image | None:
        """The image of a row of `items`, grey and square; None if its cache is not there any more, or was changed."""
        item = self.items.iloc[row]
        cache = self._caches[item["cache"]]
        return None if cache is None else cache.datasets[item["split"]][int(item["row"])]["image"]

    def check_pictures(self) -> None:
        """Refuse to draw images that are not there any more.

        Raises:
            UserError: naming the cache.
        """
        for entry, cache in zip(self.content["caches"], self._caches, strict=True):
            if cache is None:
                raise UserError(
                    f"cache {entry['path']} is not there, or its images are others; expected the one with data_hash "
                    f"{entry['data_hash']} and split_hash {entry['split_hash']}, which the index {self.folder} names"
                )

    @cached_property
    def _caches(self) -> list[Cache | None]:
        return [_unchanged(entry) for entry in self.content["caches"]]


def _unchanged(entry: dict[str, Any]) -> Cache | None:
    """Open a cache that an index names, if its rows are still the same images."""
    manifest = Path(entry["path"]) / MANIFEST
    same = manifest.is_file() and entry.items() >= {k: read_json(manifest).get(k) for k in HASHES}.items()
    return load_cache(entry["path"], check=False) if same else None


def write_graph(embeddings: Tensor, path: Path) -> None:
    """Write a graph (HNSW, arXiv 1603.09320) for approximate searches by inner product among rows [N, C]."""
    import faiss

    graph = faiss.IndexHNSWFlat(embeddings.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.add(embeddings.numpy())
    faiss.write_index(graph, str(path))
