import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlvicx_hf import __version__
from mlvicx_hf.common.files import new_folder, write_json
from mlvicx_hf.common.provenance import code_version, git_commit


def git(folder: Path, *words: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_commit_of_a_checkout_and_its_changes(tmp_path: Path):
    git(tmp_path, "init", "-q")
    (tmp_path / "code.py").write_text("1\n")
    git(tmp_path, "add", "code.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert len(head) == 40
    assert git_commit(tmp_path) == head
    (tmp_path / "notes.txt").write_text("untracked files change no result\n")
    assert git_commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2\n")
    assert git_commit(tmp_path) == f"{head}+changes"


def test_outside_a_checkout_the_commit_is_unknown(tmp_path: Path):
    assert git_commit(tmp_path / "absent") == "unknown"


def test_a_package_inside_another_repository_has_no_commit(tmp_path: Path):
    git(tmp_path, "init", "-q")
    (tmp_path / ".gitignore").write_text(".venv\n")
    git(tmp_path, "add", ".gitignore")
    git(tmp_path, "commit", "-q", "-m", "first")
    package = tmp_path / ".venv" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("1\n")
    assert git_commit(package) == "unknown"


def test_code_version_names_package_and_libraries():
    version = code_version()
    assert version["mlvicx_hf"] == __version__
    assert set(version) == {"mlvicx_hf", "commit", "torch", "transformers"}
    assert all(isinstance(value, str) and value for value in version.values())


def test_the_commit_is_that_of_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch):
    before = code_version()["commit"]
    monkeypatch.setattr("mlvicx_hf.common.provenance.git_commit", lambda folder: "later")
    assert code_version()["commit"] == before


def test_json_is_replaced_whole(tmp_path: Path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match=r"(?i)nan"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    write_json(path, {"b": [2]})
    assert json.loads(path.read_text()) == {"b": [2]}
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path):
    path = tmp_path / "checkpoint"
    with new_folder(path) as folder:
        (folder / "a").write_text("1")
        (folder / "inner").mkdir()
        (folder / "inner" / "b").write_text("2")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert (path / "inner" / "b").read_text() == "2"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_fails_leaves_the_old_one(tmp_path: Path):
    path = tmp_path / "checkpoint"
    with new_folder(path) as folder:
        (folder / "a").write_text("old")

    def fail_half_way() -> None:
        with new_folder(path) as folder:
            (folder / "a").write_text("new")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        fail_half_way()
    assert (path / "a").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_what_a_killed_run_left_is_cleared_and_an_existing_folder_replaced(tmp_path: Path):
    path = tmp_path / "checkpoint"
    left = tmp_path / ".checkpoint.tmp"
    left.mkdir()
    (left / "half").write_text("?")
    path.mkdir()
    (path / "old").write_text("?")
    with new_folder(path) as folder:
        (folder / "a").write_text("1")
    assert [p.name for p in path.iterdir()] == ["a"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_a_folder_that_was_being_replaced_at_a_kill_is_not_lost(tmp_path: Path):
    path, old = tmp_path / "checkpoint", tmp_path / ".checkpoint.old"
    with new_folder(path) as folder:
        (folder / "a").write_text("old")
    path.rename(old)  # killed between the two renames

    def fail() -> None:
        with new_folder(path):
            assert (old / "a").read_text() == "old"
            raise RuntimeError("again")

    with pytest.raises(RuntimeError, match="again"):
        fail()
    assert (path / "a").read_text() == "old"
    path.rename(old)
    with new_folder(path) as folder:
        (folder / "a").write_text("new")
    assert (path / "a").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


def test_an_old_folder_is_there_before_every_rename_and_removal(tmp_path: Path):
    path, old, active = tmp_path / "checkpoint", tmp_path / ".checkpoint.old", [True]
    with new_folder(path) as folder:
        (folder / "a").write_text("old")
    path.rename(old)  # an earlier kill
    whole = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if active and event in ("os.rename", "os.rmdir", "shutil.rmtree") and str(tmp_path) in str(arguments[0]):
            whole.append(any((place / "a").exists() for place in (path, old)))

    sys.addaudithook(watch)
    try:
        for _ in range(2):
            with new_folder(path) as folder:
                (folder / "a").write_text("new")
    finally:
        active.clear()  # a hook cannot be removed
    assert len(whole) >= 6
    assert all(whole)
