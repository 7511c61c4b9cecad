"""Self-supervised pretraining: the Accelerate loop, its order of samples, checkpoints and resume.

One process, several on one node, or several nodes run the same code. Nothing random is carried from step to step:
the order of samples is a function of (seed, epoch) and the views of (seed, epoch, sample), so a run that was killed
and resumed ends in the same weights as one that was not.
"""

from __future__ import annotations

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.optim import Lars
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .augmentation import TwoViewAugmentation, view_draws
from .data.cache import load_cache
from .data.sampling import EpochBatches, PretrainingImages, choose_views
from .data.streaming import Stream, StreamBatches, open_stream
from .hub import check_source
from .image_processing_mlvicx import MLVICXImageProcessor
from .machine import describe_hardware, use_cpu_threads
from .modeling_mlvicx import MLVICXForPreTraining, MLVICXForPreTrainingOutput
from .monitors import rankme
from .pretraining_arguments import DataArguments, ModelArguments, PretrainingArguments, parse_arguments
from .progress import progress_bar
from .provenance import code_version, new_folder, write_json

logger = logging.getLogger(__name__)


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int, final_ratio: float) -> float:
    """Rate of a step, counted from 0: linear rise to the peak, then a cosine that ends on its floor."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
    return peak * (final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def create_optimizer(model: nn.Module, arguments: PretrainingArguments) -> Lars:
    """LARS whose layer-wise rate and weight decay act on matrices and kernels; vectors follow plain momentum SGD."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.ndim > 1],
            "weight_decay": arguments.weight_decay,
            "always_adapt": True,  # timm adapts only groups with decay otherwise
        },
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0, "always_adapt": False},
    ]
    return Lars(groups, lr=0.0, momentum=arguments.momentum, trust_coeff=arguments.trust_coefficient)


def create_model(arguments: ModelArguments) -> MLVICXForPreTraining:
    """The model of a run, with the starting weights that `init_from` names.

    Raises:
        ValueError: an earlier model whose encoder does not fit.
    """
    config, source = arguments.config(), arguments.init_from
    if source is None:
        return MLVICXForPreTraining(config)
    if source == "imagenet" or source.endswith((".safetensors", ".pth", ".bin")):
        model = MLVICXForPreTraining(config)
        overlay = {} if source == "imagenet" else {"file": str(_check_timm_file(source, config.backbone))}
        weights = timm.create_model(
            config.backbone,
            pretrained=True,
            features_only=True,
            in_chans=config.num_channels,
            pretrained_cfg_overlay=overlay,
        )
        model.mlvicx.backbone.load_state_dict(weights.state_dict())
        return model
    loaded: Any = MLVICXForPreTraining.from_pretrained(
        check_source(source), config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    lacking = sorted(key for key in report["missing_keys"] if key.startswith("mlvicx."))
    if lacking:
        raise ValueError(f"init_from={source} lacks {len(lacking)} weights of this encoder, such as {lacking[0]}")
    wrong = sorted(str(row[0]) for row in report["mismatched_keys"])
    if wrong:
        raise ValueError(f"init_from={source}: {len(wrong)} weights have another shape, such as {wrong[0]}")
    return model


def _check_timm_file(source: str, backbone: str) -> Path:
    """Refuse a file that does not hold this backbone, since timm loads what fits and leaves the rest random.

    Any number of input channels is right: timm folds or repeats the first convolution.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"init_from={source!r} found; expected a file that exists")
    state = timm.models.load_state_dict(source)
    wanted = timm.create_model(backbone, num_classes=0).state_dict()
    first = next(iter(wanted))
    wrong = [
        key
        for key, value in wanted.items()
        if not key.endswith("num_batches_tracked")
        and (key not in state or (state[key].shape != value.shape and key != first))
    ]
    if wrong:
        raise ValueError(f"init_from={source} does not fit {backbone}: {len(wrong)} weights differ, such as {wrong[0]}")
    return path


def load_images(data: DataArguments) -> tuple[Any, dict[str, Any], int]:
    """Rows of a cache to pretrain on, its manifest, and how many lateral images are left out.

    Raises:
        ValueError: a split that is not there, or options that only a stream takes.
    """
    for name in ("num_images", "image_column"):
        if getattr(data, name) is not None:
            raise ValueError(f"{name}={getattr(data, name)} found without streaming; expected --streaming as well")
    cache = load_cache(data.dataset)
    if data.split not in cache.datasets:
        raise ValueError(f"split={data.split!r} found; {data.dataset} has {', '.join(cache.datasets)}")
    images, left_out = choose_views(cache.datasets[data.split], data.views)
    limit = data.max_train_samples
    if limit is not None:
        if limit < 1:
            raise ValueError(f"max_train_samples={limit} found; expected 1 or more")
        images = images.select(range(min(limit, len(images))))
    return images, cache.manifest, left_out


def load_stream(data: DataArguments) -> Stream:
    """The stream to pretrain on.

    Raises:
        ValueError: options that a stream cannot follow, or that do not fit the data.
    """
    if data.patient_balanced:
        raise ValueError("patient_balanced found with streaming; a stream is read in order, so expected one of them")
    if data.max_train_samples is not None:
        raise ValueError(f"max_train_samples={data.max_train_samples} found with streaming; expected --num_images")
    return open_stream(
        data.dataset,
        data.split,
        views=data.views,
        num_images=data.num_images,
        size=data.cache_size,
        image_column=data.image_column,
    )


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
        self._check_output()
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            log_with=None if arguments.report_to == "none" else arguments.report_to,
            project_dir=arguments.output_dir,
        )
        self.device = self.accelerator.device
        if self.device.type == "cpu":
            use_cpu_threads(arguments.cpu_threads)
        self._load_data()
        self._build()
        self.step = self._resume() if arguments.resume else 0

    # -- set-up ----------------------------------------------------------------------------------------------------

    def _check_output(self) -> None:
        if not self.arguments.resume and self.output.is_dir() and any(self.output.iterdir()):
            raise FileExistsError(
                f"output_dir={self.output} holds files of another run; choose another folder, or --resume that run"
            )
        least = dict.fromkeys(("epochs", "checkpoint_steps", "logging_steps", "save_total_limit"), 1)
        for name, smallest in (least | {"seed": 0, "warmup_epochs": 0}).items():
            if getattr(self.arguments, name) < smallest:
                raise ValueError(f"{name}={getattr(self.arguments, name)} found; expected {smallest} or more")
        for name in ("crop_area", "blur", "solarize"):
            value = getattr(self.data_arguments, name)
            if len(value) != 2:
                raise ValueError(f"{name}={value} found; expected two values")

    def _load_data(self) -> None:
        data, arguments = self.data_arguments, self.arguments
        place = (arguments.seed, self.accelerator.process_index, self.accelerator.num_processes)
        self.batches: EpochBatches | StreamBatches
        self.loader: DataLoader[Any] | StreamBatches
        if data.streaming:
            stream = load_stream(data)
            self.manifest, left_out = stream.manifest, stream.left_out
            options = {"num_workers": data.num_workers, "shuffle_buffer": data.shuffle_buffer}
            self.batches = self.loader = StreamBatches(stream, arguments.batch_size, *place, **options)
        else:
            images, self.manifest, left_out = load_images(data)
            patients = images["patient_id"][:] if data.patient_balanced else None
            self.batches = EpochBatches(len(images), arguments.batch_size, *place, patients)
            self.loader = DataLoader(
                PretrainingImages(images.select_columns("image")),
                batch_sampler=self.batches,
                num_workers=data.num_workers,
                persistent_workers=data.num_workers > 0,
                pin_memory=self.device.type == "cuda",
            )
        self.total_steps = arguments.epochs * len(self.batches)
        if left_out != 0 and self.accelerator.is_main_process:
            number = "lateral images are" if left_out is None else f"{left_out} lateral images are"
            print(f"{number} left out (--views all takes them)", flush=True)

    def _build(self) -> None:
        arguments, data = self.arguments, self.data_arguments
        torch.manual_seed(arguments.seed)
        model: nn.Module = create_model(self.model_arguments)
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
        if self.accelerator.num_processes > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = model.to(self.device).to(memory_format=torch.channels_last)
        optimizer = create_optimizer(model, arguments)
        if arguments.torch_compile:
            model.compile()  # in place: the keys of the state stay as they are
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    # -- training --------------------------------------------------------------------------------------------------

    def train(self) -> Path:
        """Train to the last epoch and save model and image processor, loadable by `AutoModel`.

        Returns:
            The output folder.

        Raises:
            FloatingPointError: a loss that is not finite.
        """
        main = self.accelerator.is_main_process
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            write_json(self.output / "run.json", self.description())
            self._keep_metrics_before(self.step)
        if self.arguments.report_to != "none":
            self.accelerator.init_trackers("mlvicx", config=_flat(self.description()))
        self.model.train()
        batch = self.arguments.batch_size
        bar = progress_bar(self.total_steps * batch, "pretraining", "img", initial=self.step * batch, show=main)
        first_epoch, first_step = divmod(self.step, len(self.batches))
        with bar:
            for epoch in range(first_epoch, self.arguments.epochs):
                self.batches.start_at(epoch, first_step if epoch == first_epoch else 0)
                for images, samples in self.loader:
                    output, rate = self._train_step(images, samples.numpy(), epoch)
                    self.step += 1
                    bar.update(batch)
                    self._report(output, rate, epoch, bar)
                    if self.step % self.arguments.checkpoint_steps == 0 and self.step < self.total_steps:
                        self.save_checkpoint()
        self.save_checkpoint()
        if main:
            self._save_model()
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return self.output

    def _train_step(self, images: Tensor, samples: np.ndarray, epoch: int) -> tuple[MLVICXForPreTrainingOutput, float]:
        arguments = self.arguments
        peak = arguments.base_learning_rate * arguments.batch_size / 256
        warmup = round(arguments.warmup_epochs * len(self.batches))
        rate = learning_rate(self.step, peak, warmup, self.total_steps, arguments.final_learning_rate_ratio)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        draws = view_draws(arguments.seed, epoch, samples)
        view_1, view_2 = self.augment(images.to(self.device, non_blocking=True), draws)
        layout = {"memory_format": torch.channels_last}
        output = self.model(view_1=view_1.contiguous(**layout), view_2=view_2.contiguous(**layout))
        if not math.isfinite(output.loss.item()):
            good = self._last_good_checkpoint() or "none yet"
            raise FloatingPointError(
                f"loss {output.loss.item()} at step {self.step} with learning rate {rate:.3g}; "
                f"last good checkpoint: {good}. A lower base_learning_rate or a longer warm-up may help"
            )
        self.accelerator.backward(output.loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return output, rate

    def _last_good_checkpoint(self) -> Path | None:
        """The newest checkpoint whose weights gave a finite loss; one of this very step did not, and is set aside."""
        for path in reversed(self._checkpoints()):
            if path != self.output / f"checkpoint-{self.step}":
                return path
            if self.accelerator.is_main_process:
                path.rename(path.with_name(f"non-finite-{path.name}"))
        return None

    def _report(self, output: MLVICXForPreTrainingOutput, rate: float, epoch: int, bar: Any) -> None:
        if self.step % self.arguments.logging_steps and self.step != self.total_steps:
            return
        scalars = {k: v.item() for k, v in output.items() if isinstance(v, Tensor) and v.ndim == 0}
        for name in ("global_embeddings", "multi_level_embeddings"):
            if name in output:  # a branch whose weight is 0 has none
                scalars[f"{name}_rankme"] = rankme(output[name][0].detach())
        images = self.step * self.arguments.batch_size
        line = {"step": self.step, "epoch": epoch, "learning_rate": rate, "images": images} | scalars
        bar.set_postfix(epoch=epoch + 1, loss=f"{line['loss']:.2f}", refresh=False)
        if self.accelerator.is_main_process:
            with (self.output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
        if self.arguments.report_to != "none":
            self.accelerator.log(line, step=self.step)

    # -- files -----------------------------------------------------------------------------------------------------

    def description(self) -> dict[str, Any]:
        """Everything that made the run: arguments, data, code, machine."""
        return {
            "model": asdict(self.model_arguments),
            "data": asdict(self.data_arguments)
            | {"images": self.batches.num_images, "data_hash": self.manifest["data_hash"]},
            "source": {name: self.manifest[name] for name in ("collection", "split_hash", "splits")},
            "training": asdict(self.arguments),
            "num_processes": self.accelerator.num_processes,
            "device": str(self.device),
            "hardware": describe_hardware(self.device, self.accelerator.num_processes),
            "synthetic": self.manifest["synthetic"],
            "code": code_version(),
        }

    def _fixed(self) -> dict[str, Any]:
        """What must not change between a checkpoint and its resume."""
        free = {"output_dir", "resume", "report_to", "logging_steps", "checkpoint_steps", "save_total_limit"}
        free |= {"dataset", "cpu_threads", "torch_compile"}
        if not self.data_arguments.streaming:  # a stream's order depends on its readers
            free.add("num_workers")
        description = self.description()
        sections = {k: description[k] for k in ("model", "data", "training")} | {
            "run": {"num_processes": self.accelerator.num_processes}
        }
        return {f"{s}.{k}": v for s, values in sections.items() for k, v in values.items() if k not in free}

    def _checkpoints(self) -> list[Path]:
        found = [p for p in self.output.glob("checkpoint-*") if (p / "state.json").is_file()]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]))

    def save_checkpoint(self) -> None:
        """Write `checkpoint-STEP`, whole or not at all: model folder, optimiser, position; then drop the oldest."""
        if self.accelerator.is_main_process:
            path = self.output / f"checkpoint-{self.step}"
            with new_folder(path) as folder:
                self.accelerator.unwrap_model(self.model).save_pretrained(folder)
                self.processor.save_pretrained(folder)
                state = {"optimizer": self.optimizer.state_dict()}
                if self.accelerator.scaler is not None:
                    state["scaler"] = self.accelerator.scaler.state_dict()
                torch.save(state, folder / "optimizer.pt")
                write_json(folder / "state.json", {"step": self.step, "fixed": self._fixed()})
            for old in self._checkpoints()[: -self.arguments.save_total_limit]:
                _remove_folder(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> int:
        checkpoints = self._checkpoints()
        if not checkpoints:
            logger.warning("%s has no checkpoint: starting from the beginning", self.output)
            return 0
        folder = checkpoints[-1]
        state = json.loads((folder / "state.json").read_text())
        now = json.loads(json.dumps(self._fixed()))
        changed = [k for k in sorted(now.keys() | state["fixed"].keys()) if now.get(k) != state["fixed"].get(k)]
        if changed:
            rows = "; ".join(f"{k} was {state['fixed'].get(k)!r}, now {now.get(k)!r}" for k in changed)
            raise ValueError(f"{folder} belongs to another run: {rows}")
        weights = load_file(folder / "model.safetensors", device="cpu")
        self.accelerator.unwrap_model(self.model).load_state_dict(weights)
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        if self.accelerator.is_main_process:
            print(f"resuming {folder} at step {state['step']} of {self.total_steps}", flush=True)
        return int(state["step"])

    def _keep_metrics_before(self, step: int) -> None:
        """Drop the lines that a killed run wrote after its last checkpoint."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = []
        for text in lines:
            try:
                kept += [text] if json.loads(text)["step"] <= step else []
            except json.JSONDecodeError:  # the line that was being written at the kill
                continue
        temporary = path.with_name(".metrics.jsonl.tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, path)

    def _save_model(self) -> None:
        """Put model and processor at the top of the run, by way of a folder of their own."""
        final = self.output / "final"
        with new_folder(final) as folder:
            self.accelerator.unwrap_model(self.model).save_pretrained(folder)
            self.processor.save_pretrained(folder)
        for file in sorted(final.iterdir()):
            os.replace(file, self.output / file.name)
        final.rmdir()


def _remove_folder(path: Path) -> None:
    """Remove a checkpoint so that a kill half-way leaves none that looks whole."""
    (path / "state.json").unlink()
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


def _flat(description: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """One level of plain values, which is what trackers take."""
    flat = {}
    for section, values in description.items():
        for key, value in (values if isinstance(values, dict) else {"": values}).items():
            name = f"{section}.{key}".rstrip(".")
            flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def main() -> None:
    """The command `scripts/pretrain.py`."""
    transformers.utils.logging.disable_progress_bar()  # of writing and loading a file
    pretrainer = Pretrainer(*parse_arguments())
    output = pretrainer.train()
    if pretrainer.accelerator.is_main_process:
        print(f"model saved in {output}: AutoModel.from_pretrained({str(output)!r})")
