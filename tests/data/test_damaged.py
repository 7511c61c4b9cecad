"""Files that are damaged, hostile or no images at all: each is read, or rejected for a reason."""

import csv
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pytest
from crashing import CrashOnArrival, draw, draw_and_abort, draw_and_be_killed, draw_and_crash
from damaged_files import DAMAGES, HEIGHT, WIDTH, damaged_files, kinds
from dicom_files import dicom
from helpers import ROOT, assert_users_error, environment, run_script
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.uid import ImplicitVRLittleEndian

from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.base import Collection, Drawing, Listing, Record
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.images.errors import UnreadableImageError
from mlvicx_hf.data.images.pixels import MAX_BYTES, decode_gray

PROC = Path("/proc")
# Of any process. With torch loaded it has 0.9 GiB before the first image; 90 million pixels of 16 or 32 bits add 1.1.
MOST_MEMORY = 2.25 * 2**30


class Watched(NamedTuple):
    """A command that has ended."""

    code: int
    out: str
    err: str
    peaks: list[int]  # bytes, of the command and all its descendants


def watch(log: Path, *words: object, timeout: float = 150) -> Watched:
    """Run a script and look every now and then how much memory its processes had at most so far."""
    out, err, peaks = log.with_suffix(".out"), log.with_suffix(".err"), {}
    command = [sys.executable, *map(str, words)]
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment(), cwd=ROOT)
    end = time.monotonic() + timeout
    try:
        while process.poll() is None:
            assert time.monotonic() < end, f"still running: {err.read_text()}"
            peaks |= {pid: peak for pid in family(process.pid) if (peak := peak_memory(pid))}
            time.sleep(0.02)
    finally:
        if process.poll() is None:
            process.kill()  # its workers end with it
            process.wait()
    return Watched(process.returncode, out.read_text(), err.read_text(), list(peaks.values()))


def family(pid: int) -> list[int]:
    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return []


def peak_memory(pid: int) -> int:
    try:
        status = (PROC / str(pid) / "status").read_text()
    except OSError:
        return 0
    return 1024 * int(status.partition("VmHWM:")[2].split()[0]) if "VmHWM:" in status else 0


def special_files(root: Path, outside: Path) -> dict[str, str | None]:
    """Make what is no ordinary file below the root, and say what becomes of each: read (None) or rejected, and why."""
    image = kinds()["gray.png"]
    outside.mkdir()
    (outside / "secret.png").write_bytes(image)
    (root / "out.png").symlink_to(outside / "secret.png")
    (root / "up.png").symlink_to("../outside/secret.png")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "outside").symlink_to(outside)
    (root / "round").symlink_to(root)
    (root / "inside.png").write_bytes(image)
    (root / "link.png").symlink_to("inside.png")
    (root / "loop.png").symlink_to("loop.png")
    (root / "a.png").symlink_to("b.png")
    (root / "b.png").symlink_to("a.png")
    (root / "dangling.png").symlink_to("none.png")
    (root / "folder.png").mkdir()
    (root / "folder.png" / "in.png").write_bytes(image)
    os.mkfifo(root / "pipe.png")
    for name, size in (("sparse.png", 10 * 2**30), ("sparse.dcm", MAX_BYTES + 1), ("sparse.bmp", 2**28)):
        with (root / name).open("wb") as file:
            file.write(image[:8])
            file.truncate(size)
    (root / "line\nbreak,\"'.png").write_bytes(image)
    (root / os.fsdecode(b"latin\xff1.png")).write_bytes(image)
    return {
        **dict.fromkeys(("inside.png", "link.png", "folder.png/in.png", "line\nbreak,\"'.png", r"latin\udcff1.png")),
        **dict.fromkeys(("loop.png", "a.png", "b.png"), "Too many levels of symbolic links"),
        "dangling.png": "No such file",
        "pipe.png": "no regular file",
        "sparse.png": "10737418240 bytes found; expected at most 1073741824",
        "sparse.dcm": "1073741825 bytes found",
        "sparse.bmp": "content is none of",
    }


def check_outcome(cache_folder: Path, whole: dict[str, bool], special: dict[str, str | None]) -> tuple[int, int]:
    """Every file is in the cache or rejected for a reason of one line, the right one where it is known.

    Returns:
        How many were read and rejected.
    """
    with (cache_folder / "rejected.csv").open(newline="", encoding="utf-8") as file:
        rejected = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    rows = {
        row["source"].removeprefix("folder:"): row
        for dataset in load_cache(cache_folder).datasets.values()
        for row in dataset
    }
    assert rows.keys() & rejected.keys() == set()
    assert rows.keys() | rejected.keys() == whole.keys() | special.keys()
    for name, reason in rejected.items():
        assert not whole.get(name), f"{name} is whole, and rejected: {reason}"
        assert reason.strip(), name
        assert reason.isprintable(), f"{name}: {reason!r}"
        assert not reason.endswith(": "), f"{name}: {reason}"
        assert name not in special or (special[name] or "?") in reason, f"{name}: {reason}"
    for name, row in rows.items():
        assert row["image"].size == (32, 32), name
        assert row["image"].mode == "L", name
        if whole.get(name) or name in special:
            assert (row["width"], row["height"]) == (WIDTH, HEIGHT), name
            assert np.asarray(row["image"]).std() > 10, name
    return len(rows), len(rejected)


def prepare_damaged(folder: Path, seed: int, count: int = 1000) -> tuple[Watched, int, int]:
    """Make so many damaged files and prepare them by the command; returns also how many were read and rejected."""
    root = folder / "images"
    root.mkdir(parents=True)
    whole = {}
    for file in damaged_files(seed, count):
        (root / file.name).write_bytes(file.content)
        whole[file.name] = file.whole
    assert len(whole) == count
    special = special_files(root, folder / "outside")
    words = ("--collection", "folder", "--root", root, "--output", folder / "cache", "--size", 32)
    done = watch(folder / "log", ROOT / "scripts" / "prepare_data.py", *words)
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    assert "3 links that lead out of" in done.out
    return done, *check_outcome(folder / "cache", whole, special)


@pytest.mark.thorough
@pytest.mark.skipif(not (PROC / "self" / "status").is_file(), reason="peak memory is read from /proc")
def test_of_a_thousand_damaged_files_each_is_read_or_rejected_in_little_memory(tmp_path: Path):
    done, read, rejected = prepare_damaged(tmp_path, seed=0)
    assert min(read, rejected) > 200  # neither everything nor nothing is damaged
    assert len(done.peaks) >= 2
    assert max(done.peaks) < MOST_MEMORY


def test_a_table_that_names_a_file_outside_is_refused_as_a_whole(tmp_path: Path):
    root, outside = tmp_path / "images", tmp_path / "outside"
    for folder in (root, outside):
        folder.mkdir()
    for path in (root / "a.png", outside / "secret.png"):
        Image.new("L", (9, 9)).save(path)
    words = ("--collection", "folder", "--root", root, "--output", tmp_path / "cache", "--size", 8)
    (root / "metadata.csv").write_text("file_name\na.png\n../outside/secret.png\n")
    assert_users_error(run_script("prepare_data.py", *words), "row 3: file '../outside/secret.png' found")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "outside"]
    (root / "link").symlink_to(outside)
    for name in (f"{outside}/secret.png", "sub/../../outside/secret.png", "link/secret.png"):
        (root / "metadata.csv").write_text(f"file_name\na.png\n{name}\n")
        with pytest.raises(ValueError, match=f"row 3: file '{name}'"):
            FolderCollection(root).read()


def test_names_that_are_no_utf_8_are_spelled_out(tmp_path: Path):
    (tmp_path / "images").mkdir()
    content = kinds()["gray.png"]
    for name, damaged in ((b"\xe4.png", content), (b"\xf6.png", b"")):
        (tmp_path / "images" / os.fsdecode(name)).write_bytes(damaged)
    options = {"size": 8, "num_workers": 0, "progress": False}
    prepare(FolderCollection(tmp_path / "images"), tmp_path / "cache", **options)
    row = load_cache(tmp_path / "cache").datasets["train"][0]
    assert (row["source"], row["patient_id"]) == (r"folder:\udce4.png", r"\udce4.png")
    assert r"\udcf6.png,empty file" in (tmp_path / "cache" / "rejected.csv").read_text()
    again = prepare(
        FolderCollection(tmp_path / "images"), tmp_path / "2", splits=tmp_path / "cache" / "splits.csv", **options
    )
    assert again["rejected"] == 0
    assert again["splits"]["train"]["images"] == 1


# Decoders that crash


class Drawn(Collection):
    """As many drawings as a test wants, of which some do something else instead."""

    name = source = "drawn"

    def __init__(self, count: int, others: dict[int, Callable[[], Drawing]]) -> None:
        self.draws = {number: others.get(number, draw) for number in range(count)}

    def read(self) -> Listing:
        return Listing([Record(f"{number:03}", "p", draw=draw) for number, draw in self.draws.items()])


def test_records_that_crash_their_worker_are_rejected_and_the_others_are_there(tmp_path: Path):
    crashing = {3: draw_and_crash, 4: draw_and_abort, 139: draw_and_crash}
    prepare(Drawn(140, crashing), tmp_path / "cache", size=8, num_workers=2, progress=False)
    with (tmp_path / "cache" / "rejected.csv").open(newline="") as file:
        rejected = {row["file"]: row["reason"] for row in csv.DictReader(file)}
    assert rejected == {
        "003": "crashes its decoder (SIGSEGV)",
        "004": "crashes its decoder (SIGABRT)",
        "139": "crashes its decoder (SIGSEGV)",
    }
    dataset = load_cache(tmp_path / "cache").datasets["train"]
    assert dataset["source"][:] == [f"drawn:{n:03}" for n in range(140) if n not in crashing]


@pytest.mark.parametrize("other", [draw_and_be_killed, CrashOnArrival()])
def test_a_worker_that_is_killed_is_an_error_and_not_the_images_fault(tmp_path: Path, other: Callable[[], Drawing]):
    with pytest.raises(ChildProcessError, match=r"a worker process died\..*num_workers may help"):
        prepare(Drawn(10, {3: other}), tmp_path / "cache", size=8, num_workers=1, progress=False)
    assert not (tmp_path / "cache").exists()


# Any bytes


@cache
def whole_files() -> dict[str, bytes]:
    return kinds()


@st.composite
def contents(draw_value: st.DrawFn) -> bytes:
    """The beginning of an image and any bytes, or a whole image that is damaged up to three times."""
    content = draw_value(st.sampled_from(sorted(whole_files().values())))
    if draw_value(st.booleans()):
        return content[: draw_value(st.sampled_from((0, 2, 4, 8, 33, 132, 200)))] + draw_value(st.binary(max_size=400))
    rng = np.random.default_rng(draw_value(st.integers(0, 2**32)))
    for damage in draw_value(st.lists(st.sampled_from(DAMAGES), max_size=3)):
        content = damage(content, rng, whole_files()) if len(content) > 1 else content
    return content


# A transfer syntax that claims to be a number, which has no 17 bytes.
WRONG_TYPE = dicom(np.zeros((4, 4), np.uint8), ImplicitVRLittleEndian).replace(b"\2\0\x10\0UI", b"\2\0\x10\0UL")


@settings(
    max_examples=1000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(contents(), st.sampled_from(["a.png", "b.dcm", "c", "sub/d.tif"]))
@example(b"", "a.png")
@example(bytes(200), "a.dcm")
@example(WRONG_TYPE, "a.dcm")
def test_any_bytes_are_a_grey_picture_or_unreadable(caplog: pytest.LogCaptureFixture, data: bytes, name: str):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = gray_or_reason(data, name)
    assert caught == caplog.records == []
    if isinstance(found, str):
        assert found.strip()
        assert found.isprintable()
    else:
        assert found.mode == "L"
        assert min(found.size) > 0


def gray_or_reason(data: bytes, name: str) -> Image.Image | str:
    try:
        return decode_gray(data, name)
    except UnreadableImageError as error:
        return error.reason
