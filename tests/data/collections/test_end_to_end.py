"""Every collection from its release's layout to a trained network: listed, prepared, pretrained on, fine-tuned on."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from helpers import draw_with_mask
from miniatures import disc_box, rsna_id, write_nih14, write_rsna, write_siim
from miniatures_more import vin_rows, write_chexpert, write_mimic_cxr_jpg, write_vinbigdata, write_vindr
from transformers import AutoModel

from mlvicx_hf.commands import prepare as prepare_command
from mlvicx_hf.commands.classify import parse_classification
from mlvicx_hf.commands.pretrain import parse_pretraining
from mlvicx_hf.commands.segment import parse_segmentation
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections import KINDS, collection_class
from mlvicx_hf.data.collections.base import Collection
from mlvicx_hf.finetuning.classification import finetune_classifier
from mlvicx_hf.finetuning.segmentation import finetune_segmenter
from mlvicx_hf.pretraining.loop import pretrain as run_pretraining
from mlvicx_hf.pretraining.setup import set_up

SIZE = 32
SPLITS = ("train", "validation", "test")


# -- small copies ------------------------------------------------------------------------------------------------------


def disc_rows(count: int = 20) -> list[dict[str, Any]]:
    """Two images a patient, 60/20/20 by patient; every other one shows a disc, which is its label and its mask."""
    return [
        {
            "patient_id": f"p{number // 2}",
            "split": ("train", "train", "train", "validation", "test")[number // 2 % 5],
            "view": ("PA", "AP")[number % 2],
            "sex": "MF"[number // 2 % 2],
            "age": 40 + number // 2,
            "Disc": (number + 1) % 2,
        }
        for number in range(count)
    ]


def write_folder(root: Path, form: str) -> Path:
    (root / "masks").mkdir(parents=True)
    rows = disc_rows()
    for number, row in enumerate(rows):
        image, mask = draw_with_mask({"disc": bool(row["Disc"])}, number)
        image.save(root / f"{number}.png")
        mask.save(root / "masks" / f"{number}.png")
        row |= {"file_name": f"{number}.png", "mask_file_name": f"masks/{number}.png"}
    table = pd.DataFrame(rows)
    if form == "csv":
        table.to_csv(root / "metadata.csv", index=False)
    elif form == "jsonl":
        table.to_json(root / "metadata.jsonl", orient="records", lines=True)
    else:
        table.to_parquet(root / "metadata.parquet")
    return root


def write_hf(root: Path, form: str) -> Path:
    """The same images as `datasets` saves them, or as parquet files of each split."""
    rows = disc_rows()
    for number, row in enumerate(rows):
        row["image"], row["mask"] = draw_with_mask({"disc": bool(row["Disc"])}, number)
    text, image = Value("string"), datasets.Image()
    features = {"patient_id": text, "view": text, "sex": text, "age": Value("int32"), "Disc": Value("int32")}
    features |= {"image": image, "mask": image}
    found = DatasetDict()
    for split in SPLITS:
        chosen = [{key: row[key] for key in features} for row in rows if row["split"] == split]
        found[split] = Dataset.from_list(chosen, features=Features(features))
    if form == "saved":
        found.save_to_disk(root)
        return root
    root.mkdir(parents=True)
    for split, part in found.items():
        part.remove_columns("mask").to_parquet(root / f"{split}.parquet")
    return root


def written(write: Callable[..., Any], **options: Any) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        write(root, **options)
        return root

    return make


@dataclass(frozen=True)
class Case:
    """A collection and what its cache holds.

    Attributes:
        kind: name of the collection.
        images: by split.
        positives: images with a label, by name, over all splits.
        write: writes the small copy below a folder.
        options: of the collection.
        boxes: of all images; None where there is no such column.
        masks: images with anything in their mask; None likewise.
        exclusive: one class an image.
        trained: images in train that are not lateral.
    """

    kind: str
    images: tuple[int, int, int]
    positives: dict[str, int]
    write: Callable[[Path], Path] | None
    options: dict[str, Any]
    boxes: int | None = None
    masks: int | None = None
    exclusive: bool = False
    trained: int | None = None


DISCS = {"images": (12, 4, 4), "positives": {"Disc": 10}}
MAPPING = "pneumonia-challenge-dataset-mappings_2018.json"
HEADERS = "kaggle_stage_2_train_images_dicom_headers.csv.gz"
CASES = {
    **{
        f"folder, {form}": Case(
            "folder", write=written(write_folder, form=form), options={"mask_names": ["disc"]}, masks=10, **DISCS
        )
        for form in ("csv", "jsonl", "parquet")
    },
    "hf, local": Case(
        "hf",
        write=written(write_hf, form="saved"),
        options={"mask_column": "mask", "mask_names": ["disc"]},
        masks=10,
        **DISCS,
    ),
    "hf, streaming": Case("hf", write=written(write_hf, form="parquet"), options={"streaming": True}, **DISCS),
    # 12 patients of two images, one of them with findings and a box; every fourth patient is in test, and a tenth of
    # the nine others, which is one, in validation.
    "nih14": Case("nih14", (16, 2, 6), {"Effusion": 12, "Infiltration": 12}, written(write_nih14), {}, boxes=12),
    # 20 images; ten show Cardiomegaly in two boxes, five of them Pneumothorax in one.
    "vinbigdata": Case(
        "vinbigdata", (14, 2, 4), {"Cardiomegaly": 10, "Pneumothorax": 5}, written(write_vinbigdata), {}, boxes=25
    ),
    # The same, a tenth of them validation; and six test images, of which three have one box and two another one.
    "vindr": Case(
        "vindr",
        (18, 2, 6),
        {"Cardiomegaly": 10 + 3, "Pneumothorax": 5 + 2, "Tuberculosis": 7, "Other diseases": 7},
        written(write_vindr),
        {},
        boxes=25 + 5,
    ),
    # Every other image is positive, and has one box or two in turn.
    "rsna, target": Case("rsna", (14, 2, 4), {"Lung Opacity": 10}, written(write_rsna, num_images=20), {}, boxes=15),
    "rsna, detailed": Case(
        "rsna",
        (14, 2, 4),
        {"Normal": 5, "No Lung Opacity / Not Normal": 5, "Lung Opacity": 10},
        written(write_rsna, num_images=20),
        {"classes": "detailed", "mapping": MAPPING, "headers": HEADERS},
        boxes=15,
        exclusive=True,
    ),
    "siim": Case("siim", (14, 2, 4), {"Pneumothorax": 10}, written(write_siim, num_images=20), {}, masks=10),
    # Patients of three images, two of them of the positive study, one of these lateral; Edema is uncertain for every
    # third of the 15 patients. One of twelve is validation.
    "chexpert": Case(
        "chexpert", (33, 3, 9), {"Pleural Effusion": 30, "Edema": 20}, written(write_chexpert), {}, trained=22
    ),
    # Ten such patients. Labels of one study are lacking, those of a second one where Edema is uncertain (0, 3, 6, 9).
    "mimic_cxr_jpg": Case(
        "mimic_cxr_jpg", (18, 6, 6), {"Pleural Effusion": 20, "Edema": 12}, written(write_mimic_cxr_jpg), {}, trained=12
    ),
    "phantom": Case(
        "phantom", (14, 2, 4), {}, None, {"num_patients": 10, "images_per_patient": 2, "mask_names": "lungs"}, masks=20
    ),
}


@dataclass(frozen=True)
class Prepared:
    """A cache, and the run of pretraining on it."""

    case: Case
    cache: Cache
    run: Path


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Prepared]:
    """What makes the cache of a case and pretrains on it, once."""
    made: dict[str, Prepared] = {}

    def make_once(name: str) -> Prepared:
        if name not in made:
            case, folder = CASES[name], tmp_path_factory.mktemp("case")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf-cache")
                root = () if case.write is None else (case.write(folder / "root"),)
                collection = collection_class(case.kind)(*root, **case.options)
                prepare(collection, folder / "cache", size=SIZE, num_workers=0, progress=False)
                pretrain(folder / "cache", folder / "run")
            made[name] = Prepared(case, load_cache(folder / "cache"), folder / "run")
        return made[name]

    return make_once


def pretrain(cache: Path, output: Path) -> None:
    """Two steps of the tiny network."""
    words = ("--recipe", "smoke", "--dataset", cache, "--output_dir", output, "--num_workers", 0, "--logging_steps", 1)
    words += ("--epochs", 1, "--batch_size", 4, "--max_train_samples", 8, "--cpu_threads", 1)
    run_pretraining(*parse_pretraining([str(word) for word in words]))


def rows(cache: Cache) -> list[dict[str, Any]]:
    return [row for part in cache.datasets.values() for row in part]


def mean_inside(row: dict[str, Any], inside: np.ndarray) -> tuple[float, float]:
    """Mean grey inside and outside of some pixels."""
    pixels = np.asarray(row["image"]).astype(float)
    return float(pixels[inside].mean()), float(pixels[~inside].mean())


# -- counts, boxes, masks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_prepared_from_the_releases_layout_with_counts_as_expected(make: Callable[[str], Prepared], name: str):
    case, cache = make(name).case, make(name).cache
    manifest = cache.manifest
    assert manifest["collection"] == case.kind
    assert {split: len(part) for split, part in cache.datasets.items()} == dict(zip(SPLITS, case.images, strict=True))
    assert (manifest["rejected"], manifest["missing"]) == (0, 0)
    assert manifest["duplicates"]["across_splits"] == 0
    assert manifest["exclusive"] == case.exclusive
    positives = {
        label: sum(counts["positives"][label] for counts in manifest["splits"].values())
        for label in manifest["label_names"]
    }
    if case.kind == "phantom":
        assert all(positives.values())
    else:
        assert {label: count for label, count in positives.items() if count} == case.positives
    features = cache.datasets["train"].features
    assert ("boxes" in features, "mask" in features) == (case.boxes is not None, case.masks is not None)
    if case.boxes is not None:
        assert sum(counts["boxes"]["boxes"] for counts in manifest["splits"].values()) == case.boxes
        assert sum(len(row["boxes"] or ()) for row in rows(cache)) == case.boxes
    if case.masks is not None:
        assert sum(np.asarray(row["mask"]).any() for row in rows(cache)) == case.masks
    patients = {split: set(part["patient_id"]) for split, part in cache.datasets.items()}
    assert sum(map(len, patients.values())) == len(set().union(*patients.values()))


@pytest.mark.parametrize("name", ["nih14", "rsna, target", "rsna, detailed"])
def test_boxes_of_a_frame_lie_where_they_were_drawn(make: Callable[[str], Prepared], name: str):
    for row in rows(make(name).cache):
        number = row["source"].partition(":")[2]
        if name == "nih14":
            drawn = [disc_box(int(number[:8]))]
        else:
            index = next(index for index in range(20) if rsna_id(index) == number)
            drawn = [disc_box(index, side) for side in range(1 + index % 4 // 2)]
        if not row["boxes"]:
            continue
        expected = [(x, y, x + width, y + height) for x, y, width, height in drawn]
        found = [[box[edge] for edge in ("x_min", "y_min", "x_max", "y_max")] for box in row["boxes"]]
        assert np.allclose(found, np.array(expected) * SIZE / 1024, atol=1e-4)
        inside = np.zeros((SIZE, SIZE), bool)
        for left, top, right, bottom in found:
            inside[math.ceil(top) : int(bottom), math.ceil(left) : int(right)] = True
        bright, rest = mean_inside(row, inside)
        assert bright > rest + 50


@pytest.mark.parametrize("name", ["vinbigdata", "vindr"])
def test_boxes_of_an_image_follow_it_into_the_square(make: Callable[[str], Prepared], name: str):
    """Of 56 x 64 pixels, which lie four pixels from the left in a square of 64."""
    for row in rows(make(name).cache):
        part, file = row["source"].partition(":")[2].split("/")
        number = int(file.removesuffix(".dicom"), 16)
        drawn = [r for r in vin_rows(number) if r["x_min"] != "" and (part == "train" or r["rad_id"] == "R8")]
        expected = {
            (r["class_name"], (r["x_min"] + 4) / 2, r["y_min"] / 2, (r["x_max"] + 4) / 2, r["y_max"] / 2) for r in drawn
        }
        assert {tuple(box.values()) for box in row["boxes"]} == expected
        if expected:
            inside = np.zeros((SIZE, SIZE), bool)
            inside[15:25, 11:21] = True  # of the disc, in all boxes of Cardiomegaly
            bright, rest = mean_inside(row, inside)
            assert bright > rest + 50


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.masks and case.kind != "phantom"])
def test_masks_lie_on_what_is_bright(make: Callable[[str], Prepared], name: str):
    for row in rows(make(name).cache):
        mask = np.asarray(row["mask"]) > 0
        assert mask.any() == (row["labels"] == [1.0])
        if mask.any():
            bright, rest = mean_inside(row, mask)
            assert bright > rest + 50


def test_forms_of_a_folder_and_of_a_dataset_hold_the_same(make: Callable[[str], Prepared]):
    caches = [make(name).cache for name in ("folder, csv", "folder, jsonl", "folder, parquet")]
    for key in ("data_hash", "split_hash", "splits", "label_names"):
        assert len({json.dumps(cache.manifest[key]) for cache in caches}) == 1
    streamed, local = make("hf, streaming").cache, make("hf, local").cache
    for split in SPLITS:
        for one, other, third in zip(*(c.datasets[split] for c in (streamed, local, caches[0])), strict=True):
            for key in ("patient_id", "view", "sex", "age", "labels", "phash"):
                assert one[key] == other[key] == third[key]
            assert np.array_equal(one["image"], other["image"])
            assert np.array_equal(other["image"], third["image"])
            assert np.array_equal(other["mask"], third["mask"])


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_two_steps_of_pretraining(make: Callable[[str], Prepared], name: str):
    case, output = make(name).case, make(name).run
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(math.isfinite(line["loss"]) for line in lines)
    run = json.loads((output / "run.json").read_text())
    assert run["source"]["collection"] == case.kind
    assert run["synthetic"] == (case.kind == "phantom")
    assert AutoModel.from_pretrained(output).config.backbone == "test_resnet"


@pytest.mark.parametrize("name", ["chexpert", "mimic_cxr_jpg"])
def test_lateral_images_are_left_out_of_pretraining(
    make: Callable[[str], Prepared], name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    prepared = make(name)
    words = ["--recipe", "smoke", "--dataset", str(prepared.cache.path), "--output_dir", str(tmp_path / "run")]
    run = set_up(*parse_pretraining([*words, "--num_workers", "0"]))
    assert run.settings.images == prepared.case.trained
    left_out = prepared.case.images[0] - (prepared.case.trained or 0)
    assert f"{left_out} lateral images are left out" in capsys.readouterr().out


def finetuning_words(prepared: Prepared, output: Path) -> list[str]:
    """Words of one epoch on the network that was pretrained on the same images."""
    words = ("--model", prepared.run, "--dataset", prepared.cache.path, "--output_dir", output, "--use_cpu")
    return [str(word) for word in (*words, "--num_train_epochs", 1, "--per_device_train_batch_size", 6)]


@pytest.mark.parametrize("name", ["nih14", "rsna, detailed", "chexpert"])
def test_classification_on_what_was_prepared(make: Callable[[str], Prepared], name: str, tmp_path: Path):
    prepared = make(name)
    results = finetune_classifier(*parse_classification(finetuning_words(prepared, tmp_path / "run")))
    assert results["counts"]["test"]["images"] == prepared.case.images[2]
    assert results["labels"] == list(prepared.cache.label_names)
    assert (results["thresholds"] is None) == prepared.case.exclusive
    scored = {label for label, value in results["test"]["auroc"].items() if isinstance(value, float)}
    assert scored
    assert scored <= set(prepared.case.positives)
    with (tmp_path / "run" / "test_predictions.csv").open(newline="") as file:
        predictions = list(csv.DictReader(file))
    assert [row["source"] for row in predictions] == prepared.cache.datasets["test"]["source"][:]
    if prepared.case.exclusive:
        for row in predictions:
            shares = [float(row[f"probability:{label}"]) for label in prepared.cache.label_names]
            assert math.isclose(sum(shares), 1, rel_tol=1e-6)


@pytest.mark.parametrize("name", ["siim", "folder, csv"])
def test_segmentation_on_what_was_prepared(make: Callable[[str], Prepared], name: str, tmp_path: Path):
    prepared = make(name)
    results = finetune_segmenter(*parse_segmentation(finetuning_words(prepared, tmp_path / "run")))
    assert results["counts"]["test"]["images"] == prepared.case.images[2]
    assert results["labels"] == list(prepared.cache.mask_names)
    assert math.isfinite(results["test"]["dice"])


# -- the script's options ----------------------------------------------------------------------------------------------

# What each collection takes besides --root, as on the command line, and the attribute that it becomes.
TAKEN: dict[str, dict[str, tuple[list[str], str, Any]]] = {
    "folder": {
        "metadata": (["table.csv"], "metadata", Path("table.csv")),
        "file_column": (["file"], "file_column", "file"),
        "patient_column": (["person"], "patient_column", "person"),
        "view_column": (["shot"], "view_column", "shot"),
        "sex_column": (["geschlecht"], "sex_column", "geschlecht"),
        "age_column": (["alter"], "age_column", "alter"),
        "label_columns": (["Edema, Mass"], "label_columns", ["Edema", "Mass"]),
        "mask_column": (["mask"], "mask_column", "mask"),
        "mask_names": (["background,left, right"], "mask_names", ["background", "left", "right"]),
        "uncertain": (["ones"], "uncertain", "ones"),
        "label_names": (["Edema, Mass"], "label_names", ["Edema", "Mass"]),
        "patient_ids": (["exact"], "patient_ids", "exact"),
        "folders": (["classes"], "folders", "classes"),
    },
    "hf": {
        "image_column": (["scan"], "image_column", "scan"),
        "patient_column": (["person"], "patient_column", "person"),
        "view_column": (["shot"], "view_column", "shot"),
        "sex_column": (["geschlecht"], "sex_column", "geschlecht"),
        "age_column": (["alter"], "age_column", "alter"),
        "label_columns": (["Edema"], "label_columns", ["Edema"]),
        "mask_column": (["mask"], "mask_column", "mask"),
        "mask_names": (["lungs"], "mask_names", ["lungs"]),
        "uncertain": (["zeros"], "uncertain", "zeros"),
        "label_names": (["Edema"], "label_names", ["Edema"]),
        "patient_ids": (["normalised"], "patient_ids", "normalised"),
        "config_name": (["small"], "config_name", "small"),
        "revision": (["v1"], "revision", "v1"),
        "streaming": ([], "streaming", True),
        "split_names": (["a=train, b=test"], "split_names", {"a": "train", "b": "test"}),
    },
    "nih14": {"metadata": (["table.csv"], "metadata", Path("table.csv"))},
    "vinbigdata": {"readers": (["majority"], "readers", "majority")},
    "vindr": {"readers": (["majority"], "readers", "majority")},
    "rsna": {
        "classes": (["detailed"], "classes", "detailed"),
        "mapping": (["map.json"], "mapping", "map.json"),
        "headers": (["headers.csv"], "headers", "headers.csv"),
    },
    "siim": {"masks": (["files"], "masks", "files")},
    "chexpert": {"uncertain": (["ones"], "uncertain", "ones")},
    "mimic_cxr_jpg": {"uncertain": (["zeros"], "uncertain", "zeros")},
    "phantom": {
        "num_patients": (["7"], "num_patients", 7),
        "images_per_patient": (["2"], "images_per_patient", 2),
        "mask_names": (["heart"], "mask_names", "heart"),
    },
}
OPTIONS = {option: words for taken in TAKEN.values() for option, (words, _, _) in taken.items()} | {"root": ["root"]}
SHARED = {"nih14": {"seed": 5}, "vindr": {"seed": 5}, "chexpert": {"seed": 5}, "phantom": {"seed": 5, "size": 64}}


OF_COMMAND = {*prepare_command.OF_CACHE, "collection", "output", "quiet"}


def collection_of(kind: str, *words: str) -> Collection:
    given = vars(prepare_command.parser().parse_args(["--collection", kind, "--output", "cache", *words]))
    options = {name: value for name, value in given.items() if name not in OF_COMMAND and value is not None}
    return prepare_command.make_collection(kind, options, given["seed"], given["size"])


def root_of(kind: str) -> list[str]:
    return [] if kind == "phantom" else ["--root", "root"]


def test_the_tables_above_know_all_collections_and_options():
    assert TAKEN.keys() == KINDS.keys()
    listed = prepare_command.parser().format_help()
    named = {line.split()[0].removeprefix("--") for line in listed.splitlines() if line.startswith("  --")}
    assert named - OF_COMMAND == OPTIONS.keys()


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind, taken in TAKEN.items() for option in taken])
def test_an_option_reaches_its_collection(kind: str, option: str):
    words, attribute, expected = TAKEN[kind][option]
    made = collection_of(kind, *root_of(kind), "--seed", "5", "--size", "64", f"--{option}", *words)
    assert type(made) is collection_class(kind)
    found: Any = made
    for name in attribute.split("."):
        found = getattr(found, name)
    assert found == expected
    if kind != "phantom":
        assert str(made.path if kind == "hf" else made.root) == "root"  # type: ignore[attr-defined]
    assert {name: getattr(made, name) for name in SHARED.get(kind, {})} == SHARED.get(kind, {})


@pytest.mark.parametrize("kind", TAKEN)
def test_all_options_together_and_none_of_them(kind: str):
    words = [word for option, (values, _, _) in TAKEN[kind].items() for word in (f"--{option}", *values)]
    assert type(collection_of(kind, *root_of(kind), *words)) is collection_class(kind)
    assert type(collection_of(kind, *root_of(kind))) is collection_class(kind)
    if kind != "phantom":
        with pytest.raises(ValueError, match=f"no --root found; --collection {kind} expects"):
            collection_of(kind)


@pytest.mark.parametrize("kind", TAKEN)
def test_an_option_that_a_collection_does_not_take_is_named(kind: str):
    taken = {*TAKEN[kind], *([] if kind == "phantom" else ["root"])}
    strange = [option for option in OPTIONS if option not in taken]
    for option in strange:
        with pytest.raises(ValueError, match=rf"^--{option} found; --collection {kind} does not take it$"):
            collection_of(kind, *root_of(kind), f"--{option}", *OPTIONS[option])
    words = [word for option in strange for word in (f"--{option}", *OPTIONS[option])]
    with pytest.raises(ValueError, match="does not take it") as caught:
        collection_of(kind, *root_of(kind), *words)
    assert all(f"--{option}" in str(caught.value) for option in strange)
