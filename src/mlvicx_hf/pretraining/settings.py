"""What made a run: written to `run.json`, and compared when a run is resumed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.data.reading.lanes import STREAM_ORDER

from .arguments import DataArguments, ModelArguments, PretrainingArguments

# Settings that may change when a run is resumed.
_FREE = {"output_dir", "resume", "report_to", "logging_steps", "checkpoint_steps", "save_total_limit", "dataset"}
_FREE |= {"cpu_threads", "num_workers", "torch_compile", "torch_compile_mode"}
_FREE |= {"probe_dataset", "probe_steps", "find_batch_size", "gradient_checkpointing"}

# What runs did before there was a choice.
BEFORE: dict[str, Any] = {
    "model.objective": "mlvicx",
    "model.objective_options": {},
    "model.context_placement": None,
    "data.flip": 0.5,
    "data.positives": "same_image",
    "data.jitter": 0.8,
    "training.optimizer": "lars",
    "training.backbone_learning_rate_ratio": 1.0,
    "training.backbone_thaw_epochs": 0.0,
    "training.freeze_batch_norm": False,
}


@dataclass(frozen=True)
class RunSettings:
    """Arguments, data and machine of a run."""

    model: ModelArguments
    data: DataArguments
    training: PretrainingArguments
    images: int  # number of images in an epoch
    manifest: dict[str, Any]  # of the cache or stream
    device: torch.device  # of this process
    hardware: dict[str, Any]  # see `describe_hardware`
    pair_share: float | None = None  # of the images whose view 2 is made of another image; None if that is not wanted

    def with_micro_batches(self, steps: int) -> RunSettings:
        """The same settings with another number of micro-batches."""
        return replace(self, training=replace(self.training, gradient_accumulation_steps=steps))

    def description(self) -> dict[str, Any]:
        """Everything that made the run, for `run.json`."""
        return self._sections() | {
            "source": {
                **{name: self.manifest[name] for name in ("collection", "split_hash", "splits")},
                "patients_known": self.manifest.get("patients_known"),  # None in caches of an earlier version
            },
            **({} if self.pair_share is None else {"pair_share": self.pair_share}),
            "num_processes": self.hardware["processes"],
            "device": str(self.device),
            "hardware": self.hardware,
            "synthetic": self.manifest["synthetic"],
            "code": code_version(),
        }

    def fixed(self) -> dict[str, Any]:
        """What must be the same in a resumed run, as "section.name"."""
        order = {"data.stream_order": STREAM_ORDER} if self.data.streaming else {}
        if self.data.patient_balanced and not self.data.streaming:
            order["data.repeated_images"] = "get other views"
        sections = self._sections().items()
        return order | {f"{s}.{k}": v for s, values in sections for k, v in values.items() if k not in _FREE}

    def machine(self) -> dict[str, Any]:
        """What the rounding of a result depends on."""
        return {
            "processes": self.hardware["processes"],
            "device": self.hardware["device"],
            "hardware": self.hardware["name"],
            "threads": torch.get_num_threads() if self.device.type == "cpu" else None,
            "torch": torch.__version__,
            "commit": code_version()["commit"],
            "torch_compile": self.training.torch_compile_mode if self.training.torch_compile else False,
        }

    def for_tracker(self) -> dict[str, str | int | float | bool]:
        """The description in one level of plain values, which is what trackers take."""
        flat = {}
        for section, values in self.description().items():
            for key, value in (values if isinstance(values, dict) else {"": values}).items():
                name = f"{section}.{key}".rstrip(".")
                flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
        return flat

    def _sections(self) -> dict[str, dict[str, Any]]:
        data = {"images": self.images, "data_hash": self.manifest["data_hash"]}
        return {"model": asdict(self.model), "data": asdict(self.data) | data, "training": asdict(self.training)}


def of_early_checkpoints(fixed: dict[str, Any], machine: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Bring what is fixed and the machine of a checkpoint of an early version to today's form."""
    fixed = BEFORE | fixed
    if fixed.get("data.patient_balanced") and not fixed.get("data.streaming"):
        fixed.setdefault("data.repeated_images", "got the same views")
    if "run.num_processes" in fixed:
        machine = machine | {"processes": fixed.pop("run.num_processes")}
        if fixed.get("data.streaming"):
            fixed.pop("data.num_workers", None)
            fixed["data.stream_order"] = "of processes and workers"
    return fixed, machine
