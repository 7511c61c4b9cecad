"""Classes of users that derive from ours: their code goes along with the model, as of any class of transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config

from mlvicx_hf import MLVICXImageProcessor

CODE = """
from mlvicx_hf import MLVICXForImageClassification, MLVICXImageProcessor


class WiderModel(MLVICXForImageClassification):
    pass


class OtherProcessor(MLVICXImageProcessor):
    pass
"""


@pytest.fixture
def derived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "derived_classes.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    import derived_classes  # type: ignore[import-not-found]  # written just now

    yield derived_classes
    del sys.modules["derived_classes"]


def test_a_registered_subclass_is_named_and_saved_with_its_code(derived: Any, tmp_path: Path):
    derived.WiderModel.register_for_auto_class("AutoModelForImageClassification")
    derived.OtherProcessor.register_for_auto_class("AutoImageProcessor")
    folder = tmp_path / "model"
    derived.WiderModel(tiny_config(num_labels=2)).save_pretrained(folder)
    derived.OtherProcessor(32).save_pretrained(folder)
    assert (folder / "derived_classes.py").is_file()
    model = json.loads((folder / "config.json").read_text())["auto_map"]
    assert model["AutoModelForImageClassification"] == "derived_classes.WiderModel"
    assert model["AutoModel"] == "modeling_mlvicx.MLVICXModel"
    processor = json.loads((folder / "preprocessor_config.json").read_text())["auto_map"]
    assert processor["AutoImageProcessor"] == "derived_classes.OtherProcessor"


def test_a_map_of_another_repository_is_not_kept(tmp_path: Path):
    """A model that was loaded by remote code names its repository; the copy has the code beside it."""
    config = tiny_config()
    config.auto_map = {"AutoModel": "org/name--modeling_mlvicx.MLVICXModel"}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_mlvicx.MLVICXModel"
    processor = MLVICXImageProcessor(32)
    processor.auto_map = {"AutoImageProcessor": "org/name--image_processing_mlvicx.MLVICXImageProcessor"}
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())["auto_map"]["AutoImageProcessor"]
    assert saved == {"torchvision": "image_processing_mlvicx.MLVICXImageProcessor"}
