# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Load an encoder, pretrained or not, under a new head."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.encoders.loading import check_source
from mlvicx_hf.encoders.weights import is_timm_source, load_timm_weights, starting_processor
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXPreTrainedModel

from .arguments import EncoderArguments


def load_config(arguments: EncoderArguments) -> MLVICXConfig:
    """Configuration of the model, or of the architecture that other weights get.

    Raises:
        UserError: a model of another kind.
    """
    source = _configured_by(arguments)
    with user_input():
        config: Any = MLVICXConfig() if source is None else AutoConfig.from_pretrained(check_source(source))
    if config.model_type != "mlvicx":
        raise UserError(f"{source} holds a {config.model_type} model; expected one of mlvicx")
    if arguments.drop_context or is_timm_source(arguments.model):
        config.use_context = False
    return config


def _configured_by(arguments: EncoderArguments) -> str | None:
    """The model that gives configuration and image processor; None for the defaults."""
    pretrained = arguments.model != "random" and not is_timm_source(arguments.model)
    return arguments.model if pretrained else arguments.architecture


def load_for_task(
    model_class: type[MLVICXPreTrainedModel], config: MLVICXConfig, arguments: EncoderArguments, fit: str
) -> tuple[Any, MLVICXImageProcessor]:
    """Load a model with a new head for this configuration, and its image processor.

    Args:
        model_class: with the head of the task.
        config: adapted to the task.
        arguments: which weights the encoder has.
        fit: of the cache, for an image processor that no model brings along.

    Raises:
        UserError: a model whose encoder lacks weights.
    """
    source = _configured_by(arguments)
    if is_timm_source(arguments.model):
        processor = starting_processor(config, arguments.model)
        processor.fit = fit
    elif source is None:
        processor = MLVICXImageProcessor(config.image_size, config.num_channels, fit=fit)
    else:
        processor = MLVICXImageProcessor.from_pretrained(source)
    if arguments.model == "random":
        return model_class(config), processor
    if is_timm_source(arguments.model):
        fresh: Any = model_class(config)
        load_timm_weights(fresh.base_model, arguments.model)
        return fresh, processor
    with user_input():
        loaded: Any = model_class.from_pretrained(
            arguments.model, config=config, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    lacking = sorted(key for key in report["missing_keys"] if key.startswith("mlvicx."))
    lacking += sorted(str(row[0]) for row in report["mismatched_keys"] if str(row[0]).startswith("mlvicx."))
    if lacking:
        raise UserError(f"{source} does not fit: {len(lacking)} weights of the encoder differ, such as {lacking[0]}")
    return model, processor
