"""All that a GPU should show, in one command: is it right, and how fast is it?

    python -m benchmark.gpu --output results/gpu        (in tools/)

Each part writes into `gpu.json` and `gpu.md` when it ends. Parts that would begin after `--minutes` are left out and
named. `--device cpu --tiny` runs the same code without a GPU, to try it; what only a GPU has is then left out, too.
"""

from __future__ import annotations

import argparse
import copy
import gc
import hashlib
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from mlvicx_hf.common.files import write_json
from mlvicx_hf.common.machine import describe_hardware
from mlvicx_hf.common.provenance import code_version
from mlvicx_hf.common.text import markdown_table
from mlvicx_hf.encoders.inference import exact_convolutions
from mlvicx_hf.objectives import Objective
from mlvicx_hf.pretraining.arguments import DataArguments, ModelArguments, PretrainingArguments
from mlvicx_hf.pretraining.model import create_objective
from mlvicx_hf.pretraining.optimizer import create_optimizer, set_learning_rate
from mlvicx_hf.pretraining.setup import set_up
from mlvicx_hf.pretraining.views import TwoViewAugmentation, ViewPlan, view_draws

from .inference import benchmark_inference
from .pipeline import phantom_cache, pretraining_seconds
from .timing import compare, spread
from .training import Setting, training_step

VICREG = ("lightly",) if find_spec("lightly") else ()  # the extra `benchmark` brings it
SCRIPT = Path(__file__).parents[2] / "scripts" / "pretrain.py"


@dataclass(frozen=True)
class Plan:
    """What is tried, and how large."""

    device: torch.device
    cache: Path
    backbone: str
    image_size: int
    steps: int  # of the curves
    batch_sizes: tuple[int, ...]  # of the timed steps
    backbones: tuple[str, ...]  # of the timed steps
    rounds: int
    workers: tuple[int, ...]

    @property
    def arguments(self) -> ModelArguments:
        """A model for the checks, with the default expanders where there is a GPU."""
        made = ModelArguments(backbone=self.backbone, image_size=self.image_size)
        if self.device.type == "cpu":
            made = replace(made, expander_dims=[64, 64], aggregation_channels=32)
        return made


# -- is it right? ------------------------------------------------------------------------------------------------------


def _objective(plan: Plan, device: torch.device) -> Objective:
    torch.manual_seed(0)
    return create_objective(plan.arguments).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it


def _views(plan: Plan, device: torch.device, step: int = 0, batch: int = 16) -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (batch, 1, 64, 64), generator=torch.Generator().manual_seed(step))
    images = torch.nn.functional.interpolate(images.float(), size=plan.image_size, mode="bicubic").clamp(0, 255)
    augment = TwoViewAugmentation(image_size=plan.image_size)
    with torch.autocast(device.type, enabled=False):
        return augment(images.to(torch.uint8).to(device), view_draws(0, step, range(batch)))


def _loss_and_slopes(objective: Objective, views: tuple[Tensor, Tensor]) -> tuple[float, Tensor]:
    objective.zero_grad()
    loss = objective(*views).loss
    loss.backward()
    slopes = [p.grad.double().flatten().cpu() for p in objective.parameters() if p.grad is not None]
    return loss.item(), torch.cat(slopes)


def _differ(one: tuple[float, Tensor], two: tuple[float, Tensor]) -> dict[str, float]:
    """Relative differences of losses and of all gradients together."""
    return {
        "loss": abs(one[0] - two[0]) / abs(one[0]),
        "gradient": ((one[1] - two[1]).norm() / one[1].norm()).item(),
    }


def check_against_cpu(plan: Plan) -> dict[str, Any]:
    """A float32 step on the device and on the CPU, without TF32."""
    cpu = torch.device("cpu")
    views = _views(plan, cpu)
    on_device = (views[0].to(plan.device), views[1].to(plan.device))
    with exact_convolutions():  # matrix products are in float32 anyway
        theirs = _views(plan, plan.device)
        found = _differ(
            _loss_and_slopes(_objective(plan, cpu), views), _loss_and_slopes(_objective(plan, plan.device), on_device)
        )
    found["views"] = max((one.cpu() - two).abs().max().item() for one, two in zip(theirs, views, strict=True))
    return found | {"passed": found["loss"] < 1e-4 and found["gradient"] < 1e-2 and found["views"] < 1e-3}


def check_compiled(plan: Plan) -> dict[str, Any]:
    """A compiled step against an eager one."""
    objective, views = _objective(plan, plan.device), _views(plan, plan.device)
    compiled = copy.deepcopy(objective)
    compiled.compile()
    found = _differ(_loss_and_slopes(objective, views), _loss_and_slopes(compiled, views))
    return found | {"passed": found["loss"] < 1e-3 and found["gradient"] < 2e-2}


def _curve(plan: Plan, precision: str) -> list[float]:
    objective = _objective(plan, plan.device)
    arguments = PretrainingArguments(output_dir="none")
    optimizer = create_optimizer(objective, arguments)
    losses = []
    for step in range(plan.steps):
        set_learning_rate(optimizer, 0.02)
        half = torch.autocast(plan.device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
        with half:
            loss = objective(*_views(plan, plan.device, step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def check_curves(plan: Plan) -> dict[str, Any]:
    """Losses of the first steps in bf16 and in float32."""
    full, half = _curve(plan, "no"), _curve(plan, "bf16")
    worst = max(abs(one - two) / one for one, two in zip(full, half, strict=True))
    return {"float32": full, "bf16": half, "worst": worst, "passed": worst < 0.05 and half[-1] < half[0]}


def check_overflow(plan: Plan) -> dict[str, Any]:
    """In fp16, a step whose gradients overflow moves no weight and halves the scale; the next steps move them."""
    objective = _objective(plan, plan.device)
    optimizer = create_optimizer(objective, PretrainingArguments(output_dir="none"))
    set_learning_rate(optimizer, 0.02)
    scaler = torch.amp.GradScaler(plan.device.type, init_scale=2.0**40)
    start = next(objective.parameters()).detach().clone()
    scales, moved = [], []
    for step in range(40):
        with torch.autocast(plan.device.type, torch.float16):
            loss = objective(*_views(plan, plan.device, step)).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        moved.append(not torch.equal(start, next(objective.parameters())))
    passed = not moved[0] and scales[0] == 2.0**39 and moved[-1] and bool(loss.isfinite())
    return {"scale": scales[-1], "skipped": moved.index(True) if True in moved else len(moved), "passed": passed}


def check_waits(plan: Plan) -> dict[str, Any]:
    """Steps of a real run in which any wait for the GPU is an error."""
    with tempfile.TemporaryDirectory() as folder:
        data = DataArguments(dataset=str(plan.cache), num_workers=2)
        training = PretrainingArguments(output_dir=folder, batch_size=8, epochs=1, mixed_precision="bf16")
        run = set_up(plan.arguments, data, training)
        run.wrapped.train()
        batches = run.remaining_batches()
        for step in range(6):
            batch = next(batches)
            if step >= 2 and plan.device.type == "cuda":  # cuDNN and cuBLAS have chosen their kernels
                torch.cuda.set_sync_debug_mode("error")
            try:
                output = run.wrapped(*run.make_views(batch))
                run.accelerator.backward(output.loss)
                run.note_loss(output.loss)
                run.optimizer.step()
                run.optimizer.zero_grad()
            finally:
                if plan.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")
        run.check_losses()
    return {"steps": 6, "passed": True}


def _command(plan: Plan, output: Path, *more: str) -> list[str]:
    words = [sys.executable, str(SCRIPT), "--dataset", str(plan.cache), "--output_dir", str(output)]
    words += ["--backbone", plan.backbone, "--image_size", str(plan.image_size), "--batch_size", "32"]
    words += ["--epochs", "2", "--checkpoint_steps", "3", "--deterministic", "--num_workers", "2"]
    return [*words, *more]


def _digest(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def check_resume(plan: Plan) -> dict[str, Any]:
    """`--deterministic`: the same command twice, and once killed with SIGKILL behind a checkpoint and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        whole, again, killed = (Path(folder, name) for name in ("whole", "again", "killed"))
        log = Path(folder, "log")
        with log.open("w") as out:
            done = [subprocess.run(_command(plan, one), stdout=out, stderr=out, check=False) for one in (whole, again)]
            process = subprocess.Popen(_command(plan, killed), stdout=out, stderr=out)
            while process.poll() is None and not (killed / "checkpoint-3" / "state.json").exists():
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.wait()
            was_killed = process.returncode == -signal.SIGKILL
            done.append(subprocess.run(_command(plan, killed, "--resume"), stdout=out, stderr=out, check=False))
        if any(one.returncode for one in done):
            raise RuntimeError(log.read_text()[-3000:])
        same = {"again": _digest(whole) == _digest(again), "resumed": _digest(whole) == _digest(killed)}
    return same | {"was_killed": was_killed, "passed": all(same.values()) and was_killed}


# -- how fast is it? ---------------------------------------------------------------------------------------------------


def time_steps(plan: Plan, compiled: bool) -> list[dict[str, Any]]:
    """The bare two-view step, lightly's VICReg where it is installed, and ours, in bf16: images/s, memory, ratio."""
    rows = []
    for backbone in plan.backbones[: 1 if compiled else None]:
        for batch in plan.batch_sizes[: 2 if compiled else None]:
            setting = Setting(backbone, plan.image_size, batch, plan.device, half=True)
            names = ("bare", "compiled") if compiled else ("bare", "eager", *VICREG)
            rows += _time_candidates(plan, setting, names)
    return rows


def _time_candidates(plan: Plan, setting: Setting, names: tuple[str, ...]) -> list[dict[str, Any]]:
    on_gpu = plan.device.type == "cuda"
    steps, memory = {}, {}
    for name in names:
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            steps[name] = training_step(name, setting)
            steps[name]()
        except torch.OutOfMemoryError:
            return [{"backbone": setting.backbone, "batch_size": setting.batch_size, "left_out": "out of memory"}]
        if on_gpu:
            memory[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    seconds = compare(steps, plan.rounds, plan.device, f"{setting.backbone}, batch {setting.batch_size}")
    return [
        {
            "backbone": setting.backbone,
            "batch_size": setting.batch_size,
            "step": name,
            "images_per_second": setting.batch_size / seconds[name]["median"],
            "of_bare": seconds["bare"]["median"] / seconds[name]["median"],
            "memory_gib": memory.get(name),
        }
        for name in names
    ]


def time_parts(plan: Plan) -> dict[str, Any]:
    """Both views alone, and the loss alone forward and backward, in milliseconds, at the first batch size."""
    batch = plan.batch_sizes[0]
    images = torch.randint(0, 256, (batch, 1, 256, 256), dtype=torch.uint8).to(plan.device)
    augment = TwoViewAugmentation(image_size=plan.image_size)
    plans = [ViewPlan(*(part.to(plan.device) for part in one)) for one in augment.plan(view_draws(0, 0, range(batch)))]
    objective = _objective(plan, plan.device)
    with torch.no_grad():
        embedded = [objective.embed(view) for view in _views(plan, plan.device, batch=batch)]

    def loss() -> None:
        leaves = [{name: value.detach().requires_grad_() for name, value in view.items()} for view in embedded]
        objective.loss(*leaves).loss.backward()

    parts: dict[str, Callable[[], Any]] = {"views": lambda: augment.apply(images, (plans[0], plans[1])), "loss": loss}
    seconds = compare(parts, 3 * plan.rounds, plan.device, "parts")
    return {"batch_size": batch} | {f"{name}_ms": 1e3 * values["median"] for name, values in seconds.items()}


def time_pretraining(plan: Plan) -> list[dict[str, Any]]:
    """The whole command in bf16, by workers, against the bare step."""
    setting = Setting(plan.backbone, plan.image_size, plan.batch_sizes[0], plan.device, half=True)
    bare = training_step("bare", setting)
    seconds = compare({"bare": bare}, plan.rounds, plan.device, "bare step")["bare"]["median"]
    del bare
    rows = []
    for workers in plan.workers:
        options = ["--num_workers", str(workers)]
        found = spread(pretraining_seconds(SCRIPT, plan.cache, setting, options, steps=8 * 5))
        rows.append(
            {
                "workers": workers,
                "images_per_second": setting.batch_size / found["median"],
                "of_bare": seconds / found["median"],
            }
        )
    return rows


def time_inference(plan: Plan) -> list[dict[str, Any]]:
    """The classifier's forward pass, float32, against timm's network."""
    rows = benchmark_inference(plan.backbone, [1, 64], plan.image_size, 10 * plan.rounds, plan.device)
    names = ("batch_size", "eager_ratio", "compiled_ratio")
    return [{name: row[name] for name in names} for row in rows]


# -- the command -------------------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Plan], Any]] = {
    "waits": check_waits,
    "against the CPU": check_against_cpu,
    "resume": check_resume,
    "curves": check_curves,
    "steps": partial(time_steps, compiled=False),
    "parts": time_parts,
    "pretraining": time_pretraining,
    "compiled": check_compiled,
    "compiled steps": partial(time_steps, compiled=True),
    "overflow": check_overflow,
    "inference": time_inference,
}
GPU_ONLY = ("overflow",)


def main() -> None:
    """Run all parts; exit code 1 where a check failed or a part raised an error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of gpu.json and gpu.md")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=7.5, help="no part begins later")
    parser.add_argument("--tiny", action="store_true", help="a toy network, few steps")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS), metavar="PART")
    words = parser.parse_args()
    device = torch.device(words.device)
    report: dict[str, Any] = {"hardware": describe_hardware(device), "code": code_version(), "parts": {}}
    words.output.mkdir(parents=True, exist_ok=True)
    start, failed = time.monotonic(), False
    Accelerator(cpu=device.type == "cpu", mixed_precision="bf16")  # fixes the precision for `check_waits`
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan(
            device=device,
            cache=phantom_cache(Path(folder), 64 if words.tiny else 1024),
            backbone="resnet18",
            image_size=224,
            steps=30,
            batch_sizes=(64, 256, 1024),
            backbones=("resnet18", "resnet50"),
            rounds=10,
            workers=(4, 8, 16),
        )
        if words.tiny:
            plan = replace(plan, backbone="test_resnet", image_size=32, steps=4, batch_sizes=(8,), rounds=1)
            plan = replace(plan, backbones=("test_resnet",), workers=(1,))
        for name in words.parts:
            found = _run_part(plan, name, (time.monotonic() - start) / 60 > words.minutes)
            report["parts"][name] = found
            failed |= isinstance(found, dict) and ("error" in found or found.get("passed") is False)
            report["minutes"] = (time.monotonic() - start) / 60
            write_json(words.output / "gpu.json", report)
            (words.output / "gpu.md").write_text(_markdown(report))
            print(f"{name}: {found}", flush=True)
    raise SystemExit(failed)


def _run_part(plan: Plan, name: str, late: bool) -> Any:
    if late:
        return {"left_out": "no time"}
    if name in GPU_ONLY and plan.device.type == "cpu":
        return {"left_out": "needs a GPU"}
    start = time.monotonic()
    try:
        found = PARTS[name](plan)
    except Exception:  # the other parts are worth having
        return {"error": traceback.format_exc()[-3000:]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # for the commands that the next parts start; does nothing without a GPU
    return found | {"seconds": time.monotonic() - start} if isinstance(found, dict) else found


def _markdown(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    lines = [f"# {hardware['name']}", "", f"torch {report['code']['torch']}, {report['minutes']:.1f} minutes.", ""]
    for name, found in report["parts"].items():
        rows = found if isinstance(found, list) else [found]
        names = list(dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, list)))
        cells = [[_cell(row.get(key)) for key in names] for row in rows]
        lines += [f"## {name}", "", markdown_table(names, cells), ""]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return "" if value is None else str(value).strip().replace("\n", " ")[-200:]


if __name__ == "__main__":
    main()
