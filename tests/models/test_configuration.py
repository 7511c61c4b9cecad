"""What a configuration holds, refuses and saves."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError

from mlvicx_hf import MLVICXConfig


def test_defaults_are_the_table_of_differences():
    config = MLVICXConfig()
    assert (config.backbone, config.num_channels, config.image_size) == ("resnet18", 1, 224)
    assert config.use_context
    assert config.context_reduction is None
    assert config.aggregation_levels is None
    assert (config.aggregation_size, config.aggregation_channels, config.aggregation_resize) == (4, 512, None)
    assert config.expander_dims == [2048, 2048, 2048]
    assert not config.expander_final_norm
    assert (config.invariance_weight, config.variance_weight, config.covariance_weight) == (25, 25, 1)
    assert (config.global_weight, config.multi_level_weight) == (1, 1)
    assert (config.variance_target, config.variance_epsilon, config.invariance_reduction) == (1, 1e-4, "mean")


@pytest.mark.parametrize("num_labels", [1, 2, 14])
def test_the_problem_type_is_never_left_open(num_labels: int):
    assert MLVICXConfig().problem_type == "multi_label_classification"
    assert MLVICXConfig(num_labels=num_labels).problem_type == "multi_label_classification"


def test_the_problem_type_of_exclusive_classes():
    single = MLVICXConfig(num_labels=3, problem_type="single_label_classification")
    assert single.problem_type == "single_label_classification"
    with pytest.raises(ValueError, match="requires `num_labels > 1`"):
        MLVICXConfig(num_labels=1, problem_type="single_label_classification")


def test_saved_and_loaded_unchanged(tmp_path: Path):
    config = MLVICXConfig(
        backbone="test_resnet",
        expander_dims=(16, 8),
        aggregation_levels=(0, 2),
        positive_weights=(1.0, 2.5),
        context_reduction=2,
        id2label={0: "Edema", 1: "Mass"},
        label2id={"Edema": 0, "Mass": 1},
    )
    config.save_pretrained(tmp_path)
    loaded = MLVICXConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {"transformers_version": loaded.to_dict()["transformers_version"]}
    assert loaded.expander_dims == [16, 8]
    assert loaded.aggregation_levels == [0, 2]
    assert loaded.positive_weights == [1.0, 2.5]
    assert loaded.id2label == {0: "Edema", 1: "Mass"}
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mlvicx"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_channels": 0}, "num_channels=0 found; expected 1 or more"),
        ({"image_size": -1}, "image_size=-1 found"),
        ({"aggregation_size": 0}, "aggregation_size=0 found"),
        ({"aggregation_channels": 0}, "aggregation_channels=0 found"),
        ({"context_reduction": 0}, "context_reduction=0 found; expected None, or 1 or more"),
        ({"aggregation_resize": 0}, "aggregation_resize=0 found"),
        ({"expander_dims": []}, "at least one positive width"),
        ({"expander_dims": [8, 0]}, "at least one positive width"),
        ({"aggregation_levels": []}, "expected None for all levels"),
        ({"invariance_weight": -1.0}, "invariance_weight=-1.0 found; expected 0 or more"),
        ({"multi_level_weight": -0.5}, "multi_level_weight=-0.5 found"),
        ({"global_weight": 0, "multi_level_weight": 0}, "expected at least one above 0"),
        ({"variance_epsilon": 0.0}, "variance_epsilon=0.0 found; expected a positive number"),
        ({"context_gain": 0.0}, "context_gain=0.0 found; expected a positive number"),
        ({"context_init_scale": 0}, "context_init_scale=0 found; expected a positive number"),
        ({"pooled_levels": "first"}, "pooled_levels='first' found; expected 'last' or 'all'"),
        ({"invariance_reduction": "max"}, "'max' found; expected 'mean' or 'sum'"),
        ({"problem_type": "regression"}, "'regression' found; expected 'multi_label_classification'"),
        ({"problem_type": "multilabel"}, "'multilabel' found; expected 'multi_label_classification'"),
    ],
)
def test_values_outside_their_range_are_refused(values: dict[str, Any], message: str):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MLVICXConfig(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_channels", "one"), ("expander_dims", "2048"), ("use_context", "yes"), ("backbone", 18)],
)
def test_values_of_another_type_are_refused_by_name(name: str, value: Any):
    with pytest.raises((ValueError, TypeError, StrictDataclassError), match=name):
        MLVICXConfig(**{name: value})


def test_a_configuration_of_another_model_is_refused(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "hidden_size": 8}')
    with pytest.raises(ValueError, match="configuration of a 'vit' model found; expected one of 'mlvicx'"):
        MLVICXConfig.from_pretrained(tmp_path)


def test_segmentation_fields_are_checked():
    for sizes in ([], [8, 0]):
        with pytest.raises((ValueError, StrictDataclassError), match="decoder_hidden_sizes="):
            MLVICXConfig(decoder_hidden_sizes=sizes)
    with pytest.raises(StrictDataclassError, match="semantic_loss_ignore_index"):
        MLVICXConfig(semantic_loss_ignore_index="255")
