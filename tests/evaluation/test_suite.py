"""A grid of runs: what it does, what it does not do twice, what it reports."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import traceback
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from helpers import make_cache, mlvicx, save_encoders

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.evaluation.suite import running
from mlvicx_hf.evaluation.suite.grid import read_suite
from mlvicx_hf.evaluation.suite.paper import paper_results
from mlvicx_hf.evaluation.suite.running import run_cells
from mlvicx_hf.recipes import find_recipe, recipe_names

OPTIONS = {"num_train_epochs": 2, "report_to": "none", "use_cpu": True}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A suite of two tasks and two models, one of them with two sets of weights."""
    folder = tmp_path_factory.mktemp("parts")
    rows = [
        {
            "patient_id": f"p{i // 2}",
            "split": ("test", "validation", "train", "train", "train")[i // 2 % 5],
            "_draw": {"disc": i % 3 == 0, "stripes": i % 4 < 2},
            "disc": int(i % 3 == 0),
            "stripes": int(i % 4 < 2),
        }
        for i in range(40)
    ]
    models = save_encoders(folder, 2)
    masked = [row | {"disc": "", "stripes": ""} for row in rows]
    return {
        "tasks": {
            "findings": {"kind": "classification", "dataset": str(make_cache(folder, rows))},
            "discs": {
                "kind": "segmentation",
                "dataset": str(make_cache(folder, masked, name="masked", mask_names=("disc",))),
                "image_size": 32,
            },
        },
        "models": {"pretrained": models, "random": {"random": models[0]}},
        "protocols": ["frozen"],
        "label_fractions": [0.5, 1],
        "classification": OPTIONS,
        "segmentation": OPTIONS | {"num_train_epochs": 1, "augment": False},
    }


@pytest.fixture
def small(parts: dict[str, Any]) -> dict[str, Any]:
    """The first task alone, with all labels: three cells."""
    return parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}


def write(folder: Path, suite: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def test_a_grid_is_run_once(parts: dict[str, Any], tmp_path: Path):
    cells = read_suite(write(tmp_path, parts)).cells
    assert len(cells) == 2 * 3 * 1 * 2
    output = tmp_path / "out"
    assert run_cells(cells[:5], output) == (list(cells[:5]), [])
    times = {file: os.stat(file).st_mtime_ns for file in output.rglob("*.json")}
    assert run_cells(cells, output) == (list(cells), [])
    assert all(os.stat(file).st_mtime_ns == time for file, time in times.items())
    first = json.loads((output / cells[0].path / "results.json").read_text())
    assert first["hyperparameters"]["fast_probe"]
    assert first["label_fraction"] == 0.5
    assert not list(output.rglob("*.safetensors"))
    again = tmp_path / "again"
    run_cells(cells[:2], again)
    for cell in cells[:2]:
        for name in ("test_predictions.csv", "splits.csv"):
            assert (again / cell.path / name).read_bytes() == (output / cell.path / name).read_bytes()


@pytest.mark.lowest
def test_a_cell_that_another_process_runs_is_left_to_it(small: dict[str, Any], tmp_path: Path):
    cells = read_suite(write(tmp_path, small)).cells
    lock = tmp_path / "out" / cells[1].lock_path
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert run_cells(cells, tmp_path / "out") == ([cells[0], cells[2]], [])
    assert run_cells(cells, tmp_path / "out") == (list(cells), [])


def test_a_cell_that_fails_is_reported_and_the_others_go_on(small: dict[str, Any], tmp_path: Path):
    suite = small | {"models": {"absent": str(tmp_path / "absent"), **small["models"]}}
    words = ("evaluate", write(tmp_path, suite), "--output", tmp_path / "out", "--samples", 50)
    done = mlvicx(*words)
    assert done.returncode == 1
    assert done.stderr.startswith(f"no folder {tmp_path / 'absent'}: it is looked for on the Hub for model absent\n")
    assert "3 of 4 cells finished, 1 failed" in done.stdout
    error = tmp_path / "out/cells/findings/absent/0/frozen/1/0.error.txt"
    assert "absent" in error.read_text()
    reason = next(line for line in error.read_text().splitlines() if line.startswith("FileNotFoundError: "))
    assert f"failed: cells/findings/absent/0/frozen/1/0: {reason}; traceback in {error}" in done.stderr
    assert f"| {reason}" in (tmp_path / "out/report.md").read_text()
    suite["models"]["absent"] = small["models"]["pretrained"][0]
    write(tmp_path, suite)
    done = mlvicx(*words)
    assert "4 of 4 cells finished, 0 failed" in done.stdout
    assert not error.exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["cells"] == {"planned": 4, "finished": 4, "failed": {}}


@pytest.mark.parametrize("message", ["one: two", "first: line\nexpected: something\nend", ""])
def test_a_failed_cell_tells_the_first_line_of_its_error(small: dict[str, Any], tmp_path: Path, message: str):
    (cell, *_) = read_suite(write(tmp_path, small)).cells
    file = tmp_path / cell.error_path
    file.parent.mkdir(parents=True)
    try:
        try:
            raise OSError("before")
        except OSError as error:
            raise ValueError(message) from error
    except ValueError:
        file.write_text(traceback.format_exc())
    assert cell.failure(tmp_path) == (f"ValueError: {message}".splitlines()[0] if message else "ValueError")


def test_what_is_not_there_is_said_before_anything_runs(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    absent = {"kind": "segmentation", "dataset": str(tmp_path / "lungs")}
    suite = parts | {"tasks": {"lungs": absent, **parts["tasks"]}, "models": {"random": {"random": "org/none"}}}
    monkeypatch.setattr(running, "run_cells", lambda *_: ([], []))
    assert mlvicx("evaluate", write(tmp_path, suite), "--output", tmp_path / "out").stderr.splitlines() == [
        f"no folder {tmp_path / 'lungs'}: task lungs will fail until its cache is there",
        "no folder org/none: it is looked for on the Hub for model random",
    ]


def test_several_launched_processes_are_refused(parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They would average the gradients of different cells."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="several launched processes found; expected `mlvicx evaluate` once a GPU"):
        running.evaluate_suite(str(write(tmp_path, parts)), tmp_path / "out")


def test_seeds_can_be_paired_with_pretrainings(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"label_fractions": [1], "seeds": [4, 5], "pair_seeds": True}
    cells = [cell for cell in read_suite(write(tmp_path, suite)).cells if cell.kind == "classification"]
    assert [(cell.model, cell.member, cell.seed) for cell in cells] == [
        ("pretrained", 0, 4),
        ("pretrained", 1, 5),
        ("random", 0, 4),
        ("random", 0, 5),
    ]


def test_protocols_with_flags_of_their_own_give_way_to_others(parts: dict[str, Any], tmp_path: Path):
    kinds = {"classification": {"patience": 3}, "segmentation": {"num_train_epochs": 4}}
    suite = parts | kinds | {"protocols": {"frozen": None, "finetuned": {"num_train_epochs": 2, "patience": 5}}}
    options = {(cell.kind, cell.protocol): cell.options for cell in read_suite(write(tmp_path, suite)).cells}
    assert options["classification", "frozen"] == {"patience": 3}
    assert options["classification", "finetuned"] == {"num_train_epochs": 2, "patience": 3}
    assert options["segmentation", "finetuned"] == {"num_train_epochs": 4, "patience": 5, "image_size": 32}
    suite["protocols"]["finetuned"] = {"freeze": True}
    with pytest.raises(UserError, match=r"pretrained, finetuned: freeze found, which is no flag of classification"):
        read_suite(write(tmp_path, suite))


def test_a_recipe_decides_whether_the_fast_probe_follows(small: dict[str, Any], tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_train_epochs: 2\n")
    cell = read_suite(write(tmp_path, small | {"classification": OPTIONS | {"recipe": str(recipe)}})).cells[0]
    assert cell.flags["fast_probe"]
    recipe.write_text("num_train_epochs: 2\nbf16: true\n")
    assert not cell.flags["fast_probe"]


def test_other_settings_and_weights_are_refused(small: dict[str, Any], tmp_path: Path):
    suite = small | {"models": {"pretrained": str(tmp_path / "model")}}
    shutil.copytree(small["models"]["pretrained"][0], tmp_path / "model")
    cells = read_suite(write(tmp_path, suite)).cells
    assert run_cells(cells, tmp_path / "out") == (list(cells), [])
    others = read_suite(write(tmp_path, suite | {"classification": OPTIONS | {"num_train_epochs": 3}})).cells
    with pytest.raises(UserError, match=r"made with other settings \(options: .*2.*then.*3.*now\)"):
        run_cells(others, tmp_path / "out")
    shutil.copytree(small["models"]["pretrained"][1], tmp_path / "model", dirs_exist_ok=True)
    with pytest.raises(UserError, match=r"made with other settings \(\S+model\.safetensors: \w+ then, \w+ now\)"):
        run_cells(cells, tmp_path / "out")
    shutil.rmtree(tmp_path / "model")  # the report can be made elsewhere
    assert cells[0].is_finished(tmp_path / "out")


def test_weights_that_change_while_a_cell_runs_fail_it(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    suite = read_suite(write(tmp_path, parts))
    cell = next(cell for cell in suite.cells if cell.kind == "classification" and Path(cell.weights).is_dir())
    finetune = running.finetune_classifier
    weights = Path(shutil.copytree(cell.weights, tmp_path / "weights"))
    cell = dataclasses.replace(cell, weights=str(weights))

    def replacing(*arguments: Any) -> Any:
        done = finetune(*arguments)
        config = weights / "config.json"
        config.write_text(config.read_text() + " ")
        return done

    monkeypatch.setattr(running, "finetune_classifier", replacing)
    finished, failed = running.run_cells([cell], tmp_path / "out")
    assert (finished, failed) == ([], [cell])
    assert "were changed while it ran" in (tmp_path / "out" / cell.error_path).read_text()


def test_a_changed_cache_recipe_or_configuration_is_refused(parts: dict[str, Any], tmp_path: Path):
    recipe, cache, model = tmp_path / "mine.yaml", tmp_path / "cache", tmp_path / "model"
    recipe.write_text("learning_rate: 0.01\n")
    shutil.copytree(parts["tasks"]["findings"]["dataset"], cache)
    shutil.copytree(parts["models"]["pretrained"][0], model)
    suite = parts | {"tasks": {"findings": {"kind": "classification", "dataset": str(cache), "recipe": str(recipe)}}}
    suite |= {"models": {"named": {"random": str(model)}}, "label_fractions": [1]}  # not as its weights are called
    [cell] = read_suite(write(tmp_path, suite)).cells
    assert run_cells([cell], tmp_path / "out") == ([cell], [])
    results = json.loads((tmp_path / "out" / cell.path / "results.json").read_text())
    assert results["hyperparameters"]["learning_rate"] == 0.01
    for file in (recipe, cache / "cache.json", model / "config.json"):
        before = file.read_text()
        file.write_text(before + "\n")
        with pytest.raises(UserError, match=rf"made with other settings \({file}: \w+ then, \w+ now\)"):
            cell.is_finished(tmp_path / "out")
        file.write_text(before)
    assert cell.is_finished(tmp_path / "out")
    about = tmp_path / "out" / cell.path / "cell.json"
    written = json.loads(about.read_text())
    for arguments in ({"num_train_epochs": 7}, {"an_option_of_before": 1}, {}):  # of versions with other defaults
        about.write_text(json.dumps(written | {"arguments": arguments}))
        if "num_train_epochs" in arguments:
            with pytest.raises(UserError, match=r"made with other settings \(num_train_epochs: 7 then, 2\.0 now\)"):
                cell.is_finished(tmp_path / "out")
        else:
            assert cell.is_finished(tmp_path / "out")
    about.write_text(json.dumps({name: value for name, value in written.items() if name != "arguments"}))
    assert cell.is_finished(tmp_path / "out")
    about.write_text(json.dumps(written))
    recipe.unlink()  # the report can be made elsewhere
    assert cell.is_finished(tmp_path / "out")


def test_weights_of_other_libraries_are_hashed_too(small: dict[str, Any], tmp_path: Path):
    folder = Path(shutil.copytree(small["models"]["pretrained"][0], tmp_path / "model"))
    file, sharded = folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"
    shutil.copy(file, sharded)
    configurations = {str(folder / name) for name in ("config.json", "preprocessor_config.json")}
    models = {
        "plain": {"weights": str(file)},
        "timm": {"timm": f"test_resnet:{file}"},
        "hub": {"hub": str(folder)},
        "named": {"timm": "test_resnet.r160_in1k"},
    }
    found = {cell.model: cell for cell in read_suite(write(tmp_path, small | {"models": models})).cells}
    weights = {name: set(cell.files) - {str(Path(cell.dataset, "cache.json"))} for name, cell in found.items()}
    assert weights == {
        "plain": {str(file)},
        "timm": {str(file)},
        "hub": {str(file), str(sharded)} | configurations,
        "named": set(),
    }
    assert [found[name].weights_file for name in ("plain", "timm", "hub")] == [str(file)] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": [1]}, "key(s) fractions found; expected some of title, tasks"),
        ({"protocols": ["linear"]}, "protocols linear found; expected some of frozen, frozen_levels, finetuned"),
        ({"paper_tables": ["V"]}, "paper_tables V found; expected some of I, II, III, IV"),
        ({"tasks": {"a": {"kind": "segmentation", "dataset": "x", "metric": "iou"}}}, "task a: metric iou found"),
        ({"classification": {"seed": 3}}, "frozen: flag seed found; expected no flag that the grid sets itself"),
        ({"segmentation": {"freeze_backbone": True}}, "frozen: flag freeze_backbone found"),
        ({"shortcuts": ["scanner"]}, "shortcuts scanner found; expected some of view, sex, source, search"),
        ({"compare": [["pretrained", "simclr"]]}, "compare simclr found; expected some of pretrained, random"),
        ({"tasks": {"a": {"kind": "detection", "dataset": "x"}}}, "task a"),
        ({"models": {"a": {"architecture": "x"}}}, "model a {'architecture': 'x'} found"),
        ({"models": ["runs/a"]}, "models: ['runs/a'] found; expected a mapping with one entry at least"),
        ({"models": {}}, "models: {} found; expected a mapping"),
        ({"tasks": {"a": "caches/a"}}, "task a caches/a found; expected a kind"),
        ({"seeds": 3}, "seeds: 3 found; expected a list of whole numbers from 0 on"),
        ({"seeds": ["a"]}, "seeds: ['a'] found"),
        ({"label_fractions": 0.1}, "label_fractions: 0.1 found; expected a list of numbers above 0, up to 1"),
        ({"label_fractions": ["10%"]}, "label_fractions: ['10%'] found"),
        ({"label_fractions": [2]}, "label_fractions: [2] found"),
        ({"compare": ["random", "pretrained"]}, "compare: ['random', 'pretrained'] found; expected a list of pairs"),
        ({"classification": ["patience"]}, "classification: ['patience'] found; expected a mapping of flags"),
        ({"shortcuts": None}, "shortcuts: None found; expected a list of names"),
        ({"protocols": []}, "protocols: [] found"),
        ({"seeds": []}, "seeds: [] found; expected a list of whole numbers from 0 on"),
        ({"models": {"a": None}}, "model a: weights None found; expected a folder, or a list of them"),
        ({"models": {"a": []}}, "model a: weights [] found; expected a folder, or a list of them"),
        ({"models": {"../a": "runs/a"}}, "models: name '../a' found; expected text without a slash"),
        ({"models": {"..": "runs/a"}}, "models: name '..' found"),
        ({"models": {"": "runs/a"}}, "models: name '' found"),
        ({"seeds": [0, 1, 1]}, "/frozen/1/1"),
        ({"label_fractions": [0.1, 0.1000000001]}, "/frozen/0.1/0"),
    ],
)
def test_suites_that_are_wrong(change: dict[str, Any], message: str, parts: dict[str, Any], tmp_path: Path):
    with pytest.raises(UserError, match=re.escape(message)):
        read_suite(write(tmp_path, parts | change))


def test_suites_of_the_package_name_what_the_paper_has():
    known = paper_results()
    for name in recipe_names("suite"):
        suite = read_suite(find_recipe(name, "suite"))
        for table in suite.paper_tables:
            rows = known[known["table"] == table]
            assert set(suite.paper.values()) == set(rows["dataset"])
            models = {cell.model for cell in suite.cells}
            assert "ImageNet" in models  # which the paper does not have
            assert models - {"ImageNet"} <= set(rows["method"])
            assert {cell.label_fraction for cell in suite.cells} == set(rows["label_fraction"])
            assert {cell.protocol for cell in suite.cells} >= set(rows["protocol"])
    with pytest.raises(UserError, match=r"suite 'table_5' found; expected .*table_1.*or the path of a \.yaml file"):
        find_recipe("table_5", "suite")


def test_a_flag_that_does_not_exist_is_refused_at_once(parts: dict[str, Any], tmp_path: Path):
    for key, value in {
        "models": {"wrong": {"weights": parts["models"]["pretrained"][0], "num_train_epoch": 1}},
        "classification": {"num_train_epoch": 1},
        "tasks": {"findings": parts["tasks"]["findings"] | {"num_train_epoch": 1}},
    }.items():
        with pytest.raises(
            ValueError, match=r"num_train_epoch found, which is no flag of \w+; expected num_train_epochs"
        ):
            read_suite(write(tmp_path, parts | {key: value}))


def test_an_impossible_value_of_a_flag_fails_its_cell_alone(small: dict[str, Any], tmp_path: Path):
    model = small["models"]["pretrained"][0]
    wrong = {"weights": model, "num_train_epochs": "many"}
    cells = read_suite(write(tmp_path, small | {"models": {"wrong": wrong, "right": model}})).cells
    assert run_cells(cells, tmp_path / "out") == ([cells[1]], [cells[0]])
    expected = "mlvicx_hf.common.errors.UserError: num_train_epochs='many' found; expected a number above 0"
    assert cells[0].failure(tmp_path / "out") == expected


def test_models_with_flags_of_their_own(small: dict[str, Any], tmp_path: Path):
    """Context dropped at transfer, and all levels pooled: other features, the same weights."""
    model = small["models"]["pretrained"][0]
    suite = small | {"models": {"kept": model, "dropped": {"weights": model, "drop_context": True}}}
    cells = read_suite(write(tmp_path, suite | {"protocols": ["frozen", "frozen_levels"]})).cells
    assert run_cells(cells, tmp_path / "out") == (list(cells), [])
    results = [json.loads((tmp_path / "out" / cell.path / "results.json").read_text()) for cell in cells]
    assert [r["hyperparameters"]["pooled_levels"] for r in results] == ["last", "all"] * 2
    assert [r["drop_context"] for r in results] == [False, False, True, True]
    assert len({json.dumps(r["validation"]["auroc"]) for r in results}) == 4


@pytest.mark.parametrize("content", [b"tasks:\n\ta: b", b"a: b: c", "title: é".encode("latin-1"), b"- a"])
def test_files_that_are_no_suite(content: bytes, tmp_path: Path):
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"(?s)s\.yaml.*expected (YAML in UTF-8|a mapping)"):
        read_suite(file)
