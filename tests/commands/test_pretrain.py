"""`scripts/pretrain.py` as it is run: killed and resumed, launched by accelerate, in two processes, and its errors."""

import json
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, assert_users_error, make_cache, mlvicx, run_python, run_script, unlabelled_cache
from runs import lines, wait_for
from safetensors.torch import load_file
from transformers import AutoModel

from kills import KILLED, Forks
from mlvicx_hf.commands.pretrain import parse_pretraining
from mlvicx_hf.pretraining.setup import set_up

SCRIPT = ROOT / "scripts" / "pretrain.py"
SCHEDULE = ("--epochs", 4, "--checkpoint_steps", 5)  # 12 steps an epoch


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unlabelled_cache(tmp_path_factory.mktemp("pretrain"), 100)


def flags(cache: Path, output: Path, *more: object) -> list[str]:
    common = ("--recipe", "smoke", "--dataset", cache, "--output_dir", output, "--logging_steps", 1)
    return [str(word) for word in (*common, *more)]


@pytest.fixture(scope="module")
def whole(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that `accelerate launch` starts in one process and nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "run"
    words = ("--num_processes", 1, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")
    words = (*words, "-m", "mlvicx_hf.commands.pretrain")  # as a module here, as a script below
    done = run_python("-m", "accelerate.commands.launch", *words, *flags(cache, output, *SCHEDULE))
    assert done.returncode == 0, done.stderr
    assert f"model saved in {output}" in done.stdout
    return output


@pytest.mark.slow
def test_launched_by_accelerate(whole: Path):
    assert AutoModel.from_pretrained(whole).config.backbone == "test_resnet"
    assert [row["step"] for row in lines(whole)] == list(range(1, 49))
    assert json.loads((whole / "run.json").read_text())["num_processes"] == 1


@pytest.mark.slow
def test_killed_and_resumed_ends_in_the_same_bits(forks: Forks, whole: Path, cache: Path, tmp_path: Path):
    killed = tmp_path / "killed"
    process = forks.start("pretrain", *flags(cache, killed, *SCHEDULE))
    try:
        wait_for(killed / "checkpoint-15", process)  # the second epoch's third step
        time.sleep(0.1)  # some steps more, which are lost
    finally:
        process.kill()  # with the workers that decode images
        code = process.wait()
    assert code == KILLED
    assert not (killed / "model.safetensors").exists()
    newest = max(int(path.name.split("-")[1]) for path in killed.glob("checkpoint-*"))
    assert newest % 12, "killed inside an epoch"

    again = run_script("pretrain.py", *flags(cache, killed, *SCHEDULE, "--resume"))
    assert again.returncode == 0, again.stderr
    assert f"resuming {killed}/checkpoint-{newest} at step {newest} of 48" in again.stdout
    one, other = load_file(whole / "model.safetensors"), load_file(killed / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert lines(killed) == lines(whole)


@pytest.mark.thorough
def test_two_processes(cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    output = tmp_path / "run"
    splits = ("train", "validation")
    rows = [{"patient_id": f"p{i}", "split": splits[i % 2], "disc": i // 2 % 2, "_draw": {}} for i in range(16)]
    probe = make_cache(tmp_path, rows, name="probe")
    done = run_python(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, SCRIPT),
        *flags(
            cache, output, "--num_workers", 0, "--checkpoint_steps", 7, "--probe_dataset", probe, "--probe_steps", 10
        ),
        **({"ACCELERATE_USE_CPU": "true"} if torch.accelerator.is_available() else {}),  # two do not share a GPU
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("model saved in") == 1
    written = json.loads((output / "run.json").read_text())
    assert written["num_processes"] == 2
    assert [row["step"] for row in lines(output)] == list(range(1, 25))  # one process writes
    assert lines(output)[-1]["images"] == 24 * 8
    assert all(torch.isfinite(p).all() for p in AutoModel.from_pretrained(output).parameters())
    assert {"checkpoint-21", "checkpoint-24"} <= {path.name for path in output.glob("checkpoint-*")}
    assert [row["step"] for row in lines(output) if "probe_linear_auroc" in row] == [10, 20, 24]  # and none hangs there
    set_up(*parse_pretraining(flags(cache, output, "--num_workers", 0, "--resume")))
    assert any("processes was 2, now 1" in message for message in caplog.messages)


def test_a_folder_in_use_is_refused(cache: Path, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    done = mlvicx("pretrain", *flags(cache, tmp_path))
    assert_users_error(done, "holds files of another run", "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (["--batch_size", "200"], ["batch_size=200 found", "at most 100"]),
        (["--backbone", "resnet1x"], ["backbone='resnet1x' found"]),
        (["--expander_dims", "0"], ["expander_dims=[0] found"]),
        (["--recipe", "fast"], ["recipe 'fast' found", "smoke"]),
        (["--init_from", "./absent"], ["'./absent' found"]),
        (["--init_from", "./absent.pth"], ["absent.pth"]),
        (["--dataset", "nowhere"], ["nowhere", "expected a prepared cache"]),
    ],
)
def test_a_users_error_is_one_line_and_code_2(
    cache: Path,
    tmp_path: Path,
    more: list[str],
    parts: list[str],
):
    assert_users_error(mlvicx("pretrain", *flags(cache, tmp_path / "run", *more)), *parts)
    assert not (tmp_path / "run").exists()


def test_a_value_that_is_no_choice_ends_with_the_usage_and_code_2(cache: Path, tmp_path: Path):
    done = mlvicx("pretrain", *flags(cache, tmp_path / "run", "--mixed_precision", "half"))
    assert done.returncode == 2
    assert "argument --mixed_precision: invalid choice: 'half' (choose from " in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_tracker_is_written(cache: Path, tmp_path: Path):
    words = ("--epochs", 1, "--report_to", "tensorboard", "--max_train_samples", 16, "--num_workers", 0)
    done = mlvicx("pretrain", *flags(cache, tmp_path / "run", *words))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))
