"""Write a model for another library: timm, torchvision or ONNX.

timm and torchvision get the **plain trunk**: the backbone without its context bottlenecks, as the paper's authors
transfer it. The model itself refines every level before the next sees it, so the trunk's features differ from the
model's, unless it was trained with `use_context=False`. ONNX gets the whole model.
"""

import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from jinja2 import StrictUndefined, Template
from PIL.Image import Resampling
from safetensors.torch import save_file
from timm.models import FeatureListNet
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_NAME

from mlvicx_hf.common.errors import UserError, require
from mlvicx_hf.common.files import check_output, new_output, write_json
from mlvicx_hf.encoders.loading import load_model
from mlvicx_hf.models.backbones_mlvicx import create_sized
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import (
    MLVICXBackbone,
    MLVICXForImageClassification,
    MLVICXForSemanticSegmentation,
    MLVICXModel,
)

ONNX_NAME = "model.onnx"
PREPROCESSING_NAME = "preprocessing.json"
ONNX_TOLERANCE = 1e-4
TIMM_CROP_MODES = {"pad": "border", "squash": "squash", "crop": "center"}
# What timm's registry says about weights that are not these.
TIMM_FOREIGN = (
    *("tag", "license", "origin_url", "paper_ids", "paper_name", "notes", "description", "label_offset"),
    *("test_input_size", "test_crop_pct", "min_input_size"),
)


def load_encoder(source: str | Path) -> tuple[MLVICXModel, MLVICXImageProcessor]:
    """Load the encoder of a saved model of any class, in float32 and evaluation mode, and its image processor."""
    model, processor = load_model(source, MLVICXModel)
    assert isinstance(model, MLVICXModel)
    return model.float(), processor


def trunk_note(library: str, encoder: MLVICXModel, processor: MLVICXImageProcessor, **facts: Any) -> str:
    """Write the README.md of a plain trunk for "timm" or "torchvision"."""
    source = (files(__package__) / "trunk.md.j2").read_text(encoding="utf-8")
    template = Template(source, trim_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined)
    return template.render(library=library, config=encoder.config, processor=processor, **facts)


def timm_trunk(encoder: MLVICXModel) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """Put the encoder's backbone into a full timm model without classifier.

    `FeatureListNet` renames modules ("stages_0" for "stages.0"). So make one from the modules of a full model and load
    the encoder's weights into it: then the full model has them under its own names.

    Returns:
        The model, and the names of its tensors that belong to no level of the backbone, such as a last norm. These
        have initial values, the same in every call. Last the arguments that fit the model to the size of its input.

    Raises:
        UserError: the names do not fit; no backbone that `create_backbone` accepts is known to do that.
    """
    config, weights = encoder.config, encoder.backbone.state_dict()

    def make(**sizes: Any) -> Any:
        return timm.create_model(config.backbone, in_chans=config.num_channels, num_classes=0, **sizes)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        full, sizes = create_sized(make, config.image_size)
    full.eval()
    own = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    if own.keys() <= full.state_dict().keys():  # networks that collect their maps have the full model's names
        return full, full.load_state_dict(own, strict=False).missing_keys, sizes
    levels = encoder.backbone.feature_info.out_indices
    for flatten in (False, True):
        try:
            features = FeatureListNet(full, out_indices=levels, flatten_sequential=flatten)
        except AssertionError:  # timm's word for levels that are not modules of the first or second depth
            continue
        if features.state_dict().keys() == weights.keys():
            features.load_state_dict(weights)
            owned = {tensor.data_ptr() for tensor in features.state_dict().values()}
            return full, [name for name, tensor in full.state_dict().items() if tensor.data_ptr() not in owned], sizes
    raise UserError(f"backbone={config.backbone!r} found; expected one whose features timm takes from named modules")


def export_timm(source: str | Path, output: str | Path) -> Path:
    """Write the plain trunk, without context bottlenecks, as a folder or repository of timm.

    It loads as `timm.create_model("local-dir:OUTPUT", pretrained=True)`, also with `features_only=True` or another
    `num_classes`. What timm puts behind the last level (a norm in a ConvNeXt, nothing in a ResNet) was not pretrained
    and keeps its initial values; the README.md names it.

    Args:
        source: folder or Hub name of a saved model of any class.
        output: new or empty folder; gets `config.json`, `model.safetensors` and `README.md`.

    Raises:
        OSError, UserError: as `encoders.loading.load_model`; or an output that is not empty.
    """
    output = check_output(Path(output))
    encoder, processor = load_encoder(source)
    config = encoder.config
    if not processor.do_rescale or not math.isclose(processor.rescale_factor or 1 / 255, 1 / 255):
        raise UserError(
            f"{source}: do_rescale={processor.do_rescale}, rescale_factor={processor.rescale_factor} found; expected "
            "grey values from 0 to 1, as timm makes them"
        )
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
    full, initial, sizes = timm_trunk(encoder)
    cfg: Any = full.pretrained_cfg
    for name in TIMM_FOREIGN:
        cfg.pop(name, None)
    cfg |= {
        "input_size": (config.num_channels, processor.image_size, processor.image_size),
        "mean": _of_channels(mean, config.num_channels),
        "std": _of_channels(std, config.num_channels),
        "interpolation": Resampling(processor.resample).name.lower(),
        "crop_pct": 1.0,
        "crop_mode": TIMM_CROP_MODES[processor.fit],
    }
    note = trunk_note("timm", encoder, processor, initial=initial)
    with new_output(output) as folder:
        save_for_hf(full, str(folder), model_args={"in_chans": config.num_channels} | sizes, safe_serialization=True)
        (folder / "README.md").write_text(note, encoding="utf-8")
    return output


def torchvision_state(encoder: MLVICXModel) -> dict[str, Tensor]:
    """Give the backbone's weights torchvision's names, for three channels.

    If the first kernel has one channel, each colour gets a third of it: this is exact for a grey image copied to RGB.

    Raises:
        UserError: a backbone that is no ResNet of torchvision, or that has neither one nor three channels.
    """
    name = encoder.config.backbone.split(".")[0]
    known = torchvision.models.list_models(torchvision.models, include=["resnet*", "resnext*", "wide_resnet*"])
    if name not in known:
        raise UserError(f"backbone={name!r} found; expected a ResNet of torchvision: {', '.join(known)}")
    if encoder.config.num_channels not in (1, 3):
        raise UserError(f"num_channels={encoder.config.num_channels} found; torchvision's models expect 1 or 3")
    state = {key: tensor.contiguous() for key, tensor in encoder.backbone.state_dict().items()}
    if encoder.config.num_channels == 1:
        state["conv1.weight"] = (state["conv1.weight"] / 3).repeat(1, 3, 1, 1)
    with torch.device("meta"):
        expected = torchvision.models.get_model(name, weights=None).state_dict()
    found = {key: tensor.shape for key, tensor in state.items()}
    assert found == {key: tensor.shape for key, tensor in expected.items() if not key.startswith("fc.")}
    return state


def export_torchvision(source: str | Path, output: str | Path) -> Path:
    """Write the plain trunk of a ResNet, without context bottlenecks, for torchvision.

    The weights are for three channels. They load into `torchvision.models.resnet18(weights=None)`, or its like, with
    `strict=False`; only `fc` is missing.

    Args:
        source: folder or Hub name of a saved model of any class.
        output: new or empty folder; gets `model.safetensors`, `preprocessing.json` and `README.md`.

    Raises:
        OSError, UserError: as `encoders.loading.load_model`; an output that is not empty, or a backbone that is no
            ResNet of torchvision.
    """
    output = check_output(Path(output))
    encoder, processor = load_encoder(source)
    state = torchvision_state(encoder)
    name = encoder.config.backbone.split(".")[0]
    note = trunk_note("torchvision", encoder, processor, name=name)
    with new_output(output) as folder:
        save_file(state, folder / SAFE_WEIGHTS_NAME, {"format": "pt", "architecture": name})
        write_json(folder / PREPROCESSING_NAME, preprocessing(processor) | {"num_channels": 3})
        (folder / "README.md").write_text(note, encoding="utf-8")
    return output


def _of_channels(value: float | list[float], channels: int) -> tuple[float, ...]:
    """A constant of every channel; the image processor may have one number for all."""
    values = value if isinstance(value, list) else [value]
    return tuple(values) if len(values) == channels else (values[0],) * channels


def preprocessing(processor: MLVICXImageProcessor) -> dict[str, Any]:
    """List the constants that make an image model input, for programs that do not use transformers."""
    names = ["image_size", "num_channels", "image_mean", "image_std", "fit", "prepared_size", "resample"]
    names += ["do_resize", "do_rescale", "rescale_factor", "do_normalize"]
    return {name: getattr(processor, name) for name in names}


def _meaning(model: PreTrainedModel) -> dict[str, Any]:
    """What the logits of a classifier or segmenter mean: names in their order, and how an answer is found."""
    if not isinstance(model, MLVICXForImageClassification | MLVICXForSemanticSegmentation):
        return {}
    config: Any = model.config
    rules = ["problem_type", "decision_thresholds", "calibration"]
    if isinstance(model, MLVICXForSemanticSegmentation):
        rules = []
    return {"labels": [config.id2label[i] for i in range(model.num_labels)], **{n: getattr(config, n) for n in rules}}


class Tensors(nn.Module):
    """A model, of any class but the pretraining one, with a plain tuple of tensors as output, as in an ONNX graph."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.names: tuple[str, ...] = ("logits",)
        if isinstance(model, MLVICXModel):
            self.names = ("last_hidden_state", "pooler_output")
        elif isinstance(model, MLVICXBackbone):
            self.names = tuple(model.out_features)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        """[B, C, H, W] to the tensors of `names`."""
        output = self.model(pixel_values, return_dict=True)
        if isinstance(self.model, MLVICXBackbone):
            return output.feature_maps
        return tuple(output[name] for name in self.names)


def export_onnx(source: str | Path, output: str | Path) -> float:
    """Write a whole model, with its context bottlenecks, as an ONNX graph, and compare it with torch.

    The graph takes `pixel_values` [B, num_channels, image_size, image_size] for any B. It gives `logits` (classifier,
    segmenter), `last_hidden_state` and `pooler_output` (encoder, pretraining run), or the maps of `out_features`
    by name (backbone).

    Args:
        source: folder or Hub name of a saved model.
        output: new or empty folder; gets `model.onnx` and `preprocessing.json`, which also names the labels, thresholds
            and calibration of a classifier.

    Returns:
        The largest absolute difference between onnxruntime and torch, for 1 and 3 images of noise.

    Raises:
        MissingExtraError: without the extra `onnx`.
        OSError, UserError: as `encoders.loading.load_model`; or an output that is not empty.
        RuntimeError: a difference above 1e-4 of an output's largest value.
    """
    require("ONNX export", "onnx", "onnx", "onnxscript", "onnxruntime")
    import onnx

    output = check_output(Path(output))
    model, processor = load_model(source)
    tensors = Tensors(model.float()).eval()
    size = (processor.num_channels, processor.image_size, processor.image_size)
    with new_output(output) as folder:
        torch.onnx.export(
            tensors,
            (torch.zeros(2, *size),),  # export takes a batch of 1 for a constant
            folder / ONNX_NAME,
            input_names=["pixel_values"],
            output_names=list(tensors.names),
            dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch")}},
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        onnx.checker.check_model(folder / ONNX_NAME, full_check=True)
        difference = compare_onnx(tensors, folder / ONNX_NAME, size)
        write_json(folder / PREPROCESSING_NAME, preprocessing(processor) | _meaning(model))
    return difference


@torch.no_grad()
def compare_onnx(tensors: Tensors, graph: Path, size: tuple[int, ...]) -> float:
    """Find the largest absolute difference between a graph and its model; RuntimeError if it is more than rounding."""
    import onnxruntime

    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch in (1, 3):
        x = torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))
        for name, expected, found in zip(
            tensors.names, tensors(x), session.run(list(tensors.names), {"pixel_values": x.numpy()}), strict=True
        ):
            difference, scale = float(np.abs(found - expected.numpy()).max()), float(expected.abs().max())
            if not difference <= ONNX_TOLERANCE * scale:
                raise RuntimeError(
                    f"{name} of a batch of {batch} differs by {difference:.2e} found; expected at most "
                    f"{ONNX_TOLERANCE:g} of its largest value, {scale:.2e}"
                )
            largest = max(largest, difference)
    return largest
