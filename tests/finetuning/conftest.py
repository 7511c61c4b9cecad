from pathlib import Path

import pytest
import torch
from helpers import draw, tiny_config

from mlvicx_hf import MLVICXForPreTraining, MLVICXImageProcessor


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder as pretraining leaves it, with statistics of its own in the batch normalisation."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(123)
    model = MLVICXForPreTraining(tiny_config()).train()
    processor = MLVICXImageProcessor(image_size=32)
    with torch.no_grad():
        for seed in range(30):
            values = {"disc": seed % 2 == 0, "stripes": seed % 3 == 0}
            images = processor([draw(values, seed * 8 + i) for i in range(8)])["pixel_values"]
            model(images, images.flip(-1))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
