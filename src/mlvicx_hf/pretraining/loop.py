"""Self-supervised pretraining: the Accelerate loop, its order of samples, checkpoints and resume.

One process, several on one node, or several nodes run the same code. Nothing random is carried from step to step:
the order of samples is a function of (seed, epoch) and the views of (seed, epoch, sample), so a run that was killed
and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_folder, sync, write_json
from mlvicx_hf.common.machine import describe_hardware, keep_freed_memory, use_cpu_threads
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.common.signals import StoppedError, StopSignals, leave_signals_to_the_main_process
from mlvicx_hf.data.reading.sampling import EpochBatches, PretrainingImages
from mlvicx_hf.data.reading.streaming import StreamBatches
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForPreTraining, MLVICXForPreTrainingOutput

from .accumulation import accumulate
from .arguments import DataArguments, ModelArguments, PretrainingArguments, parse_arguments
from .checkpoints import Checkpoint, Checkpoints
from .collapse import Watcher
from .curves import plot_curves
from .memory import Trial
from .setup import (
    create_model,
    create_optimizer,
    flat,
    keep_metrics_before,
    learning_rate,
    load_images,
    load_stream,
    use_deterministic_algorithms,
)
from .views import TwoViewAugmentation, view_draws

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
PRECISIONS = ("no", "bf16", "fp16")
TIMED_STEPS = 4  # of which the time of a run is estimated, after a first one that is slow


class Pretrainer:
    """One run of pretraining.

    Args:
        model_arguments: what is trained.
        data_arguments: on which images.
        arguments: how.

    Raises:
        FileExistsError: an output folder that holds another run, without `resume`.
        ValueError: arguments that do not fit the data, the checkpoint or one another.
    """

    def __init__(
        self, model_arguments: ModelArguments, data_arguments: DataArguments, arguments: PretrainingArguments
    ) -> None:
        self.model_arguments, self.data_arguments, self.arguments = model_arguments, data_arguments, arguments
        self.output = Path(arguments.output_dir)
        self.checkpoints = Checkpoints(self.output, arguments.save_total_limit)
        self._check_arguments()
        if arguments.deterministic:
            use_deterministic_algorithms()
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
            # Else Accelerate takes what torchrun starts without a GPU for independent runs.
            cpu=not torch.accelerator.is_available(),
        )
        self.device = self.accelerator.device
        if arguments.mixed_precision == "fp16" and self.device.type == "cpu":  # Accelerate would compute in float32
            raise UserError("mixed_precision='fp16' found on the CPU; expected no or bf16 there")
        if self.device.type == "cpu":
            use_cpu_threads(arguments.cpu_threads)
            keep_freed_memory()
        self.hardware = describe_hardware(self.device, self.accelerator.num_processes)
        self._load_data()
        checkpoint = self._find_checkpoint() if arguments.resume else None
        self.step = 0 if checkpoint is None else checkpoint.step
        self._build(resumed=checkpoint is not None)
        if checkpoint is not None:
            self._load(checkpoint)

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _check_arguments(self) -> None:
        if not self.arguments.resume and self.output.is_dir() and any(self.output.iterdir()):
            raise FileExistsError(
                f"output_dir={self.output} holds files of another run; choose another folder, or --resume that run"
            )
        if self.arguments.mixed_precision not in PRECISIONS:
            found, known = self.arguments.mixed_precision, ", ".join(PRECISIONS)
            raise UserError(f"mixed_precision={found!r} found; expected one of {known}")
        counts = ("epochs", "checkpoint_steps", "logging_steps", "save_total_limit", "probe_steps")
        least = dict.fromkeys((*counts, "gradient_accumulation_steps"), 1)
        for name, smallest in (least | {"seed": 0, "warmup_epochs": 0}).items():
            if getattr(self.arguments, name) < smallest:
                raise UserError(f"{name}={getattr(self.arguments, name)} found; expected {smallest} or more")
        for name in ("crop_area", "blur", "solarize"):
            value = getattr(self.data_arguments, name)
            if len(value) != 2:
                raise UserError(f"{name}={value} found; expected two values")

    def _load_data(self) -> None:
        data, arguments = self.data_arguments, self.arguments
        place = (arguments.seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.batches: EpochBatches | StreamBatches
        self.loader: DataLoader[Any] | StreamBatches
        if data.streaming:
            stream = load_stream(data)
            self.manifest, self.side, left_out = stream.manifest, stream.size, stream.left_out
            options = {"num_workers": data.num_workers, "shuffle_buffer": data.shuffle_buffer}
            self.batches = self.loader = StreamBatches(stream, arguments.batch_size, *place, **options)
        else:
            images, self.manifest, left_out = load_images(data)
            self.side = self.manifest["size"]
            patients = images["patient_id"][:] if data.patient_balanced else None
            self.batches = EpochBatches(len(images), arguments.batch_size, *place, patients)
            self.loader = DataLoader(
                PretrainingImages(images.select_columns("image")),
                batch_sampler=self.batches,
                num_workers=data.num_workers,
                persistent_workers=data.num_workers > 0,
                worker_init_fn=leave_signals_to_the_main_process,
                pin_memory=self.device.type == "cuda",
            )
        self.total_steps = arguments.epochs * len(self.batches)
        self.peak = arguments.base_learning_rate * arguments.batch_size / 256
        if left_out != 0 and self.accelerator.is_main_process:
            number = "lateral images are" if left_out is None else f"{left_out} lateral images are"
            print(f"{number} left out (--views all takes them)", flush=True)

    def _build(self, resumed: bool) -> None:
        arguments, data = self.arguments, self.data_arguments
        torch.manual_seed(arguments.seed)
        plain = create_model(self.model_arguments)
        self.processor = MLVICXImageProcessor(self.model_arguments.image_size, self.model_arguments.num_channels)
        self.processor.fit = self.manifest["fit"]
        self.augment = TwoViewAugmentation(
            image_size=self.model_arguments.image_size,
            crop_area=(data.crop_area[0], data.crop_area[1]),
            rotation=data.rotation,
            brightness=data.brightness,
            contrast=data.contrast,
            blur=(data.blur[0], data.blur[1]),
            solarize=(data.solarize[0], data.solarize[1]),
            mean=self.processor.image_mean,
            std=self.processor.image_std,
            num_channels=self.model_arguments.num_channels,
        )
        self.layout = torch.channels_last if arguments.channels_last else torch.contiguous_format
        plain = plain.to(self.device).to(memory_format=self.layout)
        self._fit(plain, resumed)
        model: nn.Module = plain
        if self.accelerator.num_processes > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        optimizer = create_optimizer(model, arguments)
        if arguments.torch_compile:
            model.compile()  # in place: the keys of the state stay as they are
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.score: float | None = None  # of a probe at this very step
        self.watcher: Watcher | None = None
        if self.accelerator.is_main_process:
            plain = self.accelerator.unwrap_model(self.model)
            self.watcher = Watcher(plain, self.processor, data.probe_dataset, arguments.probe_steps, device=self.device)

    def _fit(self, model: MLVICXForPreTraining, resumed: bool) -> None:
        """Find micro-batches that fit, where that is wanted, and what a step needs, before anything wraps the model."""
        self.notes: list[str] = []  # said when training begins
        if self.step == self.total_steps:
            return
        trial = Trial(self.accelerator, model, self._random_views, self.batches.share)
        if self.arguments.find_batch_size:
            if not resumed:
                self._use_micro_batches(trial.find(self.arguments.gradient_accumulation_steps))
            self.notes.append(trial.choice(self.arguments.gradient_accumulation_steps))
        timed = not self.arguments.torch_compile  # which would compile for other shapes as well
        estimate = trial.estimate(self.arguments.gradient_accumulation_steps, timed)
        self.notes.append(f"expected: {estimate.line(self.total_steps - self.step)}")

    def _use_micro_batches(self, steps: int) -> None:
        self.arguments = replace(self.arguments, gradient_accumulation_steps=steps)

    def _random_views(self, count: int) -> tuple[Tensor, Tensor]:
        """Both views of so many images of noise."""
        shape = (count, 1, self.side, self.side)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return self._views(images, np.arange(count), 0)

    # -- training --------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the last epoch and save model and image processor, loadable by `AutoModel`.

        Returns:
            The output folder.

        Raises:
            FloatingPointError: a loss that is not finite.
            OSError: a file that cannot be written; names the checkpoint that is still good.
            StoppedError: after SIGTERM or SIGINT, when the step is finished and its checkpoint saved.
        """
        main, batch = self.accelerator.is_main_process, self.arguments.batch_size
        if main:
            self._begin()
        if self.arguments.report_to != "none":
            self.accelerator.init_trackers("mlvicx", config=flat(self.description()))
        self.model.train()
        bar = progress_bar(self.total_steps * batch, "pretraining", "img", initial=self.step * batch, show=main)
        with StopSignals() as signals:
            with bar:
                self._run_epochs(bar, signals)
            self.save_checkpoint()
            if main:
                self._save_model()
                self._plot()
            self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.output

    def _begin(self) -> None:
        """Say what is about to be done, and leave no trace of what killed runs did after their last checkpoint."""
        self.output.mkdir(parents=True, exist_ok=True)
        self.checkpoints.begin(self.step)
        write_json(self.output / "run.json", self.description())
        keep_metrics_before(self.output / METRICS, self.step)
        if self.watcher is not None:
            self.watcher.resume(self.output / METRICS)
        rate, batch = self.arguments.base_learning_rate, self.arguments.batch_size
        print(f"learning rate: peak {self.peak:.6g} = base_learning_rate {rate:g} × batch {batch} / 256", flush=True)
        if rest := self.batches.num_images % batch:
            print(f"an epoch leaves out {rest} of {self.batches.num_images} images, other ones each time", flush=True)
        for note in self.notes:
            print(note, flush=True)

    def _run_epochs(self, bar: Any, signals: StopSignals) -> None:
        first_epoch, first_step = divmod(self.step, len(self.batches))
        times: list[float] = []
        for epoch in range(first_epoch, self.arguments.epochs):
            self.batches.start_at(epoch, first_step if epoch == first_epoch else 0)
            for images, samples in self.loader:
                output, view, rate = self._train_step(images, samples.numpy(), epoch)
                self.step += 1
                bar.update(self.arguments.batch_size)
                self._report(output, view, rate, epoch, bar)
                self._estimate(times, bar)
                if self.step < self.total_steps:  # the last checkpoint belongs to the end of the run
                    self._save_or_stop(signals.agreed(self.accelerator))

    def _save_or_stop(self, stopped_by: int) -> None:
        if stopped_by or self.step % self.arguments.checkpoint_steps == 0:
            self.save_checkpoint()
        if stopped_by:
            self.accelerator.end_training()
            raise StoppedError(
                stopped_by,
                f"stopped by {signal.Signals(stopped_by).name} after step {self.step} of {self.total_steps}; "
                f"{self.checkpoints.path(self.step)} is saved: the same command with --resume goes on from there",
            )

    def _estimate(self, times: list[float], bar: Any) -> None:
        """After a few steps say once how long all of them take, and how much memory."""
        if len(times) > TIMED_STEPS:
            return
        times.append(time.perf_counter())
        if len(times) <= TIMED_STEPS or not self.accelerator.is_main_process:
            return
        seconds = (times[-1] - times[0]) / TIMED_STEPS  # checkpoints that fall into them included
        if self.device.type == "cuda":
            memory = f"{torch.cuda.max_memory_allocated(self.device) / 2**30:.1f} GiB of GPU memory at most"
        else:
            memory = f"{psutil.Process().memory_info().rss / 2**30:.1f} GiB of memory"
        whole = timedelta(seconds=round(seconds * self.total_steps))
        bar.clear()
        print(f"estimate: {seconds:.3g} s a step, {whole} for all {self.total_steps} steps; {memory}", flush=True)

    def _train_step(
        self, images: Tensor, samples: np.ndarray, epoch: int
    ) -> tuple[MLVICXForPreTrainingOutput, Tensor, float]:
        """One step; its output, the first view that it saw, and its learning rate."""
        arguments = self.arguments
        warmup = round(arguments.warmup_epochs * len(self.batches))
        rate = learning_rate(self.step, self.peak, warmup, self.total_steps, arguments.final_learning_rate_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        view_1, view_2 = self._views(images, samples, epoch)
        if arguments.gradient_accumulation_steps == 1:
            output = self.model(view_1=view_1, view_2=view_2)
            self._check_loss(output.loss, rate)
            self.accelerator.backward(output.loss)
        else:
            output = accumulate(self.accelerator, self.model, view_1, view_2, arguments.gradient_accumulation_steps)
            self._check_loss(output.loss, rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output, view_1, rate

    def _views(self, images: Tensor, samples: np.ndarray, epoch: int) -> tuple[Tensor, Tensor]:
        """Both views of an epoch, [B, C, S, S] each on the device, of uint8 images [B, 1, S, S]."""
        draws = view_draws(self.arguments.seed, epoch, samples)
        view_1, view_2 = self.augment(images.to(self.device, non_blocking=True), draws)
        return view_1.contiguous(memory_format=self.layout), view_2.contiguous(memory_format=self.layout)

    def _check_loss(self, loss: Tensor | None, rate: float) -> None:
        assert loss is not None
        if not math.isfinite(loss.item()):
            good = self._last_good_checkpoint() or "none yet"
            raise FloatingPointError(
                f"loss {loss.item()} at step {self.step} with learning rate {rate:.3g}; "
                f"last good checkpoint: {good}. A lower base_learning_rate or a longer warm-up may help"
            )

    def _plot(self) -> None:
        try:
            plot_curves(self.output / METRICS, self.output / "curves.png")  # no name: the same run, the same bits
        except ImportError as error:
            logger.warning("no curves.png: %s", error)

    def _last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint whose weights gave a finite loss; one of this very step did not, and is set aside."""
        bad = self.checkpoints.path(self.step)
        if self.accelerator.is_main_process and bad.is_dir():
            self.checkpoints.set_aside(bad, "non-finite")
        paths = [path for path in self.checkpoints.paths() if path != bad]
        return paths[-1] if paths else None

    def _report(self, output: MLVICXForPreTrainingOutput, view: Tensor, rate: float, epoch: int, bar: Any) -> None:
        last = self.step == self.total_steps
        probe = {} if self.watcher is None else self.watcher.probe(self.step, last)
        self.score = probe.get("probe_linear_auroc")
        if not probe and self.step % self.arguments.logging_steps and not last:
            return
        scalars = {k: v.item() for k, v in output.items() if isinstance(v, Tensor) and v.ndim == 0}
        if self.watcher is not None:
            watched = self.watcher.scalars(output, view)
            for warning in self.watcher.check(watched, len(view)):
                logger.warning("step %d: %s", self.step, warning)
            scalars |= watched | probe
        images = self.step * self.arguments.batch_size
        line = {"step": self.step, "epoch": epoch, "learning_rate": rate, "images": images} | scalars
        bar.set_postfix(epoch=epoch + 1, loss=f"{line['loss']:.2f}", refresh=False)
        if self.accelerator.is_main_process:
            with (self.output / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.arguments.report_to != "none":
            self.accelerator.log(line, step=self.step)

    # -- files -----------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """Everything that made the run: arguments, data, code, machine."""
        return self._settings() | {
            "source": {name: self.manifest[name] for name in ("collection", "split_hash", "splits")},
            "num_processes": self.accelerator.num_processes,
            "device": str(self.device),
            "hardware": self.hardware,
            "synthetic": self.manifest["synthetic"],
            "code": code_version(),
        }

    def _settings(self) -> dict[str, dict[str, Any]]:
        data = {"images": self.batches.num_images, "data_hash": self.manifest["data_hash"]}
        return {
            "model": asdict(self.model_arguments),
            "data": asdict(self.data_arguments) | data,
            "training": asdict(self.arguments),
        }

    def _fixed(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resume."""
        free = {"output_dir", "resume", "report_to", "logging_steps", "checkpoint_steps", "save_total_limit"}
        free |= {"dataset", "cpu_threads", "torch_compile", "probe_dataset", "probe_steps", "find_batch_size"}
        if not self.data_arguments.streaming:  # a stream's order depends on its readers
            free.add("num_workers")
        sections = self._settings() | {"run": {"num_processes": self.accelerator.num_processes}}
        return {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items() if k not in free}

    def _machine(self) -> dict[str, Any]:
        """What rounding depends on."""
        return {
            "device": self.hardware["device"],
            "hardware": self.hardware["name"],
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "torch": torch.__version__,
            "torch_compile": self.arguments.torch_compile,
        }

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`, whole or not at all: model folder, optimiser, position; then drop the oldest.

        Raises:
            OSError: it cannot be written; names the checkpoint that is still good.
        """
        if self.accelerator.is_main_process:
            metrics = self.output / METRICS
            if metrics.exists():
                sync(metrics)  # what lies before the checkpoint is not computed again
            self.checkpoints.save(self.step, self._fixed(), self._machine(), self._write_state)
            if self.score is not None:
                self.mark_best(self.score, self.step)
        self.accelerator.wait_for_everyone()

    def _write_state(self, folder: Path) -> None:
        self._write_model(folder)
        state = {"optimizer": self.optimizer.state_dict()}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        buffer = io.BytesIO()  # torch's own writer hides the reason when a disk is full
        torch.save(state, buffer)
        (folder / "optimizer.pt").write_bytes(buffer.getbuffer())

    def _write_model(self, folder: Path) -> None:
        self.accelerator.unwrap_model(self.model).save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def mark_best(self, score: float, step: int) -> bool:
        """Keep the checkpoint of a step for as long as no other one has a higher score.

        Args:
            score: of its features, such as a probe's.
            step: of a checkpoint that is there.

        Returns:
            Whether the score is the highest so far; false in all processes but the main one.

        Raises:
            ValueError: no such checkpoint, or a score that is not finite.
        """
        return self.accelerator.is_main_process and self.checkpoints.mark_best(score, step)

    def _find_checkpoint(self) -> Checkpoint | None:
        """The newest whole checkpoint, of which the main process decides; None without any."""
        chosen: list[Checkpoint | ValueError | None] = [None]
        if self.accelerator.is_main_process:
            try:
                chosen = [self._choose_checkpoint()]
            except ValueError as error:  # all processes must end
                chosen = [error]
        found = broadcast_object_list(chosen)[0]
        if isinstance(found, ValueError):
            raise found
        if found is not None:
            self._keep_micro_batches(found)
        return found

    def _keep_micro_batches(self, checkpoint: Checkpoint) -> None:
        """With `find_batch_size` go on with as many as before; fewer than are asked for stay a difference."""
        steps = self.arguments.gradient_accumulation_steps
        if self.arguments.find_batch_size:
            self._use_micro_batches(max(steps, checkpoint.fixed.get("training.gradient_accumulation_steps", steps)))

    def _load(self, found: Checkpoint) -> None:
        weights = load_file(found.path / "model.safetensors", device="cpu")
        self.accelerator.unwrap_model(self.model).load_state_dict(weights)
        saved = torch.load(found.path / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.accelerator.is_main_process:
            print(f"resuming {found.path} at step {found.step} of {self.total_steps}", flush=True)

    def _choose_checkpoint(self) -> Checkpoint | None:
        checkpoint = self.checkpoints.newest_whole()
        if checkpoint is None:
            logger.warning("%s has no checkpoint: starting from the beginning", self.output)
        else:
            self._keep_micro_batches(checkpoint)
            checkpoint.check_same_run(self._fixed(), self._machine())
        return checkpoint

    def _save_model(self) -> None:
        """Put model and processor at the top of the run, by way of a folder of their own."""
        final = self.output / "final"
        with self.checkpoints.saying_what_is_left(final), new_folder(final) as folder:
            self._write_model(folder)
        for file in sorted(final.iterdir()):
            os.replace(file, self.output / file.name)
        final.rmdir()


def main() -> None:
    """The command `scripts/pretrain.py`.

    Raises:
        SystemExit: stopped by a signal; 128 and its number.
    """
    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    pretrainer = Pretrainer(*parse_arguments())
    try:
        output = pretrainer.train()
    except StoppedError as stopped:
        if pretrainer.accelerator.is_main_process:
            print(stopped, file=sys.stderr)
        raise SystemExit(128 + stopped.number) from None
    if pretrainer.accelerator.is_main_process:
        print(f"model saved in {output}: AutoModel.from_pretrained({str(output)!r})")
