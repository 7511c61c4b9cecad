"""`mlvicx index` and `mlvicx similar`."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import assert_users_error, make_cache, mlvicx, save_encoders

from kills import KILLED, Forks
from mlvicx_hf.prediction.search import ImageIndex


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_encoders(tmp_path_factory.mktemp("model"), 1)[0]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = ("train", "train", "validation", "test")
    rows = [
        {"patient_id": f"p{i}", "split": splits[i % 4], "_draw": {"disc": i % 3 == 0}, "disc": int(i % 3 == 0)}
        for i in range(24)
    ]
    return make_cache(tmp_path_factory.mktemp("data"), rows)


def test_the_commands(model: str, cache: Path, tmp_path: Path):
    words = ("--model", model, "--dataset", cache, "--output", tmp_path / "index", "--device", "cpu")
    done = mlvicx("index", *words)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"{tmp_path / 'index'}: 12 images"
    assert lines[1].startswith("an image is unlike all of them if its greatest cosine is below 0.")
    assert lines[2].startswith("precision@5 on validation images: ")
    assert len(lines) == 3
    images = cache.with_name("cache-images")
    (tmp_path / "broken.png").write_text("no image")
    searched = ("--input", images, tmp_path / "broken.png", "--output", tmp_path / "out.csv", "--num_workers", 0)
    done = mlvicx("similar", "--index", tmp_path / "index", *searched, "--sheet", tmp_path / "s.png", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{tmp_path / 'out.csv'}: 24 of 25 images"
    assert "images are unlike all indexed images" in done.stdout
    assert "warning: 1 of 25 images could not be read" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} >= {"index", "out.csv", "out.json", "s.png"}
    done = mlvicx("index", *words)
    assert_users_error(done, str(tmp_path / "index"), "expected a new or an empty folder")


def test_notes_say_what_is_not_as_usual(model: str, cache: Path, tmp_path: Path):
    words = ("--model", model, "--dataset", cache, "--splits", "validation", "train", "--output", tmp_path / "all")
    assert "no image was compared with its own patient" in mlvicx("index", *words, "--quiet").stdout
    unsplit = make_cache(tmp_path, [{"patient_id": f"p{i}", "split": "train"} for i in range(3)], name="unsplit")
    words = ("--model", model, "--dataset", unsplit, "--output", tmp_path / "index", "--quiet")
    assert "note: no validation images to compare" in mlvicx("index", *words).stdout
    searched = ("--input", cache.with_name("cache-images"), "--output", tmp_path / "out.csv", "--quiet")
    done = mlvicx("similar", "--index", tmp_path / "index", *searched, "--num_workers", 0)
    assert "note: the index has no threshold" in done.stdout


def test_a_kill_leaves_no_half_index(forks: Forks, model: str, cache: Path, tmp_path: Path):
    words = ("--model", model, "--dataset", cache, "--output", tmp_path / "out" / "index", "--quiet")
    for change in range(20):  # of the file system; the next run is not in the way of what a kill left
        process = forks.run("index", *words, folder=tmp_path / "out", kill_before=change)
        if process.wait() != KILLED or (tmp_path / "out" / "index").exists():
            break
    assert change >= 4  # kills before it was complete
    assert len(ImageIndex(tmp_path / "out" / "index").items) == 12
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left - {".index.writing"} == {"index"}  # a lock that nobody holds is in nobody's way
