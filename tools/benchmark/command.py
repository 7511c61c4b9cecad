"""The command `python -m benchmark`: sections, table, JSON."""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import write_json
from mlvicx_hf.common.machine import available_cores, describe_hardware, keep_freed_memory, use_cpu_threads
from mlvicx_hf.common.provenance import code_version

from .inference import benchmark_inference
from .methods import benchmark_methods
from .pipeline import (
    benchmark_input,
    benchmark_pretraining,
    benchmark_processes,
    benchmark_views,
    phantom_cache,
)
from .preparing import benchmark_prepare
from .timing import Spread
from .training import CANDIDATES, Setting, benchmark_covariance, benchmark_step

SECTIONS = ("step", "methods", "views", "covariance", "input", "pretraining", "processes", "inference")


def main(script: Path) -> None:
    """Measure what is asked for and print one line a figure.

    Args:
        script: scripts/pretrain.py, which is timed as a whole.

    Raises:
        UserError: an unknown section.
    """
    arguments = _parse()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        use_cpu_threads()
    setting = Setting(arguments.backbone, arguments.image_size, arguments.batch_size, device, arguments.bf16)
    sections = ["prepare"] if arguments.prepare is not None else arguments.sections
    report: dict[str, Any] = {
        "backbone": setting.backbone,
        "image_size": setting.image_size,
        "batch_size": setting.batch_size,
        "precision": "bf16" if setting.half else "float32",
        "hardware": describe_hardware(device) | {"threads": torch.get_num_threads()},
        "code": code_version(),
    }
    with tempfile.TemporaryDirectory() as folder:
        cache = arguments.dataset
        if cache is None and {"views", "input", "pretraining", "processes"} & set(sections):
            cache = phantom_cache(Path(folder))
        for section in sections:
            report[section] = _apart(section, arguments, setting, cache, script)
            _PRINT[section](report[section], setting)
            if arguments.json:  # after every section: what is measured is kept
                write_json(arguments.json, report)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed as ratios within one run.")
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), metavar="NAME", help=", ".join(SECTIONS))
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument(
        "--rounds", type=int, default=5, help="turns of every comparison; ten times as many of short ones"
    )
    parser.add_argument("--dataset", type=Path, help="cache for views, input and pretraining; drawn by default")
    parser.add_argument("--inference_batch_sizes", nargs="+", type=int, default=[1, 16, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 by autocast in step, pretraining and processes")
    parser.add_argument("--prepare", type=Path, metavar="ROOT", help="measure preparing these images instead")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.sections) - set(SECTIONS))
    if unknown:
        raise UserError(f"sections {', '.join(unknown)} found; expected some of {', '.join(SECTIONS)}")
    return arguments


def _apart(section: str, *words: Any) -> Any:
    """`_measure` in a process of its own: the memory of one section is not there in the next."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, section, *words).result()


def _measure(section: str, arguments: argparse.Namespace, setting: Setting, cache: Path, script: Path) -> Any:
    rounds, device = arguments.rounds, setting.device
    if device.type == "cpu":
        use_cpu_threads()
        keep_freed_memory()
    match section:
        case "step":
            return benchmark_step(setting, rounds, _possible_candidates(setting))
        case "methods":
            return benchmark_methods(setting, rounds)
        case "views":
            return benchmark_views(cache, setting, rounds)
        case "covariance":
            return benchmark_covariance([64, 256, 1024], [2048, 4096, 8192], rounds, device)
        case "input":
            return benchmark_input(cache, setting, rounds)
        case "pretraining":
            return benchmark_pretraining(script, cache, setting, max(1, rounds // 2))
        case "processes":
            return benchmark_processes(script, cache, setting, max(1, rounds // 2))
        case "inference":
            sizes = arguments.inference_batch_sizes
            return benchmark_inference(setting.backbone, sizes, setting.image_size, 10 * rounds, device)
        case _:
            return benchmark_prepare(arguments.prepare, 256, available_cores(), rounds)


def _possible_candidates(setting: Setting) -> tuple[str, ...]:
    """Those whose libraries and backbone are there; the others are named."""
    left_out = {}
    if importlib.util.find_spec("lightly") is None:
        left_out["lightly"] = 'pip install ".[benchmark]" for it'
    if not setting.backbone.startswith("resnet"):
        left_out["authors"] = "their code knows ResNets only"
    for name, why in left_out.items():
        print(f"step: {name} is left out: {why}")
    return tuple(name for name in CANDIDATES if name.removesuffix("_kept") not in left_out)


def _between(values: Spread, form: str = ".3g") -> str:
    return f"{values['median']:{form}} ({values['min']:{form}}-{values['max']:{form}})"


def _print_step(rows: dict[str, Any], setting: Setting) -> None:
    for name, row in rows.items():
        parts = [f"step, batch {setting.batch_size}, {name}: {_between(row['seconds'])} s, {row['ratio']:.3f} of bare"]
        if "gigaflops" in row:
            parts.append(f"{row['gigaflops']:.1f} GFLOP an image")
        if "memory_bytes" in row:
            parts.append(f"{row['memory_bytes'] / 2**30:.2f} GiB, {row['memory_ratio']:.2f} of bare")
        print(", ".join(parts))
    if "authors" in rows:
        theirs, beside = rows["authors"]["seconds"], rows["authors"]["seconds_beside"]
        print(
            f"step, authors over ours, eager: {theirs['median'] / beside['eager']['median']:.2f} "
            f"(bare {_between(beside['bare'])} s, ours {_between(beside['eager'])} s)"
        )
    if "authors_kept" in rows:
        times = (rows["authors_kept"]["ratio"] / rows[ours]["ratio"] for ours in ("eager", "compiled"))
        print("step, authors_kept over ours: {:.2f} (eager), {:.2f} (compiled)".format(*times))


def _print_views(row: dict[str, Any], setting: Setting) -> None:
    rates = row["images_per_second"]
    print(
        f"views, one core: {rates['ours']:.0f} img/s, torchvision {rates['torchvision']:.0f}: "
        f"{row['times_torchvision']:.1f} times faster"
    )


def _print_covariance(rows: list[dict[str, Any]], setting: Setting) -> None:
    for row in rows:
        print(
            f"covariance, {row['batch_size']}×{row['dimension']}: {1e3 * row['seconds']['ours']['median']:.3g} ms, "
            f"{row['times_plain']:.1f} times faster than r×r, {row['times_masked']:.1f} than r×r masked"
        )


def _print_input(row: dict[str, Any], setting: Setting) -> None:
    rates = row["images_per_second"]
    print(f"input: {_between(rates, '.0f')} img/s, {row['images_per_second_a_core']:.0f} a core")


def _print_rates(what: str) -> Callable[[dict[str, Any], Setting], None]:
    def show(row: dict[str, Any], setting: Setting) -> None:
        first, *others = row["images_per_second"]
        print(f"{what}, {first}: {_between(row['images_per_second'][first])} img/s")
        for name in others:
            rate = _between(row["images_per_second"][name])
            print(f"{what}, {name}: {rate} img/s, {row['share'][name]:.3f} of {first}")

    return show


def _print_inference(rows: list[dict[str, Any]], setting: Setting) -> None:
    for row in rows:
        rate = row["batch_size"] / row["seconds"]["timm"]["median"]
        print(
            f"inference, batch {row['batch_size']}: timm {rate:.1f} img/s; our time over timm's: "
            f"eager {row['eager_ratio']:.3f}, compiled {row['compiled_ratio']:.3f}"
        )


def _print_prepare(row: dict[str, Any], setting: Setting) -> None:
    rates = row["images_per_second"]
    print(
        f"prepare, {row['images']} images, {row['num_workers']} workers: {rates['prepare']:.1f} img/s, "
        f"{row['speed_ratio']:.3f} of the bare loop's {rates['bare']:.1f}; "
        f"further images {row['further_speed_ratio']:.3f}"
    )


_PRINT: dict[str, Callable[[Any, Setting], None]] = {
    "step": _print_step,
    "methods": _print_step,
    "views": _print_views,
    "covariance": _print_covariance,
    "input": _print_input,
    "pretraining": _print_rates("pretraining"),
    "processes": _print_rates("processes"),
    "inference": _print_inference,
    "prepare": _print_prepare,
}
