"""What several test files share: tiny models, small caches made by the real `prepare`, commands and fresh processes."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.multiprocessing as mp
from forks import run_forked
from PIL import Image, ImageDraw
from transformers.utils import logging

from mlvicx_hf import MLVICXConfig, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.commands import main
from mlvicx_hf.common.provenance import package_commit
from mlvicx_hf.data.cache.prepare import prepare
from mlvicx_hf.data.collections.folder import FolderCollection
from mlvicx_hf.data.masks import foreground

ROOT = Path(__file__).parents[1]


def tiny_config(**values: Any) -> MLVICXConfig:
    """A network of some 400,000 weights for images of 32 or 64 pixels."""
    tiny: dict[str, Any] = {
        "backbone": "test_resnet",
        "image_size": 32,
        "expander_dims": [32, 32],
        "aggregation_channels": 16,
        "aggregation_size": 2,
    }
    return MLVICXConfig(**(tiny | values))


def environment(**more: str) -> dict[str, str]:
    """Of a child process: offline, and one thread, on which results do not depend."""
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | offline | more


def run_python(*words: object, timeout: float = 240, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the interpreter of the tests with these words."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=environment(**more), cwd=ROOT, check=False
    )


def run_code(code: str, *words: object, timeout: float = 240, **more: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process that has imported PyTorch, but neither transformers nor the package."""
    return run_forked(code, *map(str, words), environment=environment(**more), folder=ROOT, timeout=timeout)


def mlvicx(*words: object) -> subprocess.CompletedProcess[str]:
    """Run a command of `mlvicx` in this process, which leaves nothing of it behind."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with _settings_kept(), redirect_stdout(out), redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return subprocess.CompletedProcess(["mlvicx", *map(str, words)], code, out.getvalue(), err.getvalue())


SERIES = """
import json, sys
from helpers import mlvicx

done = [mlvicx(*words) for words in json.loads(sys.argv[1])]
print(json.dumps([[each.args, each.returncode, each.stdout, each.stderr] for each in done]))
"""


def mlvicx_elsewhere(*commands: Sequence[object], **more: str) -> list[subprocess.CompletedProcess[str]]:
    """Run commands of `mlvicx` one after another in one process of their own with these variables."""
    words = json.dumps([list(map(str, command)) for command in commands])
    done = run_code(SERIES, words, PYTHONPATH=str(ROOT / "tests"), **more)
    assert done.returncode == 0, done.stderr
    return [subprocess.CompletedProcess(*each) for each in json.loads(done.stdout.splitlines()[-1])]


@contextmanager
def _settings_kept() -> Iterator[None]:
    """Variables, threads and what transformers shows, as commands set them for their whole process."""
    variables, threads = dict(os.environ), torch.get_num_threads()
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(variables)
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()


def run_script(name: str, *words: object, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts."""
    return run_python(ROOT / "scripts" / name, *words, **more)


def in_two_processes(process: Callable[[int, str], None], folder: Path) -> None:
    """Run `process(rank, folder)` in two processes of one thread, which Accelerate joins by gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_join, (process, str(folder), port), nprocs=2)


def _join(rank: int, process: Callable[[int, str], None], folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    process(rank, folder)


def assert_users_error(done: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit code 2 and an error of one line that names these parts."""
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for part in parts:
        assert part in errors[0]


def replace(path: Path, old: str, new: str) -> None:
    """Replace the first `old` in a text file, which gzip may have compressed."""
    packed = path.suffix == ".gz"
    text = gzip.decompress(path.read_bytes()).decode() if packed else path.read_text()
    assert old in text
    text = text.replace(old, new, 1)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())


def draw(values: dict[str, bool], seed: int, size: int = 40) -> Image.Image:
    """Noise on grey with a bright disc where `disc` is, and stripes where `stripes` are."""
    return draw_with_mask(values, seed, size)[0]


def draw_with_mask(
    values: dict[str, bool], seed: int, size: int = 40, names: Sequence[str] = ("disc",)
) -> tuple[Image.Image, Image.Image]:
    """What `draw` draws and its mask of class indices; stripes hide the disc below them."""
    value = foreground(names)
    generator = np.random.default_rng(seed)
    image = Image.fromarray(generator.normal(90, 18, (size, size)).clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    mask = Image.new("L", image.size)
    mask_pen = ImageDraw.Draw(mask)
    if values.get("disc"):
        x, y = generator.integers(8, size - 20, 2)
        pen.ellipse((x, y, x + 14, y + 14), fill=210)
        mask_pen.ellipse((x, y, x + 14, y + 14), fill=value.get("disc", 0))
    if values.get("stripes"):
        for x in range(0, size, 6):
            pen.line((x, 0, x, size), fill=20, width=2)
            mask_pen.line((x, 0, x, size), fill=value.get("stripes", 0), width=2)
    return image, mask


def make_cache(
    folder: Path,
    rows: Sequence[dict[str, Any]],
    size: int = 32,
    name: str = "cache",
    mask_names: Sequence[str] = (),
    **options: Any,
) -> Path:
    """Draw one image a row, write the table beside them and prepare it.

    Args:
        folder: where images and cache go.
        rows: columns of the table; `_draw` says what is drawn and `_mask` whether its mask is known (default true):
            both are no columns.
        size: of the cache.
        name: of the cache's folder.
        mask_names: structures with masks, "disc" or "stripes".
        options: of `prepare`.
    """
    images = folder / f"{name}-images"
    (images / "masks" if mask_names else images).mkdir(parents=True)
    table = []
    for number, row in enumerate(rows):
        file = f"{number:04}.png"
        image, mask = draw_with_mask(row.get("_draw", {}), number, names=mask_names)
        image.save(images / file)
        columns = {"file_name": file} | {k: v for k, v in row.items() if not k.startswith("_")}
        if mask_names:
            columns["mask_file_name"] = f"masks/{file}" if row.get("_mask", True) else ""
            mask.save(images / "masks" / file)
        table.append(columns)
    with (images / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    collection = FolderCollection(images, mask_names=mask_names or None)
    prepare(collection, folder / name, size=size, num_workers=0, progress=False, **options)
    return folder / name


def unlabelled_cache(folder: Path, count: int = 40, **options: Any) -> Path:
    """Images for pretraining, two a patient."""
    rows = [{"patient_id": f"p{i // 2}", "_draw": {"disc": i % 3 == 0, "stripes": i % 4 == 0}} for i in range(count)]
    return make_cache(folder, rows, **options)


def segmentation_cache(
    folder: Path, count: int = 40, names: Sequence[str] = ("disc",), unknown: Sequence[int] = (), **options: Any
) -> Path:
    """Images with masks, two a patient, 60/20/20 by patient; half show a disc, the masks of the others lack it.

    Args:
        folder: where images and cache go.
        count: images, at least 10 for three splits.
        names: ("disc",) for binary masks, or classes such as ("background", "disc", "stripes"), where every other
            image shows stripes, too.
        unknown: numbers of the images whose mask is not known.
        options: of `make_cache` and `prepare`.
    """
    rows = [
        {
            "patient_id": f"p{number // 2}",
            "split": ("train", "train", "train", "validation", "test")[number // 2 % 5],
            "_draw": {"disc": number % 2 == 0, "stripes": "stripes" in names and number % 4 in (1, 2)},
            "_mask": number not in unknown,
        }
        for number in range(count)
    ]
    return make_cache(folder, rows, mask_names=names, **options)


def save_encoders(folder: Path, count: int) -> list[str]:
    """Folders of tiny encoders with different random weights, and their image processors."""
    models = []
    for seed in range(count):
        torch.manual_seed(seed)
        models.append(str(folder / f"model-{seed}"))
        MLVICXModel(tiny_config(context_init_scale=1)).save_pretrained(models[-1])  # gates that do something
        MLVICXImageProcessor(image_size=32).save_pretrained(models[-1])
    return models


@contextmanager
def hidden_checkout() -> Iterator[None]:
    """Hide the commit of the checkout, which each process looks up once, from this process and its children."""
    package_commit.cache_clear()
    try:
        with mock.patch.dict(os.environ, {"GIT_DIR": "/nowhere"}):
            yield
    finally:
        package_commit.cache_clear()
