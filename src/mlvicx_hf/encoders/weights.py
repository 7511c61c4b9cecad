"""Initial weights from timm: ImageNet's, or a file."""

from __future__ import annotations

from pathlib import Path

import timm

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel


def is_timm_source(source: str) -> bool:
    """Whether a source is for `load_timm_weights`, and not a saved model of this package."""
    return source == "imagenet" or source.endswith((".safetensors", ".pth", ".bin"))


def load_timm_weights(encoder: MLVICXModel, source: str) -> None:
    """Load timm's weights into a backbone, in place. Leave its context blocks as they are.

    Args:
        encoder: with the backbone.
        source: "imagenet", for timm's default weights from the Hub, or a file of timm weights.

    Raises:
        FileNotFoundError: no such file.
        UserError: a file for another backbone.
    """
    config = encoder.config
    overlay = {} if source == "imagenet" else {"file": str(_check_timm_file(source, config.backbone))}
    options = {"features_only": True, "in_chans": config.num_channels, "pretrained_cfg_overlay": overlay}
    weights = timm.create_model(config.backbone, pretrained=True, **options)
    encoder.backbone.load_state_dict(weights.state_dict())


def _check_timm_file(source: str, backbone: str) -> Path:
    """Refuse a file for another backbone: timm would load the weights that fit, and leave the others random.

    Accept any number of input channels: timm adapts the first convolution.
    """
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"init_from={source!r} found; expected a file that exists")
    state = timm.models.load_state_dict(source)
    wanted = timm.create_model(backbone, num_classes=0).state_dict()
    first = next(iter(wanted))
    wrong = [
        key
        for key, value in wanted.items()
        if not key.endswith("num_batches_tracked")
        and (key not in state or (state[key].shape != value.shape and key != first))
    ]
    if wrong:
        raise UserError(f"init_from={source} does not fit {backbone}: {len(wrong)} weights differ, such as {wrong[0]}")
    return path
