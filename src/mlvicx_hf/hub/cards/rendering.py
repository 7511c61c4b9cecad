"""Fill a template with the files that runs wrote: the model card, which is the README of a published model.

Every figure comes from a file; a placeholder without a source is an error.
"""

import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.files import json_field, read_json, read_text
from mlvicx_hf.data.cache.cache import MANIFEST
from mlvicx_hf.encoders.inference import weights_of

from .results import NUMBER, TASKS, Result, describe_code, describe_machine, last_part, read_results
from .tables import build_tables, calibration_table, evaluation_results

RESULTS_NAME, RUN_NAME = "results.json", "run.json"
RUN_FILE = "the run.json of a pretraining run"
TEMPLATES = Path(__file__).parent / "templates"
CARD_TAGS = ["mlvicx", "chest-x-ray", "radiology", "medical-imaging", "self-supervised-learning"]
CARD_TAGS += ["not-a-medical-device"]
PAGE = "---\n{{ card_data }}\n---\n\n{{ body }}"  # the form of huggingface_hub's own templates
METHODS = {  # by the name that --objective takes
    "mlvicx": "MLVICX", "vicreg": "VICReg", "barlow_twins": "Barlow Twins", "simclr": "SimCLR", "simsiam": "SimSiam",
    "byol": "BYOL", "moco_v2": "MoCo v2", "inter_moco": "Inter-MoCo", "caid": "CAiD", "pcrl_v1": "PCRL",
    "pcrl_v2": "PCRLv2",
}  # fmt: skip
OPTIMIZERS = {"lars": "LARS", "sgd": "SGD", "adamw": "AdamW"}
SUBGROUPS = ("view", "sex", "age")  # of which a card says at least that they were not measured
ENCODER_FIELDS = ("backbone", "num_channels", "use_context", "context_reduction")
RUN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "model": dict, "data.dataset": str, "data.images": int, "data.data_hash": str, "training.output_dir": str,
    "training.epochs": NUMBER, "training.batch_size": int, "training.base_learning_rate": NUMBER, "synthetic": bool,
    "code.mlvicx_hf": str, "code.commit": str,
}  # fmt: skip


@dataclass(frozen=True)
class CardKind:
    """What a template describes: the saved classes it fits, the Hub's tag, the task of its results (None: any)."""

    architectures: tuple[str, ...]
    pipeline_tag: str
    task: str | None


CARD_KINDS = {
    "backbone": CardKind(("MLVICXForPreTraining", "MLVICXModel"), "image-feature-extraction", None),
    "classifier": CardKind(("MLVICXForImageClassification",), "image-classification", "classification"),
    "segmenter": CardKind(("MLVICXForSemanticSegmentation",), "image-segmentation", "segmentation"),
}


def render_card(
    template: Path,
    model: Path,
    results: Sequence[Path],
    *,
    repo_id: str = "org/mlvicx-resnet18",
    pretraining: Path | None = None,
    cache: Path | None = None,
    base_model: str | None = None,
    datasets: Sequence[str] = (),
    revision: str = "main",
    code_url: str | None = None,
) -> ModelCard:
    """Render the card of a model from a template and the files of its runs.

    Args:
        template: backbone.md, classifier.md or segmenter.md, or a changed copy of that name.
        model: folder of the saved model; a head's holds its own `results.json`, a backbone's its `run.json`.
        results: `results.json` files of evaluations.
        repo_id: name on the Hub that the card is for.
        pretraining: `run.json`, or the folder of the pretraining run, where the model's folder has none.
        cache: `cache.json`, or the folder of the cache of pretraining, which knows collection and patients.
        base_model: Hub name of the encoder that a head was trained on.
        datasets: Hub names of the data sets trained on.
        revision: revision that the examples load.
        code_url: address of the package's repository, for links.

    Raises:
        FileNotFoundError: a file that is not there.
        UserError: a placeholder without a source, or files that do not fit one another or the template.
    """
    if template.stem not in CARD_KINDS:
        expected = ", ".join(f"{name}.md" for name in CARD_KINDS)
        raise UserError(f"template {template} found; expected one named {expected}")
    kind = CARD_KINDS[template.stem]
    with user_input():
        for name in (repo_id, *([base_model] if base_model else []), *datasets):
            validate_repo_id(name)
    config, processor = read_json(model / "config.json"), read_json(model / "preprocessor_config.json")
    _check_model(template, model, config, kind)
    run_file = _run_file(model, pretraining, required=kind.task is None or pretraining is not None)
    cache_file = cache / MANIFEST if cache is not None and cache.is_dir() else cache
    run = _read_run(run_file, cache_file, model, config, kind) if run_file.is_file() else None
    own = None if kind.task is None else _read_own_results(model, config)
    encoder = _encoder_names(model, repo_id, run, run_file, own)
    found = read_results([*([] if own is None else [own.path]), *results])
    _check_results(found, template, kind, model, config, encoder)
    tables = build_tables(found, encoder, own)
    context: dict[str, Any] = {
        "name": repo_id.split("/")[-1], "repo_id": repo_id, "base_model": base_model, "datasets": list(datasets),
        "revision": revision, "code_url": code_url, "config": config, "processor": processor, "tables": tables,
        "unmeasured": [group for group in SUBGROUPS if not any(group in table.subgroups for table in tables)],
        "synthetic": any([*(r.content["data"]["synthetic"] for r in found), run is not None and run["synthetic"]]),
    }  # fmt: skip
    if run is not None:
        context["pretraining"] = run
    if own is not None:
        context["training"] = own.content
        context["calibration_table"] = calibration_table(own)
    looked_at = [model / "config.json", model / "preprocessor_config.json", run_file]
    looked_at += [*([] if cache_file is None else [cache_file]), *(result.path for result in found)]
    body = _fill(template, context, looked_at)
    return ModelCard.from_template(_metadata(context, found, kind), template_str=PAGE, body=body)


def _metadata(context: dict[str, Any], found: Sequence[Result], kind: CardKind) -> ModelCardData:
    evaluations = evaluation_results(context["tables"], context["repo_id"])
    tasks = dict.fromkeys(result.content["task"] for result in found)
    return ModelCardData(
        base_model=context["base_model"],
        datasets=context["datasets"] or None,
        eval_results=evaluations or None,
        library_name="transformers",
        license="apache-2.0",
        metrics=[metric for task in tasks for metric in TASKS[task].metrics.values()] or None,
        model_name=context["name"] if evaluations else None,
        pipeline_tag=kind.pipeline_tag,
        tags=CARD_TAGS + (["synthetic-data"] if context["synthetic"] else []),
    )


class _Missing(jinja2.StrictUndefined):
    """A placeholder without a source: an error even where it is formatted as a number."""

    def __format__(self, specification: str) -> str:
        return str(self)  # raises UndefinedError


def _fill(template: Path, context: dict[str, Any], looked_at: Sequence[Path]) -> str:
    """Fill the placeholders of a template. `ModelCard.from_template` alone would leave unknown ones empty."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),  # of the parts that a template includes
        undefined=_Missing,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "thousands": "{:,}".format, "short": "{:g}".format, "last_part": last_part,
        "machine": describe_machine, "versions": describe_code,
    }  # fmt: skip
    text = read_text(template)
    try:
        return environment.from_string(text).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{error.filename or template}, line {error.lineno}: {error.message}") from error
    except (jinja2.UndefinedError, LookupError, TypeError, ValueError) as error:  # no value, or one of another type
        files_of_frames = {"<template>": template} | {str(part): part for part in TEMPLATES.glob("parts/*.md")}
        frames = reversed(traceback.extract_tb(error.__traceback__))
        frame = next(frame for frame in frames if frame.filename in files_of_frames)
        file, number = files_of_frames[frame.filename], frame.lineno or 1
        line = file.read_text(encoding="utf-8").splitlines()[number - 1].strip()
        files = ", ".join(map(str, looked_at))
        raise UserError(f"{file}, line {number}, {line!r}: {error}; looked at {files}") from error


# -- what the files say ------------------------------------------------------------------------------------------------


def _check_model(template: Path, model: Path, config: dict[str, Any], kind: CardKind) -> None:
    found = json_field(config, "architectures", list, model / "config.json")
    if not set(found) & set(kind.architectures):
        expected = f"{kind.architectures[0]} for {template.name}"
        raise UserError(f"{model / 'config.json'}: architectures {found} found; expected {expected}")


def _run_file(model: Path, pretraining: Path | None, required: bool) -> Path:
    """Where the record of pretraining lies, or would lie."""
    place = pretraining or model
    file = place / RUN_NAME if place.is_dir() else place
    if required and not file.is_file():
        other = "" if pretraining else " (--pretraining), or a card of your own"
        raise FileNotFoundError(f"{file}: no such file; expected {RUN_FILE}{other}")
    return file


def _read_run(
    file: Path, cache_file: Path | None, model: Path, config: dict[str, Any], kind: CardKind
) -> dict[str, Any]:
    """Read the `run.json` of this very model or encoder; add what a card says besides."""
    run = read_json(file)
    for name, type_ in RUN_FIELDS.items():
        json_field(run, name, type_, file, RUN_FILE)
    for name in run["model"] if kind.task is None else ENCODER_FIELDS:
        asked = run["model"].get(name)  # None: the model chose, such as a `context_placement` that suits its backbone
        if name in config and asked not in (None, config[name]):
            found = f"{name}={config[name]} found; expected {asked}, as of {file}"
            raise UserError(f"{model / 'config.json'}: {found}")
    if cache_file is not None:
        run["cache"], wanted = read_json(cache_file), run["data"]["data_hash"]
        found = json_field(run["cache"], "data_hash", str, cache_file, f"the {MANIFEST} of a prepared cache")
        if found != wanted:
            raise UserError(f"{cache_file}: data_hash {found[:12]}… found; expected {wanted[:12]}…, as of {file}")
    elif "source" in run:
        run["cache"] = run["source"]
    training = run["training"]
    batches = run["data"]["images"] // training["batch_size"]  # the last incomplete batch waits
    steps = round(training["epochs"] * batches)  # as `objectives.base.Schedule`
    optimizer = training.get("optimizer", "lars")  # older files do not say it
    rate = training["base_learning_rate"] * training["batch_size"] / 256
    start, objective = run["model"].get("init_from"), run["model"].get("objective", "mlvicx")
    return run | {
        "start": "random weights" if start is None else "ImageNet" if start == "imagenet" else f"`{last_part(start)}`",
        "steps": steps,
        "images_seen": steps * training["batch_size"],
        "peak_learning_rate": rate,
        "method": METHODS.get(objective, objective),
        "optimizer": OPTIMIZERS[optimizer],
    }


def _encoder_names(
    model: Path, repo_id: str, run: dict[str, Any] | None, run_file: Path, own: Result | None
) -> set[str]:
    """Names by which results call the encoder of the card."""
    names = {model.resolve().name, last_part(repo_id)}
    if run is not None:
        names |= {last_part(run["training"]["output_dir"]), run_file.resolve().parent.name}
    if own is None:
        return names
    trained_on = last_part(own.content["model"])
    if run is not None and trained_on not in names:
        raise UserError(f"{own.path}: model {trained_on!r} found; expected {run_file.parent.name!r}, as of {run_file}")
    return {trained_on}


def _read_own_results(model: Path, config: dict[str, Any]) -> Result:
    """Read the results of the head itself, whose thresholds and calibration must be those that were evaluated."""
    own = read_results([model / RESULTS_NAME])[0]
    for field, name in (("decision_thresholds", "thresholds"), ("calibration", "calibration")):
        saved, known = config.get(field), own.content.get(name) or {}
        if saved is not None and saved != {key: value for key, value in known.items() if key != "not_fitted"}:
            raise UserError(f"{model / 'config.json'}: {field} found that differ from {name} of {own.path}")
    return own


def _check_weights(result: Result) -> None:
    """Refuse results of weights that have been replaced since, as by another pretraining into the same folder."""
    place = Path(result.content["model"])
    then, now = result.content.get("weights_sha256"), weights_of(place) if place.is_dir() else {}
    if then and now and then != now:
        listed = " and ".join(" ".join(sorted(found.values())) for found in (then, now))
        raise UserError(
            f"{result.path}: scores of other weights than {place} has now (SHA-256 {listed}); expected results of the "
            "weights that are there"
        )


def _check_results(
    results: Sequence[Result],
    template: Path,
    kind: CardKind,
    model: Path,
    config: dict[str, Any],
    encoder: Collection[str],
) -> None:
    """Refuse results of another task, of other classes, or, for a backbone, of another encoder."""
    for result in results:
        content, found = result.content, last_part(result.content["model"])
        if kind.task is None:
            _check_weights(result)
            if content["model"] != "random" and found not in encoder:
                known = f"'random' or this one ({', '.join(sorted(encoder))})"
                raise UserError(f"{result.path}: model {found!r} found; expected {known}")
            continue
        if content["task"] != kind.task:
            expected = f"{kind.task!r} for {template.name}"
            raise UserError(f"{result.path}: task {content['task']!r} found; expected {expected}")
        names = list(json_field(config, "id2label", dict, model / "config.json").values())
        names = names[1:] if kind.task == "segmentation" else names  # the background is not scored
        if sorted(names) != sorted(content["labels"]):
            listed = ", ".join(content["labels"])
            raise UserError(f"{result.path}: labels {listed} found; expected {', '.join(names)}, the model's")
