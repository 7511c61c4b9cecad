from __future__ import annotations

import os
import shutil
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from mlvicx_hf.common.files import check_output, new_file, new_folder, new_output, only_writer


def hold(path: Path, holding: Any, done: Any) -> None:
    with only_writer(path):
        holding.set()
        done.wait(60)


def test_a_second_process_that_writes_is_refused_and_the_next_one_is_not(tmp_path: Path):
    forks = get_context("fork")
    holding, done = forks.Event(), forks.Event()
    other = forks.Process(target=hold, args=(tmp_path / "out", holding, done))
    other.start()
    assert holding.wait(60)
    for writes in (new_file, new_folder, only_writer):
        with pytest.raises(FileExistsError, match="out: another run is writing it"), writes(tmp_path / "out"):
            pass
    done.set()
    other.join()
    with new_folder(tmp_path / "out") as folder:
        (folder / "a").touch()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_lock_that_a_kill_left_does_not_hold(tmp_path: Path):
    (tmp_path / ".out.writing").touch()
    with new_file(tmp_path / "out") as temporary:
        temporary.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_neither_file_nor_folder_stays(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(FileExistsError, match="is no file"), new_file(pipe):
        pass
    with pytest.raises(FileExistsError, match="expected a new or an empty folder"):
        check_output(pipe)
    assert pipe.is_fifo()


def test_a_link_to_a_folder_is_followed(tmp_path: Path):
    """Somebody whose disk is full writes to another one."""
    (tmp_path / "other_disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "other_disk")
    for content in ("first", "second"):
        with new_folder(tmp_path / "link") as temporary:
            (temporary / "file").write_text(content)
        assert (tmp_path / "other_disk" / "file").read_text() == content
    assert (tmp_path / "link").is_symlink()
    assert {entry.name for entry in tmp_path.iterdir()} == {"link", "other_disk"}


def test_a_link_is_followed(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with new_file(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_the_working_folder_is_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for path in (Path("."), tmp_path):
        with pytest.raises(FileExistsError, match="is the working folder; expected another one, new or empty"):
            check_output(path)
    assert check_output(Path("new")) == Path("new")


def test_what_came_to_a_new_output_meanwhile_stays(tmp_path: Path):
    for found in ([], ["theirs"]):
        refused = pytest.raises(FileExistsError, match="out is there already") if found else nullcontext()
        with refused, new_output(tmp_path / "out") as folder:
            (folder / "ours").touch()
            (tmp_path / "out").mkdir()
            for name in found:
                (tmp_path / "out" / name).touch()
        assert [path.name for path in (tmp_path / "out").iterdir()] == (found or ["ours"])
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        shutil.rmtree(tmp_path / "out")
