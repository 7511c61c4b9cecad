"""The quick start on a user's own folder: with labels a classifier, without them neighbours."""

import contextlib
import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from helpers import assert_users_error, mlvicx
from PIL import Image
from safetensors import safe_open

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.demo.quickstart import Quickstart


def write_folder(folder: Path, labelled: bool) -> None:
    """Forty small images of twenty patients; a bright corner is the finding."""
    rng = np.random.default_rng(0)
    rows = ["file_name,patient_id" + (",Corner" if labelled else "")]
    for index in range(40):
        pixels = rng.integers(0, 128, (48, 40), dtype=np.uint8)
        finding = index // 2 % 2
        pixels[:12, :12] += 100 * finding
        Image.fromarray(pixels).save(folder / f"{index}.png")
        rows.append(f"{index}.png,{index // 2}" + (f",{finding}" if labelled else ""))
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")


def run_quickstart(images: Path, output: Path) -> dict:
    done = mlvicx("quickstart", "--images", images, "--output", output, "--pretraining_images", 100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"$ mlvicx prepare --size 128 --seed 0 --output {output / 'cache'} --collection folder" in done.stdout
    assert "mlvicx_hf.commands.pretrain" in done.stdout or "$ mlvicx pretrain" in done.stdout  # on several GPUs or not
    return json.loads((output / "report.json").read_text())


@pytest.mark.parametrize(("gpus", "batch"), [(2, "32"), (3, "30")])
def test_pretraining_on_several_gpus_is_launched_by_accelerate(
    gpus: int, batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Cache:
        datasets: ClassVar = {"train": range(40)}

    launched = []

    def run(words: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        launched.append(words)
        return subprocess.CompletedProcess(words, 3)

    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(SystemExit) as ended:
        Quickstart(print, tmp_path / "report")._pretrain(Cache())
    assert ended.value.code == 3
    (words,) = launched
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    assert words[words.index("--num_processes") + 1] == str(gpus)
    assert words[words.index("--batch_size") + 1] == batch
    assert words[words.index("mlvicx_hf.commands.pretrain") - 1] == "-m"
    assert capsys.readouterr().out.startswith(f"$ accelerate launch --num_machines 1 --num_processes {gpus}")


def test_folders_of_others_stay_as_they_are(tmp_path: Path) -> None:
    images = tmp_path / "radio"
    (images / "a").mkdir(parents=True)
    write_folder(images, labelled=False)
    (tmp_path / "empty").mkdir()
    for output, given, message in (
        (images, images, "lies in"),
        (images / "a", images / "a", "lies in"),
        (images, tmp_path / "empty", "holds other files; expected a new folder, or one of an earlier quick start"),
        (tmp_path / "new", tmp_path / "absent", "absent: no such folder; expected the radiographs"),
        (tmp_path / "new", tmp_path / "empty", "no images found"),
        (tmp_path / "new", tmp_path / "empty", "no images found"),  # again: what the first one left is its own
    ):
        assert_users_error(mlvicx("quickstart", "--images", given, "--output", output), message)
    with (
        contextlib.chdir(tmp_path / "empty"),
        pytest.raises(UserError, match="is the working folder; expected another"),
    ):
        Quickstart(lambda _: None, Path("."))._clear()
    assert len(list(images.glob("*.png"))) == 40
    assert {file.name for file in tmp_path.iterdir()} == {"radio", "empty", "new", "new.previous"}


@pytest.mark.slow
def test_labelled_folder_gives_the_whole_report(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    write_folder(images, labelled=True)
    output = tmp_path / "report"
    report = run_quickstart(images, output)
    for protocol in ("frozen", "finetuned"):
        for start in ("pretrained", "random"):
            value = report[protocol][start]["auroc_macro"]
            assert value == "n/a" or 0 <= value <= 1
    assert report["synthetic"] is False
    with safe_open(Path(report["model"]) / "model.safetensors", "pt") as file:
        assert any(key.startswith("mlvicx.backbone.") for key in file.keys())  # noqa: SIM118 - not a dict
    text = (output / "report.md").read_text()
    assert "not a medical device" in text
    assert "| **macro** |" in text
    for picture in ("loss.png", "views.png"):
        assert picture in text
        assert Image.open(output / picture).size[0] > 100


@pytest.mark.slow
def test_folder_without_labels_gives_neighbours_and_keeps_the_last_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a plain `pip install`, without matplotlib."""
    missing = "matplotlib", "matplotlib.figure"
    monkeypatch.setattr("mlvicx_hf.common.errors.find_spec", lambda name: None if name in missing else find_spec(name))
    images = tmp_path / "images"
    images.mkdir()
    write_folder(images, labelled=False)
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.json").write_text("{}")  # of a suite, say
    (output / "mine.txt").write_text("kept")
    assert_users_error(mlvicx("quickstart", "--images", images, "--output", output), "report holds other files")
    (output / ".quickstart").touch()
    report = run_quickstart(images, output)
    assert "frozen" not in report
    assert "loss" not in report
    assert "loss.png" not in (output / "report.md").read_text()
    assert 1 <= report["rankme"]["value"] <= 40
    assert Image.open(output / report["neighbours"]).size[0] > 100
    assert (tmp_path / "report.previous" / "mine.txt").read_text() == "kept"
