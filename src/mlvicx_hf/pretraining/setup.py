"""What a run of pretraining is put together from: learning rate, optimiser, model, images."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from timm.optim import Lars
from torch import nn

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import new_file
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.reading.sampling import choose_views
from mlvicx_hf.data.reading.streaming import Stream, open_stream
from mlvicx_hf.encoders.loading import check_source
from mlvicx_hf.encoders.weights import is_timm_source, load_timm_weights
from mlvicx_hf.models.modeling_mlvicx import MLVICXForPreTraining

from .arguments import DataArguments, ModelArguments, PretrainingArguments


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
    if is_timm_source(source):
        model = MLVICXForPreTraining(config)
        load_timm_weights(model.mlvicx, source)
        return model
    loaded: Any = MLVICXForPreTraining.from_pretrained(
        check_source(source), config=config, output_loading_info=True, ignore_mismatched_sizes=True
    )
    model, report = loaded
    lacking = sorted(key for key in report["missing_keys"] if key.startswith("mlvicx."))
    if lacking:
        raise UserError(f"init_from={source} lacks {len(lacking)} weights of this encoder, such as {lacking[0]}")
    wrong = sorted(str(row[0]) for row in report["mismatched_keys"])
    if wrong:
        raise UserError(f"init_from={source}: {len(wrong)} weights have another shape, such as {wrong[0]}")
    return model


def load_images(data: DataArguments) -> tuple[Any, dict[str, Any], int]:
    """Rows of a cache to pretrain on, its manifest, and how many lateral images are left out.

    Raises:
        ValueError: a split that is not there, or options that only a stream takes.
    """
    for name in ("num_images", "image_column"):
        if getattr(data, name) is not None:
            raise UserError(f"{name}={getattr(data, name)} found without streaming; expected --streaming as well")
    cache = load_cache(data.dataset)
    if data.split not in cache.datasets:
        raise UserError(f"split={data.split!r} found; {data.dataset} has {', '.join(cache.datasets)}")
    images, left_out = choose_views(cache.datasets[data.split], data.views)
    limit = data.max_train_samples
    if limit is not None:
        if limit < 1:
            raise UserError(f"max_train_samples={limit} found; expected 1 or more")
        images = images.select(range(min(limit, len(images))))
    return images, cache.manifest, left_out


def load_stream(data: DataArguments) -> Stream:
    """The stream to pretrain on.

    Raises:
        ValueError: options that a stream cannot follow, or that do not fit the data.
    """
    if data.patient_balanced:
        raise UserError("patient_balanced found with streaming; a stream is read in order, so expected one of them")
    if data.max_train_samples is not None:
        raise UserError(f"max_train_samples={data.max_train_samples} found with streaming; expected --num_images")
    return open_stream(
        data.dataset,
        data.split,
        views=data.views,
        num_images=data.num_images,
        size=data.cache_size,
        image_column=data.image_column,
    )


def use_deterministic_algorithms() -> None:
    """Make torch compute the same bits every time, on GPUs too; what it cannot do that way is a RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def flat(description: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """One level of plain values, which is what trackers take."""
    flat = {}
    for section, values in description.items():
        for key, value in (values if isinstance(values, dict) else {"": values}).items():
            name = f"{section}.{key}".rstrip(".")
            flat[name] = value if isinstance(value, (str, int, float, bool)) else str(value)
    return flat


def keep_metrics_before(path: Path, step: int) -> None:
    """Drop the lines of `metrics.jsonl` that a killed run wrote after its last checkpoint.

    Args:
        path: of the file, which need not be there.
        step: of the checkpoint.
    """
    lines = path.read_text().splitlines() if path.exists() else []
    kept = []
    for text in lines:
        try:
            kept += [text] if json.loads(text)["step"] <= step else []
        except json.JSONDecodeError:  # the line that was being written at the kill
            continue
    with new_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in kept))
