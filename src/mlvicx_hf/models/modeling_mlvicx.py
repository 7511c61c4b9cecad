# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""MLVICX models: the encoder on a timm backbone, pretraining, classification, segmentation (arXiv 2403.11504).

This file travels to the Hub, so it imports nothing from the package but its flat neighbours, relatively.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HTTPError  # of the HTTP library that the client uses
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPoolingAndNoAttention,
    ImageClassifierOutputWithNoAttention,
    SemanticSegmenterOutput,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple, logging

from .backbones_mlvicx import Tap, create_backbone, find_taps, is_plain, layout_of, named_layers, refine
from .configuration_mlvicx import MLVICXConfig
from .hub_mlvicx import AUTO_MAP, check_download
from .layers_mlvicx import ContextBottleneck, Expander, GateConv2d, MultiLevelAggregator, UNetDecoder
from .loss_mlvicx import (
    LossTerms,
    at_least_float32,
    multi_label_loss,
    own_precision,
    segmentation_loss,
    single_label_loss,
    values_are_readable,
    variance_covariance_loss,
)

logger = logging.get_logger(__name__)


class MLVICXPreTrainedModel(PreTrainedModel):
    """Base class: configuration, initialisation, freezing, loading and publishing."""

    config_class = MLVICXConfig
    base_model_prefix = "mlvicx"
    main_input_name = "pixel_values"
    # Every loss is a mean already. Else the Trainer, which sees `**kwargs`, multiplies it by the number of accumulation
    # steps and of processes.
    accepts_loss_kwargs = False
    input_modalities = ("image",)  # type: ignore[assignment]  # as transformers' own models have it
    # They join maps, which must lie on one device; `MLVICXModel` adds the blocks of its backbone.
    _no_split_modules = ["ContextBottleneck", "MultiLevelAggregator", "UNetDecoder"]  # noqa: RUF012
    # Weights of another class's head: expanders and aggregation of pretraining, a classifier, a decoder.
    _keys_to_ignore_on_load_unexpected = [  # noqa: RUF012
        r"^(aggregator|global_expander|multi_level_expander)\.",
        r"^decoder\.",
        r"^classifier\.",
    ]

    @property
    def supports_gradient_checkpointing(self) -> bool:  # type: ignore[override]  # a plain attribute elsewhere
        """Whether the maps inside the stages can be computed again: of backbones that are lists of layers."""
        return bool(self.base_model.is_plain)

    def require_gradient_checkpointing(self) -> None:
        """Refuse a backbone that is no list of layers.

        Raises:
            ValueError: naming the backbone.
        """
        if not self.supports_gradient_checkpointing:
            raise ValueError(
                f"gradient checkpointing of backbone={self.config.backbone!r} found; expected a backbone that is a "
                "list of layers, such as resnet18"
            )

    # What both names lead to, in versions of transformers that have two.
    if hasattr(PreTrainedModel, "activation_checkpointing_enable"):

        def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
            """As in the base class, after `require_gradient_checkpointing`."""
            self.require_gradient_checkpointing()
            super().activation_checkpointing_enable(*args, **kwargs)

    else:

        def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
            """As in the base class, after `require_gradient_checkpointing`."""
            self.require_gradient_checkpointing()
            super().gradient_checkpointing_enable(*args, **kwargs)

    def _report_unexpected(self, head: str) -> None:
        """Name weights of this class's own `head` that are not loaded; other classes ignore them."""
        ignored = self._keys_to_ignore_on_load_unexpected  # a list or, in later transformers, a set
        self._keys_to_ignore_on_load_unexpected = type(ignored)(key for key in ignored if head not in key)

    _frozen = False  # of an encoder
    _frozen_norms: str | None = None  # part of an encoder whose batch normalisation is frozen; "" is all of it
    _labels_seen = False

    def __init__(self, config: MLVICXConfig, *args: Any, **kwargs: Any) -> None:
        config.validate()  # which `strict` makes; values may have been set since
        super().__init__(config, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, with one kind of error for weights that are not whole.

        Raises:
            OSError: weights that are damaged, absent or not reachable.
            ValueError: a model of another type.
        """
        source = pretrained_model_name_or_path
        try:
            return super().from_pretrained(source, *args, **kwargs)
        except SafetensorError as error:
            raise OSError(f"{source}: damaged weights: {error}; expected a whole safetensors file") from error
        except (HTTPError, OSError) as error:
            for reason in (error, error.__cause__):
                if isinstance(reason, HTTPError) and not isinstance(reason, OSError):
                    raise OSError(f"{source}: the download of the weights broke off ({reason}); try again") from error
            raise

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        """As in the base class, after a check of what was downloaded."""
        for file in checkpoint_files or []:
            check_download(Path(file))
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]  # the base class wraps its own
        """As in the base class. The code goes along, so that the model also loads where this package is not installed.

        Push the image processor, too.
        """
        self.config.auto_map = dict(AUTO_MAP)  # which makes the configuration save the code
        return super().push_to_hub(*args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise our own layers as torch does, and the backbone as timm does (see `MLVICXModel`)."""
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            if isinstance(module, GateConv2d):
                bound *= self.config.context_init_scale
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            super()._init_weights(module)

    def _check_labels(self, labels: Tensor) -> bool | None:
        """Say whether to look at the labels' values: of the first batch in any case, then where it costs nothing."""
        if self._labels_seen or not values_are_readable(labels):
            return None
        self._labels_seen = True
        return True

    def freeze_backbone(self) -> None:
        """Switch off the backbone's gradients, and keep it in evaluation mode through every call of `train()`."""
        encoder: Any = self.base_model
        encoder._frozen = True
        encoder.requires_grad_(False).train(False)

    def freeze_batch_norm(self, part: str = "") -> None:
        """Keep statistics, scales and shifts of the encoder's batch normalisation, through every call of `train()`.

        The statistics of a small batch, or of enlarged and moved images, are not those of the images to be read.

        Args:
            part: of the encoder, such as "backbone"; by default all of it.
        """
        encoder: Any = self.base_model
        encoder._frozen_norms = part
        for norm in batch_norms(encoder.get_submodule(part)):
            norm.requires_grad_(False).train(False)

    def train(self, mode: bool = True) -> MLVICXPreTrainedModel:
        """As `nn.Module.train`, but what is frozen stays in evaluation mode, whatever it is a part of."""
        super().train(mode and not self._frozen)
        if self._frozen_norms is not None:
            for norm in batch_norms(self.get_submodule(self._frozen_norms)):
                norm.train(False)
        return self


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The layers of a module that normalise over the batch."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def _running_statistics_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Normalise by the batch at hand without a trace in the running statistics: this forward pass is a repetition.

    Copies take the traces. Without statistics, the repetition would save fewer tensors, and checkpoints compare that.
    """
    norms = [norm for module in modules for norm in batch_norms(module)]
    kept = [(norm, name, buffer) for norm in norms for name, buffer in norm.named_buffers(recurse=False)]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)


class Stage(GradientCheckpointingLayer):
    """What runs between two levels. It has no weights: the layers stay where a checkpoint's names have them."""

    def forward(self, x: Tensor, layers: list[nn.Module], runs: list[None] | None = None) -> Tensor:
        """Apply layers one after another.

        Args:
            x: [B, C, H, W].
            layers: of the backbone, and a context bottleneck.
            runs: of gradient checkpointing, an empty list; a repetition in a backward pass finds a run in it.
        """
        if runs is None:
            return _apply(layers, x)
        with _running_statistics_kept(layers if runs else []):
            runs.append(None)
            return _apply(layers, x)


def _apply(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def _block_types(module: nn.Module) -> set[str]:
    """Names of the types that a backbone runs as one. A plain `nn.Sequential` runs its parts one after another."""
    types = set()
    for child in module.children():
        if type(child) is nn.Sequential:
            types |= _block_types(child)
        elif any(True for _ in child.children()):
            types.add(type(child).__name__)
    return types


def _refuse_replica(module: nn.Module, what: str) -> None:
    if getattr(module, "_is_replica", False):
        raise RuntimeError(f"torch.nn.DataParallel found; {what}: start one process a GPU, as `accelerate launch` does")


def _refine_output(encoder: MLVICXModel, level: int, tap: Tap, layer: nn.Module, _: Any, output: Tensor) -> Tensor:
    """Refine what a layer of the backbone gives, as a forward hook; the layers behind it see the refined map."""
    _refuse_replica(layer, "its copies of this backbone would use the context bottlenecks of the first GPU")
    return refine(encoder.context[level], tap, encoder.input_ratio, output)


class MLVICXModel(MLVICXPreTrainedModel):
    """The encoder f: a timm backbone whose every level is refined by a context bottleneck.

    Args:
        config: see `MLVICXConfig`. `context_placement` None becomes what the backbone allows, if it is no list of
            layers.

    Raises:
        ValueError: a backbone without features, or one whose maps cannot be refined between its layers although
            `context_placement` asks for it.
    """

    input_ratio = 1.0  # height over width of the input at hand

    def __init__(self, config: MLVICXConfig) -> None:
        super().__init__(config)
        self.backbone = create_backbone(config)
        self.is_plain = is_plain(self.backbone)
        taps = () if self.is_plain else find_taps(config.backbone, config.num_channels, config.image_size)
        between = taps is not None
        if config.context_placement == "between" and not between:
            raise ValueError(
                f"context_placement='between' found; the levels of {config.backbone} are made of several layers, "
                "behind which nothing follows; expected 'taps' or None"
            )
        self.refines_between = between and config.context_placement != "taps"
        if config.context_placement is None and not self.is_plain:
            config.context_placement = "between" if between else "taps"
        self.channels: list[int] = self.backbone.feature_info.channels()
        self.context = nn.ModuleList(
            ContextBottleneck(c, config.context_reduction, config.context_gain) if config.use_context else nn.Identity()
            for c in self.channels
        )
        self.pooled_features = self.channels[-1] if config.pooled_levels == "last" else sum(self.channels)
        self.stages = nn.ModuleList(Stage() for _ in self.channels)
        if taps and config.use_context and self.refines_between:
            layers = named_layers(self.backbone)
            for level, tap in enumerate(taps):
                hook = functools.partial(_refine_output, self, level, tap)
                layers[tap.name].register_forward_hook(hook, prepend=True)  # before those by which timm collects maps
        self._no_split_modules = [*(self._no_split_modules or []), *_block_types(self.backbone)]
        for tensor in (*self.backbone.parameters(), *self.backbone.buffers()):
            if not tensor.is_meta:  # from_pretrained builds on the meta device, and fills in missing weights later
                tensor._is_hf_initialized = True
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise a backbone's missing weights by timm's rules: draw a whole one, and take from it what is missing.

        As in a new model, where timm has initialised them before.
        """
        if all(module is not part for part in self.backbone.modules()):
            super()._init_weights(module)
            return
        names = ("parameters", "buffers")
        missing = {
            name: tensor
            for kind in names
            for name, tensor in getattr(self.backbone, f"named_{kind}")()
            if not getattr(tensor, "_is_hf_initialized", False)  # transformers' mark, as in its own functions
        }
        if missing:
            with torch.device("cpu"):
                config: Any = self.config
                drawn = create_backbone(config)
            values = dict(drawn.named_parameters()) | dict(drawn.named_buffers())
            for name, tensor in missing.items():
                init.copy_(tensor, values[name].to(tensor))
                tensor._is_hf_initialized = True

    def refined_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Compute the refined map of every level, finest first, each [B, C_p, H_p, W_p].

        Raises:
            ValueError: input that is not [B, num_channels, H, W].
        """
        expected = self.config.num_channels
        if pixel_values.ndim != 4 or pixel_values.shape[1] != expected:
            found = tuple(pixel_values.shape)
            count = f"{found[1]} channels" if pixel_values.ndim == 4 else f"{pixel_values.ndim} dimensions"
            raise ValueError(
                f"pixel_values of shape {found} with {count} found; expected [B, {expected}, H, W] "
                f"with {expected} channel(s), as num_channels={expected} says"
            )
        if not self.is_plain:
            return self._collected_maps(pixel_values)
        between = self.refines_between
        maps: list[Tensor] = []
        x, layers = pixel_values, []
        for name, layer in self.backbone.items():
            layers.append(layer)
            if name in self.backbone.return_layers:
                level = len(maps)
                x = self._run(self.stages[level], [*layers, self.context[level]] if between else layers, x)
                maps.append(x if between else self.context[level](x))
                layers = []
        return tuple(maps)

    def _collected_maps(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """Maps of a backbone that collects them itself; hooks have refined them on their way."""
        self.input_ratio = pixel_values.shape[2] / pixel_values.shape[3]
        maps = self.backbone(pixel_values)
        if layout_of(self.backbone) == "NHWC":
            maps = [level.permute(0, 3, 1, 2) for level in maps]
        if not (self.refines_between and self.config.use_context):  # without gates these are places for hooks
            maps = [context(level) for context, level in zip(self.context, maps, strict=True)]
        return tuple(maps)

    def _run(self, stage: Any, layers: list[nn.Module], x: Tensor) -> Tensor:
        """Apply the layers of a stage, with gradient checkpointing if transformers' or timm's switch is on."""
        timm_saves = self.backbone.grad_checkpointing
        if not (self.training and torch.is_grad_enabled() and (stage.gradient_checkpointing or timm_saves)):
            return stage(x, layers=layers)
        if not stage.gradient_checkpointing:
            return checkpoint(stage, x, layers=layers, runs=[], use_reentrant=False)
        if not x.requires_grad:
            # Reentrant checkpoints would lose the gradients of a stage whose input has none.
            function: Any = stage._gradient_checkpointing_func
            x = x.detach().requires_grad_(getattr(function, "keywords", {}).get("use_reentrant") is not False)
        return stage(x, layers=layers, runs=[])

    def pool(self, maps: tuple[Tensor, ...], levels: str | None = None) -> Tensor:
        """Pool the refined maps of all levels.

        Args:
            maps: finest first, each [B, C_p, H_p, W_p].
            levels: "last" or "all"; None for the configuration's `pooled_levels`.

        Returns:
            Features [B, C]; C is `pooled_features` when `levels` is None.

        Raises:
            ValueError: another value of `levels`.
        """
        levels = levels or self.config.pooled_levels
        if levels == "last":
            return maps[-1].mean((2, 3))
        if levels != "all":
            raise ValueError(f"levels={levels!r} found; expected 'last' or 'all'")
        return torch.cat([level.mean((2, 3)).to(maps[-1].device) for level in maps], 1)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndNoAttention | tuple[Any, ...]:
        """Encode a batch of images.

        Args:
            pixel_values: [B, num_channels, H, W], from `MLVICXImageProcessor`.
            output_hidden_states: also return the refined maps of all levels.
            kwargs: `return_dict=False` gives a plain tuple.

        Returns:
            `last_hidden_state` [B, C, h, w], `pooler_output` [B, C] (with `pooled_levels` "all" of all levels, finest
            first), `hidden_states` (refined maps, finest first).

        Raises:
            ValueError: input with another number of channels than the configuration's.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = self.refined_maps(pixel_values)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=maps[-1],
            pooler_output=self.pool(maps),
            hidden_states=maps if output_hidden_states else None,
        )


@dataclass
class MLVICXForPreTrainingOutput(ModelOutput):
    """Output of `MLVICXForPreTraining`. Fields of a branch whose weight is 0 are None.

    Args:
        loss: global_weight · L_G + λ · L_L (Eq. 5).
        global_loss: L_G (Eq. 3).
        multi_level_loss: L_L (Eq. 4).
        global_invariance: unweighted term of L_G, likewise the five that follow.
        global_variance: mean over the views.
        global_covariance: sum over the views.
        multi_level_invariance: unweighted term of L_L.
        multi_level_variance: mean over the views.
        multi_level_covariance: sum over the views.
        global_embeddings: z and z', [B, r] each, of this process's samples.
        multi_level_embeddings: m and m', [B, r] each.
        hidden_states: refined maps of view 1, finest first, then those of view 2.
    """

    loss: Tensor | None = None
    global_loss: Tensor | None = None
    multi_level_loss: Tensor | None = None
    global_invariance: Tensor | None = None
    global_variance: Tensor | None = None
    global_covariance: Tensor | None = None
    multi_level_invariance: Tensor | None = None
    multi_level_variance: Tensor | None = None
    multi_level_covariance: Tensor | None = None
    global_embeddings: tuple[Tensor, Tensor] | None = None
    multi_level_embeddings: tuple[Tensor, Tensor] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class MLVICXForPreTraining(MLVICXPreTrainedModel):
    """MLVICX for pretraining: encoder, global expander g, aggregation, multi-level expander h, loss (Eq. 5).

    Args:
        config: see `MLVICXConfig`.
    """

    main_input_name = "view_1"

    def __init__(self, config: MLVICXConfig) -> None:
        super().__init__(config)
        self.mlvicx = MLVICXModel(config)
        dims, final_norm = list(config.expander_dims), config.expander_final_norm
        if config.global_weight > 0:
            self.global_expander = Expander(self.mlvicx.channels[-1], dims, final_norm)
        if config.multi_level_weight > 0:
            self.aggregator = MultiLevelAggregator(config, self.mlvicx.channels)
            width = config.aggregation_channels * config.aggregation_size**2
            self.multi_level_expander = Expander(width, dims, final_norm)
        self.post_init()
        self._report_unexpected("expander")

    def embed(self, pixel_values: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Compute the global embedding z and the multi-level embedding m of one view, [B, r] each."""
        return self._expand(self.mlvicx.refined_maps(pixel_values))

    def _expand(self, maps: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor | None]:
        """Refined maps of one view to z and m."""
        z = self.global_expander(maps[-1].mean((2, 3))) if self.config.global_weight > 0 else None
        m = self.multi_level_expander(self.aggregator(maps).flatten(1)) if self.config.multi_level_weight > 0 else None
        return z, m

    @can_return_tuple
    def forward(
        self,
        view_1: Tensor,
        view_2: Tensor,
        return_loss: bool | None = True,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MLVICXForPreTrainingOutput | tuple[Any, ...]:
        """Compute the loss of two views of the same images; under torch.distributed, the loss of the global batch.

        Each view has its own forward pass, hence its own batch normalisation statistics.

        Args:
            view_1: [B, num_channels, H, W].
            view_2: [B, num_channels, H, W].
            return_loss: false gives only the embeddings; `add_losses` computes the rest. None is the configuration's
                `return_loss`, or true.
            output_hidden_states: also return the refined maps of all levels.
            kwargs: `return_dict=False` gives a plain tuple.

        Returns:
            `MLVICXForPreTrainingOutput`; the loss is its first value.

        Raises:
            ValueError: views of different shapes, or the loss of one image.
        """
        _refuse_replica(self, "each part of the batch would have a loss of its own")
        if return_loss is None:
            return_loss = getattr(self.config, "return_loss", True)  # which transformers sets without declaring it
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if view_1.shape != view_2.shape:
            raise ValueError(
                f"views of shapes {tuple(view_1.shape)} and {tuple(view_2.shape)} found; expected equal shapes"
            )
        if return_loss and view_1.shape[0] < 2:
            raise ValueError(f"a batch of {view_1.shape[0]} found; variance and covariance need at least 2 images")
        maps_1 = self.mlvicx.refined_maps(view_1)
        z_1, m_1 = self._expand(maps_1)
        maps_2 = self.mlvicx.refined_maps(view_2)
        z_2, m_2 = self._expand(maps_2)
        output = MLVICXForPreTrainingOutput(
            global_embeddings=None if z_1 is None or z_2 is None else (z_1, z_2),
            multi_level_embeddings=None if m_1 is None or m_2 is None else (m_1, m_2),
            hidden_states=(*maps_1, *maps_2) if output_hidden_states else None,
        )
        return self.add_losses(output) if return_loss else output

    def add_losses(self, output: MLVICXForPreTrainingOutput) -> MLVICXForPreTrainingOutput:
        """Compute the loss and its terms from the embeddings of a batch, and return all of it.

        The output is made in one call, because the order in which fields are set is that of its keys, and exporters
        name their results by it.
        """
        branches = (
            ("global", output.global_embeddings, self.config.global_weight),
            ("multi_level", output.multi_level_embeddings, self.config.multi_level_weight),
        )
        fields: dict[str, Tensor] = {}
        total: list[Tensor] = []
        for name, embeddings, weight in branches:
            if embeddings is not None:
                terms = self._loss(*embeddings)
                fields |= {f"{name}_{term}": value for term, value in zip(terms._fields, terms, strict=True)}
                total.append(weight * terms.loss)
        return MLVICXForPreTrainingOutput(
            loss=torch.stack([part.to(total[0].device) for part in total]).sum(),
            **fields,
            global_embeddings=output.global_embeddings,
            multi_level_embeddings=output.multi_level_embeddings,
            hidden_states=output.hidden_states,
        )

    def _loss(self, z_1: Tensor, z_2: Tensor) -> LossTerms:
        names = ("invariance_weight", "variance_weight", "covariance_weight", "variance_target", "variance_epsilon")
        options: Any = {name: getattr(self.config, name) for name in (*names, "invariance_reduction")}
        return variance_covariance_loss(z_1, z_2, **options)


class MLVICXForImageClassification(MLVICXPreTrainedModel):
    """The encoder with one linear layer on its pooled output (section IV-B of the paper).

    Args:
        config: `num_labels` or `id2label`, `problem_type` ("multi_label_classification" unless set otherwise) and
            `positive_weights` matter here. Without labels (`num_labels=0`) the logits are the pooled features.

    Another head may take the place of `classifier`: any module that turns [B, C] into [B, L]. Make it again after
    loading, and load its weights into it.
    """

    def __init__(self, config: MLVICXConfig) -> None:
        super().__init__(config)
        if config.positive_weights is not None and len(config.positive_weights) != config.num_labels:
            raise ValueError(
                f"{len(config.positive_weights)} positive_weights found; expected {config.num_labels}, one a label"
            )
        self.num_labels = int(config.num_labels or 0)
        self.mlvicx = MLVICXModel(config)
        features, labels = self.mlvicx.pooled_features, self.num_labels
        self.classifier: Any = nn.Linear(features, labels) if labels else nn.Identity()
        self.post_init()
        self._report_unexpected("classifier")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutputWithNoAttention | tuple[Any, ...]:
        """Classify a batch of images.

        Args:
            pixel_values: [B, num_channels, H, W], from `MLVICXImageProcessor`.
            labels: multi-label [B, L] of 1, 0 and NaN (unknown); single-label [B] of class indices, -100 for unknown.
            output_hidden_states: also return the refined maps of all levels.
            kwargs: `return_dict=False` gives a plain tuple.

        Returns:
            `loss` (when labels are given), `logits` [B, L], `hidden_states`.
        """
        encoded = self.mlvicx(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        # Use the head's own precision under autocast, too: rounded to bfloat16, many scores would be equal.
        with own_precision(pixel_values):
            logits = self.classifier(encoded.pooler_output.to(self._head_dtype()))
        loss = None if labels is None else self.compute_loss(logits, labels)
        return ImageClassifierOutputWithNoAttention(loss=loss, logits=logits, hidden_states=encoded.hidden_states)

    def _head_dtype(self) -> torch.dtype:
        """Type of the head's weights; of one without float weights, such as a quantised one, that of the model's."""
        weights = [*self.classifier.parameters(), *getattr(self.classifier, "_former_parameters", {}).values()]
        types = [weight.dtype for weight in weights if weight.is_floating_point()]  # `_former`: of nn.DataParallel
        return types[0] if types else self.dtype

    def compute_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss of the configuration's problem type, in float32 or more: masked BCE, or cross-entropy.

        Args:
            logits: [B, L].
            labels: see `multi_label_loss` and `single_label_loss`.

        Raises:
            ValueError: labels that do not fit. On a GPU only the first batch and those without gradients are looked at;
                a later one makes the loss NaN.
        """
        logits = at_least_float32(logits)
        labels, check = labels.to(logits.device), self._check_labels(labels)
        kind = self.config.problem_type
        if not self.num_labels:
            raise ValueError("labels found; expected none, since the model was made with num_labels=0")
        if kind == "single_label_classification":
            return single_label_loss(logits, labels, check=check)
        if kind != "multi_label_classification":
            raise ValueError(
                f"problem_type={kind!r} found; expected 'multi_label_classification' or 'single_label_classification'"
            )
        return multi_label_loss(logits, labels, self.config.positive_weights, check)


class MLVICXForSemanticSegmentation(MLVICXPreTrainedModel):
    """The encoder with a U-Net decoder (section IV-B of the paper).

    Args:
        config: `num_labels` or `id2label` (one label: a binary mask from one logit; K labels: classes of which 0 is the
            background), `decoder_hidden_sizes` and `semantic_loss_ignore_index` matter here.
    """

    def __init__(self, config: MLVICXConfig) -> None:
        super().__init__(config)
        self.num_labels = int(config.num_labels or 0)
        if not self.num_labels:
            raise ValueError("num_labels=0 found; expected 1 for binary masks, or the number of classes")
        self.mlvicx = MLVICXModel(config)
        self.decoder = UNetDecoder(config, self.mlvicx.channels)
        self.post_init()
        self._report_unexpected("decoder")

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SemanticSegmenterOutput | tuple[Any, ...]:
        """Segment a batch of images of any size.

        Args:
            pixel_values: [B, num_channels, H, W], from `MLVICXImageProcessor`.
            labels: [B, H, W] class indices; `semantic_loss_ignore_index` for pixels that do not count.
            output_hidden_states: also return the refined maps of all levels.
            kwargs: `return_dict=False` gives a plain tuple.

        Returns:
            `loss` (when labels are given, see `segmentation_loss`), `logits` [B, num_labels, H, W] at the resolution
            of the input, `hidden_states`.

        Raises:
            ValueError: labels of another size than the images, or with values out of range.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = self.mlvicx.refined_maps(pixel_values)
        logits = self.decoder(maps, pixel_values)
        loss = None
        if labels is not None:
            ignored = self.config.semantic_loss_ignore_index
            labels, check = labels.to(logits.device), self._check_labels(labels)
            if check and ignored > 1:  # a value that may be white in a mask; others are chosen on purpose
                white = labels == ignored
                if bool(((labels == 0) | white).all() and white.any()):
                    logger.warning(
                        f"masks of 0 and {ignored} alone found in the first batch. Pixels of {ignored} do not count, "
                        f"so if they show the structure, divide the masks by {ignored} first"
                    )
            loss = segmentation_loss(logits, labels, ignored, check)
        return SemanticSegmenterOutput(loss=loss, logits=logits, hidden_states=maps if output_hidden_states else None)


class MLVICXBackbone(BackboneMixin, MLVICXPreTrainedModel):
    """The encoder as a backbone of other transformers models (UperNet, DETR, Mask2Former …).

    Args:
        config: `out_features` (names such as "stage1", see `config.stage_names`) or `out_indices` choose the levels;
            by default the last.
    """

    has_attentions = False

    def __init__(self, config: MLVICXConfig) -> None:
        super().__init__(config)
        self.mlvicx = MLVICXModel(config)
        self.num_features = self.mlvicx.channels
        self.post_init()

    @property
    def out_features(self) -> list[str]:
        """Names of the levels that are returned, as the configuration has them."""
        return self.config.out_features

    @out_features.setter
    def out_features(self, names: list[str]) -> None:
        self.config.out_features = names

    @property
    def out_indices(self) -> list[int]:
        """Numbers of the levels that are returned, as the configuration has them."""
        return self.config.out_indices

    @out_indices.setter
    def out_indices(self, numbers: tuple[int] | list[int]) -> None:
        self.config.out_indices = numbers

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple[Any, ...]:
        """Compute the refined maps of the chosen levels.

        Args:
            pixel_values: [B, num_channels, H, W].
            output_hidden_states: also return the refined maps of all levels.
            output_attentions: there are none.
            kwargs: `return_dict=False` gives a plain tuple.

        Returns:
            `feature_maps`, finest first, each [B, C_p, H_p, W_p]; `hidden_states`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = self.mlvicx.refined_maps(pixel_values)
        chosen: Any = tuple(maps[level] for level in self.out_indices)
        return BackboneOutput(
            feature_maps=chosen,
            hidden_states=maps if output_hidden_states else None,
        )


__all__ = [
    "MLVICXBackbone",
    "MLVICXForImageClassification",
    "MLVICXForPreTraining",
    "MLVICXForSemanticSegmentation",
    "MLVICXModel",
    "MLVICXPreTrainedModel",
]
