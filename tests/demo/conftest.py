from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import draw, tiny_config
from PIL import Image

from mlvicx_hf import MLVICXForImageClassification, MLVICXForSemanticSegmentation, MLVICXImageProcessor

NAMES = ["Edema", "Mass <b>left</b>", "No Finding"]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "classifier"
    torch.manual_seed(0)
    config = tiny_config(id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    config.decision_thresholds = {"values": {NAMES[0]: 0.25, NAMES[1]: None, NAMES[2]: 0.75}, "split": "validation"}
    bands = {NAMES[0]: [0.0, 1.0], NAMES[1]: [0.0, 0.01], NAMES[2]: None}
    config.calibration = {
        "method": "platt",
        "values": {name: {"scale": 1.0, "shift": 0.0} for name in NAMES},
        "folded": True,
        "bands": bands,
        "level": 0.9,
        "counts": {name: [30, 30] for name in NAMES},
        "split": "validation",
    }
    MLVICXForImageClassification(config).save_pretrained(folder)
    MLVICXImageProcessor(32, 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "segmenter"
    torch.manual_seed(1)
    config = tiny_config(id2label={0: "background", 1: "lungs"}, label2id={"background": 0, "lungs": 1})
    MLVICXForSemanticSegmentation(config).save_pretrained(folder)
    MLVICXImageProcessor(32, 1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def radiograph() -> bytes:
    """A picture that is no square."""
    square = draw({"disc": True}, seed=3, size=64)
    return png(square.crop((0, 0, 64, 48)))


@pytest.fixture(scope="session")
def deep_radiograph() -> bytes:
    """One of 16 bits."""
    ramp = np.linspace(0, 60000, 48 * 64).reshape(48, 64).astype(np.uint16)
    return png(Image.fromarray(ramp))
