"""Load an encoder, pretrained or not, under a new head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.common.files import write_json
from mlvicx_hf.encoders.external import ExternalEncoder, adapt, is_external
from mlvicx_hf.encoders.loading import check_source, looking_for, without_report
from mlvicx_hf.encoders.weights import is_timm_source, load_timm_weights, starting_processor
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.loss_mlvicx import multi_label_loss, own_precision, single_label_loss
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification, MLVICXPreTrainedModel, batch_norms

from .arguments import EncoderArguments


def load_config(arguments: EncoderArguments) -> MLVICXConfig:
    """Configuration of the model, or of the architecture that other weights get.

    Raises:
        UserError: a model of another kind.
    """
    source = _configured_by(arguments)
    if arguments.architecture not in (None, source):
        raise UserError(
            f"architecture={arguments.architecture!r} found with model={arguments.model!r}, which has its own; "
            "expected it with 'random' or timm's weights"
        )
    if is_external(arguments.model):
        return MLVICXConfig(use_context=False)  # holds labels and problem type; the encoder knows its own form
    config: Any = MLVICXConfig()
    if source is not None:
        with looking_for(check_source(source)), user_input():
            config = AutoConfig.from_pretrained(source)
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
    model_class: type[MLVICXPreTrainedModel],
    config: MLVICXConfig,
    arguments: EncoderArguments,
    square: tuple[int, str],
    image_size: int | None = None,
) -> tuple[Any, MLVICXImageProcessor]:
    """Load a model with a new head for this configuration, and its image processor.

    Args:
        model_class: with the head of the task.
        config: adapted to the task.
        arguments: which weights the encoder has.
        square: size and fit of the cache's squares. The image processor first makes such squares of other images.
        image_size: side of the input in pixels; None for the model's.

    Raises:
        UserError: a model whose encoder lacks weights, or an encoder of another library for another task than
            classification.
    """
    if is_external(arguments.model):
        if model_class is not MLVICXForImageClassification:
            raise UserError(f"model={arguments.model!r} found; expected a model of this package, with maps of levels")
        adapted = adapt(arguments.model, image_size)
        model: Any = ExternalClassifier(ExternalEncoder(adapted, config, arguments.model))
        processor = adapted.processor
    else:
        if image_size is not None:
            config.image_size = image_size  # before the model is made: some backbones are made for a size
        model, processor = _load_own(model_class, config, arguments)
        processor.image_size = image_size or processor.image_size
    processor.prepared_size, processor.fit = square
    return model, processor


def _load_own(
    model_class: type[MLVICXPreTrainedModel], config: MLVICXConfig, arguments: EncoderArguments
) -> tuple[Any, MLVICXImageProcessor]:
    source = _configured_by(arguments)
    if is_timm_source(arguments.model):
        processor = starting_processor(config, arguments.model)
    elif source is None:
        processor = MLVICXImageProcessor(config.image_size, config.num_channels)
    else:
        processor = MLVICXImageProcessor.from_pretrained(source)
    if arguments.model == "random":
        return model_class(config), processor
    if is_timm_source(arguments.model):
        started: Any = model_class(config)
        load_timm_weights(started.base_model, arguments.model)
        return started, processor
    with user_input(), without_report():
        loaded: Any = model_class.from_pretrained(
            arguments.model, config=config, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    model, report = loaded
    new = {*report["missing_keys"], *(str(row[0]) for row in report["mismatched_keys"])}
    lacking = sorted(key for key in new if key.startswith("mlvicx."))
    if lacking:
        raise UserError(f"{source} does not fit: {len(lacking)} weights of the encoder differ, such as {lacking[0]}")
    if {key for key in model.state_dict() if not key.startswith("mlvicx.")} - new:  # the head of an earlier task
        fresh = model_class(config)
        fresh.base_model.load_state_dict(model.base_model.state_dict())
        model = fresh
    return model, processor


class ExternalClassifier(nn.Module):
    """A linear layer on an encoder of another library, with what `MLVICXForImageClassification` offers to training.

    Args:
        encoder: with the configuration of the task.

    Raises:
        UserError: a configuration that asks for features of all levels.
    """

    def __init__(self, encoder: ExternalEncoder) -> None:
        super().__init__()
        self.config, self.source = encoder.config, encoder.source
        if self.config.pooled_levels == "all":
            raise UserError(f"pooled_levels='all' found with model={self.source!r}; expected 'last': it has one level")
        self.mlvicx = encoder
        self.classifier = nn.Linear(encoder.channels[-1], int(self.config.num_labels or 0))

    def freeze_backbone(self) -> None:
        """Switch off the encoder's gradients, and keep it in evaluation mode."""
        self.mlvicx.frozen = True
        self.mlvicx.requires_grad_(False).train(False)

    def freeze_batch_norm(self) -> None:
        """Keep statistics, scales and shifts of the encoder's batch normalisation as they are."""
        self.mlvicx.norms_frozen = True
        for norm in batch_norms(self.mlvicx):
            norm.requires_grad_(False).train(False)

    def forward(self, pixel_values: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """Logits [B, L] of images [B, C, S, S], and the loss if labels are given."""
        features = self.mlvicx(pixel_values).pooler_output
        with own_precision(features):  # rounded to bfloat16, many scores would be equal
            logits = self.classifier(features.float())
        return {"logits": logits} if labels is None else {"loss": self.compute_loss(logits, labels), "logits": logits}

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss of the configuration's problem type; see `MLVICXForImageClassification.compute_loss`."""
        if self.config.problem_type == "single_label_classification":
            return single_label_loss(logits.float(), labels)
        weights = self.config.positive_weights
        return multi_label_loss(logits.float(), labels, None if weights is None else list(weights))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the weights, and a configuration that says whose they are. No class loads them as a whole."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_model(self, str(Path(folder, "model.safetensors")))
        values = {"model_type": "external", "encoder": self.source, "id2label": self.config.id2label}
        values |= {name: getattr(self.config, name) for name in ("decision_thresholds", "calibration")}
        write_json(Path(folder, "config.json"), values)
