"""One run of pretraining: its parts, its position, and its files."""

import io
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file
from torch import Tensor, nn

from mlvicx_hf.common.files import new_folder, sync
from mlvicx_hf.common.signals import StoppedError
from mlvicx_hf.data.reading.sampling import EpochBatches
from mlvicx_hf.data.reading.streaming import StreamBatches
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.objectives import Objective
from mlvicx_hf.objectives.base import Schedule

from .arguments import PretrainingArguments
from .batches import PlannedBatch
from .checkpoints import Checkpoint, Checkpoints
from .collapse import Watcher
from .optimizer import learning_rate
from .settings import RunSettings
from .view_sets import Views

METRICS_FILE = "metrics.jsonl"


@dataclass
class Run:
    """What `set_up` makes and the loop moves."""

    settings: RunSettings  # what made the run
    accelerator: Accelerator
    objective: Objective  # what is trained
    wrapped: nn.Module  # the objective as Accelerate prepared it, perhaps for several processes; call this one
    optimizer: AcceleratedOptimizer
    processor: MLVICXImageProcessor  # saved beside the model
    schedule: Schedule
    batches: EpochBatches | StreamBatches  # which images form the batches of an epoch
    loader: Iterable[PlannedBatch]  # the same, with their images and what happens to them
    make_views: Callable[[PlannedBatch], Views]
    checkpoints: Checkpoints
    watcher: Watcher | None  # measures the objective; None in all processes but the main one
    notes: list[str]  # lines to print when training begins
    step: int = 0  # steps that are done
    # Step and value of the first loss that is not finite; -1 and 0 before.
    _first_bad: tuple[Tensor, Tensor] | None = None

    @property
    def arguments(self) -> PretrainingArguments:
        """How it is trained."""
        return self.settings.training

    @property
    def output(self) -> Path:
        """Its folder."""
        return Path(self.arguments.output_dir)

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.schedule.total_steps

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.arguments.warmup_epochs * len(self.batches))

    @property
    def peak_rate(self) -> float:
        """The highest learning rate."""
        return self.arguments.base_learning_rate * self.arguments.batch_size / 256

    def learning_rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        final = self.arguments.final_learning_rate_ratio
        return learning_rate(step, self.peak_rate, self.warmup_steps, self.total_steps, final)

    def backbone_ratio(self, step: int) -> float:
        """Learning rate of the backbone in a step, counted from 0, over that of the rest."""
        thawing = self.arguments.backbone_thaw_epochs * len(self.batches)
        return self.arguments.backbone_learning_rate_ratio * min(1.0, step / thawing if thawing else 1.0)

    def remaining_batches(self) -> Iterator[PlannedBatch]:
        """Every batch that is not done yet."""
        steps = len(self.batches)
        first_epoch, first_step = divmod(self.step, steps)
        whole, rest = divmod(self.total_steps, steps)
        for epoch in range(first_epoch, whole + bool(rest)):
            done = first_step if epoch == first_epoch else 0
            self.batches.start_at(epoch, done)
            yield from self.loader if epoch < whole else islice(self.loader, rest - done)

    def note_loss(self, loss: Tensor) -> None:
        """Remember the first loss that is not finite, on its device: reading it would wait for the device."""
        loss = loss.detach()
        step, value = self._first_bad or (torch.full_like(loss, -1, dtype=torch.int64), torch.zeros_like(loss))
        is_first = (step < 0) & ~loss.isfinite()
        now = torch.full_like(step, self.step)
        self._first_bad = torch.where(is_first, now, step), torch.where(is_first, loss, value)

    def check_losses(self) -> None:
        """Stop the run if a loss was not finite. Called before anything is written.

        The weights behind that loss are never written. A checkpoint of that very step gave it, so it is set aside.

        Raises:
            FloatingPointError: names step, rate and the newest checkpoint whose weights gave a finite loss.
        """
        if self._first_bad is None or self._first_bad[0].item() < 0:
            return
        step, loss = int(self._first_bad[0].item()), self._first_bad[1].item()
        bad = self.checkpoints.path(step)
        if self.accelerator.is_main_process and bad.is_dir():
            self.checkpoints.set_aside(bad, "non-finite")
        good = [path for path in self.checkpoints.paths() if path != bad]
        raise FloatingPointError(
            f"loss {loss} at step {step} with learning rate {self.learning_rate(step):.3g}; "
            f"last good checkpoint: {good[-1] if good else 'none yet'}. "
            "A lower base_learning_rate or a longer warm-up may help"
        )

    def stopped(self, number: int) -> StoppedError:
        """The exception to raise after a signal of this number, when the checkpoint is saved."""
        return StoppedError(
            number,
            f"stopped by {signal.Signals(number).name} after step {self.step} of {self.total_steps}; "
            f"{self.checkpoints.path(self.step)} is saved: the same command with --resume goes on from there",
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    def save_checkpoint(self, score: float | None = None) -> None:
        """Write `checkpoint-STEP`, whole or not at all, and drop the oldest one.

        Args:
            score: of a probe at this step; the checkpoint with the highest score is kept.

        Raises:
            FloatingPointError: see `check_losses`; or a weight that is not finite.
            OSError: it cannot be written; names the checkpoint that is still good.
        """
        self.check_losses()
        for name, weight in self.objective.model.named_parameters():
            if not bool(weight.isfinite().all()):  # no loss has shown it yet, and behind the last step none would
                raise FloatingPointError(f"{name} is not finite after step {self.step}; expected finite weights")
        if self.accelerator.is_main_process:
            metrics = self.output / METRICS_FILE
            if metrics.exists():
                sync(metrics)  # the steps before the checkpoint are not computed again
            self.checkpoints.save(self.step, self.settings.fixed(), self.settings.machine(), self._write_state)
            if score is not None:
                self.checkpoints.mark_best(score, self.step)
        self.accelerator.wait_for_everyone()

    def save_model(self) -> None:
        """Put model and image processor at the top of the output folder, by way of a folder of their own."""
        if self.accelerator.is_main_process:
            final = self.output / "final"
            with self.checkpoints.saying_what_is_left(final), new_folder(final) as folder:
                self._write_model(folder)
            for file in sorted(final.iterdir()):
                os.replace(file, self.output / file.name)
            final.rmdir()
        self.accelerator.wait_for_everyone()

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint."""
        weights = load_file(checkpoint.path / "model.safetensors", device="cpu")
        saved = torch.load(checkpoint.path / "optimizer.pt", map_location="cpu", weights_only=True)
        besides = saved.get("objective", {})  # early checkpoints have none: all their weights are the model's
        self.objective.load_state_dict({f"model.{name}": value for name, value in weights.items()} | besides)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.step = checkpoint.step

    def _write_state(self, folder: Path) -> None:
        self._write_model(folder)
        weights = self.objective.state_dict()
        besides = {name: value for name, value in weights.items() if not name.startswith("model.")}
        state = {"optimizer": self.optimizer.state_dict(), "objective": besides}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        buffer = io.BytesIO()  # torch's own writer hides the reason when a disk is full
        torch.save(state, buffer)
        (folder / "optimizer.pt").write_bytes(buffer.getbuffer())

    def _write_model(self, folder: Path) -> None:
        self.objective.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
