"""What a run writes of its scores: subgroups, a table of the test images, and what made the result."""

import csv
import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerState, TrainingArguments

from mlvicx_hf.common.files import new_file
from mlvicx_hf.common.provenance import made_by
from mlvicx_hf.data.cache.cache import Cache
from mlvicx_hf.scoring.labels import NOT_SCORED, mean_scored

from .arguments import EncoderArguments, FinetuningArguments, LabelledDataArguments
from .data import used_images

PLAIN_FIELDS = (  # of `FinetuningArguments`, which results tell as they are
    *("weight_decay", "patience", "lr_scheduler_type", "warmup_steps", "max_steps", "gradient_accumulation_steps"),
    *("max_grad_norm", "bf16", "fp16"),
)
AGE_BANDS = ("0-17", "18-39", "40-64", "65+")
AGE_LIMITS = (18, 40, 65)  # years at which the next band begins


def describe_run(
    cache: Cache,
    encoder: EncoderArguments,
    data: LabelledDataArguments,
    arguments: FinetuningArguments,
    settings: TrainingArguments,
    state: TrainerState,
) -> dict[str, Any]:
    """Which model, split, seed, data, code and machine made a result."""
    counts = {
        split: {"images": len(images), "patients": len(set(images["patient_id"]))}
        for split, images in cache.datasets.items()
    }
    alone = getattr(encoder, "fast_probe", False)  # then every process does the same
    processes = 1 if alone else settings.world_size
    best = state.best_global_step
    score = f"eval_{settings.metric_for_best_model}"
    epochs = {int(row["step"]): row["epoch"] for row in state.log_history if score in row}
    about = {name: cache.manifest[name] for name in ("collection", "synthetic", "policy", "data_hash", "split_hash")}
    about["label_hash"] = cache.manifest.get("label_hash")  # None in caches of an earlier version
    about["used_hash"] = hashlib.sha256(used_images(cache).encode()).hexdigest()
    about["patients_known"] = cache.manifest.get("patients_known")
    about["copies_across_splits"] = cache.manifest["duplicates"]["across_splits"]
    return {
        "protocol": "frozen" if encoder.freeze_backbone else "finetuned",
        "model": encoder.model,
        "architecture": encoder.architecture,
        "drop_context": encoder.drop_context,
        "label_fraction": data.label_fraction,
        "max_train_samples": data.max_train_samples,
        "seed": settings.seed,
        "counts": counts,
        "data": {"cache": data.dataset} | about,
        "hyperparameters": {
            "learning_rate": settings.learning_rate,
            "batch_size": settings.train_batch_size * processes * settings.gradient_accumulation_steps,
            "max_epochs": settings.num_train_epochs,
            **{name: getattr(arguments, name) for name in PLAIN_FIELDS},
            "patient_balanced": data.patient_balanced,
            **{name: value for name, value in arguments.trainer_options.items() if "token" not in name},
        },
        "epochs_trained": state.epoch,
        "best_epoch": epochs.get(best or -1),
        **made_by(settings.device, settings.world_size),
    }


def subgroups(images: Any) -> dict[str, np.ndarray]:
    """View, sex and age band of every image of a split, [N] names each; "" where they are unknown."""
    ages = np.array(images["age"], dtype=np.float64)
    known = ~np.isnan(ages)
    bands = np.full(len(ages), "", dtype=object)
    bands[known] = np.array(AGE_BANDS, dtype=object)[np.searchsorted(AGE_LIMITS, ages[known], side="right")]
    columns = {kind: np.array(images[kind], dtype=object) for kind in ("view", "sex")}
    columns["view"][columns["view"] == "UNKNOWN"] = ""
    return columns | {"age": bands}


def score_subgroups(images: Any, score: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    """Score the images of each view, sex and age band; `score` gives the scores of some rows of the split.

    Returns:
        {"view": {"PA": {"images", "patients", …scores}}, …}, without the kinds that have a single group. An image whose
        group is unknown is in none. `auroc_macro` and `auprc_macro` are means over the labels that can be scored in
        every group of the kind that has any (`macro_labels`), since means over others cannot be compared.
    """
    patients = np.array(images["patient_id"])
    found: dict[str, Any] = {}
    for kind, names in subgroups(images).items():
        present = sorted(set(names.tolist()) - {""}, key=_place)
        if len(present) < 2:
            continue
        found[kind] = {}
        for name in present:
            rows = np.flatnonzero(names == name)
            counts = {"images": len(rows), "patients": len(set(patients[rows].tolist()))}
            found[kind][name] = counts | score(rows)
        _share_labels(list(found[kind].values()))
    return found


def _share_labels(groups: Sequence[dict[str, Any]]) -> None:
    """Make the means of classifiers over labels those over the same labels in all groups."""
    known = [group["auroc"] for group in groups if group.get("num_scored_labels")]
    if not known:
        return
    shared = [name for name in known[0] if NOT_SCORED not in (scores[name] for scores in known)]
    for group in groups:
        group["macro_labels"] = shared
        for metric in ("auroc", "auprc"):
            group[f"{metric}_macro"] = mean_scored(group[metric][name] for name in shared)


def _place(name: str) -> tuple[int, str]:
    """Age bands in their order, other names by the alphabet."""
    return (AGE_BANDS.index(name) if name in AGE_BANDS else 0), name


def write_images(path: Path, images: Any, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write one row for every image of a split to a CSV file: source, patient, view, sex, age band, further columns."""
    groups = subgroups(images)
    about = zip(images["source"], images["patient_id"], *groups.values(), strict=True)
    with new_file(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["source", "patient_id", *groups, *columns])
        writer.writerows([*facts, *row] for facts, row in zip(about, rows, strict=True))
