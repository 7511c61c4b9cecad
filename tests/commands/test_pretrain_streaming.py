"""`mlvicx pretrain --streaming` as it is run: killed in the middle of an epoch and resumed, and its errors."""

import io
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, Value
from PIL import Image
from runs import lines, wait_for
from transformers import AutoModel

from kills import KILLED, Forks
from mlvicx_hf.commands.pretrain import main
from mlvicx_hf.common.errors import run

SCHEDULE = ("--epochs", 2, "--checkpoint_steps", 3)  # 20 steps an epoch


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four parquet shards: 160 frontal images of 16 bits and no square shape, one damaged, and 8 lateral ones."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    features = Features({"image": datasets.Image(), "view": Value("string"), "label": Value("int8")})
    for shard in range(4):
        rows = []
        for row in range(42):
            buffer = io.BytesIO()
            Image.fromarray(generator.integers(0, 65536, (40, 30), dtype=np.uint16)).save(buffer, "PNG")
            content = b"damaged" if (shard, row) == (2, 30) else buffer.getvalue()
            view = "LATERAL" if row % 21 == 0 else "PA"
            rows.append({"image": {"bytes": content, "path": None}, "view": view, "label": 1})
        Dataset.from_list(rows, features=features).to_parquet(folder / f"train-{shard:05d}-of-00004.parquet")
    return folder


def flags(dataset: object, output: Path, *more: object) -> list[str]:
    common = ("--recipe", "smoke", "--streaming", "--dataset", dataset, "--output_dir", output, "--logging_steps", 1)
    return [str(word) for word in (*common, "--cache_size", 32, "--shuffle_buffer", 64, *more)]


@pytest.mark.slow
def test_killed_in_an_epoch_and_resumed_ends_in_the_same_bits(forks: Forks, shards: Path, tmp_path: Path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = forks.run("pretrain", *flags(shards, whole, *SCHEDULE))
    assert done.code == 0, done.output
    assert "8 lateral images are left out (--views all takes them)" in done.output
    assert done.output.count("left out row 31 of shard 3: content is none of") == 1
    assert AutoModel.from_pretrained(whole).config.backbone == "test_resnet"
    assert [row["step"] for row in lines(whole)] == list(range(1, 41))

    process = forks.start("pretrain", *flags(shards, killed, *SCHEDULE))
    try:
        wait_for(killed / "checkpoint-27", process)  # the second epoch's seventh step
    finally:
        process.kill()  # with the workers that decode images
        code = process.wait()
    assert code == KILLED
    assert not (killed / "model.safetensors").exists()
    newest = max(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
    assert newest % 20, "killed inside an epoch"

    again = forks.run("pretrain", *flags(shards, killed, *SCHEDULE, "--resume"))
    assert again.code == 0, again.output
    assert f"resuming {killed}/checkpoint-{newest} at step {newest} of 40" in again.output
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert lines(killed) == lines(whole)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--patient_balanced"], ["patient_balanced found with streaming"]),
        (["--max_train_samples", "8"], ["max_train_samples=8 found with streaming", "--num_images"]),
        (["--dataset", "./nowhere"], ["'./nowhere' found", "a dataset on the Hub"]),
        (["--dataset", "nobody/nothing"], ["nobody/nothing"]),
        (["--views", "side"], ["--views", "'side'", "frontal", "all"]),
        (["--shuffle_buffer", "0"], ["shuffle_buffer=0 found"]),
        (["--streaming", "false", "--num_images", "9"], ["num_images=9 found without streaming"]),
    ],
)
def test_a_users_error_is_one_line_and_code_2(
    shards: Path,
    tmp_path: Path,
    more: list[str],
    parts: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *flags(shards, tmp_path / "run", *more)])
    with pytest.raises(SystemExit) as caught:
        run(main)
    assert caught.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(errors) == 1
    assert all(part in errors[0] for part in parts), errors
    assert not (tmp_path / "run").exists()
