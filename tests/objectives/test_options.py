"""Options of objectives: on the command line, in recipes, refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlvicx_hf import MLVICXConfig, MLVICXModel
from mlvicx_hf.commands.pretrain import parse_pretraining
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.objectives import OBJECTIVES, make_objective, read_options

REQUIRED = ["--dataset", "cache", "--output_dir", "run"]


def model_arguments(*words: str):
    return parse_pretraining([*words, *REQUIRED])[0]


def test_words_of_the_command_line_become_values():
    words = ["temperature=0.1", "projection_size=64"]
    given = model_arguments("--objective", "simclr", "--objective_options", *words).objective_options
    options = read_options("simclr", given)
    assert (options.temperature, options.projection_size) == (0.1, 64)
    assert read_options("barlow_twins", {"projector_dims": "8,9"}).projector_dims == [8, 9]
    assert read_options("byol", {"scale_momentum": "false"}).scale_momentum is False
    assert read_options("mlvicx", {}) is None


def test_flags_override_options_of_a_recipe_one_by_one(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("objective: simclr\nobjective_options:\n  temperature: 0.1\n  projection_size: 64\n")
    found = model_arguments("--recipe", str(path), "--objective_options", "temperature=0.2").objective_options
    options = read_options("simclr", found)
    assert (options.temperature, options.projection_size) == (0.2, 64)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("simclr", {"temprature": 1}, "temprature found, which simclr does not have; it takes projection_size, temp"),
        ("simclr", {"queue_size": 64}, r"queue_size found, which simclr does not have; .*\(queue_size belongs to moco"),
        ("mlvicx", {"temperature": 1}, r"temperature found, which mlvicx does not have; it takes none \(.* simclr"),
        ("simclr", {"temperature": "warm"}, "temperature='warm' found; expected a number"),
        ("simclr", {"temperature": 0}, "temperature=0 found; expected a number above 0"),
        ("byol", {"target_momentum": 1.5}, "target_momentum=1.5 found; expected a number at least 0 and at most 1"),
        ("byol", {"hidden_size": "0"}, "hidden_size='0' found; expected a whole number above 0"),
        (
            "barlow_twins",
            {"projector_dims": "8,0"},
            r"projector_dims=\['8', '0'\] found; .* each a whole number above 0",
        ),
        ("barlow_twins", {"projector_dims": []}, r"projector_dims=\[\] found; expected a list of one or more"),
        ("pcrl_v1", {"reference_batch": 0}, "reference_batch=0 found; expected a whole number above 0"),
        ("pcrl_v2", {"local_views": -1}, "local_views=-1 found; expected a whole number at least 0"),
        ("moco_v2", {"key_images": 1}, "key_images=1 found; expected 0, or 2 or more"),
        ("magic", {}, f"objective='magic' found; expected one of {', '.join(OBJECTIVES)}"),
    ],
)
def test_wrong_options_are_refused_by_name(name: str, values: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        read_options(name, values)


def test_a_word_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"objective_options=\['temperature'\] found; expected NAME=VALUE"):
        model_arguments("--objective_options", "temperature")


def test_options_of_a_recipe_are_a_mapping_or_words(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("objective_options: [temperature=0.1]\n")
    given = ["--objective", "simclr", "--objective_options", "projection_size=8"]
    assert model_arguments("--recipe", str(path), *given).objective_options == {
        "temperature": "0.1",
        "projection_size": "8",
    }
    path.write_text("objective_options: 3\n")
    with pytest.raises(ValueError, match="objective_options=3 found; expected NAME=VALUE, or a mapping"):
        model_arguments("--recipe", str(path))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], True),
        (["--objective", "simclr"], False),
        (["--objective", "simclr", "--use_context"], True),
        (["--no_use_context"], False),
    ],
)
def test_other_methods_train_a_plain_backbone_unless_asked(words: list[str], expected: bool):
    assert model_arguments(*words).use_context is expected


def test_small_views_that_a_backbone_does_not_take_are_refused():
    config = MLVICXConfig(backbone="coatnet_pico_rw_224", num_channels=1, image_size=64, use_context=False)
    with torch.device("meta"):
        model = MLVICXModel(config)
    with pytest.raises(
        UserError, match="local_size=32 found with backbone='coatnet_pico_rw_224', which takes one size"
    ):
        make_objective("pcrl_v2", model, {"local_size": "32"})
