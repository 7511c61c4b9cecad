"""`mlvicx predict`."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest
import torch
from helpers import assert_users_error, draw, mlvicx, run_code, tiny_config
from loopback_hub import LoopbackHub, Repository, StoredFile

from kills import KILLED, Forks
from mlvicx_hf import MLVICXForImageClassification, MLVICXImageProcessor
from mlvicx_hf.prediction.prediction import predict


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    names = {0: "Effusion", 1: "Mass"}
    thresholds = {"values": {"Effusion": 0.4, "Mass": None}, "split": "validation", "criterion": "youden"}
    config = tiny_config(id2label=names, label2id={v: k for k, v in names.items()}, decision_thresholds=thresholds)
    MLVICXForImageClassification(config).save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        draw({"disc": number == 0}, seed=number).save(folder / f"{number}.png")
    (folder / "broken.png").write_text("not an image")
    return folder


def test_the_command(model: Path, images: Path, tmp_path: Path):
    output = tmp_path / "new" / "out.csv"
    words = ("--model", model, "--input", images, images / "broken.png", "--output", output, "--batch_size", 2)
    done = mlvicx("predict", *words, "--embeddings", tmp_path / "new" / "e.safetensors", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{output}: 3 of 4 images"]
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert warnings == [f"warning: 1 of 4 images could not be read; column error of {output} says why"]
    assert "predicting: 100%" in done.stderr
    with output.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
    assert rows[0]["decision:Effusion"] == str(int(float(rows[0]["probability:Effusion"]) >= 0.4))
    assert json.loads(output.with_suffix(".json").read_text())["errors"] == 1
    assert {path.name for path in output.parent.iterdir()} == {"out.csv", "out.json", "e.safetensors"}


def test_nothing_readable_is_an_error_after_the_table(model: Path, images: Path, tmp_path: Path):
    words = ("--model", model, "--input", images / "broken.png", "--output", tmp_path / "out.csv")
    done = mlvicx("predict", *words, "--num_workers", 0, "--quiet")
    assert_users_error(done, "none of 1 images could be read", "out.csv")
    assert "content is none of PNG" in (tmp_path / "out.csv").read_text()


def test_weights_that_do_not_fit_are_a_users_error(model: Path, images: Path, tmp_path: Path):
    torch.manual_seed(0)
    source = tmp_path / "model"
    MLVICXForImageClassification(tiny_config(num_labels=2)).mlvicx.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["MLVICXForImageClassification"]}))
    MLVICXImageProcessor(image_size=32).save_pretrained(source)
    done = mlvicx("predict", "--model", source, "--input", images, "--output", tmp_path / "out.csv")
    assert_users_error(done, str(source), "classifier")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_kill_leaves_no_half_written_results(forks: Forks, model: Path, tmp_path: Path):
    folder = tmp_path / "in"
    folder.mkdir()
    large = draw({"disc": True}, seed=0, size=1500)
    large.save(folder / "0.png")
    for number in range(1, 200):
        (folder / f"{number}.png").hardlink_to(folder / "0.png")
    words = ("--model", model, "--input", folder, "--output", tmp_path / "out.csv", "--batch_size", 1)
    process = forks.start("predict", *words, "--num_workers", 0)
    deadline = time.monotonic() + 240
    while not (tmp_path / ".out.csv.tmp").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait(10) == KILLED
    assert {path.name for path in tmp_path.iterdir()} == {"in", ".out.csv.tmp", ".out.csv.writing"}
    record = predict(str(model), folder / "0.png", tmp_path / "out.csv", num_workers=0, device="cpu", progress=False)
    assert record["images"] == 1  # what is left over is in nobody's way
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out.csv", "out.json"}


def test_a_model_from_the_hub_is_pinned_to_its_commit(model: Path, images: Path, tmp_path: Path):
    files = {path.name: StoredFile(path.read_bytes(), is_lfs=path.suffix == ".safetensors") for path in model.iterdir()}
    code = """
import sys
from mlvicx_hf.prediction.prediction import predict
options = {"inputs": sys.argv[1], "output": sys.argv[2], "num_workers": 0, "device": "cpu"}
try:
    predict("org/absent", **options)
except OSError as error:
    print(error)
predict("org/model", revision="v1", **options)
"""
    with LoopbackHub() as hub:
        repository = hub.repositories["org/model"] = Repository("org/model", private=False)
        repository.tags["v1"] = repository.commit("main", "first", files).sha
        changed = {"modeling_mlvicx.py": StoredFile(b"raise SystemExit(7)", is_lfs=False)}
        repository.commit("main", "second", files | changed)
        done = run_code(code, images / "0.png", tmp_path / "out.csv", **hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "org/absent: not found here, nor on the Hub" in done.stdout
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["model"], record["revision"]) == ("org/model", repository.tags["v1"])
    assert record["weights_sha256"] == {"model.safetensors": files["model.safetensors"].sha256}
