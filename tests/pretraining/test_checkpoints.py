"""Checkpoints: whole or absent, checked, kept or dropped; and runs that meet damage and full disks."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import interrupted, pretrain, start

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.pretraining.checkpoints import Checkpoints, DamagedCheckpointError, verify_checkpoint
from mlvicx_hf.pretraining.loop import train

FIXED, MACHINE = {"training.seed": 3, "model.dims": (4, 5)}, {"threads": 2}


def write_files(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4)
    (folder / "optimizer.pt").write_bytes(b"momentum" * 100)


def save(folder: Path, *steps: int, limit: int = 2) -> Checkpoints:
    checkpoints = Checkpoints(folder, limit)
    for step in steps:
        checkpoints.save(step, FIXED, MACHINE, write_files)
    return checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- whole or damaged --------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path: Path):
    checkpoints = save(tmp_path, 5)
    found = verify_checkpoint(checkpoints.path(5))
    assert (found.step, found.fixed["training.seed"], found.machine) == (5, 3, MACHINE)
    found.check_same_run(FIXED, MACHINE)
    assert checkpoints.newest_whole() == found
    assert names(tmp_path) == ["checkpoint-5"]
    assert names(found.path) == ["model.safetensors", "optimizer.pt", "state.json"]


def flip(path: Path, place: int = 100) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def edit_state(folder: Path, **values: Any) -> None:
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | values))


def move(folder: Path) -> None:
    """An older checkpoint in its place."""
    shutil.rmtree(folder)
    older = max(folder.parent.glob("checkpoint-?"))
    shutil.copytree(older, folder)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated optimizer": (lambda p: os.truncate(p / "optimizer.pt", 300), "optimizer.pt has the SHA-256 hash"),
    "empty optimizer": (lambda p: os.truncate(p / "optimizer.pt", 0), "optimizer.pt has the SHA-256 hash"),
    "a bit of the model": (lambda p: flip(p / "model.safetensors"), "model.safetensors has the SHA-256 hash"),
    "model missing": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors is missing"),
    "optimizer missing": (lambda p: (p / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "state missing": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "state empty": (lambda p: (p / "state.json").write_text(""), "state.json is no state"),
    "state cut": (lambda p: os.truncate(p / "state.json", 40), "state.json is no state"),
    "state no text": (lambda p: (p / "state.json").write_bytes(b"\xff\x00" * 9), "state.json is no state"),
    "state a list": (lambda p: (p / "state.json").write_text("[1]"), "state.json is no state"),
    "state of an older version": (lambda p: edit_state(p, sha256={}), "state.json is no state"),
    "another step": (lambda p: edit_state(p, step=3), "state.json is not what was written"),
    "another setting": (lambda p: edit_state(p, fixed={"training.seed": 4}), "state.json is not what was written"),
    "another checkpoint": (move, "state.json is not what was written"),
    "a folder for a file": (lambda p: ((p / "optimizer.pt").unlink(), (p / "optimizer.pt").mkdir()), "optimizer.pt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    checkpoints = save(tmp_path, 5, 10)
    do, message = DAMAGES[damage]
    do(checkpoints.path(10))
    with pytest.raises(DamagedCheckpointError, match=message):
        verify_checkpoint(checkpoints.path(10))
    found = checkpoints.newest_whole()
    assert found is not None
    assert found.path == checkpoints.path(5)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"{checkpoints.path(10)} is damaged: {message}" in record.message
    assert checkpoints.newest_good() == checkpoints.path(5)


def test_no_whole_checkpoint_is_an_error_with_every_reason(tmp_path: Path):
    checkpoints = save(tmp_path, 5, 10)
    (checkpoints.path(10) / "optimizer.pt").unlink()
    flip(checkpoints.path(5) / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole \(checkpoint-10: optimizer.* checkpoint-5: mod"
    ):
        checkpoints.newest_whole()
    assert checkpoints.newest_good() is None


def test_a_trained_model_without_checkpoints_is_not_trained_anew(tmp_path: Path):
    assert Checkpoints(tmp_path / "absent", 2).newest_whole() is None
    assert Checkpoints(tmp_path, 2).newest_whole() is None
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="holds a trained model and no checkpoint"):
        Checkpoints(tmp_path, 2).newest_whole()


def test_all_differences_are_listed_and_another_machine_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found = save(tmp_path, 1).newest_whole()
    assert found is not None
    with pytest.raises(
        ValueError, match=r"model\.dims was \[4, 5\], now None; training\.seed was 3, now 4; x was None"
    ):
        found.check_same_run({"training.seed": 4, "x": 1}, MACHINE)
    assert not caplog.records
    found.check_same_run(FIXED, {"threads": 3})
    assert "the bits may differ" in caplog.text
    assert "threads was 2, now 3" in caplog.text


# -- which are kept ----------------------------------------------------------------------------------------------------


def test_the_newest_are_kept_by_number(tmp_path: Path):
    (tmp_path / "checkpoint-mine").mkdir()  # not ours
    save(tmp_path, 8, 9, 10, 100)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100", "checkpoint-mine"]


def test_the_only_good_one_is_kept(tmp_path: Path):
    checkpoints = save(tmp_path, 5, 10, 15, limit=3)
    for step in (10, 15):
        os.truncate(checkpoints.path(step) / "model.safetensors", 0)
    single = Checkpoints(tmp_path, 1)
    found = single.newest_whole()
    assert found is not None
    single.begin(found.step)
    assert names(tmp_path) == ["checkpoint-5", "damaged-checkpoint-10", "damaged-checkpoint-15"]
    single.save(6, FIXED, MACHINE, write_files)  # older than the damaged ones, and yet the newest
    assert [path.name for path in single.paths()] == ["checkpoint-6"]
    assert single.newest_good() == single.path(6)


def test_a_step_that_has_a_checkpoint_is_not_written_again(tmp_path: Path):
    checkpoints = save(tmp_path, 5)
    before = (checkpoints.path(5) / "state.json").stat().st_ino
    checkpoints.save(5, FIXED, MACHINE, lambda folder: pytest.fail("written"))
    assert (checkpoints.path(5) / "state.json").stat().st_ino == before


def test_what_kills_have_left_is_cleared(tmp_path: Path):
    checkpoints = save(tmp_path, 5)
    for name in (".checkpoint-7.tmp", ".checkpoint-3.old"):
        shutil.copytree(checkpoints.path(5), tmp_path / name)
    (tmp_path / ".mine").touch()
    (tmp_path / ".checkpoint-8.writing").touch()  # of a lock
    checkpoints.begin(5)
    assert names(tmp_path) == [".mine", "checkpoint-5"]


def test_the_best_one_is_kept_until_there_is_a_better_one(tmp_path: Path):
    checkpoints = save(tmp_path, 1, limit=1)
    assert checkpoints.mark_best(0.6, 1)
    save(tmp_path, 2, 3, limit=1)
    assert names(tmp_path) == ["best.json", "checkpoint-1", "checkpoint-3"]
    assert not checkpoints.mark_best(0.6, 3)  # the earlier one stays
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 1, "score": 0.6}
    assert Checkpoints(tmp_path, 1).mark_best(0.7, 3)
    save(tmp_path, 4, limit=1)
    assert names(tmp_path) == ["best.json", "checkpoint-3", "checkpoint-4"]
    assert json.loads((tmp_path / "best.json").read_text()) == {"step": 3, "score": 0.7}


@pytest.mark.parametrize(("score", "step"), [(float("nan"), 5), (float("inf"), 5), (0.5, 4)])
def test_a_best_one_must_be_there_and_have_a_score(tmp_path: Path, score: float, step: int):
    with pytest.raises(AssertionError):
        save(tmp_path, 5).mark_best(score, step)
    assert names(tmp_path) == ["checkpoint-5"]


def test_a_best_one_that_is_set_aside_is_forgotten(tmp_path: Path):
    checkpoints = save(tmp_path, 5, 10)
    checkpoints.mark_best(0.9, 10)
    os.truncate(checkpoints.path(10) / "optimizer.pt", 0)
    checkpoints.begin(5)
    assert names(tmp_path) == ["checkpoint-5", "damaged-checkpoint-10"]
    assert checkpoints.mark_best(0.1, 5)


def test_a_damaged_note_of_the_best_one_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "best.json").write_text("")
    checkpoints = save(tmp_path, 5)
    assert "best.json is damaged" in caplog.text
    assert checkpoints.mark_best(0.1, 5)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tmp_path: Path):
    checkpoints = save(tmp_path, 5)

    def fail(folder: Path) -> None:
        write_files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(
        OSError, match=r"checkpoint-10 cannot be written: .*No space left .* checkpoint: .*/checkpoint-5$"
    ):
        checkpoints.save(10, FIXED, MACHINE, fail)
    assert names(tmp_path) == ["checkpoint-5"]
    with pytest.raises(OSError, match=r"last good checkpoint: none yet$"):
        Checkpoints(tmp_path / "new", 1).save(10, FIXED, MACHINE, fail)


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run with the checkpoints 6 and 9, killed after its ninth step."""
    return interrupted(finished, tmp_path / "unfinished", 6, 9)


def assert_same_end(output: Path, finished: Path) -> None:
    for name in ("model.safetensors", "metrics.jsonl", "checkpoint-10/optimizer.pt", "checkpoint-10/model.safetensors"):
        assert (output / name).read_bytes() == (finished / name).read_bytes(), name


@pytest.mark.parametrize("damage", ["truncated optimizer", "a bit of the model", "model missing", "state empty"])
def test_a_run_falls_back_and_ends_in_the_same_bits(
    cache: Path, finished: Path, unfinished: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    do, message = DAMAGES[damage]
    do(unfinished / "checkpoint-9")
    resumed = start(cache, unfinished, "--resume")
    assert resumed.step == 6
    assert f"checkpoint-9 is damaged: {message}" in caplog.text
    assert (unfinished / "checkpoint-9").is_dir(), "nothing is changed before it trains"
    train(resumed)
    assert_same_end(unfinished, finished)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_anew(cache: Path, unfinished: Path):
    for path in unfinished.glob("checkpoint-*"):
        flip(path / "model.safetensors")
    before = {str(file): file.stat().st_mtime_ns for file in unfinished.rglob("*")}
    with pytest.raises(ValueError, match=r"is whole .*; expected one to resume"):
        start(cache, unfinished, "--resume")
    assert {str(file): file.stat().st_mtime_ns for file in unfinished.rglob("*")} == before


def test_the_best_checkpoint_of_a_run_is_kept(cache: Path, unfinished: Path):
    resumed = start(cache, unfinished, "--resume", "--checkpoint_steps", 1, "--save_total_limit", 1)
    assert resumed.checkpoints.mark_best(0.8, 6)
    train(resumed)
    assert [path.name for path in resumed.checkpoints.paths()] == ["checkpoint-6", "checkpoint-10"]


def test_a_kill_before_the_note_of_the_best_one_does_not_lose_it(cache: Path, unfinished: Path):
    """The probe's score is in the metrics, and the checkpoint is whole."""
    resumed = start(cache, unfinished, "--resume", "--checkpoint_steps", 1, "--save_total_limit", 1)
    resumed_at = resumed.step
    metrics = unfinished / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()[:-1]]  # the last one was cut by the kill
    scored = [row | ({"probe_linear_auroc": 0.9} if row["step"] == resumed.step else {}) for row in rows]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in scored))
    train(resumed)
    assert [path.name for path in resumed.checkpoints.paths()] == [f"checkpoint-{resumed_at}", "checkpoint-10"]
    assert json.loads((unfinished / "best.json").read_text()) == {"step": resumed_at, "score": 0.9}


def test_a_whole_checkpoint_of_another_process_is_not_set_aside(tmp_path: Path):
    checkpoints = save(tmp_path, 500, 700)
    with pytest.raises(UserError, match=r"checkpoint-700 found, which another process has written since .* step 500"):
        checkpoints.begin(500)
    assert names(tmp_path) == ["checkpoint-500", "checkpoint-700"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", 4], "training.batch_size was 8, now 4"),
        (["--seed", 1], "training.seed was 0, now 1"),
        (["--epochs", 3], "training.epochs was 2, now 3"),
        (["--deterministic"], "training.deterministic was False, now True"),
        (["--channels_last", "false"], "training.channels_last was True, now False"),
        (["--aggregation_size", 2], "model.aggregation_size was 4, now 2"),
        (["--covariance_weight", 2], "model.covariance_weight was 1.0, now 2.0"),
        (["--max_train_samples", 40], "data.images was 44, now 40; data.max_train_samples was None, now 40"),
        (["--patient_balanced"], "data.patient_balanced was False, now True"),
        (["--blur", 1, 1], r"data.blur was \[1.0, 0.1\], now \[1.0, 1.0\]"),
        (
            ["--recipe", "small", "--image_size", 32, "--batch_size", 8],
            "model.backbone was 'test_resnet', now 'resnet18'",
        ),
    ],
)
@pytest.mark.usefixtures("restored_algorithms")
def test_another_setting_is_refused(cache: Path, finished: Path, flags: list[object], message: str):
    with pytest.raises(ValueError, match=f"checkpoint-10 belongs to another run: .*{message}"):
        start(cache, finished, "--resume", *flags)


def test_other_threads_are_a_warning(cache: Path, finished: Path, caplog: pytest.LogCaptureFixture):
    start(cache, finished, "--resume", "--cpu_threads", 2)
    assert "the bits may differ from those of a run that was not interrupted: threads was 1, now 2" in caplog.text


# -- full disks --------------------------------------------------------------------------------------------------------


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As a full disk: a write behind that place fails (Python ignores the signal that comes with it)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_leaves_the_checkpoint_before(cache: Path, finished: Path, unfinished: Path, file: str):
    resumed = start(cache, unfinished, "--resume")
    model = (finished / "checkpoint-10" / "model.safetensors").stat().st_size
    limit = model - 1
    if file == "optimizer.pt":
        next(iter(resumed.optimizer.state.values()))["unused"] = torch.zeros(500_000)  # larger than the model
        limit = model + 1000
    with no_file_larger_than(limit), pytest.raises(OSError, match="cannot be written") as caught:
        train(resumed)
    message = str(caught.value)
    assert f"{unfinished}/checkpoint-10 cannot be written: " in message
    assert "File too large" in message
    assert message.endswith(f"last good checkpoint: {unfinished}/checkpoint-9")
    assert not [path for path in unfinished.iterdir() if path.name.startswith(".")]
    assert not (unfinished / "checkpoint-10").exists()
    again = start(cache, unfinished, "--resume")
    assert again.step == 9
    train(again)
    assert_same_end(unfinished, finished)


def test_a_full_disk_at_the_end_leaves_the_last_checkpoint(cache: Path, finished: Path, tmp_path: Path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    (output / "model.safetensors").unlink()
    with no_file_larger_than(1_000_000), pytest.raises(OSError, match=r"final cannot be written.*/checkpoint-10$"):
        pretrain(cache, output, "--resume")
    assert not (output / "final").exists()
    pretrain(cache, output, "--resume")
    assert_same_end(output, finished)


# -- what a run says, and how it computes ------------------------------------------------------------------------------


def test_rate_and_estimate_are_said_once(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pretrain(cache, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("learning rate: peak 0.05 = base_learning_rate 1.6 × batch 8 / 256") == 1
    [estimate] = [line for line in lines if line.startswith("estimate: ")]
    assert "s a step, 0:00:" in estimate
    assert " for all 10 steps; " in estimate
    gigabytes = float(estimate.split("; ")[1].removesuffix(" GiB of memory"))
    assert 0.1 < gigabytes < 20


@pytest.fixture
def restored_algorithms() -> Iterator[None]:
    cudnn, before = torch.backends.cudnn, torch.are_deterministic_algorithms_enabled()
    flags, variable = (cudnn.deterministic, cudnn.benchmark), os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(before)
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if variable is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = variable


@pytest.mark.usefixtures("restored_algorithms")
def test_deterministic_algorithms(cache: Path, tmp_path: Path):
    start(cache, tmp_path / "plain")
    assert not torch.are_deterministic_algorithms_enabled()
    run = start(cache, tmp_path / "run", "--deterministic", "--epochs", 1)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    train(run)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["training"]["deterministic"] is True


@pytest.mark.parametrize("value", [True, False])
def test_memory_layout(cache: Path, tmp_path: Path, value: bool):
    run = start(cache, tmp_path / "run", "--channels_last", str(value).lower(), "--epochs", 1)
    kernel = next(p for p in run.objective.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1)
    assert kernel.is_contiguous(memory_format=torch.channels_last) is value
    assert kernel.is_contiguous() is not value
    view, _ = run.make_views(next(run.remaining_batches()))
    assert view.is_contiguous(memory_format=torch.channels_last if value else torch.contiguous_format)
