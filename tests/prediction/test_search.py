"""Indexes of small caches, held against sklearn's brute force and counts by hand."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import draw, make_cache, save_encoders, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.neighbors import NearestNeighbors
from torch.nn.functional import normalize

from mlvicx_hf import MLVICXForImageClassification, MLVICXForSemanticSegmentation, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.images.pixels import fit_square_gray
from mlvicx_hf.encoders.inference import load
from mlvicx_hf.prediction.indexing import build_index
from mlvicx_hf.prediction.search import ImageIndex
from mlvicx_hf.prediction.similar import find_similar, search_batches
from mlvicx_hf.scoring import neighbours
from mlvicx_hf.scoring.neighbours import nearest_rows, precision_of_neighbours

INDEXING: dict[str, Any] = {"device": "cpu", "progress": False}
SEARCHING: dict[str, Any] = INDEXING | {"num_workers": 0}
SPLITS = ("train", "train", "train", "validation", "test")


def labelled(name: str, count: int = 40, first: int = 0, **columns: str) -> list[dict[str, Any]]:
    """Rows of a table: two images a patient, the findings disc and stripes, disc unknown of the first image."""
    return [
        {
            "patient_id": f"{name}{i // 2}",
            "view": "PA",
            "split": SPLITS[i // 2 % 5],
            "_draw": {"disc": i % 2 == 0, "stripes": i % 3 == 0},
            columns.get("disc", "disc"): "" if i == 0 else int(i % 2 == 0),
            columns.get("stripes", "stripes"): int(i % 3 == 0),
        }
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_encoders(tmp_path_factory.mktemp("models"), 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data"), labelled("p"))


@pytest.fixture(scope="module")
def built(models: list[str], cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("indexes") / "index"
    build_index(models[0], cache, folder, **INDEXING)
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """An index to damage."""
    return Path(shutil.copytree(built, tmp_path / "index"))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def embedded(source: str, images: Any) -> torch.Tensor:
    """Pooled output of the encoder of a saved model, image by image."""
    model, processor = MLVICXModel.from_pretrained(source).eval(), MLVICXImageProcessor.from_pretrained(source)
    with torch.no_grad():
        return torch.cat([model(processor(image)["pixel_values"]).pooler_output for image in images])


# -- search ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [7, 64, 2**24])
def test_search_is_that_of_sklearn(block: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(neighbours, "BLOCK", block)  # so that rows come in many blocks
    generator = torch.Generator().manual_seed(0)
    rows, queries = torch.randn(101, 8, generator=generator), torch.randn(6, 8, generator=generator) * 3
    cosines, found = nearest_rows(normalize(rows, dim=1), queries, 9)
    distances, expected = (
        NearestNeighbors(n_neighbors=9, metric="cosine", algorithm="brute").fit(rows).kneighbors(queries)
    )
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(cosines, 1 - distances, atol=1e-6)


def test_neither_the_own_group_nor_others_than_asked_for():
    rows = normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [0, 1]]), dim=1)
    groups = (torch.tensor([5, 6, 6, 7]), torch.tensor([5]))
    cosines, found = nearest_rows(rows, rows[:1], 4, groups, torch.tensor([True, False, True, True]))
    assert found[0, :2].tolist() == [2, 3]
    assert cosines[0, 2:].tolist() == [-torch.inf] * 2
    assert nearest_rows(rows[:0], rows[:1], 4)[0].shape == (1, 0)


def test_precision_is_counted_by_hand():
    rows = normalize(torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [1, 0.3], [0, 1]]), dim=1)
    labels = np.array([[np.nan, 0], [1, 0], [0, 0], [1, 0], [1, 0]], np.float32)
    queries, wanted = rows[:2], np.array([[1, 0], [0, 0]], np.float32)
    nobody = (torch.arange(5), torch.tensor([8, 9]))
    first, second = precision_of_neighbours(rows, labels, queries, wanted, nobody, top=2)
    assert first == {"queries": 1, "precision": 0.5, "chance": 0.75}  # of rows 1 and 2; row 0 is unknown
    assert second == {"queries": 0, "precision": None, "chance": 0.0}
    own = (torch.tensor([0, 1, 1, 3, 4]), torch.tensor([1, 9]))
    assert precision_of_neighbours(rows, labels, queries, wanted, own, top=2)[0]["precision"] == 1.0


# -- index -------------------------------------------------------------------------------------------------------------


def test_an_index_holds_the_images_of_its_cache(built: Path, models: list[str], cache: Path):
    index, train = ImageIndex(built), load_cache(cache).datasets["train"]
    expected = normalize(embedded(models[0], train["image"]), dim=1)
    torch.testing.assert_close(index.embeddings, expected, rtol=1e-4, atol=1e-5)
    assert {path.name for path in built.iterdir()} == {
        "embeddings.safetensors", "items.parquet", "validation.parquet", "index.json"
    }  # fmt: skip
    for name in ("source", "patient_id", "view", "sha256"):
        assert index.items[name].tolist() == train[name][:]
    labels = index.items[["label:disc", "label:stripes"]].to_numpy()
    np.testing.assert_array_equal(labels, np.array(train["labels"][:], np.float32))
    assert np.isnan(labels).sum() == 1
    picture = index.picture(3)
    assert picture is not None
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(train[3]["image"]))


def test_what_index_json_says(built: Path, models: list[str], cache: Path):
    content, opened = json.loads((built / "index.json").read_text()), load_cache(cache)
    loaded = load(models[0])
    assert {name: content[name] for name in loaded.describe()} == loaded.describe()
    (entry,) = content["caches"]
    assert entry["path"] == str(cache)
    assert entry["splits"] == {"train": 24}
    assert {name: entry[name] for name in ("data_hash", "split_hash")} == {
        name: opened.manifest[name] for name in ("data_hash", "split_hash")
    }
    assert content["label_names"] == ["disc", "stripes"]
    assert "Not a medical device" in content["notice"]
    assert set(content["code"]) >= {"commit", "torch"}


def test_threshold_and_precision_are_those_of_brute_force(built: Path, models: list[str], cache: Path):
    opened = load_cache(cache).datasets
    train, asked = (normalize(embedded(models[0], opened[name]["image"]), dim=1) for name in ("train", "validation"))
    cosines = (asked @ train.T).numpy()
    content = ImageIndex(built).content
    assert content["unlike_threshold"] == pytest.approx(np.quantile(cosines.max(1), 0.05), abs=1e-5)
    table, wanted = (np.array(opened[name]["labels"][:], float)[:, 1] for name in ("train", "validation"))
    share = np.mean([table[np.argsort(-row)[:5]].mean() for row in cosines[wanted == 1]])
    found = content["precision_at_5"]["labels"]["stripes"]
    assert found["queries"] == (wanted == 1).sum()
    assert found["precision"] == pytest.approx(share)
    assert found["chance"] == pytest.approx(table.mean())
    both = [content["precision_at_5"]["labels"][name]["precision"] for name in ("disc", "stripes")]
    assert content["precision_at_5"]["macro"]["precision"] == pytest.approx(np.mean(both))


def test_no_image_is_compared_with_its_own_patient(models: list[str], cache: Path, tmp_path: Path):
    content = build_index(models[0], cache, tmp_path / "index", splits=["validation", "train"], **INDEXING)
    assert content["validation"]["own_patient_left_out"]
    assert content["images"] == 32
    assert content["unlike_threshold"] < 0.99999  # else each image was compared with itself
    alone = make_cache(tmp_path, [{"patient_id": "a", "split": s} for s in ("validation", "validation")], name="alone")
    content = build_index(models[0], alone, tmp_path / "one", splits=["validation"], **INDEXING)
    assert content["unlike_threshold"] is None
    assert content["precision_at_5"] == {"labels": {}, "macro": {"precision": None, "chance": None}}


def test_without_a_validation_split_there_is_no_threshold(models: list[str], tmp_path: Path):
    unsplit = make_cache(tmp_path, [{"patient_id": f"p{i}", "split": "train"} for i in range(3)])
    content = build_index(models[0], unsplit, tmp_path / "index", **INDEXING)
    assert content["unlike_threshold"] is None
    find_similar(tmp_path / "index", tmp_path / "cache-images", tmp_path / "out.csv", **SEARCHING)
    rows = read(tmp_path / "out.csv")
    assert len(rows) == 9  # of three images each
    assert {row["unlike"] for row in rows} == {""}


@pytest.mark.parametrize("head", [MLVICXForImageClassification, MLVICXForSemanticSegmentation])
def test_any_model_gives_the_embeddings_of_its_encoder(head: Any, cache: Path, tmp_path: Path):
    torch.manual_seed(2)
    head(tiny_config(num_labels=2)).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(image_size=32).save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    build_index(source, cache, tmp_path / "index", splits=["test"], **INDEXING)
    expected = normalize(embedded(source, load_cache(cache).datasets["test"]["image"]), dim=1)
    torch.testing.assert_close(ImageIndex(tmp_path / "index").embeddings, expected, rtol=1e-4, atol=1e-5)
    images = cache.with_name("cache-images")
    find_similar(tmp_path / "index", images / "0008.png", tmp_path / "out.csv", top=1, **SEARCHING)
    assert read(tmp_path / "out.csv")[0]["source"].endswith("0008.png")


def test_added_images_come_last_and_everything_is_measured_anew(models: list[str], built: Path, tmp_path: Path):
    other = make_cache(tmp_path, labelled("q", first=103, disc="nodule"), name="other")
    both = build_index(models[0], other, tmp_path / "both", add_to=built, **INDEXING)
    index, earlier = ImageIndex(tmp_path / "both"), ImageIndex(built)
    assert both["images"] == len(index.items) == 48
    assert torch.equal(index.embeddings[:24], earlier.embeddings)
    assert [cache["splits"] for cache in both["caches"]] == [{"train": 24}] * 2
    assert both["label_names"] == ["disc", "stripes", "nodule"]
    assert index.items["label:disc"][24:].isna().all()
    assert index.items["label:nodule"][:24].isna().all()
    assert index.items["label:stripes"].notna().all()
    assert both["validation"]["images"] == 16  # of both caches
    cosines = nearest_rows(index.embeddings, index.validation.embeddings, 1)[0]
    assert both["unlike_threshold"] == pytest.approx(np.quantile(cosines, 0.05))
    train = load_cache(other).datasets["train"]
    picture = index.picture(30)
    assert picture is not None
    np.testing.assert_array_equal(np.asarray(picture), np.asarray(train[6]["image"]))


def test_copies_of_indexed_images_do_not_measure_the_threshold(models: list[str], cache: Path, tmp_path: Path):
    """The same files under other names of patients, as in a cache of another export."""
    built = build_index(models[0], cache, tmp_path / "index", **INDEXING)
    rows = [row | {"patient_id": f"other{row['patient_id']}", "split": "validation"} for row in labelled("p")]
    other = make_cache(tmp_path, [*rows, *labelled("z", 4, first=300)], name="other")
    assert set(load_cache(cache).datasets["train"]["sha256"]) < set(load_cache(other).datasets["validation"]["sha256"])
    both = build_index(models[0], other, tmp_path / "both", add_to=tmp_path / "index", **INDEXING)
    assert built["validation"]["images"] == 8
    assert both["validation"]["images"] == 16  # and those of the first cache's test split, but none of its train split


def test_images_that_are_in_already_are_refused(models: list[str], built: Path, cache: Path, tmp_path: Path):
    source = ImageIndex(built).items["source"][0]
    with pytest.raises(UserError, match=rf"24 images of .* are in the index .* already: {source}"):
        build_index(models[0], cache, tmp_path / "new", add_to=built, **INDEXING)
    larger = make_cache(tmp_path, labelled("l", first=205), size=40, name="larger")
    with pytest.raises(UserError, match=r"larger: size and fit \(40, 'pad'\) found; expected \(32, 'pad'\)"):
        build_index(models[0], larger, tmp_path / "new", add_to=built, **INDEXING)
    build_index(models[0], cache, tmp_path / "new", add_to=built, splits=["test"], **INDEXING)
    assert ImageIndex(tmp_path / "new").items["split"].value_counts().to_dict() == {"train": 24, "test": 8}
    again = build_index(models[0], cache, tmp_path / "more", add_to=built, splits=["validation"], **INDEXING)
    assert again["validation"]["images"] == 8  # each counts once
    assert again["images"] == 32


def test_the_index_of_another_model_is_refused(models: list[str], built: Path, cache: Path, tmp_path: Path):
    found, expected = (load(model).weights["model.safetensors"] for model in reversed(models))
    message = f"{models[1]} with weights of SHA-256 {found} found; expected {models[0]} with {expected}"
    with pytest.raises(UserError, match=message):
        build_index(models[1], cache, tmp_path / "new", add_to=built, splits=["test"], **INDEXING)
    with pytest.raises(UserError, match=message):
        find_similar(built, cache.with_name("cache-images"), tmp_path / "out.csv", model=models[1], **SEARCHING)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_prepares_images_otherwise_than_for_the_index_is_refused(
    models: list[str], copied: Path, cache: Path, queries: Path, tmp_path: Path
):
    changed = Path(shutil.copytree(models[0], tmp_path / "changed"))
    processor = MLVICXImageProcessor.from_pretrained(changed)
    processor.image_mean = 0.25
    processor.save_pretrained(changed)
    message = r"changed: image_mean=0.25 of the image processor found; expected 0.5, as when it made the index"
    with pytest.raises(UserError, match=message):
        find_similar(copied, queries / "new.png", tmp_path / "out.csv", model=str(changed), **SEARCHING)
    with pytest.raises(UserError, match=message):
        build_index(str(changed), cache, tmp_path / "more", splits=["test"], add_to=copied, **INDEXING)
    change_json(copied, preprocessing="absent")  # as earlier versions wrote it
    find_similar(copied, queries / "new.png", tmp_path / "out.csv", model=str(changed), **SEARCHING)


def test_an_index_is_whole_or_absent(models: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("mlvicx_hf.prediction.indexing.write_json", fail)
    with pytest.raises(OSError, match="no space left"):
        build_index(models[0], cache, tmp_path / "index", **INDEXING)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "precious").write_text("1")
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        build_index(models[0], cache, tmp_path / "index", **INDEXING)


def test_what_cannot_be_indexed(models: list[str], cache: Path, tmp_path: Path):
    with pytest.raises(UserError, match="expected valid as well"):
        build_index(models[0], cache, tmp_path / "index", splits=["train", "valid"], **INDEXING)
    with pytest.raises(UserError, match="batch_size=0"):
        build_index(models[0], cache, tmp_path / "index", batch_size=0, **INDEXING)
    dead = Path(shutil.copytree(models[0], tmp_path / "dead"))
    weights = {name: torch.zeros_like(value) for name, value in load_file(dead / "model.safetensors").items()}
    save_file(weights, dead / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match=r"embedding of length 0\.0 for .*png; expected a trained model"):
        build_index(str(dead), cache, tmp_path / "index", **INDEXING)
    assert [path.name for path in tmp_path.iterdir()] == ["dead"]


# -- damage ------------------------------------------------------------------------------------------------------------


def change_json(folder: Path, **values: Any) -> None:
    content = json.loads((folder / "index.json").read_text()) | values
    (folder / "index.json").write_text(json.dumps({name: v for name, v in content.items() if v != "absent"}))


def change_tensor(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "embeddings.safetensors")
    save_file(tensors | {"embeddings": change(tensors["embeddings"])}, folder / "embeddings.safetensors")


def test_opening_names_the_file_and_what_is_wrong(copied: Path, tmp_path: Path):
    def refused(damage: Any, message: str) -> None:
        folder = Path(shutil.copytree(copied, tmp_path / "damaged"))
        damage(folder)
        with pytest.raises((UserError, FileNotFoundError), match=message):
            ImageIndex(folder)
        shutil.rmtree(folder)

    for name in ("index.json", "items.parquet", "embeddings.safetensors"):
        refused(lambda folder, name=name: (folder / name).unlink(), rf"{name}: no such file")
    refused(lambda folder: change_json(folder, format=9), "index.json: format=9 found; expected 1")
    refused(
        lambda folder: change_json(folder, caches=[]), r"index.json: caches=\[\] found; expected the cache of every"
    )
    refused(lambda folder: change_json(folder, weights_sha256="absent"), "no field 'weights_sha256' found")
    refused(lambda folder: change_json(folder, caches=[{"path": "x"}]), "no field 'fit' found")
    refused(lambda folder: change_json(folder, unlike_threshold="high"), "unlike_threshold='high' found")
    refused(lambda folder: change_json(folder, images=23), r"\[24, 96\] found; expected torch.float32 \[23, 96\]")
    refused(lambda folder: change_tensor(folder, torch.Tensor.half), r"embeddings.safetensors: .*torch.float16 \[24")
    refused(lambda folder: (folder / "items.parquet").write_text("no"), "items.parquet: .*expected a whole parquet")
    refused(lambda folder: change_json(folder, label_names=["cyst"]), "items.parquet: 24 rows without label:cyst found")

    def cut(folder: Path) -> None:
        whole = (folder / "embeddings.safetensors").read_bytes()
        (folder / "embeddings.safetensors").write_bytes(whole[:-9])

    refused(cut, "embeddings.safetensors: .*expected a whole file with the tensor 'embeddings'")

    def shorten(folder: Path) -> None:
        pd.read_parquet(folder / "items.parquet")[:-1].to_parquet(folder / "items.parquet")

    refused(shorten, "items.parquet: 23 rows found; expected 24 rows")


@pytest.mark.parametrize("value", [torch.nan, 7.0])
def test_rows_that_are_no_embeddings_are_found_by_any_search(copied: Path, value: float):
    def damage(embeddings: torch.Tensor) -> torch.Tensor:
        embeddings[5] = value
        return embeddings

    change_tensor(copied, damage)
    with pytest.raises(UserError, match=r"embeddings.safetensors: cosine .* found with row 5 of 'embeddings'"):
        ImageIndex(copied).nearest(torch.ones(1, 96), 2)
    with pytest.raises(UserError, match=r"embeddings \[1, 9\] found; expected \[Q, 96\]"):
        ImageIndex(copied).nearest(torch.ones(1, 9), 2)


# -- similar -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def queries(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("queries")
    shutil.copy(cache.with_name("cache-images") / "0001.png", folder / "indexed.png")  # of the train split
    draw({"stripes": True}, seed=900).resize((80, 60)).save(folder / "new.png")
    (folder / "broken.png").write_text("no image")
    return folder


def test_the_table_has_the_neighbours_of_each_file(built: Path, models: list[str], queries: Path, tmp_path: Path):
    record = find_similar(built, queries, tmp_path / "new" / "out.csv", top=3, **SEARCHING)
    rows, index = read(tmp_path / "new" / "out.csv"), ImageIndex(built)
    names = ["source", "patient_id", "split", "label:disc", "label:stripes"]
    assert list(rows[0]) == ["file", "error", "note", "rank", "cosine", *names, "unlike"]
    files = ["broken.png", *["indexed.png"] * 3, *["new.png"] * 3]
    assert [row["file"] for row in rows] == [str(queries / name) for name in files]
    assert "content is none of PNG" in rows[0]["error"]
    assert {value for name, value in rows[0].items() if name not in ("file", "error")} == {""}
    square = fit_square_gray(Image.open(queries / "new.png"), 32, "pad")  # as the cache has its images
    expected = index.embeddings @ normalize(embedded(models[0], [square]), dim=1)[0]
    values, order = expected.sort(descending=True)
    for rank in range(3):
        row, item = rows[4 + rank], index.items.iloc[int(order[rank])]
        assert row["rank"] == str(rank + 1)
        assert float(row["cosine"]) == pytest.approx(float(values[rank]), abs=1e-5)
        assert [row[name] for name in names[:3]] == item[names[:3]].tolist()
        cells = ["" if np.isnan(item[name]) else str(int(item[name])) for name in names[3:]]
        assert [row[name] for name in names[3:]] == cells
        assert row["unlike"] == str(int(values[0] < index.unlike_threshold))
    assert rows[1]["source"].endswith("0001.png")
    assert float(rows[1]["cosine"]) > 0.99999  # a file finds itself
    assert (record["images"], record["errors"], record["settings"]["top"]) == (3, 1, 3)
    assert record["weights_sha256"] == index.content["weights_sha256"]
    assert json.loads((tmp_path / "new" / "out.json").read_text()) == record
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"out.csv", "out.json"}


def test_pictures_that_raise_doubt_have_a_note(built: Path, queries: Path, tmp_path: Path):
    Image.new("L", (40, 40), 90).save(tmp_path / "flat.png")
    record = find_similar(built, [tmp_path / "flat.png", queries / "new.png"], tmp_path / "out.csv", top=2, **SEARCHING)
    notes = [(Path(row["file"]).name, row["note"]) for row in read(tmp_path / "out.csv")]
    assert notes == [("flat.png", "no contrast or texture")] * 2 + [("new.png", "")] * 2
    assert (record["errors"], record["noted"]) == (0, 1)


@pytest.mark.parametrize(("threshold", "unlike"), [(1.1, "1"), (-1.1, "0"), (None, "")])
def test_unlike_is_below_the_threshold(copied: Path, queries: Path, tmp_path: Path, threshold: Any, unlike: str):
    change_json(copied, unlike_threshold=threshold)
    record = find_similar(copied, queries / "new.png", tmp_path / "out.csv", **SEARCHING)
    assert [row["unlike"] for row in read(tmp_path / "out.csv")] == [unlike] * 5
    assert record["unlike"] == {"1": 1, "0": 0, "": None}[unlike]


def test_a_sheet_shows_files_and_their_neighbours(built: Path, cache: Path, queries: Path, tmp_path: Path):
    record = find_similar(built, queries, tmp_path / "out.csv", top=2, sheet=tmp_path / "a" / "sheet.png", **SEARCHING)
    assert record["sheet"]["images"] == 2
    sheet = Image.open(tmp_path / "a" / "sheet.png")
    height = 128 + 24 + 4  # of a tile with two lines of title and the margin
    assert sheet.size == (3 * 132 + 4, 2 * height + 4)
    (first,) = (row for row in read(tmp_path / "out.csv") if row["rank"] == "1" and "new.png" in row["file"])
    index = ImageIndex(built)
    picture = index.picture(index.items["source"].tolist().index(first["source"]))
    assert picture is not None
    shown = sheet.crop((4 + 132, 4 + height + 24, 4 + 132 + 128, 4 + height + 24 + 128))
    expected = np.asarray(picture.resize((128, 128), Image.Resampling.BICUBIC), float)
    assert np.abs(np.asarray(shown, float) - expected).mean() < 1


def test_a_sheet_needs_the_cache_as_it_was(copied: Path, queries: Path, tmp_path: Path):
    for change in ({"path": str(tmp_path / "moved")}, {"data_hash": "ab"}, {"split_hash": "ab"}):
        entry = json.loads((copied / "index.json").read_text())["caches"][0] | change
        folder = Path(shutil.copytree(copied, tmp_path / "changed"))
        change_json(folder, caches=[entry])
        with pytest.raises(UserError, match=rf"cache {entry['path']} is not there, or its images are others"):
            find_similar(
                folder, queries, tmp_path / "out.csv", sheet=tmp_path / "sheet.png", overwrite=True, **SEARCHING
            )
        assert ImageIndex(folder).picture(0) is None
        find_similar(folder, queries, tmp_path / "out.csv", overwrite=True, **SEARCHING)  # without pictures
        shutil.rmtree(folder)


def test_a_sheet_never_takes_the_place_of_an_input(built: Path, queries: Path, tmp_path: Path):
    scan = Path(shutil.copy(queries / "new.png", tmp_path / "scan.png"))
    before = scan.read_bytes()
    for given, sheet in ((scan, scan), (tmp_path, tmp_path / "sheet.png")):
        with pytest.raises(UserError, match=r"lies in the input .*; expected it elsewhere"):
            find_similar(built, given, tmp_path / "out.csv", sheet=sheet, overwrite=True, **SEARCHING)
    assert scan.read_bytes() == before


def test_a_sheet_of_strips(built: Path, tmp_path: Path):
    (tmp_path / "in").mkdir()
    for number, size in enumerate([(1, 900), (900, 1), (2, 700)]):
        Image.new("L", size, 99).save(tmp_path / "in" / f"{number}.png")
    record = find_similar(built, tmp_path / "in", tmp_path / "out.csv", sheet=tmp_path / "s.png", **SEARCHING)
    assert record["sheet"]["images"] == 3


def test_a_revision_is_of_a_model(built: Path, queries: Path, tmp_path: Path):
    with pytest.raises(UserError, match="revision='v1' found without a model; expected --model as well, or neither"):
        find_similar(built, queries, tmp_path / "out.csv", revision="v1", **SEARCHING)


def test_outputs_are_replaced_only_when_asked(built: Path, queries: Path, tmp_path: Path):
    output, sheet = tmp_path / "out.csv", tmp_path / "sheet.png"
    find_similar(built, queries, output, sheet=sheet, **SEARCHING)
    for arguments in ({"output": output}, {"output": tmp_path / "b.csv", "sheet": sheet}):
        with pytest.raises(FileExistsError, match="--overwrite"):
            find_similar(built, queries, **arguments, **SEARCHING)
    find_similar(built, queries, output, sheet=sheet, top=1, overwrite=True, **SEARCHING)
    assert len(read(output)) == 3
    with pytest.raises(UserError, match=r"expected a name that ends in \.png"):
        find_similar(built, queries, tmp_path / "b.csv", sheet=tmp_path / "sheet.jpg", **SEARCHING)
    with pytest.raises(UserError, match="top=0"):
        find_similar(built, queries, tmp_path / "b.csv", top=0, **SEARCHING)
    with pytest.raises(UserError, match=r"none of 1 images could be read.*b\.csv"):
        find_similar(built, queries / "broken.png", tmp_path / "b.csv", sheet=tmp_path / "b.png", **SEARCHING)
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "out.json", "sheet.png", "b.csv", "b.json"}


# -- approximate searches ----------------------------------------------------------------------------------------------


def test_an_approximate_search_of_few_images_is_exact(
    models: list[str], cache: Path, queries: Path, copied: Path, tmp_path: Path
):
    pytest.importorskip("faiss", reason='needs pip install ".[search]"')
    build_index(models[0], cache, tmp_path / "graph", approximate=True, **INDEXING)
    index = ImageIndex(tmp_path / "graph")
    exact, near = (index.nearest(index.validation.embeddings, 4, approximate) for approximate in (False, True))
    assert torch.equal(exact[1], near[1])
    torch.testing.assert_close(exact[0], near[0])
    find_similar(tmp_path / "graph", queries, tmp_path / "out.csv", approximate=True, **SEARCHING)
    assert len(read(tmp_path / "out.csv")) == 11
    with pytest.raises(FileNotFoundError, match=r"hnsw\.faiss: no such file; expected an index of .*--approximate"):
        ImageIndex(copied).nearest(index.embeddings, 1, approximate=True)
    (copied / "hnsw.faiss").write_bytes(b"IHNf")
    with pytest.raises(UserError, match=r"hnsw\.faiss: .*expected a whole file of faiss"):
        ImageIndex(copied).nearest(index.embeddings, 1, approximate=True)


def test_places_for_which_the_graph_found_no_image_are_left_out(monkeypatch: pytest.MonkeyPatch):
    found = torch.tensor([[0.9, 0.8, -3e38]]), torch.tensor([[4, 0, -1]])
    monkeypatch.setattr("mlvicx_hf.prediction.similar.infer", lambda *_, **__: (None, torch.zeros(1, 2)))
    index = SimpleNamespace(nearest=lambda *_: found)
    batch = SimpleNamespace(pixels=torch.zeros(1, 1, 4, 4), errors=[""], notes=[""])
    (near,) = search_batches(None, index, [SimpleNamespace(path=Path("a.png"))], [batch], 3, True)
    assert near.rows == [4, 0]
    assert near.cosines == pytest.approx([0.9, 0.8])


def test_without_faiss_the_extra_is_named(
    models: list[str], built: Path, cache: Path, queries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delitem(sys.modules, "faiss", raising=False)
    monkeypatch.setattr("mlvicx_hf.common.errors.find_spec", lambda name: None)
    message = r'needs faiss: pip install "\.\[search\]"'
    with pytest.raises(MissingExtraError, match=message):
        build_index(models[0], cache, tmp_path / "index", approximate=True, **INDEXING)
    with pytest.raises(MissingExtraError, match=message):
        find_similar(built, queries, tmp_path / "out.csv", approximate=True, **SEARCHING)
    assert list(tmp_path.iterdir()) == []
