"""What a configuration holds, refuses and saves."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from helpers import tiny_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageClassification

from mlvicx_hf import MLVICXConfig, MLVICXForImageClassification


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
    with pytest.raises((ValueError, StrictDataclassError), match="num_labels"):
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
        ({"invariance_weight": -1.0}, "invariance_weight=-1.0 found; expected a finite number, 0 or more"),
        ({"multi_level_weight": -0.5}, "multi_level_weight=-0.5 found"),
        ({"global_weight": 0, "multi_level_weight": 0}, "expected at least one above 0"),
        (
            dict.fromkeys(["invariance_weight", "variance_weight", "covariance_weight"], 0),
            "expected at least one above 0",
        ),
        ({"variance_epsilon": 0.0}, "variance_epsilon=0.0 found; expected a finite positive number"),
        ({"context_gain": 0.0}, "context_gain=0.0 found; expected a finite positive number"),
        ({"context_init_scale": 0}, "context_init_scale=0 found; expected a finite positive number"),
        ({"pooled_levels": "first"}, "pooled_levels='first' found; expected 'last' or 'all'"),
        ({"invariance_reduction": "max"}, "'max' found; expected 'mean' or 'sum'"),
        ({"problem_type": "regression"}, "'regression' found; expected 'multi_label_classification'"),
        ({"problem_type": "multilabel"}, "multilabel"),
        ({"id2label": {1: "a", 2: "b"}}, "expected a name for each number from 0 on"),
        ({"num_labels": -1}, "num_labels=-1 found; expected 0 or more"),
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


# -- values that are set after the configuration is made ---------------------------------------------------------------

WRONG = [
    ({"problem_type": "regression"}, "problem_type='regression' found"),
    ({"num_labels": 1, "problem_type": "single_label_classification"}, "requires `num_labels > 1`"),
    ({"pooled_levels": "All"}, "pooled_levels='All' found; expected 'last' or 'all'"),
    ({"image_size": -3}, "image_size=-3 found; expected 1 or more"),
    ({"image_size": "large"}, "image_size"),
    ({"variance_weight": float("nan")}, "variance_weight=nan found; expected a finite number, 0 or more"),
    ({"variance_target": -1.0}, "variance_target=-1.0 found; expected a finite number, 0 or more"),
    ({"context_gain": float("inf")}, "context_gain=inf found; expected a finite positive number"),
    ({"positive_weights": [1.0, -2.0]}, r"positive_weights=\[1.0, -2.0\] found; expected weights of 0 or more"),
    ({"global_weight": 0, "multi_level_weight": 0}, "expected at least one above 0"),
    ({"aggregation_levels": []}, "expected None for all levels"),
    ({"out_features": ["stage9"]}, "out_features must be a subset of stage_names"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    MLVICXForImageClassification(tiny_config(num_labels=2)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_values_given_while_loading_are_checked(saved: Path, values: dict[str, Any], message: str):
    for load in (
        MLVICXConfig.from_pretrained,
        AutoConfig.from_pretrained,
        MLVICXForImageClassification.from_pretrained,
        AutoModelForImageClassification.from_pretrained,
    ):
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            load(saved, **values)


def _make_with(config: MLVICXConfig, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(config, name, value)  # a level's name is checked here
    MLVICXForImageClassification(config)


@pytest.mark.parametrize(("values", "message"), [row for row in WRONG if "large" not in row[0].values()])
def test_values_set_later_are_checked_before_a_model_is_made_or_saved(
    tmp_path: Path, values: dict[str, Any], message: str
):
    model = MLVICXForImageClassification(tiny_config(num_labels=2))
    config = copy.deepcopy(model.config)
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        _make_with(config, values)
    if "out_features" not in values:
        for name, value in values.items():
            setattr(model.config, name, value)
        for save in (config.save_pretrained, model.save_pretrained):
            with pytest.raises((ValueError, StrictDataclassError), match=message):
                save(tmp_path / "model")
        assert not list(tmp_path.rglob("config.json"))


def test_values_that_fit_are_taken_while_loading(saved: Path):
    model = MLVICXForImageClassification.from_pretrained(
        saved,
        num_labels=3,
        problem_type="single_label_classification",
        pooled_levels="all",
        ignore_mismatched_sizes=True,
    )
    assert model.config.problem_type == "single_label_classification"
    assert model.classifier.in_features == 400
    config, rest = MLVICXConfig.from_pretrained(saved, image_size=64, nonsense=3, return_unused_kwargs=True)
    assert config.image_size == 64
    assert rest == {"nonsense": 3}


# -- what other code asks of a backbone's configuration ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "sizes", "depths"),
    [
        ("resnet18", [64, 128, 256, 512], [2, 2, 2, 2]),
        ("resnet50", [256, 512, 1024, 2048], [3, 4, 6, 3]),
        ("densenet121", [256, 512, 1024, 1024], [6, 12, 24, 16]),
        ("regnety_008", [64, 128, 320, 768], [1, 3, 8, 2]),
        ("convnext_atto", [40, 80, 160, 320], [2, 2, 6, 2]),
    ],
)
def test_widths_and_depths_of_the_stages(backbone: str, sizes: list[int], depths: list[int]):
    config = MLVICXConfig(backbone=backbone)
    assert config.hidden_sizes == sizes
    assert config.hidden_size == sizes[-1]
    assert config.depths == depths
    assert not {"hidden_sizes", "hidden_size", "depths"} & set(config.to_dict())


def test_the_last_stage_is_the_default_of_a_backbone(tmp_path: Path):
    config = MLVICXConfig()
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    config.out_features = None
    assert (config.out_features, config.out_indices) == (["stage4"], [4])
    config.out_indices = (0, 2)
    assert (config.out_features, config.out_indices) == (["stem", "stage2"], [0, 2])
    config.save_pretrained(tmp_path)
    loaded = MLVICXConfig.from_pretrained(tmp_path)
    assert (loaded.out_features, loaded.out_indices) == (["stem", "stage2"], [0, 2])


def test_other_labels_leave_thresholds_and_calibration_behind(tmp_path: Path):
    kept = {"decision_thresholds": {"method": "youden", "values": {"a": 0.3, "b": 0.4}}, "positive_weights": [1.0, 2.0]}
    config = tiny_config(id2label={0: "a", 1: "b"}, **kept)
    config.save_pretrained(tmp_path)
    for names in ({0: "a", 1: "b"}, {"1": "b", "0": "a"}):
        same = MLVICXConfig.from_pretrained(tmp_path, id2label=names)
        assert same.decision_thresholds == kept["decision_thresholds"]
        assert same.id2label == {0: "a", 1: "b"}
    single = {"problem_type": "single_label_classification"}
    for change in ({"id2label": {0: "b", 1: "a"}}, {"id2label": {1: "a", 0: "b"}}, {"num_labels": 3}, single):
        other = MLVICXConfig.from_pretrained(tmp_path, **change)
        assert other.decision_thresholds is other.positive_weights is None


@pytest.mark.parametrize("given", [{"num_labels": 2}, {"id2label": {0: "LABEL_0", 1: "LABEL_1"}}])
def test_two_labels_without_names_are_the_same_labels(given: dict[str, Any], tmp_path: Path):
    tiny_config(num_labels=2, positive_weights=[1.0, 9.0]).save_pretrained(tmp_path)  # which leaves the names out
    assert MLVICXConfig.from_pretrained(tmp_path, **given).positive_weights == [1.0, 9.0]
    assert MLVICXConfig.from_pretrained(tmp_path, num_labels=3).positive_weights is None


def test_the_usual_problem_type_is_no_other_one(tmp_path: Path):
    tiny_config(num_labels=2, positive_weights=[1.0, 9.0]).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["problem_type"]  # as somebody may write it
    (tmp_path / "config.json").write_text(json.dumps(saved))
    same = MLVICXConfig.from_pretrained(tmp_path, problem_type="multi_label_classification")
    assert same.positive_weights == [1.0, 9.0]


def test_whole_numbers_are_weights():
    assert tiny_config(num_labels=2, positive_weights=[1, 9]).positive_weights == [1, 9]
