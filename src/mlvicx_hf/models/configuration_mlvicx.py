# Copyright 2026 The mlvicx_hf authors. Licensed under the Apache License, Version 2.0.
"""Configuration of the MLVICX models.

This file travels to the Hub beside the model, so it imports nothing from the package.
"""

import difflib
import functools
import math
from os import PathLike
from typing import Any, NamedTuple

import timm
import torch
from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .hub_mlvicx import AUTO_MAP, save_code

logger = logging.get_logger(__name__)

MULTI_LABEL: Any = "multi_label_classification"  # the problem type unless the user gives another
OF_LABELS = ("decision_thresholds", "calibration", "positive_weights")  # of a configuration


class Levels(NamedTuple):
    """What a backbone says of its levels, finest first.

    Attributes:
        names: "stem" if one has half the resolution, then "stage1", "stage2", ….
        channels: of every level's map.
        depths: blocks of every level; 0 of a stem without blocks; 1 where the backbone is no list of layers.
    """

    names: tuple[str, ...]
    channels: tuple[int, ...]
    depths: tuple[int, ...]


EVEN_LEVELS = 4  # of a network whose blocks all have one resolution
WORKING_BACKBONES = "resnet18, resnet34, resnet50, densenet121 or regnety_008"


def check_backbone(backbone: str) -> None:
    """Refuse a name that timm does not have.

    Raises:
        ValueError: names similar ones.
    """
    if not timm.is_model(backbone):
        similar = ", ".join(difflib.get_close_matches(backbone, timm.list_models(), 5)) or WORKING_BACKBONES
        raise ValueError(f"backbone={backbone!r} found; expected a timm model such as {similar}")


def create_features(backbone: str, **options: Any) -> Any:
    """Make a timm backbone that gives the maps of its levels, on the meta device as well."""
    try:
        return timm.create_model(backbone, features_only=True, **options)
    except NotImplementedError:  # before timm 1.0.30 RegNets find their widths with tensors, which need values
        with torch.device("cpu"):
            return timm.create_model(backbone, features_only=True, **options).to("meta")


def even_levels(backbone: Any) -> dict[str, Any]:
    """Ask for levels at even depths of a network whose blocks have one resolution; timm would take the last blocks."""
    info = getattr(getattr(backbone, "model", None), "feature_info", None)
    if not isinstance(info, list) or len(info) < EVEN_LEVELS or len({block["reduction"] for block in info}) > 1:
        return {}
    return {"out_indices": tuple((level + 1) * len(info) // EVEN_LEVELS - 1 for level in range(EVEN_LEVELS))}


@functools.cache
def backbone_levels(backbone: str) -> Levels:
    """Describe the levels of a timm backbone.

    Raises:
        ValueError: a name that timm does not have.
    """
    check_backbone(backbone)
    with torch.device("meta"):
        network = create_features(backbone)
        if level_options := even_levels(network):
            network = create_features(backbone, **level_options)
    reductions = network.feature_info.reduction()
    stem = ["stem"] if reductions[0] == 2 else []
    names = (*stem, *(f"stage{i + 1}" for i in range(len(reductions) - len(stem))))
    depths, deepest = [], 0
    for name, layer in network.named_children():
        blocks = dict(layer.named_children()).get("blocks", layer)
        deepest = max(deepest, sum(any(True for _ in block.children()) for block in blocks.children()))
        if name in getattr(network, "return_layers", ()):  # which no other form than `FeatureListNet` has
            depths.append(deepest)
            deepest = 0
    return Levels(names, tuple(network.feature_info.channels()), tuple(depths) or (1,) * len(names))


@strict
class MLVICXConfig(BackboneConfigMixin, PreTrainedConfig):
    """Architecture and loss of MLVICX (arXiv 2403.11504). docs/concepts/differences.md gives the defaults.

    Args:
        backbone: name of a timm model that can give the maps of several levels (`features_only`), such as resnet18.
        num_channels: channels of `pixel_values`; 1 for radiographs, 3 for converted colour weights.
        image_size: side of the input in pixels, also for the image processor.
        use_context: refine every level by a context bottleneck (Eqs. 1 and 2) before the next layer sees it.
        context_placement: "between": the layers behind a refined map see it; "taps": they see the plain map, and only
            what is made of the levels sees the refined ones. None: between, where the backbone allows it. The
            model writes down which, unless the backbone is a list of layers, as ResNets are: there it is between.
        context_reduction: None for the one shared 1×1 convolution of Eq. 1; a number for the two-layer form
            C → C/reduction → C of the authors' code.
        context_gain: factor of each of the two gates. With 1, as in the paper, the gates of an untrained network
            quarter every map: σ(0) · σ(0). With 2 they leave the maps as they are.
        context_init_scale: factor of the gates' random weights. With 0.01 every gate starts near the middle of its
            range, and all maps start with the same scale. With 1, as torch draws a convolution, some gates start open
            and some shut, by chance. Not 0: LARS would give weights of norm 0 a rate a thousand times the others'.
        pooled_levels: "last" pools the last refined map into `pooler_output`; "all" pools the maps of all levels and
            concatenates them. The classification head takes the same features.
        aggregation_levels: levels that enter the multi-level embedding; None for all.
        aggregation_size: side of the grid to which every level is pooled.
        aggregation_channels: channels of the compound representation u.
        aggregation_resize: side to which the maps are interpolated before pooling, as the authors do with 64; None
            pools them directly.
        expander_dims: widths of the linear layers of both expanders.
        expander_final_norm: batch normalisation after the last layer of the expanders too, as the authors' code has.
        invariance_weight: α of Eqs. 3 and 4.
        variance_weight: β.
        covariance_weight: γ.
        global_weight: weight of L_G in Eq. 5; with 0 the global expander is not built.
        multi_level_weight: λ, the weight of L_L in Eq. 5; with 0 aggregation and multi-level expander are not built.
        variance_target: Λ of Eq. 7.
        variance_epsilon: ε of Eq. 7, under the root.
        invariance_reduction: "mean" over batch and dimensions, or "sum" over the dimensions as Eq. 6.
        positive_weights: weight of the positives of each label in the multi-label loss; None for 1.
        decision_thresholds: of a classifier: {"values": {label: probability or None}, "split", "criterion", …}. A
            finding is present from its probability on; split and criterion say how the values were chosen.
        calibration: of a classifier: {"method": "platt" or "temperature", "values", "folded": true, "bands", "level",
            "counts", "split", …}. It says what the last layer contains already, since its weights are multiplied by
            the scales, and the band of probabilities of each label that are answered "unsure".
        decoder_hidden_sizes: widths of the segmentation decoder from the coarsest level to the input's resolution,
            one a level of the backbone; None for …, 64, 32, 16.
        semantic_loss_ignore_index: value of mask pixels that do not count in the segmentation loss.
        out_features: names of the levels that `MLVICXBackbone` returns, from `stage_names`; by default the last.
        out_indices: numbers of these levels.

    Raises:
        ValueError: a dictionary of another model type.
        StrictDataclassError: a value of another type or outside its range, named with what was expected.
    """

    model_type = "mlvicx"

    backbone: str = "resnet18"
    num_channels: int = 1
    image_size: int = 224
    use_context: bool = True
    context_placement: str | None = None
    context_reduction: int | None = None
    context_gain: float | int = 1.0
    context_init_scale: float | int = 0.01
    pooled_levels: str = "last"
    aggregation_levels: list[int] | tuple[int, ...] | None = None
    aggregation_size: int = 4
    aggregation_channels: int = 512
    aggregation_resize: int | None = None
    expander_dims: list[int] | tuple[int, ...] = (2048, 2048, 2048)
    expander_final_norm: bool = False
    invariance_weight: float | int = 25.0
    variance_weight: float | int = 25.0
    covariance_weight: float | int = 1.0
    global_weight: float | int = 1.0
    multi_level_weight: float | int = 1.0
    variance_target: float | int = 1.0
    variance_epsilon: float | int = 1e-4
    invariance_reduction: str = "mean"
    positive_weights: list[float | int] | tuple[float | int, ...] | None = None
    decision_thresholds: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    decoder_hidden_sizes: list[int] | tuple[int, ...] | None = None
    semantic_loss_ignore_index: int = 255

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in fields that depend on others. Set `problem_type`, because transformers would guess it."""
        if (kwargs.get("num_labels") or 0) < 0:
            raise ValueError(f"num_labels={kwargs['num_labels']} found; expected 0 or more")
        if self.problem_type is None:
            self.problem_type = MULTI_LABEL
        for name in ("aggregation_levels", "expander_dims", "positive_weights", "decoder_hidden_sizes"):
            value = getattr(self, name)
            setattr(self, name, list(value) if isinstance(value, tuple) else value)
        features, indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        self._out_features = self._out_indices = None
        if features is not None or indices is not None:
            self.set_output_features_output_indices(features, indices)
        super().__post_init__(**kwargs)

    @property
    def stage_names(self) -> list[str]:
        """Names of the backbone's levels, finest first."""
        return list(backbone_levels(self.backbone).names)

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the stages' maps, finest first, without a stem."""
        levels = backbone_levels(self.backbone)
        return [size for name, size in zip(levels.names, levels.channels, strict=True) if name != "stem"]

    @property
    def hidden_size(self) -> int:
        """Channels of the last map, `last_hidden_state`."""
        return self.hidden_sizes[-1]

    @property
    def depths(self) -> list[int]:
        """Blocks of the stages, finest first, without a stem."""
        levels = backbone_levels(self.backbone)
        return [depth for name, depth in zip(levels.names, levels.depths, strict=True) if name != "stem"]

    @property
    def out_features(self) -> list[str]:
        """Names of the levels that `MLVICXBackbone` returns; by default the last."""
        return self.stage_names[-1:] if self._out_features is None else self._out_features

    @out_features.setter
    def out_features(self, names: list[str] | None) -> None:
        self.set_output_features_output_indices(names, None)

    @property
    def out_indices(self) -> list[int]:
        """Numbers of the levels that `MLVICXBackbone` returns; by default the last."""
        return [len(self.stage_names) - 1] if self._out_indices is None else self._out_indices

    @out_indices.setter
    def out_indices(self, numbers: list[int] | tuple[int, ...] | None) -> None:
        self.set_output_features_output_indices(None, None if numbers is None else list(numbers))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in the base class, but a configuration of another model is an error, not a warning.

        The whole is validated after `kwargs` have replaced values of the dictionary. With other labels or another
        problem type, what belongs to the saved ones is left out: thresholds, calibration, weights of positives.
        """
        found = config_dict.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(f"configuration of a {found!r} model found; expected one of {cls.model_type!r}")
        # transformers leaves its own names of two labels out.
        usual = {} if "num_labels" in config_dict else {0: "LABEL_0", 1: "LABEL_1"}
        saved = _by_number(config_dict.get("id2label") or usual)
        if "id2label" in kwargs:
            kwargs["id2label"] = _by_number(kwargs["id2label"])
        others = kwargs.get("id2label", saved) != saved or kwargs.get("num_labels", len(saved)) != len(saved)
        problem = config_dict.get("problem_type") or MULTI_LABEL
        if others or kwargs.get("problem_type", problem) != problem:
            held = [name for name in OF_LABELS if config_dict.get(name) is not None]
            if held:
                kind = "labels" if others else "problem type"
                logger.warning("other %s: %s of the saved ones left out", kind, ", ".join(held))
            config_dict = {name: value for name, value in config_dict.items() if name not in held}
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.validate()
        return made

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> None:
        """As in the base class. A configuration that names its code, in `auto_map`, is saved with the code.

        One that could not be loaded again is not saved.
        """
        self.validate()  # which `strict` makes
        if found := getattr(self, "auto_map", None):  # which transformers sets without declaring it
            self.auto_map = save_code(save_directory, found, AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    def validate_ranges(self) -> None:
        """Check every number and choice; `strict` calls it after the types."""
        for name in ("num_channels", "image_size", "aggregation_size", "aggregation_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} found; expected 1 or more")
        for name in ("context_reduction", "aggregation_resize"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} found; expected None, or 1 or more")
        if not self.expander_dims or min(self.expander_dims) < 1:
            raise ValueError(f"expander_dims={self.expander_dims} found; expected at least one positive width")
        sizes = self.decoder_hidden_sizes
        if sizes is not None and (not sizes or min(sizes) < 1):
            raise ValueError(f"decoder_hidden_sizes={sizes} found; expected None, or positive widths, one a level")
        if self.aggregation_levels is not None and not self.aggregation_levels:
            raise ValueError("aggregation_levels=[] found; expected None for all levels, or at least one level")
        weights = ("invariance_weight", "variance_weight", "covariance_weight", "global_weight", "multi_level_weight")
        for name in (*weights, "variance_target"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} found; expected a finite number, 0 or more")
        if self.global_weight == 0 and self.multi_level_weight == 0:
            raise ValueError("global_weight=0 and multi_level_weight=0 found; expected at least one above 0")
        if not any(getattr(self, name) for name in weights[:3]):
            raise ValueError(f"{', '.join(f'{name}=0' for name in weights[:3])} found; expected at least one above 0")
        for name in ("variance_epsilon", "context_gain", "context_init_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} found; expected a finite positive number")
        self._validate_labels()
        if self.context_placement not in (None, "between", "taps"):
            raise ValueError(f"context_placement={self.context_placement!r} found; expected None, 'between' or 'taps'")
        if self.pooled_levels not in ("last", "all"):
            raise ValueError(f"pooled_levels={self.pooled_levels!r} found; expected 'last' or 'all'")
        if self.invariance_reduction not in ("mean", "sum"):
            raise ValueError(f"invariance_reduction={self.invariance_reduction!r} found; expected 'mean' or 'sum'")

    def _validate_labels(self) -> None:
        names = self.id2label or {}
        if sorted(names) != list(range(len(names))):
            raise ValueError(f"id2label={names} found; expected a name for each number from 0 on")
        if self.problem_type not in ("multi_label_classification", "single_label_classification"):
            raise ValueError(
                f"problem_type={self.problem_type!r} found; expected 'multi_label_classification' or "
                "'single_label_classification'"
            )
        if self.problem_type == "single_label_classification" and self.num_labels == 1:
            raise ValueError(
                "problem_type='single_label_classification' with num_labels=1 found; it requires `num_labels > 1`: "
                "two classes are num_labels=2, one finding is 'multi_label_classification'"
            )
        if self.positive_weights is not None and not all(0 <= weight < math.inf for weight in self.positive_weights):
            raise ValueError(f"positive_weights={self.positive_weights} found; expected weights of 0 or more")


def _by_number(names: Any) -> Any:
    """Turn keys such as "1", which JSON and many scripts write, into numbers."""
    return {int(number): name for number, name in names.items()} if isinstance(names, dict) else names


__all__ = ["MLVICXConfig"]
