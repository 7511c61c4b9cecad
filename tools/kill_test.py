#!/usr/bin/env python
"""Kill pretraining with SIGKILL again and again: does every resume end in the bits of a run that nothing interrupted?

    python tools/kill_test.py --kills 30
    python tools/kill_test.py --kills 4 --objectives all

The run is a tiny network on synthetic radiographs, with a checkpoint after every step; of each objective one. Half of
the kills come at a random moment; the others come before a random change of a file of a checkpoint. A run that ends
is compared with the uninterrupted one, file by file, and a new one is begun. It prints one line for each kill. The
exit code is 0 only if every resume succeeded and no bit differs.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
import time
from pathlib import Path

from kills import KILLED, Forked, Forks, contents, differences
from mlvicx_hf.objectives import OBJECTIVES

BEGUN = re.compile(r"resuming \S+ at (step \d+)|starting from (the beginning)")
IGNORED = ("run.json",)  # says whether a run was resumed
QUEUE = ("queue_size=8",)  # which fits 32 images
SMALL = {"pcrl_v2": ("local_views=2", "local_size=16"), "barlow_twins": ("projector_dims=32,32",)} | dict.fromkeys(
    ("moco_v2", "inter_moco", "caid", "pcrl_v1"), QUEUE
)
ALIGNED = ("--crop_area", 1, 1, "--flip", 0)  # what inter_moco demands


def main() -> None:
    """Kill, resume, compare; exit code 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--objectives", nargs="+", default=["mlvicx"], metavar="NAME", help="names, or all")
    arguments = parser.parse_args()
    names = list(OBJECTIVES) if arguments.objectives == ["all"] else arguments.objectives
    faults = []
    with Forks() as forks:
        for name in names:
            with tempfile.TemporaryDirectory() as folder:
                print(f"objective {name}", flush=True)
                faults += kill_often(forks, Path(folder), arguments.kills, random.Random(arguments.seed), name)
    print(f"{arguments.kills * len(names)} kills, {len(faults)} faults", *faults, sep="\n")
    raise SystemExit(bool(faults))


def kill_often(
    forks: Forks, folder: Path, kills: int, generator: random.Random, objective: str = "mlvicx"
) -> list[str]:
    """Kill one run after another.

    Args:
        forks: start the runs.
        folder: an empty one.
        kills: how many.
        generator: chooses the moments.
        objective: what the runs minimise.

    Returns:
        What went wrong.
    """
    words = make_words(forks, folder, objective)
    start = time.monotonic()
    whole = forks.run(*words, "--output_dir", folder / "whole")
    seconds = time.monotonic() - start
    if whole.code:
        return [f"the uninterrupted run failed: {whole.output[-1500:]}"]
    print(f"uninterrupted: {seconds:.1f} s, {len(contents(folder / 'whole'))} files", flush=True)
    faults: list[str] = []
    killed, ended, pending = 0, 0, ""
    while killed < kills or pending:  # the run after the last kill is left alone
        output = folder / f"run-{ended}"
        moment = generator.uniform(0.1, 0.7) * seconds if killed < kills and killed % 2 == 0 else None
        change = generator.randrange(60) if killed < kills and killed % 2 else None
        process = forks.start(*words, "--output_dir", output, "--resume", folder="checkpoint-", kill_before=change)
        if moment is not None:
            wait(process, moment)
        code = process.wait()
        if pending:
            begun = BEGUN.search(process.output)
            print(pending, f"resumed at {begun[1] or begun[2]}" if begun else "killed again before it said", flush=True)
            pending = ""
        if code == KILLED:
            killed += 1
            how = f"killed after {moment:.2f} s" if moment else process.output.rstrip().rpartition("\n")[2]
            pending = f"kill {killed:2}: {describe(output)}, {how} ->"
        elif code:
            return [*faults, f"a run failed with exit code {code}: {process.output[-1500:]}"]
        else:
            different = differences(folder / "whole", output, IGNORED)
            faults += [f"{objective}, {output.name}: {name} differs" for name in different]
            result = f"{len(different)} files differ" if different else "the same bits"
            print(f"{output.name} ended: {result}", flush=True)
            ended += 1
    return faults


def make_words(forks: Forks, folder: Path, objective: str) -> list[object]:
    """Arguments of a run of 39 or 40 steps, on a cache that is made first."""
    drawn = ("--collection", "phantom", "--num_patients", 40, "--images_per_patient", 1, "--splits", "none")
    made = forks.run("prepare", *drawn, "--size", 32, "--num_workers", 0, "--output", folder / "cache", "--quiet")
    assert made.code == 0, made.output
    words = ["pretrain", "--recipe", "smoke", "--dataset", folder / "cache", "--objective", objective]
    words += (
        ["--max_train_samples", 32, "--epochs", 10]
        if objective in SMALL
        else ["--max_train_samples", 24, "--epochs", 13]
    )
    words += ["--objective_options", *SMALL[objective]] if objective in SMALL else []
    words += ALIGNED if objective == "inter_moco" else []
    return [*words, "--checkpoint_steps", 1, "--logging_steps", 1, "--num_workers", 0, "--cpu_threads", 1]


def wait(process: Forked, seconds: float) -> None:
    """Kill a run so many seconds after its start, unless it has ended by then."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end:
            process.kill()
            return
        time.sleep(0.003)


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


if __name__ == "__main__":
    main()
