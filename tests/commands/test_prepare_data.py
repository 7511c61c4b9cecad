import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_users_error, mlvicx, segmentation_cache
from PIL import Image

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import partial_folder

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(*arguments: object) -> tuple[int, str, str]:
    """The command in this process: exit code, stdout, stderr."""
    done = mlvicx("prepare", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_a_folder_is_prepared_and_summed_up(tmp_path: Path):
    (tmp_path / "images").mkdir()
    lines = ["file_name,patient_id,Edema"]
    for number in range(20):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        lines.append(f"{number}.png,p{number // 2},{number // 2 % 2}")
    (tmp_path / "images" / "0.png").write_text("text")
    (tmp_path / "images" / "metadata.csv").write_text("\n".join([*lines, "none.png,p0,0"]))
    output = tmp_path / "cache"
    options = ("--collection", "folder", "--root", tmp_path / "images", "--output", output, "--size", 24)
    code, out, err = run(*options, "--allow_missing")
    assert code == 0, err
    assert "19 images of 24 x 24" in out
    assert "train: 14 images, 7 patients" in out or "train: 13 images, 7 patients" in out
    assert "Edema: " in out
    assert "labels: Edema\n" in out
    assert "rejected: 1 (see " in out
    assert "missing: 1\n" in out
    assert "img" in err  # the progress bar, also when it is not a terminal
    cache = load_cache(output)
    assert sum(len(dataset) for dataset in cache.datasets.values()) == 19
    assert cache.manifest["size"] == 24


def test_masks_are_summed_up(tmp_path: Path):
    cache = segmentation_cache(tmp_path, 20, ("background", "disc", "stripes"), unknown=(0,))
    options = ("--collection", "folder", "--root", tmp_path / "cache-images", "--output", tmp_path / "again")
    code, out, err = run(*options, "--size", 32, "--mask_names", "background, disc,stripes", "--quiet")
    assert code == 0, err
    assert "train: 12 images, 6 patients; UNKNOWN 12\n    masks: 11 known of 12; disc in 5, stripes in 6\n" in out
    assert "test: 4 images, 2 patients; UNKNOWN 4\n    masks: 4 known of 4; disc in 2, stripes in 2\n" in out
    again = load_cache(tmp_path / "again")
    assert again.mask_names == ("background", "disc", "stripes")
    assert again.manifest["data_hash"] == load_cache(cache).manifest["data_hash"]


def test_phantoms_are_prepared_with_a_mask(tmp_path: Path):
    options = ("--num_patients", 10, "--images_per_patient", 1, "--size", 32, "--mask_names", "Pneumothorax", "--quiet")
    code, out, err = run("--collection", "phantom", "--output", tmp_path / "cache", *options)
    assert code == 0, err
    assert "    masks: 7 known of 7; Pneumothorax in " in out
    assert load_cache(tmp_path / "cache").mask_names == ("Pneumothorax",)


def test_a_users_error_is_one_line_and_code_2(tmp_path: Path):
    code, out, err = run("--collection", "nih14", "--root", tmp_path, "--output", tmp_path / "cache")
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    assert "expected NIH's table" in err
    assert not (tmp_path / "cache").exists()


def test_the_workers_of_a_killed_run_end_and_the_next_one_goes_on(tmp_path: Path):
    output = tmp_path / "cache"
    options = ("--collection", "phantom", "--size", 32, "--output", output, "--quiet", "--num_workers", 2)
    options = (*options, "--num_patients", 10, "--images_per_patient", 100)
    process = start(*options)
    deadline = time.monotonic() + 90
    workers: list[int] = []
    finished = partial_folder(output) / "shards"
    while time.monotonic() < deadline and not (list(finished.glob("*/*.json")) and len(workers) >= 2):
        assert process.poll() is None, process.communicate()[1]
        workers = descendants(process.pid)
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert not output.exists()
    assert list(finished.glob("*/*.json"))
    while time.monotonic() < deadline and any(map(is_alive, workers)):
        time.sleep(0.1)
    assert not any(map(is_alive, workers))  # workers end with their parent
    code, out, err = run(*options)
    assert code == 0, err
    assert "shards were finished before" in out
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert load_cache(output).manifest["synthetic"]


def descendants(pid: int) -> list[int]:
    """Processes below this one, from Linux's process table."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # ended meanwhile
        parents[int(entry.parent.name)] = int(fields[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--collection", "folder"], "no --root found; --collection folder expects the folder of its images"),
        (["--collection", "phantom", "--root", "x"], "--root found; --collection phantom does not take it"),
        (["--collection", "nih14", "--root", "x", "--num_patients", "3"], "--num_patients found; --collection nih14"),
        (["--collection", "nih14", "--root", "x", "--mask_names", "x"], "--mask_names found; --collection nih14 does"),
        (["--collection", "phantom", "--mask_names", "a,b"], "mask_names='a,b' found; expected one of lungs, heart"),
        (["--collection", "phantom", "--size", "0"], "size=0"),
        (["--collection", "phantom", "--num_patients", "0"], "num_patients=0"),
    ],
)
def test_options_that_do_not_fit_are_errors(tmp_path: Path, options: list[str], message: str):
    assert_users_error(mlvicx("prepare", *options, "--output", tmp_path / "cache"), message)
    assert list(tmp_path.iterdir()) == []


def test_an_output_in_the_way_is_found_before_anything_is_read(tmp_path: Path):
    (tmp_path / "file.txt").write_text("")
    done = mlvicx("prepare", "--collection", "phantom", "--output", tmp_path)
    assert_users_error(done, "exists and is not empty; --overwrite replaces a cache")
