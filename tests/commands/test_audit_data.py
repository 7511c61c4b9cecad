import csv
import json
from pathlib import Path

import pytest
from helpers import mlvicx
from PIL import Image

from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.synthetic.phantom import draw_phantom


def call(*words: object) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    done = mlvicx("audit", *words)
    return done.returncode, done.stdout, done.stderr


def prepared(folder: Path, name: str, first: int = 0, copy: bool = False) -> Path:
    """A cache of 10 drawn patients; with `copy` the last one's only film is the first one's, saved again."""
    images = folder / f"{name}-images"
    images.mkdir()
    rows = [("file_name", "patient_id", "view", "split", "Edema")]
    for patient in range(first, first + 10):
        split = ("train", "train", "train", "validation", "test")[patient % 5]
        rows.append((f"{patient}.jpg", f"p{patient}", "PA", split, str(patient % 2)))
        film = Image.fromarray(draw_phantom(0 if copy and patient == first + 9 else patient, size=96).image)
        film.save(images / f"{patient}.jpg", quality=60 + patient)
    with (images / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    prepare(FolderCollection(images), folder / name, size=64, num_workers=0, progress=False)
    return folder / name


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return {
        "clean": prepared(folder, "clean"),
        "apart": prepared(folder, "apart", first=20),
        "leaking": prepared(folder, "leaking", first=40, copy=True),
    }


def test_caches_without_leaks_end_with_0(caches: dict[str, Path], tmp_path: Path):
    code, out, err = call(caches["clean"], caches["apart"], "--json", tmp_path / "out.json")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == "no leak found"
    assert "LEAK" not in out
    assert f"{caches['apart']}: folder, 64 px, pad" in out
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["leaks"] == []
    assert len(result["pairs"]) == 15


def test_a_leak_ends_with_1(caches: dict[str, Path], tmp_path: Path):
    both = (caches["clean"], caches["leaking"], "--quiet")
    code, out, err = call(*both, "--json", tmp_path / "out.json")
    assert (code, err) == (1, "")
    leak, last = out.splitlines()
    assert leak.startswith(f"LEAK: 1 nearly identical image(s) in {caches['clean']} train and {caches['leaking']} test")
    assert "folder:0.jpg = folder:49.jpg" in leak
    assert last == "1 leak(s)"
    assert [f"LEAK: {line}" for line in json.loads((tmp_path / "out.json").read_text())["leaks"]] == [leak]
    assert call(*both, "--near", 0) == (0, "no leak found\n", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "none: no such folder; expected a prepared cache"),
        (["clean", "clean"], "clean found; expected at least one, and each once"),
        (["clean", "--near", "300"], "near=300 found; expected bits from 0 to 127"),
        (["clean", "--json", "absent/out.json"], "absent/out.json: no folder absent found; expected one to write in"),
    ],
)
def test_users_errors_end_with_2(
    monkeypatch: pytest.MonkeyPatch, caches: dict[str, Path], words: list[str], message: str
):
    monkeypatch.chdir(caches["clean"].parent)
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_command_line_without_a_cache_ends_with_2():
    assert call()[0] == 2
