"""What a run says: notes, progress, `metrics.jsonl`, trackers, warnings of collapse, curves."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from mlvicx_hf.common.errors import MissingExtraError
from mlvicx_hf.common.files import new_file, read_json, write_json
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.objectives.base import LossOutput

from .curves import plot_curves
from .run import METRICS_FILE, Run

logger = logging.getLogger(__name__)

RUN_RECORD = "run.json"
SCORE = "probe_linear_auroc"  # in metrics, which chooses the best checkpoint
TIMED_STEPS = 4  # the estimate uses these steps, after a first one that is slow


class Reporter:
    """Reports of one run; all but the trackers are made by the main process."""

    def __init__(self, run: Run) -> None:
        self.run, self.watcher = run, run.watcher
        self.metrics = run.output / METRICS_FILE
        self.main = run.accelerator.is_main_process
        self._times: list[float] = []

    @cached_property
    def bar(self) -> tqdm[Any]:
        """Progress in images, shown from its first use."""
        total, batch = self.run.total_steps, self.run.arguments.batch_size
        return progress_bar(total * batch, "pretraining", "img", initial=self.run.step * batch, show=self.main)

    def begin(self) -> None:
        """Write what the run is, print its notes, and remove what killed runs did after their last checkpoint."""
        run, arguments = self.run, self.run.arguments
        if self.main:
            run.output.mkdir(parents=True, exist_ok=True)
            self._mark_best()
            run.checkpoints.begin(run.step)
            write_json(run.output / RUN_RECORD, self._describe())
            keep_metrics_before(self.metrics, run.step)
            if self.watcher is not None:
                self.watcher.resume(self.metrics)
            rate, batch = arguments.base_learning_rate, arguments.batch_size
            print(f"learning rate: peak {run.peak_rate:.6g} = base_learning_rate {rate:g} × batch {batch} / 256")
            if run.warmup_steps > run.total_steps:
                print(
                    f"warm-up of {run.warmup_steps} steps (warmup_epochs {arguments.warmup_epochs:g}), but the run has "
                    f"{run.total_steps}: the rate only rises, to {run.total_steps / run.warmup_steps:.0%} of its peak"
                )
            if rest := run.batches.num_images % batch:
                print(f"an epoch leaves out {rest} of {run.batches.num_images} images, other ones each time")
            launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` was told
            if launched not in ("no", arguments.mixed_precision):
                print(f"mixed_precision is {arguments.mixed_precision}; the launcher's {launched} is not used")
            for note in run.notes:
                print(note)
        if arguments.report_to != "none":
            run.accelerator.init_trackers("mlvicx", config=run.settings.for_tracker())

    def _mark_best(self) -> None:
        """Do what a kill may have prevented after the checkpoint that the run goes on from."""
        for line in _lines(self.metrics):
            if line["step"] == self.run.step > 0 and SCORE in line:
                self.run.checkpoints.mark_best(line[SCORE], self.run.step)

    def _describe(self) -> dict[str, Any]:
        """The description of the run, with the code and the machine of its parts before this one (`earlier`)."""
        described, file = self.run.settings.description(), self.run.output / RUN_RECORD
        if self.run.step == 0 or not file.is_file():
            return described
        before = read_json(file)
        parts = list(before.get("earlier", []))
        part = {name: before.get(name) for name in ("code", "hardware")}
        if part != {name: described[name] for name in part}:
            parts.append({"until_step": self.run.step} | part)
        return described | ({"earlier": parts} if parts else {})

    def step_done(self, output: LossOutput, view: Tensor, rate: float, epoch: int) -> float | None:
        """Report a step with the first view of its images; return the score of the linear probe, where one was due."""
        run, arguments = self.run, self.run.arguments
        self.bar.update(arguments.batch_size)
        last = run.step == run.total_steps
        if last or run.step % arguments.logging_steps == 0 or run.step % arguments.probe_steps == 0:
            run.check_losses()
        probe = {} if self.watcher is None else self.watcher.probe(run.step, last)
        if probe or last or run.step % arguments.logging_steps == 0:
            scalars = {name: value.item() for name, value in output.terms.items()} | {"loss": output.loss.item()}
            if self.watcher is not None:
                watched = self.watcher.scalars(output.embeddings, view)
                for warning in self.watcher.check(watched, output.embeddings):
                    logger.warning("step %d: %s", run.step, warning)
                scalars |= watched | probe
            images = run.step * arguments.batch_size
            self._write({"step": run.step, "epoch": epoch, "learning_rate": rate, "images": images} | scalars)
        self._estimate()
        return probe.get(SCORE)

    def _write(self, line: dict[str, float]) -> None:
        self.bar.set_postfix(epoch=int(line["epoch"]) + 1, loss=f"{line['loss']:.2f}", refresh=False)
        if self.main:
            with self.metrics.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.run.arguments.report_to != "none":
            self.run.accelerator.log(line, step=self.run.step)

    def _estimate(self) -> None:
        """After a few steps print once how long the run takes, and how much memory."""
        if not self.main or len(self._times) > TIMED_STEPS:
            return
        if self.run.settings.device.type == "cuda":
            torch.cuda.synchronize(self.run.settings.device)  # otherwise the time is that of the launches
        self._times.append(time.perf_counter())
        if len(self._times) <= TIMED_STEPS:
            return
        seconds = (self._times[-1] - self._times[0]) / TIMED_STEPS  # with checkpoints that fall into them
        if self.run.settings.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.run.settings.device)
            memory = f"{peak / 2**30:.1f} GiB of GPU memory at most"
        else:
            memory = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB of memory"
        steps = self.run.total_steps
        whole = timedelta(seconds=round(seconds * steps))
        self.bar.clear()
        print(f"estimate: {seconds:.3g} s a step, {whole} for all {steps} steps; {memory}", flush=True)

    def end(self) -> None:
        """Draw the curves and say where the model is."""
        if self.main:
            try:
                plot_curves(self.metrics, self.run.output / "curves.png")  # no title: the same run, the same bits
            except MissingExtraError as error:
                logger.warning("no curves.png: %s", error)
            print(f"model saved in {self.run.output}: AutoModel.from_pretrained({str(self.run.output)!r})", flush=True)


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop the lines of `metrics.jsonl`, if there is one, that a killed run wrote after the checkpoint of a step."""
    kept = [line for line in _lines(path) if line["step"] <= step]
    with new_file(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `metrics.jsonl`, if there is one."""
    for text in path.read_text().splitlines() if path.exists() else ():
        with suppress(json.JSONDecodeError):  # the line that was being written at a kill
            yield json.loads(text)
