"""What a run trains: the objective with its starting weights, and its batch normalisations."""

from dataclasses import asdict
from typing import Any

import torch
from timm.layers import DropPath, convert_sync_batchnorm
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.encoders.loading import check_source, without_report
from mlvicx_hf.encoders.weights import is_timm_source, load_timm_weights
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.layers_mlvicx import keep_shift
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel
from mlvicx_hf.objectives import Objective, find_objective, make_objective
from mlvicx_hf.objectives.base import Schedule

from .arguments import ModelArguments, PretrainingArguments

HEADS = ("global_expander", "aggregator", "multi_level_expander")  # of pretraining


def create_config(arguments: ModelArguments) -> MLVICXConfig:
    """Make the configuration of what a run trains.

    Raises:
        UserError: an unknown objective.
        ValueError: a value that no model can have.
    """
    values = asdict(arguments)
    for name in ("init_from", "objective", "objective_options"):
        del values[name]
    return MLVICXConfig(**find_objective(arguments.objective).configure(values))


def prepare_objective(
    model_arguments: ModelArguments, arguments: PretrainingArguments, schedule: Schedule
) -> Objective:
    """Make what a run trains, ready for its schedule, from the seed of the run.

    Raises:
        UserError: see `create_objective`; or arguments that the objective cannot obey.
    """
    torch.manual_seed(arguments.seed)
    objective = create_objective(model_arguments)
    _check_accumulation(objective, model_arguments.objective, arguments)
    objective.prepare(schedule)
    if arguments.gradient_checkpointing:
        with user_input():
            objective.encoder.require_gradient_checkpointing()
        objective.encoder.backbone.set_grad_checkpointing()
    if arguments.freeze_batch_norm:
        if not any(isinstance(part, _BatchNorm) for part in objective.encoder.backbone.modules()):
            objective.notes.append(f"freeze_batch_norm: without effect, a {model_arguments.backbone} has none")
        for part in objective.modules():
            if isinstance(part, MLVICXModel):  # a momentum copy as well: it must see what the encoder sees
                part.freeze_batch_norm("backbone")
    objective.notes[:0] = [*_unused_arguments(objective, model_arguments), *_leave_nothing_to_chance(objective)]
    return objective


def create_objective(arguments: ModelArguments) -> Objective:
    """Make what a run trains, with the starting weights that `init_from` names.

    Raises:
        UserError: an unknown objective, a model that cannot be built, or an earlier model that does not fit.
    """
    objective_class, source, start = find_objective(arguments.objective), arguments.init_from, ""
    with user_input():
        config = create_config(arguments)
        if source is None:
            model: Any = objective_class.model_class(config)
        elif is_timm_source(source):
            model = objective_class.model_class(config)
            start = load_timm_weights(model.base_model, source)
        else:
            model, start = _load_earlier(objective_class.model_class, config, source)
    objective = make_objective(arguments.objective, model, arguments.objective_options)
    objective.notes += [start] if start else []
    return objective


def _load_earlier(model_class: type[PreTrainedModel], config: MLVICXConfig, source: str) -> tuple[PreTrainedModel, str]:
    """A model with the weights of an earlier one, which must hold all of the encoder but gates, and what is new."""
    with without_report():
        loaded: Any = model_class.from_pretrained(
            check_source(source),
            config=config,
            dtype=torch.float32,  # some are saved in half precision
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    model, report = loaded
    encoder = "" if model.base_model is model else f"{model.base_model_prefix}."
    lacking = sorted(key for key in report["missing_keys"] if key.startswith(encoder))
    left = [key for key in report["unexpected_keys"] if ".context." in f".{key}"]
    gates = {key for key in model.state_dict() if key.startswith(f"{encoder}context.")}
    start = f"started from {source}"
    if gates and gates <= set(lacking):  # a plain network gets gates
        lacking = [key for key in lacking if key not in gates]
        start += ", which has no context bottlenecks: they start anew"
    elif gates:
        _check_gates(source, model.config)  # in which the backbone has said where its gates are
    elif left:
        start += f", without its context bottlenecks ({len(left)} weights)"
    larger = [key for key in report["unexpected_keys"] if ".backbone." in f".{key}"]
    if larger:
        raise UserError(
            f"init_from={source} holds {len(larger)} weights that this encoder lacks, such as {larger[0]}; expected "
            f"weights of a {config.backbone}, or another --backbone"
        )
    if lacking:
        raise UserError(
            f"init_from={source} lacks {len(lacking)} weights of this encoder, such as {lacking[0]}; expected weights "
            f"of a {config.backbone}, or another --backbone"
        )
    differing = sorted(str(row[0]) for row in report["mismatched_keys"])
    wrong = [key for key in differing if key.startswith(encoder)]
    if wrong:
        raise UserError(f"init_from={source}: {len(wrong)} weights have another shape, such as {wrong[0]}")
    if differing:
        start += f"; {len(differing)} weights of its heads have another shape and start anew, such as {differing[0]}"
    return model, start + (_compare_heads(source, model, encoder, report) if encoder else "")


def _compare_heads(source: str, model: Any, encoder: str, report: dict[str, Any]) -> str:
    """Say which weights of the heads are new although others are not, and which of the earlier ones are left out.

    Raises:
        UserError: an aggregation of other levels with the same shapes, which would take the weights of one for another.
    """
    own = [key for key in model.state_dict() if not key.startswith(encoder)]
    new = sorted(set(own) & set(report["missing_keys"]))
    left_out = sorted(key for key in report["unexpected_keys"] if key.split(".")[0] in HEADS)
    found = ""
    if 0 < len(new) < len(own):
        found += f"; {len(new)} weights of its heads are new, such as {new[0]}"
    if left_out:
        found += f"; {len(left_out)} weights of the earlier heads are left out, such as {left_out[0]}"
    anew = {*new, *(row[0] for row in report["mismatched_keys"])}
    if any(key.startswith("aggregator.") and key not in anew for key in own):
        now = model.aggregator.levels
        then = MLVICXConfig.from_pretrained(source).aggregation_levels or list(range(len(model.mlvicx.channels)))
        if then != now:
            raise UserError(
                f"aggregation_levels={now} found; expected {then}, as the heads of init_from={source} were trained, or "
                "its encoder alone, as `mlvicx export` writes it"
            )
    return found


def _check_gates(source: str, config: Any) -> None:
    """Refuse settings of the gates that differ from those the earlier model was trained with: no weight shows them."""
    earlier = MLVICXConfig.from_pretrained(source)
    for name, usual in (("context_gain", 1.0), ("context_placement", "between")):
        then, now = (getattr(each, name) or usual for each in (earlier, config))
        if then != now:
            raise UserError(f"{name}={now} found; expected {then}, as the gates of init_from={source} were trained")


def _check_accumulation(objective: Objective, name: str, arguments: PretrainingArguments) -> None:
    steps = arguments.gradient_accumulation_steps
    if objective.inexact_accumulation and (steps > 1 or arguments.find_batch_size):
        found = f"gradient_accumulation_steps={steps}" if steps > 1 else "find_batch_size"
        raise UserError(f"{found} found with objective={name}; expected neither: {objective.inexact_accumulation}")


def _unused_arguments(objective: Objective, arguments: ModelArguments) -> list[str]:
    """Say which arguments that differ from their defaults change nothing."""
    usual = ModelArguments()
    found = [name for name in objective.unused if getattr(arguments, name) != getattr(usual, name)]
    return [f"objective={arguments.objective} does not use {', '.join(found)}"] if found else []


def _leave_nothing_to_chance(objective: Objective) -> list[str]:
    """Turn off the dropout and the stochastic depth that some backbones of timm have by default.

    They would draw from torch's generator, which a checkpoint does not keep and the two passes of a micro-batch do not
    share: a resumed run would be another one. Return a note.
    """
    dropouts = [part for part in objective.modules() if isinstance(part, _DropoutNd) and part.p > 0]
    paths = [part for part in objective.modules() if isinstance(part, DropPath) and part.drop_prob > 0]
    for dropout in dropouts:
        dropout.p = 0.0
    for path in paths:
        path.drop_prob = 0.0
    found = len(dropouts) + len(paths)
    return [f"dropout and stochastic depth of {found} layers are off"] if found else []


def synchronise_norms(objective: Objective) -> Objective:
    """Take batch statistics over all processes, unless the objective needs those of each process.

    The shifts of an expander's last norm are buffers, for which torch's conversion has no place: they are parameters
    while it runs.
    """
    if not objective.synchronise_norms:
        return objective
    norms = {
        n: m for n, m in objective.named_modules() if isinstance(m, _BatchNorm) and "bias" in dict(m.named_buffers())
    }
    for norm in norms.values():
        shift = norm.bias
        del norm.bias
        norm.bias = nn.Parameter(shift, requires_grad=False)
    synchronised = convert_sync_batchnorm(objective)  # of timm: torch's drops the activation inside timm's norms
    for name in norms:
        keep_shift(synchronised.get_submodule(name))
    return synchronised
