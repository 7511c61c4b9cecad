#!/usr/bin/env python
"""Kill pretraining with SIGKILL again and again: does every resume end in the bits of a run that nothing interrupted?

    python tools/kill_test.py --kills 30

A tiny network on synthetic radiographs, with a checkpoint after every step. Half of the kills come at a random moment
of the run; the others before the n-th time that a file of a checkpoint is opened, renamed or removed, with a random n.
A run that ends is compared with the uninterrupted one, file by file, and a new one is begun. One line for each kill;
exit code 0 only if every resume succeeded and no bit differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1].joinpath("scripts", "pretrain.py")
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")
BEGUN = re.compile(r"resuming \S+ at (step \d+)|starting from (the beginning)")
DEADLINE = 600.0  # seconds for one run


def main() -> None:
    """Kill, resume, compare; exit code 1 where something differs."""
    if sys.argv[1:2] == ["--die_before"]:
        die_before(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        faults = kill_often(Path(folder), arguments.kills, random.Random(arguments.seed))
    print(f"{arguments.kills} kills, {len(faults)} faults", *faults, sep="\n")
    raise SystemExit(bool(faults))


def die_before(number: int, words: list[str]) -> None:
    """Pretrain, and be killed before the file of a checkpoint is opened, renamed or removed for the n-th time."""
    count = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in CHANGES and "checkpoint-" in str(arguments[0]):
            if count == number:
                os.write(1, f"\nkilled before {event} {'/'.join(Path(str(arguments[0])).parts[-2:])}\n".encode())
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.argv = [str(SCRIPT), *words]
    sys.addaudithook(watch)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    raise SystemExit(0)


def kill_often(folder: Path, kills: int, generator: random.Random) -> list[str]:
    """Kill one run after another.

    Args:
        folder: an empty one.
        kills: how many.
        generator: chooses the moments.

    Returns:
        What went wrong.
    """
    words = make_words(folder)
    code, log, seconds = run([*words, "--output_dir", folder / "whole"], folder / "log")
    if code:
        return [f"the uninterrupted run failed: {log[-1500:]}"]
    print(f"uninterrupted: {seconds:.1f} s after start-up, {len(contents(folder / 'whole'))} files", flush=True)
    faults: list[str] = []
    killed, ended, pending = 0, 0, ""
    while killed < kills or pending:  # the run after the last kill is left alone
        output = folder / f"run-{ended}"
        moment, change = choose(generator, killed, seconds) if killed < kills else (None, None)
        code, log, _ = run([*words, "--output_dir", output, "--resume"], folder / "log", moment, change)
        if pending:
            begun = BEGUN.search(log)
            print(pending, f"resumed at {begun[1] or begun[2]}" if begun else "killed again before it said", flush=True)
            pending = ""
        if code == -signal.SIGKILL:
            killed += 1
            how = f"killed after {moment:.2f} s" if change is None else log.rstrip().rpartition("\n")[2]
            pending = f"kill {killed:2}: {describe(output)}, {how} ->"
        elif code:
            return [*faults, f"a run failed with exit code {code}: {log[-1500:]}"]
        else:
            different = differences(folder / "whole", output)
            faults += [f"{output.name}: {name} differs" for name in different]
            print(
                f"{output.name} ended:", f"{len(different)} files differ" if different else "the same bits", flush=True
            )
            ended += 1
    return faults


def choose(generator: random.Random, number: int, seconds: float) -> tuple[float | None, int | None]:
    """How a run is killed: so many seconds after it begins to train, or before that change; in turns."""
    return (generator.uniform(0, 0.6 * seconds), None) if number % 2 == 0 else (None, generator.randrange(90))


def make_words(folder: Path) -> list[object]:
    """Arguments of a run of 39 steps, on a cache that is made first."""
    from mlvicx_hf.data.cache.prepare import prepare
    from mlvicx_hf.data.collections.phantom import PhantomCollection

    prepare(PhantomCollection(40, 1, size=32), folder / "cache", size=32, num_workers=0, progress=False)
    words = ["--recipe", "smoke", "--dataset", folder / "cache", "--max_train_samples", 24, "--epochs", 13]
    return [*words, "--checkpoint_steps", 1, "--logging_steps", 1, "--num_workers", 0, "--cpu_threads", 1]


def run(
    words: list[object], log: Path, moment: float | None = None, change: int | None = None
) -> tuple[int, str, float]:
    """Run the command, and kill it so many seconds after it begins to train, or before that change.

    Returns:
        Exit code, what it printed, and seconds of training.
    """
    command = [SCRIPT] if change is None else [__file__, "--die_before", change]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, (*command, *words))], stdout=file, stderr=subprocess.STDOUT, env=environment
        )
    start, begun = time.monotonic(), 0.0
    while process.poll() is None and time.monotonic() < start + DEADLINE:
        if not begun and re.search("learning rate: peak|resuming", log.read_text()):
            begun = time.monotonic()
        if begun and moment is not None and time.monotonic() >= begun + moment:
            break
        time.sleep(0.003)
    process.kill()  # nothing where it has ended
    return process.wait(), log.read_text(), time.monotonic() - begun


def describe(output: Path) -> str:
    """What was going on when a run was killed, from what it left."""
    metrics = output / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    done = max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)
    doing = "training"
    for pattern, name in {
        ".checkpoint-*.tmp": "writing",
        ".checkpoint-*.old": "removing",
        "*final*": "saving the model",
        "model.safetensors": "saving the model",
        ".*.tmp": "writing",
    }.items():
        if found := sorted(output.glob(pattern)):
            doing = f"{name} {found[0].name}"
            break
    return f"step {done}, {doing}"


def contents(folder: Path) -> dict[str, bytes]:
    """All files but `run.json`, in which --resume is written."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "run.json"]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def differences(one: Path, other: Path) -> list[str]:
    """Files of two runs that differ or that only one has."""
    left, right = contents(one), contents(other)
    return sorted(name for name in left.keys() | right.keys() if left.get(name) != right.get(name))


if __name__ == "__main__":
    main()
