"""`mlvicx card`."""

import json
from pathlib import Path

import pytest
from helpers import ROOT, assert_users_error, mlvicx, tiny_config
from huggingface_hub import ModelCard

from mlvicx_hf import MLVICXConfig, MLVICXForSemanticSegmentation, MLVICXImageProcessor
from mlvicx_hf.hub.cards.rendering import render_card

TEMPLATE = ROOT / "src" / "mlvicx_hf" / "hub" / "cards" / "templates" / "segmenter.md"


def write_model(folder: Path) -> Path:
    """What a card reads of a fine-tuned segmenter."""
    names = {"id2label": {0: "background", 1: "lungs"}, "label2id": {"background": 0, "lungs": 1}}
    config = tiny_config(**names, architectures=["MLVICXForSemanticSegmentation"])
    config.save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    scores = {"dice": 0.91, "dice_positive": 0.92, "iou": 0.83, "iou_positive": 0.84}
    counts = {"images": 12, "patients": 6}
    results = {
        "task": "segmentation",
        "protocol": "finetuned",
        "labels": ["lungs"],
        "empty_mask_convention": "of an image: 1 when both masks are empty",
        "test": scores | {"dice_per_class": {"lungs": 0.91}, "images_positive": {"lungs": 11}},
        "model": "random",
        "architecture": None,
        "label_fraction": 1.0,
        "seed": 3,
        "counts": dict.fromkeys(("train", "validation", "test"), counts),
        "data": {
            "cache": "caches/drawn",
            "collection": "phantom",
            "synthetic": True,
            "data_hash": "a" * 64,
            "split_hash": "b" * 64,
        },
        "hyperparameters": {"learning_rate": 0.001},
        "epochs_trained": 4.0,
        "best_epoch": None,
        "code": {"mlvicx_hf": "0.1.0", "commit": "unknown"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_card_is_written_whole(tmp_path: Path):
    words = ("--template", TEMPLATE, "--model", write_model(tmp_path / "run"), "--repo_id", "org/lungs")
    output = tmp_path / "README.md"
    done = mlvicx("card", *words, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"card written to {output}\n"
    card = ModelCard.load(output)
    assert "| **this model** (random weights of the default architecture, fine-tuned) | 12 | 3 | 0.910 |" in card.text
    assert "**The labelled images are synthetic" in card.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "run"]
    output.write_text("by hand")
    assert_users_error(mlvicx("card", *words, "--output", output), "README.md is there already; --overwrite")
    assert output.read_text() == "by hand"
    assert mlvicx("card", *words, "--output", output, "--overwrite").returncode == 0
    assert ModelCard.load(output).text == card.text


def test_without_an_output_the_card_is_printed(tmp_path: Path):
    """The template comes by the model's class, by name, or from a path."""
    model = write_model(tmp_path / "run")
    expected = f"{render_card(TEMPLATE, model, [])}\n"
    for template in ((), ("--template", "segmenter"), ("--template", TEMPLATE)):
        assert mlvicx("card", "--model", model, *template).stdout == expected
    assert_users_error(mlvicx("card", "--model", model, "--template", "classifier"), "MLVICXForSemanticSegmentation")
    assert_users_error(mlvicx("card", "--model", model, "--template", tmp_path / "segmenter.md"), "segmenter.md")
    (tmp_path / "segmenter.md").write_bytes("größe {{ name }}".encode("latin-1"))
    message = "segmenter.md: byte 0xf6 found; expected text in UTF-8"
    assert_users_error(mlvicx("card", "--model", model, "--template", tmp_path / "segmenter.md"), message)


def test_a_missing_result_is_a_users_error_and_leaves_no_card(tmp_path: Path):
    output = tmp_path / "README.md"
    words = ("--template", TEMPLATE, "--model", write_model(tmp_path / "run"), "--output", output)
    done = mlvicx("card", *words, "--results", tmp_path / "absent.json")
    assert_users_error(done, "absent.json: no such file; expected one that a run wrote")
    assert not output.exists()


@pytest.mark.parametrize(
    ("words", "revision"), [(("--tag", "v2"), "v2"), (("--revision", "trial"), "trial"), ((), "main")]
)
def test_the_code_of_a_published_card_loads_what_is_published(tmp_path: Path, words: tuple[str, ...], revision: str):
    model = write_model(tmp_path / "run")
    MLVICXForSemanticSegmentation(MLVICXConfig.from_pretrained(model)).save_pretrained(model)
    done = mlvicx("publish", "--model", model, "--repo_id", "org/lungs", "--dry_run", *words)
    assert done.returncode == 0, done.stderr
    assert f'revision = "{revision}"' in done.stdout


def test_a_card_is_given_or_made(tmp_path: Path):
    (tmp_path / "card.md").write_text("Research use only.")
    words = ("--model", write_model(tmp_path / "run"), "--repo_id", "org/lungs", "--dry_run")
    done = mlvicx("publish", *words, "--card", tmp_path / "card.md", "--pretraining", tmp_path / "absent")
    assert_users_error(done, "--pretraining found with --card; expected a card, or what it is made of")
