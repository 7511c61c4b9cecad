"""Weights that exist: read files of them, and start a backbone from timm's, torchvision's or another checkpoint's."""

import argparse
import copy
import pickle
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import read_json
from mlvicx_hf.common.text import some
from mlvicx_hf.models.backbones_mlvicx import create_backbone
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig, check_backbone
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .loading import check_source, load_image_processor

WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".ckpt")  # torch.save writes all but the first
# Errors of the readers for a file that is cut short, altered or of another kind. A safe unpickler checks little else.
UNREADABLE = (
    *(SafetensorError, pickle.UnpicklingError, struct.error, EOFError, AssertionError),
    *(LookupError, RuntimeError, TypeError, ValueError),
)
# Functions named in the state of the authors' optimiser. `_nothing` stands in for them; they are never imported.
OPTIMIZER_FUNCTIONS = ("builtins.getattr", "trainer.mlvicx_trainer.MLVICXTrainer")
COUNTER = "num_batches_tracked"  # of a batch normalisation; many files have none
# A checkpoint of two networks holds one that its authors evaluate: the average, the teacher, the encoder of queries.
EVALUATED = ("state_dict_ema", "model_ema", "teacher", "encoder_q", "base_encoder", "online", "online_encoder")


# -- files -------------------------------------------------------------------------------------------------------------


def read_weights(path: Path) -> dict[str, Any]:
    """Read a `.safetensors` file, or a file of torch.save. Refuse code in it; none ever runs.

    Raises:
        FileNotFoundError: no such file.
        UserError: a file that is damaged, holds more than tensors and plain values, or is no dictionary.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} found; expected a checkpoint, a file that exists")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        harmless: list[Any] = [argparse.Namespace, *((_nothing, name) for name in OPTIMIZER_FUNCTIONS)]
        allowed = torch.serialization.safe_globals(harmless)
        with allowed, warnings.catch_warnings(action="ignore"):  # about odd pickles, which end in an error anyway
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code is not None:
            raise UserError(f"{path} refused: {code[1]} found in it; expected tensors and plain values") from error
        raise UserError(f"{path}: a damaged file or none of weights; expected a whole .pth or .safetensors") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: {type(content).__name__} found; expected a dictionary of weights")
    return content


def _nothing(*_: Any) -> None:
    """Stand in for functions that a checkpoint names."""


# -- where a run starts ------------------------------------------------------------------------------------------------


def is_timm_source(source: str) -> bool:
    """Whether a source is for `load_timm_weights`, and not a saved model of this package."""
    if Path(source).is_dir():
        return False
    return source == "imagenet" or source.endswith(WEIGHT_FILES) or ("/" not in source and timm.is_model(source))


def timm_normalisation(name: str, num_channels: int) -> tuple[float | list[float], float | list[float]]:
    """Find the mean and the standard deviation of grey values in [0, 1] that timm's weights of a name expect.

    Args:
        name: timm model, perhaps with the tag of its weights.
        num_channels: 1 for weights that are summed over red, green and blue: they get the constants' mean.

    Returns:
        Each as one number, or as a list with one a channel.
    """
    check_backbone(name)
    found = timm.get_pretrained_cfg(name)
    if found is None:  # an architecture without published weights
        return 0.5, 0.25
    mean, std = list(found.mean), list(found.std)
    if len(set(mean)) == len(set(std)) == 1 or num_channels != len(mean):
        return round(sum(mean) / len(mean), 6), round(sum(std) / len(std), 6)
    return mean, std


def starting_processor(config: MLVICXConfig, source: str | None) -> MLVICXImageProcessor:
    """Make the image processor of a model that starts from a source: its constants follow the weights.

    Args:
        config: of the model.
        source: as `init_from`; None for random weights.
    """
    processor = MLVICXImageProcessor(config.image_size, config.num_channels)
    if source is not None and is_timm_source(source):
        name = _timm_name(config, source)
        processor.image_mean, processor.image_std = timm_normalisation(name, config.num_channels)
    elif source is not None:
        earlier = load_image_processor(check_source(source), config)
        processor.image_mean, processor.image_std = earlier.image_mean, earlier.image_std
    return processor


def _timm_name(config: MLVICXConfig, source: str) -> str:
    """Name of the timm weights that a source means; of a file, that of the backbone.

    Raises:
        UserError: weights of another architecture.
    """
    if source == "imagenet" or source.endswith(WEIGHT_FILES):
        return config.backbone
    if source.split(".")[0] != config.backbone.split(".")[0]:
        raise UserError(f"weights {source!r} found for backbone {config.backbone!r}; expected weights of that backbone")
    return source


def load_timm_weights(encoder: MLVICXModel, source: str) -> str:
    """Load weights of a plain network into a backbone, in place. Leave its context blocks as they are.

    The first kernels of a file for colour images are summed over their channels where the backbone takes grey ones: a
    grey image then gives what the original computes from the image copied to all channels.

    Args:
        encoder: with the backbone.
        source: "imagenet", for timm's default weights from the Hub; a timm name with the tag of its weights; or a file
            of timm, torchvision or a self-supervised method, in which the network may lie under a prefix.

    Returns:
        What was loaded, and the tensors of a file that were left out, in one line.

    Raises:
        FileNotFoundError: no such file.
        OSError: weights that cannot be fetched.
        UserError: weights for another backbone.
    """
    if source.endswith(WEIGHT_FILES):
        about = Path(source).with_name("config.json")
        if about.is_file() and read_json(about).get("model_type") == MLVICXConfig.model_type:
            raise UserError(f"{source}: a file of a saved model found; expected its folder, {about.parent}")
        return load_backbone(encoder, read_weights(Path(source)), source)
    config: Any = copy.copy(encoder.config)
    config.backbone = _timm_name(config, source)
    try:
        pretrained = create_backbone(config, pretrained=True)
    except OSError as error:
        raise OSError(
            f"{source}: timm's weights of {config.backbone} are neither here nor to be fetched from the Hub: {error} "
            "Without internet, bring a file of them, and start from what `mlvicx convert` makes of it"
        ) from error
    encoder.backbone.load_state_dict(pretrained.state_dict())
    return f"started from timm's {config.backbone}"


def load_backbone(encoder: MLVICXModel, content: Mapping[str, Any], source: str) -> str:
    """Load what a file of weights holds into a backbone; see `load_timm_weights`.

    Args:
        encoder: with the backbone.
        content: of the file.
        source: its path.
    """
    config: Any = encoder.config
    kept, line = find_network(content, config.backbone, config.num_channels, source)
    made = create_backbone(config, pretrained=True, pretrained_cfg_overlay={"state_dict": kept})
    encoder.backbone.load_state_dict(made.state_dict())
    return line


def find_network(
    content: Mapping[str, Any], name: str, num_channels: int, source: str
) -> tuple[dict[str, Tensor], str]:
    """Find all weights of a network in what a file holds, without its classifier.

    Args:
        content: of the file.
        name: of the network in timm.
        num_channels: that the first kernels may have, besides those of timm's network.
        source: path of the file.

    Returns:
        The weights by their names in timm, and what was found and left out, in one line.

    Raises:
        UserError: weights of another network, or of several.
    """
    with torch.device("meta"):
        wanted = timm.create_model(name, num_classes=0).state_dict()
    wanted = {key: value for key, value in wanted.items() if not key.endswith(COUNTER)}
    where, state, beside = _choose(source, list(_networks(content, wanted)), name, wanted)
    first = getattr(timm.get_pretrained_cfg(name), "first_conv", None) or ()
    kernels = {f"{each}.weight" for each in ((first,) if isinstance(first, str) else first)}
    wrong = [
        key
        for key, value in wanted.items()
        if not _fits(state.get(key), value, num_channels if key in kernels else None)
    ]
    own = {key.split(".")[0] for key in wanted}  # first words of the network's own names
    others = sorted(key for key in state if key not in wanted and not key.endswith(COUNTER))
    wrong += [key for key in others if key.split(".")[0] in own]  # of a larger network
    if wrong:
        raise UserError(f"{source} does not fit {name}: {len(wrong)} weights differ, such as {wrong[0]}")
    kept = {key: value for key, value in state.items() if key not in others}
    others += beside
    left_out = f"; left out: {len(others)} other tensors ({some(others, 3)})" if others else ""
    return kept, f"started from {source}{f', network {where}' if where else ''}{left_out}"


Found = tuple[str, dict[str, Tensor], list[str]]  # prefix of a network, its weights, and the tensors beside it


def _networks(content: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> Iterator[Found]:
    """Networks in a checkpoint, with the prefix of each: places below which most of the wanted names are."""
    parts = {"": content} | {f"{name}.": part for name, part in content.items() if isinstance(part, Mapping)}
    first = next(iter(wanted))
    for name, part in parts.items():
        tensors = {str(key): value for key, value in part.items() if isinstance(value, Tensor)}
        for key in tensors:
            prefix = key.removesuffix(first)
            if key.endswith(first) and (not prefix or prefix.endswith(".")):
                inner = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if sum(each in inner for each in wanted) > len(wanted) / 2:
                    yield name + prefix, inner, sorted(k for k in tensors if not k.startswith(prefix))


def _choose(source: str, networks: list[Found], name: str, wanted: Mapping[str, Tensor]) -> Found:
    """Choose the network of a checkpoint that its authors evaluate."""
    if not networks:
        raise UserError(f"{source} does not fit {name}: no {next(iter(wanted))} and the like in it")
    if len(networks) > 1:
        networks = [each for each in networks if set(each[0].split(".")) & set(EVALUATED)] or networks
    if len(networks) > 1:
        names = ", ".join(prefix or "(no prefix)" for prefix, *_ in networks)
        raise UserError(f"{source}: networks {names} found; expected one, or one named as in {EVALUATED}")
    return networks[0]


def _fits(found: Tensor | None, wanted: Tensor, num_channels: int | None) -> bool:
    """Whether a weight has its shape; first kernels may have other channels."""
    if found is None or found.shape == wanted.shape:
        return found is not None
    if num_channels is None or not found.ndim == wanted.ndim == 4:
        return False
    return found.shape[1] == num_channels and found[:, 0].shape == wanted[:, 0].shape
