"""Show what classifiers look at: Grad-CAM heat maps of the images of a prepared cache, drawn and scored."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import check_output, new_output, write_json
from mlvicx_hf.common.machine import choose_device
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.common.provenance import made_by
from mlvicx_hf.common.text import NOTICE
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.options import check_least
from mlvicx_hf.data.vocabulary import match
from mlvicx_hf.encoders.inference import LoadedModel, exact_convolutions, load
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification
from mlvicx_hf.scoring.labels import NOT_SCORED

from ..overlap import check_overlap, read_training
from .localization import Localization, Subject, chance, find_subject, localize, summarize, usual_place
from .overlays import Panel, draw_grid, draw_overlay

logger = logging.getLogger(__name__)
LONGEST_NAME = 240  # bytes of a picture's name, without its suffix


def grad_cam(
    model: MLVICXForImageClassification, pixel_values: Tensor, target: int, size: int, level: int | None = None
) -> Tensor:
    """Compute Grad-CAM (arXiv 1610.02391) of one logit on the refined map of a level.

    Args:
        model: in evaluation mode. Freeze its weights to save the time of their gradients.
        pixel_values: [B, num_channels, S, S].
        target: output whose logit is explained.
        size: side of the heat maps in pixels.
        level: of the encoder, 0 the finest; by default the last.

    Returns:
        [B, size, size], float32 of 0 or more, on the CPU.

    Raises:
        UserError: a level that the encoder does not have, or that its scores do not depend on.
        FloatingPointError: a heat map that is not finite.
    """
    from captum.attr import LayerGradCam

    method = LayerGradCam(lambda pixels: model(pixels).logits, find_layer(model, level))
    with exact_convolutions():
        try:
            heat = method.attribute(pixel_values.detach().requires_grad_(), target=target, relu_attributions=True)
        except RuntimeError as error:
            if "not have been used" not in str(error):
                raise
            raise UserError(
                f"level={level} found; no layer of this {model.config.backbone} sees the map of that level, which is "
                "taken beside them; expected the last level"
            ) from error
    if not heat.isfinite().all():
        raise FloatingPointError("a heat map with values that are not finite found; expected a trained model")
    return F.interpolate(heat.detach(), (size, size), mode="bilinear", align_corners=False)[:, 0].cpu()


def find_layer(model: MLVICXForImageClassification, level: int | None) -> nn.Module:
    """Find the module whose output is the refined map of a level, by default the last; UserError if there is none."""
    layers = model.mlvicx.context
    if level is not None and not 0 <= level < len(layers):
        raise UserError(f"level={level} found; {model.config.backbone} has levels 0 to {len(layers) - 1}, or last")
    return layers[len(layers) - 1 if level is None else level]


def heat_maps(
    loaded: LoadedModel, images: Any, rows: Sequence[int], target: int, size: int, level: int | None, batch_size: int
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """Yield some rows of a cache's split, in order, each with its heat map [size, size]."""
    for start in range(0, len(rows), batch_size):
        batch = [images[row] for row in rows[start : start + batch_size]]
        pixels = loaded.processor([row["image"] for row in batch])["pixel_values"].to(loaded.model.device)
        # The cached images are squares, so a resize brings the heat map back to them, whatever `fit` says.
        yield from zip(batch, grad_cam(loaded.model, pixels, target, size, level).numpy(), strict=True)


def find_outputs(loaded: LoadedModel, cache: Cache) -> dict[str, int]:
    """Map each label of a cache to the model's output of the same meaning, if it is one output and not several."""
    matching = match(read_training(loaded).collection, loaded.labels, cache.manifest["collection"], cache.label_names)
    alone = [found for found in matching.matches if len(found.model_columns) == len(found.data_columns) == 1]
    return {cache.label_names[found.data_columns[0]]: found.model_columns[0] for found in alone}


def choose_findings(
    cache: Cache, split: str, outputs: Mapping[str, Mapping[str, int]], wanted: Sequence[str] | None = None
) -> list[str]:
    """Choose the findings to explain: the wanted labels, or else all that every model knows and some image shows.

    `outputs` maps a model to the result of `find_outputs`.

    Raises:
        UserError: a finding that the cache or a model does not know, or that no image shows.
    """
    images, names = cache.datasets[split], cache.label_names
    labels = np.array(images["labels"], dtype=np.float64).reshape(len(images), len(names))
    shown = dict(zip(names, (labels == 1).any(0).tolist(), strict=True))
    common = [name for name in names if all(name in known for known in outputs.values())]
    chosen = [name for name in common if shown[name]] if wanted is None else list(dict.fromkeys(wanted))
    unknown = [name for name in chosen if name not in common]
    if unknown or not common:
        raise UserError(
            f"{'findings ' + ', '.join(unknown) if unknown else 'no finding in common'} found; {cache.path} has "
            f"{', '.join(names) or 'no labels'}, and all models know {', '.join(common) or 'none'} of these"
        )
    absent = [name for name in chosen or common if not shown[name]]
    if absent:
        raise UserError(f"{cache.path}: no image of {split} with {' or '.join(absent)} found; expected one or more")
    return chosen


@dataclass
class HeatMaps:
    """What one model's heat maps of a finding gave."""

    drawn: list[Panel] = field(default_factory=list)  # the first ones
    sources: list[str] = field(default_factory=list)  # names of the images that are drawn
    empty: int = 0  # number of heat maps that are zero everywhere
    scores: list[Localization] = field(default_factory=list)  # of each image whose region is known
    regions: list[np.ndarray] = field(default_factory=list)  # of the same images
    patients: list[str] = field(default_factory=list)  # of the same images


@dataclass(frozen=True)
class Explainer:
    """What is the same for all findings. The fields that are not described here are the arguments of `explain`."""

    models: Mapping[str, LoadedModel]  # by name
    outputs: Mapping[str, Mapping[str, int]]  # model → result of `find_outputs`
    images: Any  # split of a cache
    level: int | None
    max_images: int
    score: bool
    tolerance: float
    batch_size: int

    def rows(self, subject: Subject) -> tuple[int, ...]:
        """The images of a finding that are explained: the first are drawn, and all with a known region are scored."""
        return subject.rows[: max(self.max_images, subject.located if self.score else 0)]

    def explain(self, subject: Subject, folder: Path, bar: Any) -> dict[str, Any]:
        """Draw the heat maps of a finding into a folder, score them, and return what `explanations.json` says of it."""
        name = file_name(subject.finding)
        (folder / name).mkdir()
        done = {model: self._explain_by(model, subject, folder / name, bar) for model in self.models}
        first = next(iter(done.values()))
        if first.drawn:
            draw_grid(folder / f"grid_{name}.png", subject.finding, {model: maps.drawn for model, maps in done.items()})
        found: dict[str, Any] = {"images": len(subject.rows), "located": subject.located}
        found |= {"explained": len(self.rows(subject)), "pictures": first.sources}
        found |= {"empty_maps": {model: maps.empty for model, maps in done.items()}}
        labels = {name: loaded.labels[self.outputs[name][subject.finding]] for name, loaded in self.models.items()}
        found |= {"labels": labels}  # by which each model calls the finding
        if not self.score:
            return found
        if not first.scores:
            return found | {"scores": NOT_SCORED}
        scores = {model: np.array(maps.scores) for model, maps in done.items()}
        levels = {
            "chance": np.array([chance(region, self.tolerance) for region in first.regions]),
            "usual_place": np.array(usual_place(first.regions, first.patients, self.tolerance)),
        }
        return found | {"patients": len(set(first.patients))} | summarize(scores, levels, np.array(first.patients))

    def _explain_by(self, model: str, subject: Subject, folder: Path, bar: Any) -> HeatMaps:
        maps, loaded, output = HeatMaps(), self.models[model], self.outputs[model][subject.finding]
        rows = self.rows(subject)
        for row, heat in heat_maps(loaded, self.images, rows, output, subject.size, self.level, self.batch_size):
            region = subject.region(row)
            maps.empty += not heat.any()
            if len(maps.drawn) < self.max_images:
                maps.drawn.append(Panel(np.asarray(row["image"]), region, heat))
                maps.sources.append(row["source"])
                image = row["source"].split(":", 1)[-1]  # without the collection
                draw_overlay(folder / picture_name(image, model), maps.drawn[-1])
            if self.score and region is not None:
                maps.scores.append(localize(heat, region, self.tolerance))
                maps.regions.append(region)
                maps.patients.append(row["patient_id"])
            bar.update()
        return maps


def picture_name(image: str, model: str) -> str:
    """Name the picture of an image."""
    return f"{file_name(image, model)}.png"


def file_name(*words: str) -> str:
    """Join words to a name without a suffix. A system takes 255 bytes at most, so a hash ends a longer name."""
    name = "_".join(quote(word, safe=" ") for word in words)
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def explain(
    models: Mapping[str, str],
    dataset: str | Path,
    output: str | Path,
    *,
    split: str = "test",
    level: int | None = None,
    findings: Sequence[str] | None = None,
    mask_name: str | None = None,
    max_images: int = 8,
    score: bool = False,
    tolerance: float = 0,
    batch_size: int = 16,
    device: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Explain what classifiers see in the images that show a finding, and return what `explanations.json` holds.

    Nothing is transformed at random. Images that a model was trained on are explained too; a warning says so and is
    recorded. Arguments that are not listed are those of `prediction.predict`.

    Args:
        models: name → folder or Hub name of a classifier. Labels are matched by `data.vocabulary`.
        dataset: prepared cache.
        output: folder for pictures and `explanations.json`, written as a whole or not at all.
        split: of the cache.
        level: whose refined map is explained, 0 the finest; by default the last.
        findings: labels of the cache; by default all that every model knows and some image shows.
        mask_name: structure of the masks that is the one finding, if it has another name.
        max_images: number of images drawn for each finding, those with a known region first.
        score: compare the heat maps with the true regions, on all images that have one.
        tolerance: pixels of the cache by which a map's maximum may miss the region.

    Raises:
        ImportError: without captum or matplotlib.
        FileExistsError: an output that holds something.
        UserError: arguments, models, labels or masks that do not fit, no image of a finding, or none to score.
        OSError: a model or cache that is absent or damaged.
        FloatingPointError: a model whose heat maps are not finite.
    """
    require("a heat map", "explain", "captum", "matplotlib")
    check_least(1, models=len(models), batch_size=batch_size)
    check_least(0, max_images=max_images, tolerance=tolerance)
    output = check_output(Path(output))
    cache = load_cache(dataset, [split])
    loaded = {name: _load_frozen(source, level, device) for name, source in models.items()}
    outputs = {name: find_outputs(each, cache) for name, each in loaded.items()}
    seen = {name: check_overlap(read_training(each), cache, split, True, progress) for name, each in loaded.items()}
    subjects = _find_subjects(cache, split, choose_findings(cache, split, outputs, findings), mask_name, score)
    explainer = Explainer(loaded, outputs, cache.datasets[split], level, max_images, score, tolerance, batch_size)
    total = len(loaded) * sum(len(explainer.rows(subject)) for subject in subjects)
    settings = {"max_images": max_images, "tolerance": tolerance, "mask_name": mask_name, "batch_size": batch_size}
    manifest = {name: cache.manifest[name] for name in ("collection", "synthetic", "size", "data_hash", "split_hash")}
    output.parent.mkdir(parents=True, exist_ok=True)
    with new_output(output) as folder, progress_bar(total, "explaining", "map", show=progress) as bar:
        results = {
            "task": "explanation",
            "method": f"Grad-CAM of captum {version('captum')}",
            "findings": {subject.finding: explainer.explain(subject, folder, bar) for subject in subjects},
            "models": {
                name: each.describe()
                | {"level": len(each.model.mlvicx.context) - 1 if level is None else level, "overlap": seen[name]}
                for name, each in loaded.items()
            },
            "data": {"cache": str(dataset), "split": split} | manifest,
            "settings": settings,
            **made_by(next(iter(loaded.values())).model.device),
            "notice": NOTICE,
        }
        write_json(folder / "explanations.json", results)
    return results


def _load_frozen(source: str, level: int | None, device: str | None) -> LoadedModel:
    """Load a classifier without gradients of its weights. Refuse a level that it lacks; warn of one of one pixel."""
    loaded = load(source, device=choose_device(device), expected=MLVICXForImageClassification)
    find_layer(loaded.model, level)
    reductions, size = loaded.model.mlvicx.backbone.feature_info.reduction(), loaded.processor.image_size
    if size <= reductions[-1 if level is None else level]:
        logger.warning(
            "%s: a level has one pixel of an image of %d: its heat maps cannot point; --level %d can",
            loaded.source,
            size,
            max((i for i, each in enumerate(reductions) if each < size), default=0),
        )
    loaded.model.requires_grad_(False)
    return loaded


def _find_subjects(
    cache: Cache, split: str, findings: Sequence[str], mask_name: str | None, score: bool
) -> list[Subject]:
    listed = ", ".join(findings)
    if mask_name is not None and len(findings) > 1:
        raise UserError(f"mask_name={mask_name!r} for {listed} found; expected one finding (--findings)")
    subjects = [find_subject(cache, split, finding, mask_name) for finding in findings]
    if score and not any(subject.located for subject in subjects):
        raise UserError(f"{cache.path}: no box and no mask of {listed} found in {split}; expected some to score by")
    return subjects
