"""`scripts/prepare_data.py` killed with SIGKILL, at moments by chance and before every change of the disk at its end.

Whenever it is killed, the same command goes on, makes no finished shard again, and ends in the bytes of a run that
nothing interrupted.
"""

import glob
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashing import draw, draw_and_abort
from helpers import ROOT, environment, hidden_checkout
from PIL import Image

from kills import KILLED, Forks
from mlvicx_hf.data.cache.cache import cache_features
from mlvicx_hf.data.cache.prepare import check_cache_output, partial_folder
from mlvicx_hf.data.cache.shards import Making, Shard, is_made, make_shard, read_note, write_shards
from mlvicx_hf.data.cache.summary import write_pictures
from mlvicx_hf.data.collections.base import Record

SCRIPT = ROOT / "scripts" / "prepare_data.py"


def contents(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def old_folder(output: Path) -> Path:
    return output.with_name(f".{output.name}.old")


def write_images(folder: Path, counts: dict[str, int], side: int) -> list[str]:
    """Noise with a mask each, one split after another; returns the names."""
    (folder / "masks").mkdir(parents=True)
    lines, names = ["file_name,patient_id,split,mask_file_name"], []
    for split, count in counts.items():
        for number in range(count):
            name = f"{split}{number}.png"
            pixels = np.random.default_rng(len(names)).integers(0, 64, (side, side), np.uint8) * 4
            Image.fromarray(pixels).save(folder / name, compress_level=1)
            Image.fromarray((pixels > 200).astype(np.uint8)).save(folder / "masks" / name)
            lines.append(f"{name},p{len(names) // 2},{split},masks/{name}")
            names.append(name)
    (folder / "metadata.csv").write_text("\n".join(lines))
    return names


@pytest.fixture(scope="module", autouse=True)
def no_commit() -> Iterator[None]:
    """Caches name the checkout's commit; no test should fail because somebody commits meanwhile."""
    with hidden_checkout():
        yield


# -- by chance ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """What is there of a cache that is being made.

    Attributes:
        shards: inode and time of every Arrow file that is finished, wherever it is.
        begun: times of the files that say which record is read.
        assembling: inode and time of the folder in which the cache is put together; None without.
        moved: whether shards are in it.
        placed: inode of the cache at its place; None without.
    """

    shards: dict[str, tuple[int, int]]
    begun: dict[str, int]
    assembling: tuple[int, int] | None
    moved: bool
    placed: int | None


def look(output: Path) -> State:
    """The state while a run may be changing it."""
    partial_cache = partial_folder(output) / "cache"
    notes = list_files(partial_folder(output), "*/*/*.json")
    shards, begun = {}, {}
    for note in notes:
        name = f"{note.parent.name}/{note.stem}.arrow"
        for file in (note.with_suffix(".arrow"), partial_cache / name):
            if note.parts[-3] != "cache" and (found := stat(file)):
                shards[name] = (found.st_ino, found.st_mtime_ns)
                break
    for position in list_files(partial_folder(output), "shards/*/*.at"):
        if found := stat(position):
            begun[position.name] = found.st_mtime_ns
    folder, placed = stat(partial_cache), stat(output)
    return State(
        shards,
        begun,
        folder and (folder.st_ino, folder.st_ctime_ns),
        bool(list_files(partial_cache, "*/*.arrow")),
        placed and placed.st_ino,
    )


def list_files(folder: Path, pattern: str) -> list[Path]:
    """As `Path.glob`, which however fails where a folder vanishes meanwhile."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder)]


def stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def describe(state: State) -> str:
    parts = [f"{len(state.shards)} shards finished"]
    parts += ["cache being assembled"] if state.assembling else []
    parts += ["shards moved into it"] if state.moved else []
    return ", ".join(parts)


Moment = Callable[[State, State], bool]  # of the state now and that before the run


def finished(count: int, now: State, before: State) -> bool:
    """So many shards are finished, and the workers of this run read."""
    return (now.begun != before.begun and len(now.shards) >= count) or assembling(now, before)


def assembling(now: State, before: State) -> bool:
    return (now.assembling is not None and now.assembling != before.assembling) or placed(now, before)


def moving(now: State, before: State) -> bool:
    return (now.moved and not before.moved) or placed(now, before)


def placed(now: State, before: State) -> bool:
    return now.placed not in (None, before.placed)


def run(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), *words],
            stdout=file,
            stderr=file,
            env=environment(),
            start_new_session=True,
        )


def kill_at(moment: Moment, delay: float, group: bool, output: Path, words: list[str], log: Path) -> int:
    """Start the command and kill it so many seconds after the moment; returns its exit code."""
    before, deadline = look(output), time.monotonic() + 100
    process = run(words, log)
    try:
        while process.poll() is None and not moment(look(output), before):
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.002)
        time.sleep(delay)
    finally:
        if group or time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()  # its workers end by themselves
        process.wait()
    return process.returncode


@dataclass
class Killed:
    """What a chain of runs left.

    Attributes:
        log: state after each kill.
        first: files of shards as they were when they were first seen finished.
        again: shards that were another file later.
        kept: whether the old cache or the new one was whole after each kill.
    """

    log: list[str]
    first: dict[str, tuple[int, int]]
    again: list[str]
    kept: list[bool]


def kill_often(
    output: Path, words: list[str], moments: list[tuple[Moment, float]], whole: list[dict[str, bytes]], seed: int
) -> Killed:
    """Kill one run after another, each a random time (up to so many seconds) after its moment; then let it finish."""
    generator, log = random.Random(seed), output.with_name(f"{output.name}.log")
    killed = Killed([], {}, [], [])

    def check(shards: dict[str, tuple[int, int]]) -> None:
        killed.again.extend(name for name, file in killed.first.items() if shards.get(name) != file)
        killed.first.update(shards)

    for number, (moment, spread) in enumerate(moments):
        group = (number + seed) % 2 == 0
        code = kill_at(moment, generator.uniform(0, spread), group, output, words, log)
        assert code == KILLED, log.read_text()
        now = look(output)
        if output.exists() and contents(output) == whole[-1]:
            killed.log.append(f"{'group' if group else 'parent'}: new cache in its place")
            break
        killed.log.append(f"{'group' if group else 'parent'}: {describe(now)}")
        check(now.shards)
        found = output if output.exists() else old_folder(output)
        killed.kept.append((contents(found) if found.exists() else {}) in whole)
    if output.exists() and contents(output) == whole[-1]:
        with pytest.raises(FileExistsError, match="exists and is not empty"):  # what the command says from now on
            check_cache_output(output, overwrite=False)
    else:
        process = run(words, log)
        assert process.wait(100) == 0, log.read_text()
        assert "8 of 8 shards were finished before" in log.read_text()
    check(files(output))
    return killed


def files(output: Path) -> dict[str, tuple[int, int]]:
    found = {file: file.stat() for file in output.glob("*/*.arrow")}
    return {str(f.relative_to(output)): (stats.st_ino, stats.st_mtime_ns) for f, stats in found.items()}


def call_script(words: list[str]) -> None:
    """The command in this process, with the pictures that the killed processes draw as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlvicx_hf.data.cache.assembly.write_pictures", write_pictures)
        patch.setattr(sys, "argv", [str(SCRIPT), *words])
        runpy.run_path(str(SCRIPT), run_name="__main__")


@dataclass(frozen=True)
class Chains:
    """Two chains of kills: into a new folder, and over an old cache."""

    whole: dict[str, bytes]
    old: dict[str, bytes]
    new: Path
    over: Path
    of_new: Killed
    of_over: Killed


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Chains:
    """660 images in eight shards: a run that nothing interrupts, and both chains side by side."""
    folder = tmp_path_factory.mktemp("killed")
    images = folder / "images"
    names = write_images(images, {"train": 400, "validation": 130, "test": 130}, 128)
    (images / names[3]).write_text("text")
    (images / names[300]).write_bytes((images / names[300]).read_bytes()[:900])
    (images / names[420]).write_bytes(b"")
    (images / "masks" / names[600]).write_text("text")

    def words(output: Path, *more: object) -> list[str]:
        common = ("--collection", "folder", "--root", images, "--output", output, "--size", 32, "--mask_names", "spots")
        return [str(word) for word in (*common, "--quiet", *more)]

    call_script(words(folder / "whole", "--num_workers", 0))
    over, new = folder / "over" / "cache", folder / "new" / "cache"
    new.parent.mkdir()
    call_script(words(over, "--num_workers", 0, "--max_images", 20))
    whole, old = contents(folder / "whole"), contents(over)
    end = [(assembling, 0.1), (assembling, 0.2)]
    of_new = [(partial(finished, 0), 0.2), (partial(finished, 3), 0.2), *end, (moving, 0)]
    of_over = [(partial(finished, 1), 0.2), (partial(finished, 5), 0.2), *end, (placed, 0)]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(kill_often, new, words(new, "--num_workers", 2), of_new, [{}, whole], 0),
            pool.submit(kill_often, over, words(over, "--num_workers", 2, "--overwrite"), of_over, [old, whole], 1),
        ]
        results = [job.result() for job in jobs]
    for result in results:
        print("\n".join(result.log))
    return Chains(whole, old, new, over, *results)


@pytest.mark.slow
def test_killed_at_ten_moments_the_same_command_ends_in_the_same_bytes(chains: Chains):
    assert len(chains.of_new.log) + len(chains.of_over.log) == 10
    states = {line.partition(": ")[2] for line in (*chains.of_new.log, *chains.of_over.log)}
    assert len(states) >= 4, "the kills are spread over the run"
    assert contents(chains.new) == chains.whole
    assert [path.name for path in chains.new.parent.iterdir() if path.suffix != ".log"] == ["cache"]
    assert sum(name.endswith(".arrow") for name in chains.whole) == 8
    assert chains.whole["rejected.csv"].count(b"\n") == 1 + 4


@pytest.mark.slow
def test_a_finished_shard_is_not_made_again(chains: Chains):
    for killed in (chains.of_new, chains.of_over):
        assert len(killed.first) == 8
        assert killed.again == []


@pytest.mark.slow
def test_killed_over_a_cache_the_old_or_the_new_one_is_whole(chains: Chains):
    assert all(chains.of_over.kept)
    assert contents(chains.over) == chains.whole != chains.old
    assert [path.name for path in chains.over.parent.iterdir() if path.suffix != ".log"] == ["cache"]


# -- before every change -----------------------------------------------------------------------------------------------


class Prepare:
    """Runs the command again and again in forks, which start in a moment."""

    def __init__(self, forks: Forks, folder: Path) -> None:
        self.forks, self.folder, self.output = forks, folder, folder / "cache"
        words = ("--collection", "folder", "--root", folder / "images", "--output", self.output, "--size", 16)
        self.words = (*words, "--mask_names", "spots", "--num_workers", 0, "--quiet")

    def __call__(self, number: int | None, *words: object) -> dict[str, Any]:
        """Run the command with these words as well, killed before the change of that number; None for no kill."""
        done = self.forks.run("prepare", *self.words, *words, folder=self.folder, kill_before=number)
        return {"code": done.code, "changes": done.changes, "output": done.output}


@pytest.fixture(scope="module")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepare]:
    folder = tmp_path_factory.mktemp("forks")
    names = write_images(folder / "images", {"train": 20, "validation": 6, "test": 6}, 24)
    shutil.copy(folder / "images" / names[4], folder / "images" / names[5])
    (folder / "images" / names[3]).write_text("text")
    with Forks(("mlvicx_hf.data.cache.prepare",), without=("matplotlib",)) as forks:
        yield Prepare(forks, folder)


def put(output: Path, cache: dict[str, bytes]) -> None:
    """A cache of these files at this place."""
    for name, content in cache.items():
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_bytes(content)


def beside(output: Path) -> list[str]:
    return sorted(path.name for path in output.parent.iterdir() if path.name != "images")


def clear(output: Path) -> None:
    for path in (output, old_folder(output), partial_folder(output)):
        shutil.rmtree(path, ignore_errors=True)


def chosen(changes: list[list[str]], most: int) -> list[int]:
    """Numbers of changes: those that put the cache in its place, and others by chance."""
    renames = [number for number, change in enumerate(changes) if change[0] == "os.rename"]
    last = set(range(renames[-3], renames[-1] + 3))  # of a shard, or of what is used up, to the tidying up
    rest = [number for number in range(len(changes)) if number not in last]
    return sorted(last | set(random.Random(0).sample(rest, most - len(last))))


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("more", "most"), [((), 8), (("--overwrite",), 10), (("--overwrite", "--drop_duplicates", "identical"), 8)]
)
def test_killed_before_any_change_of_the_disk_nothing_is_lost(forks: Prepare, more: tuple[str, ...], most: int):
    output = forks.output
    clear(output)
    assert forks(None, "--seed", 1)["code"] == 0
    old = contents(output) if more else {}
    if not more:
        clear(output)
    answer = forks(None, *more)
    assert answer["code"] == 0, answer["output"]
    new = contents(output)
    assert old != new
    clear(output)
    for number in chosen(answer["changes"], most):
        what = f"before change {number}: {answer['changes'][number]}"
        put(output, old)
        assert forks(number, *more)["code"] == KILLED, what
        place = output if output.exists() else old_folder(output)
        left = contents(place) if place.exists() else {}
        in_place = output.exists() and left == new
        assert left in (old, new), what
        shards = look(output).shards
        again = forks(None, *more)
        assert contents(output) == new, what
        if in_place and not more:
            assert again["code"] == 2, what
            assert "exists and is not empty" in again["output"]
        else:
            assert again["code"] == 0, again["output"]
            if not in_place and len(more) < 2:  # copies are left out in other files
                assert shards.items() <= files(output).items(), f"{what}: finished shards were made again"
        assert beside(output) == ["cache"], what
        clear(output)


@pytest.mark.slow
def test_killed_between_old_and_new_the_old_cache_comes_back(forks: Prepare):
    output = forks.output
    clear(output)
    assert forks(None, "--seed", 1)["code"] == 0
    old = contents(output)
    changes = forks(None, "--overwrite")["changes"]
    clear(output)
    put(output, old)
    place = max(n for n, change in enumerate(changes) if change[0] == "os.rename" and change[2] == str(output))
    assert forks(place, "--overwrite")["code"] == KILLED
    assert beside(output) == [".cache.old", ".cache.partial"]
    with pytest.raises(FileExistsError, match="exists and is not empty; --overwrite replaces a cache"):
        check_cache_output(output, overwrite=False)
    assert contents(output) == old
    assert beside(output) == [".cache.partial", "cache"]
    again = forks(None, "--overwrite")
    assert "3 of 3 shards were finished before" in again["output"]
    assert contents(output) != old
    assert beside(output) == ["cache"]
    clear(output)
    put(old_folder(output), old)  # somebody removed the partial folder
    check_cache_output(output.with_name("other"), overwrite=False)
    assert beside(output) == [".cache.old"]
    with pytest.raises(FileExistsError):
        check_cache_output(output, overwrite=False)
    assert contents(output) == old
    assert beside(output) == ["cache"]


# -- workers that crash ------------------------------------------------------------------------------------------------


def test_a_shard_of_other_records_is_made_anew_also_after_a_crash(tmp_path: Path):
    making = Making(cache_features().arrow_schema, "listed", 8, "pad")
    good, bad = Record("good", "p", draw=draw), Record("bad", "p", draw=draw_and_abort)
    crashing, changed = (
        Shard(tmp_path / "train" / "0.arrow", [good, bad]),
        Shard(tmp_path / "train" / "1.arrow", [good]),
    )
    make_shard(Shard(changed.path, [Record("earlier", "p", draw=draw)]), making)  # by an earlier run
    made = list(write_shards([crashing, changed], making, num_workers=1))
    assert sorted(shard.path.name for shard in made) == ["0.arrow", "1.arrow"]
    assert is_made(changed, making)
    assert read_note(crashing)["rejected"] == [["bad", "crashes its decoder (SIGABRT)"]]
