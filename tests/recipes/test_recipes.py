from dataclasses import asdict
from pathlib import Path

import pytest

from mlvicx_hf import MLVICXConfig
from mlvicx_hf.commands.pretrain import parse_pretraining
from mlvicx_hf.finetuning.arguments import CLASSIFICATION_SECTIONS, SEGMENTATION_SECTIONS
from mlvicx_hf.objectives import OBJECTIVES, find_objective, read_options
from mlvicx_hf.recipes import fill_sections, load_recipe, recipe_names

REQUIRED = ["--dataset", "cache", "--output_dir", "run"]
GIVEN = {"dataset": "cache", "output_dir": "run", "model": "random"}


def test_the_recipes_that_come_with_the_package():
    assert {"authors", "default", "paper", "small", "smoke"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_makes_a_configuration(name: str):
    model, data, training = parse_pretraining(["--recipe", name, *REQUIRED])
    of_the_model = {
        key: value for key, value in asdict(model).items() if key not in ("init_from", "objective", "objective_options")
    }
    config = MLVICXConfig(**of_the_model)
    values = asdict(model) | asdict(data) | asdict(training)
    recipe = load_recipe(name, set(values))
    assert recipe
    for key, value in recipe.items():
        assert values[key] == value, key
        assert type(values[key]) is type(value) or isinstance(values[key], float), key
    assert (data.dataset, training.output_dir) == ("cache", "run")
    assert config.backbone == model.backbone
    assert config.expander_dims == list(model.expander_dims)


METHODS = sorted(set(OBJECTIVES) - {"mlvicx"})


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe(name: str):
    model, data, training = parse_pretraining(["--recipe", name, *REQUIRED])
    assert model.objective == name
    assert not model.use_context
    options = read_options(name, model.objective_options)
    assert not find_objective(name).views(options).aligned or (data.crop_area, data.flip) == ([1.0, 1.0], 0)
    assert training.batch_size == 64


def test_rates_at_batch_64():
    rates = {name: parse_pretraining(["--recipe", name, *REQUIRED])[2] for name in METHODS}
    assert {name: each.base_learning_rate * each.batch_size / 256 for name, each in rates.items()} == pytest.approx(
        {"barlow_twins": 0.05, "vicreg": 0.05, "simclr": 0.075, "byol": 0.075, "simsiam": 0.0125, "moco_v2": 0.0075}
        | {"caid": 0.0075, "inter_moco": 0.03, "pcrl_v1": 0.001, "pcrl_v2": 0.01}
    )
    lars = {name for name, each in rates.items() if each.optimizer == "lars"}
    assert lars == {"barlow_twins", "vicreg", "simclr", "byol"}


def test_what_the_recipes_mean():
    paper = parse_pretraining(["--recipe", "paper", *REQUIRED])[2]
    assert paper.base_learning_rate * paper.batch_size / 256 == pytest.approx(3e-5)
    assert (paper.weight_decay, paper.batch_size, paper.epochs) == (1e-5, 64, 300)
    model, data, training = parse_pretraining(["--recipe", "authors", *REQUIRED])
    assert model.expander_dims == [4096, 4096, 4096]
    assert model.expander_final_norm
    assert (model.context_reduction, model.aggregation_resize, model.num_channels) == (2, 64, 3)
    assert (data.crop_area, data.rotation) == ([0.08, 1.0], 0.0)
    assert (training.base_learning_rate, training.weight_decay) == (0.2, 1e-6)


def test_flags_override_the_recipe():
    flags = ["--epochs", "3", "--expander_dims", "8", "9", "--use_context", "false", "--crop_area", "0.5", "0.6"]
    model, data, training = parse_pretraining(["--recipe", "smoke", *flags, *REQUIRED])
    assert training.epochs == 3
    assert training.batch_size == 8  # of the recipe
    assert model.expander_dims == [8, 9]
    assert not model.use_context
    assert data.crop_area == [0.5, 0.6]


def test_a_recipe_of_ones_own(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("epochs: 7\nbackbone: resnet34\n")
    model, _, training = parse_pretraining(["--recipe", str(path), *REQUIRED])
    assert (training.epochs, model.backbone) == (7, "resnet34")


def test_an_unknown_key_suggests_the_nearest(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("base_learning_rat: 0.1\n")
    with pytest.raises(ValueError, match=r"'base_learning_rat', which does not exist; did you mean base_learning_rate"):
        parse_pretraining(["--recipe", str(path), *REQUIRED])


@pytest.mark.parametrize("key", ["dataset", "output_dir", "resume"])
def test_what_belongs_to_a_single_run_is_no_recipe(tmp_path: Path, key: str):
    path = tmp_path / "mine.yaml"
    path.write_text(f"{key}: here\n")
    with pytest.raises(ValueError, match=f"'{key}', which belongs to a single run"):
        parse_pretraining(["--recipe", str(path), *REQUIRED])


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(ValueError, match=f"'fast' found; expected {', '.join(recipe_names())}"):
        parse_pretraining(["--recipe", "fast", *REQUIRED])


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "epochs"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="expected a mapping of keys to values"):
        parse_pretraining(["--recipe", str(path), *REQUIRED])


def test_an_absent_file(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        parse_pretraining(["--recipe", str(tmp_path / "absent.yaml"), *REQUIRED])


def test_an_abbreviated_flag_is_refused():
    with pytest.raises((ValueError, SystemExit)):
        parse_pretraining(["--recipe", "smoke", "--epoch", "3", *REQUIRED])


@pytest.mark.parametrize("name", recipe_names("segmentation"))
def test_every_recipe_for_segmentation_parses(name: str):
    _, _, training = fill_sections(SEGMENTATION_SECTIONS, GIVEN | {"recipe": name}, "segmentation")
    assert training.metric_for_best_model == "dice"
    if name == "paper":
        batch = training.per_device_train_batch_size
        assert (batch, training.learning_rate, training.patience) == (32, 3e-4, 10)


@pytest.mark.parametrize("name", recipe_names("classification"))
def test_every_recipe_for_classification_parses(name: str):
    _, _, training = fill_sections(CLASSIFICATION_SECTIONS, GIVEN | {"recipe": name}, "classification")
    expected = {"default": (64, None), "paper_nih": (64, 1e-5), "paper_vinbig": (16, 1e-3)}
    assert (training.per_device_train_batch_size, training.learning_rate) == expected[name]
    assert training.patience == 10
