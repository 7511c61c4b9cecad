"""Segmentation: frozen and fine-tuned, what is written, masks and images together, and what cannot be done."""

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_cache, segmentation_cache, unlabelled_cache
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

from mlvicx_hf import MLVICXImageProcessor
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.finetuning.arguments import SEGMENTATION_SECTIONS
from mlvicx_hf.finetuning.segmentation import MaskedImages, finetune_segmenter, load_masked_cache
from mlvicx_hf.recipes import fill_sections
from mlvicx_hf.scoring.overlap import overlap_counts, score_overlap


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return segmentation_cache(tmp_path_factory.mktemp("masks"), 80)


def run(output: Path, model: object, dataset: Path, **values: Any) -> dict[str, Any]:
    usual = {"output_dir": output, "model": str(model), "dataset": str(dataset), "num_train_epochs": 1, "use_cpu": True}
    return finetune_segmenter(*fill_sections(SEGMENTATION_SECTIONS, usual | values, "segmentation"))


@pytest.fixture(scope="module")
def frozen(cache: Path, pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("frozen") / "run"
    run(output, pretrained, cache, freeze_backbone=True, num_train_epochs=8, learning_rate=3e-3)
    return output


def test_results_say_what_was_measured_on_what(frozen: Path, cache: Path, pretrained: Path):
    results = json.loads((frozen / "results.json").read_text())
    manifest = load_cache(cache).manifest
    assert (results["task"], results["protocol"]) == ("segmentation", "frozen")
    assert results["labels"] == ["disc"]
    assert results["model"] == str(pretrained)
    assert results["data"]["split_hash"] == manifest["split_hash"]
    assert results["data"]["data_hash"] == manifest["data_hash"]
    assert results["counts"]["test"] == {"images": 16, "patients": 8}
    assert results["hyperparameters"]["learning_rate"] == 3e-3
    assert "both empty" in results["empty_mask_convention"]
    assert results["hardware"]["processes"] == 1
    assert results["code"]["commit"]
    assert sorted(p.name for p in frozen.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "results.json",
        "splits.csv",
        "test_overlaps.csv",
    ]


def test_the_saved_model_gives_the_masks_and_these_the_score(frozen: Path, cache: Path):
    model = AutoModelForSemanticSegmentation.from_pretrained(frozen).eval()
    assert model.config.id2label == {0: "background", 1: "disc"}
    processor = AutoImageProcessor.from_pretrained(frozen)
    test = load_cache(cache).datasets["test"]
    made = processor(list(test["image"]), segmentation_maps=list(test["mask"]))
    with torch.no_grad():
        maps = processor.post_process_semantic_segmentation(model(made["pixel_values"]))
    counts = overlap_counts(torch.stack(maps).numpy(), made["labels"].numpy(), 2)
    results = json.loads((frozen / "results.json").read_text())["test"]
    assert score_overlap(counts, ["disc"]) == {k: v for k, v in results.items() if k != "subgroups"}
    with (frozen / "test_overlaps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["source"] for row in rows] == test["source"][:]
    listed = [[int(row[f"{kind}:disc"]) for kind in ("overlap", "predicted", "true")] for row in rows]
    assert listed == counts[:, 0].tolist()


def test_the_task_is_learned(frozen: Path):
    test = json.loads((frozen / "results.json").read_text())["test"]
    assert test["dice_positive"] > 0.6
    assert test["per_label"]["disc"]["images_positive"] == 8


def test_frozen_leaves_the_encoder_bit_for_bit(frozen: Path, pretrained: Path):
    before, after = (load_file(folder / "model.safetensors") for folder in (pretrained, frozen))
    encoder = [key for key in after if key.startswith("mlvicx.")]
    assert encoder
    assert all(torch.equal(after[key], before[key]) for key in encoder)


def test_the_same_seed_gives_the_same_model_and_another_one_does_not(cache: Path, pretrained: Path, tmp_path: Path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(tmp_path / name, pretrained, cache, seed=seed, max_train_samples=16)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_several_classes_on_a_frozen_random_encoder(pretrained: Path, tmp_path: Path):
    """Without calibration the batch normalisation of a random encoder would let nothing through."""
    cache = segmentation_cache(tmp_path, 40, names=("background", "disc", "stripes"))
    results = run(tmp_path / "run", "random", cache, architecture=str(pretrained), freeze_backbone=True)
    assert results["labels"] == ["disc", "stripes"]
    assert set(results["test"]["per_label"]) == {"disc", "stripes"}
    expected = np.mean([results["test"]["per_label"][name]["dice"] for name in results["labels"]])
    assert results["test"]["dice"] == pytest.approx(expected)
    assert results["hyperparameters"]["batch_size"] == 16  # of recipe default
    state = load_file(tmp_path / "run" / "model.safetensors")
    means = [value for key, value in state.items() if key.startswith("mlvicx.") and key.endswith("running_mean")]
    assert all(mean.abs().max() > 0 for mean in means)


@pytest.mark.parametrize(("asked", "kept"), [(True, True), (False, False), (None, False)])
def test_batch_normalisation_is_kept_as_asked(
    asked: bool | None, kept: bool, cache: Path, pretrained: Path, tmp_path: Path
):
    before = AutoModel.from_pretrained(pretrained).state_dict()
    results = run(tmp_path / "run", pretrained, cache, freeze_batch_norm=asked, learning_rate=1e-2)
    assert (results["hyperparameters"]["freeze_batch_norm"], results["batch_norm_frozen"]) == (kept, kept)
    found = load_file(tmp_path / "run" / "model.safetensors")
    same = {name: torch.equal(found[f"mlvicx.{name}"], value) for name, value in before.items()}
    assert {equal for name, equal in same.items() if name.endswith("running_mean")} == {kept}
    assert not all(equal for name, equal in same.items() if name.endswith("weight"))  # the convolutions


def test_augmentation_moves_image_and_mask_together(cache: Path):
    images = load_cache(cache).datasets["train"].select([0] * 30)  # the same disc thirty times
    torch.manual_seed(0)
    made = [MaskedImages(images, MLVICXImageProcessor(32), augment=True)[i] for i in range(30)]
    centres = set()
    for item in made:
        mask = item["labels"].bool()
        pixels = item["pixel_values"][0]
        assert pixels[mask].mean() > pixels[~mask].mean() + 1  # the disc is bright wherever it went
        centres.add(tuple(mask.nonzero().float().mean(0).round().tolist()))
    assert len(centres) > 5
    still = MaskedImages(images, MLVICXImageProcessor(32))
    assert torch.equal(still[0]["labels"], still[1]["labels"])


def test_images_of_unknown_mask_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = segmentation_cache(tmp_path, 40, unknown=(0, 1, 2, 8))
    with caplog.at_level(logging.WARNING):
        loaded = load_masked_cache(str(path))
    assert "3 images of train have no known mask and are left out" in caplog.text
    assert len(loaded.datasets["train"]) == 21
    assert all(mask is not None for mask in loaded.datasets["train"]["mask"])


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_cache_that_lacks_a_split_or_masks(cache: Path, tmp_path: Path, split: str):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    for name in ("cache.json", "dataset_dict.json"):
        content = json.loads((copy / name).read_text())
        if name == "cache.json":
            del content["splits"][split]
        else:
            content["splits"].remove(split)
        (copy / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"has the splits .*; expected {split} as well"):
        load_masked_cache(str(copy))
    with pytest.raises(ValueError, match=r"has no masks; expected some: prepare it with .*mask_file_name"):
        load_masked_cache(str(unlabelled_cache(tmp_path, 12)))


def test_a_validation_split_of_empty_masks(tmp_path: Path):
    rows = [
        {"patient_id": str(i), "split": ("train", "validation", "test")[i % 3], "_draw": {"disc": i % 3 != 1}}
        for i in range(12)
    ]
    path = make_cache(tmp_path, [row | {"_mask": True} for row in rows], mask_names=("disc",))
    with pytest.raises(ValueError, match="every mask of the validation split is empty"):
        load_masked_cache(str(path))


def test_a_structure_that_no_mask_shows(tmp_path: Path):
    path = segmentation_cache(tmp_path, 20, names=("background", "disc", "stripes", "heart"))
    with pytest.raises(ValueError, match="no mask of train shows heart; expected names of what the masks hold"):
        load_masked_cache(str(path))


def test_a_structure_that_no_chosen_mask_shows(cache: Path, pretrained: Path, tmp_path: Path):
    rows = [
        {"patient_id": str(i), "split": ("train", "validation", "test")[i % 3], "_draw": {"disc": i > 5}}
        for i in range(12)
    ]
    path = make_cache(tmp_path, rows, mask_names=("disc",))
    with pytest.raises(UserError, match="no mask of the 2 training images that were chosen shows disc; expected one"):
        run(tmp_path / "run", pretrained, path, max_train_samples=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss' found; expected one of dice, dice_positive"),
        ({"batch_eval_metrics": "false"}, "batch_eval_metrics='false' found; expected true: the masks of a whole"),
        ({"recipe": "nothing"}, "recipe 'nothing' found; expected default, paper"),
    ],
)
def test_arguments_that_do_not_fit(values: dict[str, Any], message: str, cache: Path, pretrained: Path, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", pretrained, cache, **values)


def test_a_model_or_folder_that_does_not_fit(cache: Path, frozen: Path, pretrained: Path, tmp_path: Path):
    with pytest.raises(FileExistsError, match="is there already; expected a new or an empty"):
        run(frozen, pretrained, cache)
    with pytest.raises(FileNotFoundError, match="absent"):
        run(tmp_path / "run", tmp_path / "absent", cache)
