"""Model cards: a template and the files that runs wrote become the README of a published model.

Every figure comes from a file; a placeholder without a source is an error. The files are checked in `card_results`,
and what results say is put together in `card_tables`.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import validate_repo_id

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import json_field, new_file, read_json
from mlvicx_hf.common.text import markdown_table
from mlvicx_hf.data.cache.cache import MANIFEST

from .results import (
    NUMBER,
    Result,
    describe_code,
    describe_machine,
    last_part,
    read_results,
)
from .tables import build_tables, evaluation_results

RESULTS, RUN = "results.json", "run.json"
TAGS = ["mlvicx", "chest-x-ray", "radiology", "medical-imaging", "self-supervised-learning", "not-a-medical-device"]
METRICS = {"classification": ["roc_auc", "accuracy"], "segmentation": ["dice", "mean_iou"]}
PAGE = "---\n{{ card_data }}\n---\n\n{{ body }}"  # the form of huggingface_hub's own templates
SUBGROUPS = ("view", "sex", "age")  # of which a card says at least that they were not measured


@dataclass(frozen=True)
class Kind:
    """What a template describes: the saved classes it fits, the Hub's tag, the task of its results (None: any)."""

    architectures: tuple[str, ...]
    pipeline_tag: str
    task: str | None


KINDS = {
    "backbone": Kind(("MLVICXForPreTraining", "MLVICXModel"), "image-feature-extraction", None),
    "classifier": Kind(("MLVICXForImageClassification",), "image-classification", "classification"),
    "segmenter": Kind(("MLVICXForSemanticSegmentation",), "image-segmentation", "segmentation"),
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
    """The card of a model from a template and the files of its runs.

    Args:
        template: backbone.md, classifier.md or segmenter.md, or a changed copy of that name.
        model: folder of the saved model; a head's holds its own `results.json`, a backbone's its `run.json`.
        results: `results.json` files of evaluations.
        repo_id: name on the Hub that the card is for.
        pretraining: `run.json`, or the folder of the pretraining run, where the model's folder has none.
        cache: `cache.json`, or the folder of the cache of pretraining, which knows collection and patients.
        base_model: Hub name of the encoder that a head was trained on.
        datasets: Hub names of the data sets trained on.
        revision: that the examples load.
        code_url: address of the package's repository, for links.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: a placeholder without a source, or files that do not fit one another or the template.
    """
    kind = _kind(template)
    for name in (repo_id, *([base_model] if base_model else []), *datasets):
        validate_repo_id(name)
    config_file, processor_file = model / "config.json", model / "preprocessor_config.json"
    config, processor = read_json(config_file), read_json(processor_file)
    _check_architecture(template, config_file, config, kind)
    looked_at = [config_file, processor_file]
    context: dict[str, Any] = {
        "name": repo_id.split("/")[-1], "repo_id": repo_id, "base_model": base_model, "datasets": list(datasets),
        "revision": revision, "code_url": code_url, "config": config, "processor": processor,
    }  # fmt: skip
    encoder = {model.resolve().name, last_part(repo_id)}  # names that results may call the encoder by
    run_file = _run_file(model, pretraining)
    looked_at.append(run_file)
    if kind.task is None and not run_file.is_file():
        raise FileNotFoundError(
            f"{run_file}: no such file; expected the {RUN} of a pretraining run (--pretraining), or a card of your own"
        )
    if run_file.is_file():
        run = _read_run(run_file, config_file, config, every_field=kind.task is None)
        encoder |= {last_part(run["training"]["output_dir"]), run_file.resolve().parent.name}
        context["pretraining"] = run | _pretraining_facts(run, run_file)
        if cache is not None:
            looked_at.append(cache / MANIFEST if cache.is_dir() else cache)
            context["pretraining"]["cache"] = _read_cache(looked_at[-1], run, run_file)
        elif "source" in run:
            context["pretraining"]["cache"] = _cache_facts(run["source"], run, run_file)
    elif pretraining is not None:
        raise FileNotFoundError(f"{run_file}: no such file; expected the {RUN} of a pretraining run")
    own = None
    if kind.task is not None:
        own = read_results([model / RESULTS])[0]
        results = [own.path, *results]
        if run_file.is_file() and last_part(own.content["model"]) not in encoder:
            found = last_part(own.content["model"])
            raise UserError(f"{own.path}: model {found!r} found; expected {run_file.parent.name!r}, as of {run_file}")
        encoder = {last_part(own.content["model"])}
        context["training"] = own.content | _training_facts(own)
        context["thresholds"] = _thresholds(own, config_file, config)
    found_results = read_results(results)
    looked_at += [result.path for result in found_results]
    _check_results(found_results, template, kind, config_file, config, encoder)
    tables = build_tables(found_results, encoder, own)
    measured = {group for table in tables for group in table.subgroups}
    context["tables"] = tables
    context["unmeasured"] = [group for group in SUBGROUPS if group not in measured]
    context["synthetic"] = any(r.content["data"]["synthetic"] for r in found_results) or (
        "pretraining" in context and context["pretraining"]["synthetic"]
    )
    evaluations = evaluation_results(tables, repo_id)
    data = ModelCardData(
        base_model=base_model,
        datasets=list(datasets) or None,
        eval_results=evaluations or None,
        library_name="transformers",
        license="apache-2.0",
        metrics=[m for task in dict.fromkeys(r.content["task"] for r in found_results) for m in METRICS[task]] or None,
        model_name=context["name"] if evaluations else None,
        pipeline_tag=kind.pipeline_tag,
        tags=TAGS + (["synthetic-data"] if context["synthetic"] else []),
    )
    return ModelCard.from_template(data, template_str=PAGE, body=_fill(template, context, looked_at))


def _kind(template: Path) -> Kind:
    if template.stem not in KINDS:
        raise UserError(f"template {template} found; expected one named {', '.join(f'{name}.md' for name in KINDS)}")
    return KINDS[template.stem]


class _Missing(jinja2.StrictUndefined):
    """A placeholder without a source: an error even where it is formatted as a number."""

    def __format__(self, specification: str) -> str:
        return str(self)  # raises UndefinedError


def _fill(template: Path, context: dict[str, Any], looked_at: Sequence[Path]) -> str:
    """The template's text with its placeholders filled; `ModelCard.from_template` alone leaves unknown ones empty."""
    environment = jinja2.Environment(
        undefined=_Missing, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"thousands": "{:,}".format, "short": "{:g}".format}
    text = template.read_text(encoding="utf-8")
    try:
        return environment.from_string(text).render(context)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"{template}, line {error.lineno}: {error.message}") from error
    except (jinja2.UndefinedError, TypeError, ValueError) as error:  # no value, or one that is not a number
        frames = traceback.extract_tb(error.__traceback__)
        number = next(frame.lineno for frame in reversed(frames) if frame.filename == "<template>") or 1
        line = text.splitlines()[number - 1].strip()
        files = ", ".join(map(str, looked_at))
        raise UserError(f"{template}, line {number}, {line!r}: {error}; looked at {files}") from error


# -- what the files say ------------------------------------------------------------------------------------------------


def _check_architecture(template: Path, file: Path, config: dict[str, Any], kind: Kind) -> None:
    found = json_field(config, "architectures", list, file)
    if not set(found) & set(kind.architectures):
        raise UserError(f"{file}: architectures {found} found; expected {kind.architectures[0]} for {template.name}")


def _run_file(model: Path, pretraining: Path | None) -> Path:
    place = pretraining or model
    return place / RUN if place.is_dir() else place


def _read_run(file: Path, config_file: Path, config: dict[str, Any], every_field: bool) -> dict[str, Any]:
    """`run.json`, whose model is that of the card."""
    run = read_json(file)
    fields: dict[str, type | tuple[type, ...]] = {
        "model": dict, "data.dataset": str, "data.images": int, "data.data_hash": str, "training.output_dir": str,
        "training.epochs": int, "training.batch_size": int, "training.base_learning_rate": NUMBER, "synthetic": bool,
        "code.mlvicx_hf": str, "code.commit": str,
    }  # fmt: skip
    for name, kind in fields.items():
        json_field(run, name, kind, file, f"the {RUN} of a pretraining run")
    checked = run["model"] if every_field else ("backbone", "num_channels", "use_context", "context_reduction")
    for name in checked:
        if name in config and name in run["model"] and config[name] != run["model"][name]:
            raise UserError(f"{config_file}: {name}={config[name]} found; expected {run['model'][name]}, as of {file}")
    return run


def _pretraining_facts(run: dict[str, Any], file: Path) -> dict[str, Any]:
    """What a card says of a run beside its fields as they are."""
    training, data = run["training"], run["data"]
    steps = training["epochs"] * (data["images"] // training["batch_size"])  # the last incomplete batch waits
    start = run["model"].get("init_from")
    return {
        "dataset": last_part(data["dataset"]),
        "data_hash": data["data_hash"][:12],
        "steps": steps,
        "images_seen": steps * training["batch_size"],
        "peak_learning_rate": f"{training['base_learning_rate'] * training['batch_size'] / 256:g}",
        "start": "random weights" if start is None else "ImageNet" if start == "imagenet" else f"`{last_part(start)}`",
        "machine": describe_machine(run, file),
        "versions": describe_code(run["code"]),
    }


def _read_cache(file: Path, run: dict[str, Any], run_file: Path) -> dict[str, Any]:
    """Collection, splits and patients of the images of pretraining."""
    manifest = read_json(file)
    expected = f"the {MANIFEST} of a prepared cache"
    found, wanted = json_field(manifest, "data_hash", str, file, expected), run["data"]["data_hash"]
    if found != wanted:
        raise UserError(f"{file}: data_hash {found[:12]}… found; expected {wanted[:12]}…, as of {run_file}")
    return _cache_facts(manifest, run, file)


def _cache_facts(manifest: dict[str, Any], run: dict[str, Any], file: Path) -> dict[str, Any]:
    """What a card says of the cache of pretraining, from its manifest or from what the run wrote down of it."""
    split, expected = run["data"]["split"], f"the {MANIFEST} of a prepared cache, or the source of a run"
    counts = json_field(manifest, "splits", dict, file, expected)
    rows = [[name, f"{c['images']:,}", f"{c['patients']:,}"] for name, c in counts.items()]
    return {
        "collection": json_field(manifest, "collection", str, file, expected),
        "split_hash": json_field(manifest, "split_hash", str, file, expected)[:12],
        "splits": markdown_table(["split", "images", "patients"], rows),
        "patients": json_field(manifest, f"splits.{split}.patients", int, file, expected),
        "complete": counts[split]["images"] == run["data"]["images"],
    }


def _training_facts(own: Result) -> dict[str, Any]:
    """What a card says of a head's own training beside its fields as they are."""
    content = own.content
    counts = [[split, f"{c['images']:,}", f"{c['patients']:,}"] for split, c in content["counts"].items()]
    settings = [[name, str(value)] for name, value in content["hyperparameters"].items()]
    return {
        "encoder": last_part(content["model"]),
        "frozen": content["protocol"] == "frozen",
        "cache": last_part(content["data"]["cache"]),
        "data_hash": content["data"]["data_hash"][:12],
        "split_hash": content["data"]["split_hash"][:12],
        "percent": f"{100 * content['label_fraction']:g} %",
        "splits": markdown_table(["split", "images", "patients"], counts),
        "settings": markdown_table(["setting", "value"], settings),
        "machine": describe_machine(content, own.path),
        "versions": describe_code(content["code"]),
    }


def _thresholds(own: Result, config_file: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """Decision thresholds of a classifier, as evaluated and as saved with it; None where there are none."""
    found, saved = own.content.get("thresholds"), config.get("decision_thresholds")
    if found is None and saved is None:
        return None
    if found is None or (saved is not None and saved != found):
        raise UserError(f"{config_file}: decision_thresholds found that differ from thresholds of {own.path}")
    values = json_field(found, "values", dict, own.path)
    rows = [[n, "none: one value only" if v is None else f"{v:.3f}"] for n, v in values.items()]
    return {
        "listed": markdown_table(["class", "threshold"], rows),
        "split": json_field(found, "split", str, own.path),
        "criterion": json_field(found, "criterion", str, own.path),
    }


def _check_results(
    results: Sequence[Result],
    template: Path,
    kind: Kind,
    config_file: Path,
    config: dict[str, Any],
    encoder: Collection[str],
) -> None:
    """Refuse results of another task, of other classes, or, for a backbone, of another encoder."""
    for result in results:
        content = result.content
        if kind.task is None:
            found = last_part(content["model"])
            if found != "random" and found not in encoder:
                known = ", ".join(sorted(encoder))
                raise UserError(f"{result.path}: model {found!r} found; expected 'random' or this one ({known})")
        elif content["task"] != kind.task:
            raise UserError(
                f"{result.path}: task {content['task']!r} found; expected {kind.task!r} for {template.name}"
            )
        else:
            names = list(json_field(config, "id2label", dict, config_file).values())
            names = names[1:] if kind.task == "segmentation" else names  # the background is not scored
            if sorted(names) != sorted(content["labels"]):
                listed = ", ".join(content["labels"])
                raise UserError(f"{result.path}: labels {listed} found; expected {', '.join(names)}, the model's")


def main() -> None:
    """The command `scripts/render_card.py`."""
    parser = argparse.ArgumentParser(description="Fill a model card from the files of finished runs.")
    parser.add_argument("--template", type=Path, required=True, help="backbone.md, classifier.md or segmenter.md")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--results", type=Path, nargs="*", default=[], help="results.json files of evaluations")
    parser.add_argument("--repo_id", default="org/mlvicx-resnet18", help="name on the Hub")
    parser.add_argument("--pretraining", type=Path, help="run.json or folder of the pretraining run, if not --model")
    parser.add_argument("--cache", type=Path, help="cache of pretraining, for collection and patients")
    parser.add_argument("--base_model", help="Hub name of the encoder that a head was trained on")
    parser.add_argument("--datasets", nargs="*", default=[], help="Hub names of the data sets trained on")
    parser.add_argument("--revision", default="main", help="revision that the examples load")
    parser.add_argument("--code_url", help="address of the package's repository")
    parser.add_argument("--output", type=Path, help="file to write; by default the card is printed")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    card = render_card(**arguments)
    if output is None:
        print(card)
        return
    with new_file(output) as temporary:
        card.save(temporary)
    print(f"card written to {output}")
