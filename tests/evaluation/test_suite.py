"""A grid of runs: what it does, what it does not do twice, what it reports."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from helpers import make_cache, run_script, save_encoders

from mlvicx_hf.evaluation.suite import command
from mlvicx_hf.evaluation.suite.analysis import paper_results
from mlvicx_hf.evaluation.suite.grid import find_suite, is_finished, read_reason, read_suite, run_suite, suite_names

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


def write(folder: Path, suite: dict[str, Any]) -> Path:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def test_a_grid_is_run_once(parts: dict[str, Any], tmp_path: Path):
    cells = read_suite(write(tmp_path, parts)).cells
    assert len(cells) == 2 * 3 * 1 * 2
    output = tmp_path / "out"
    assert run_suite(cells[:5], output) == []
    times = {file: os.stat(file).st_mtime_ns for file in output.rglob("*.json")}
    assert run_suite(cells, output) == []
    assert all(os.stat(file).st_mtime_ns == time for file, time in times.items())
    first = json.loads((output / cells[0].path / "results.json").read_text())
    assert first["hyperparameters"]["fast_probe"]
    assert first["label_fraction"] == 0.5
    assert not list(output.rglob("*.safetensors"))
    again = tmp_path / "again"
    assert run_suite(cells[:2], again) == []
    for cell in cells[:2]:
        for name in ("test_predictions.csv", "splits.csv"):
            assert (again / cell.path / name).read_bytes() == (output / cell.path / name).read_bytes()


def test_a_cell_that_another_process_runs_is_left_to_it(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    cells = read_suite(write(tmp_path, suite)).cells
    lock = tmp_path / "out" / cells[1].lock_path
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert run_suite(cells, tmp_path / "out") == []
        assert [is_finished(cell, tmp_path / "out") for cell in cells] == [True, False, True]
    assert run_suite(cells, tmp_path / "out") == []
    assert all(is_finished(cell, tmp_path / "out") for cell in cells)


def test_a_cell_that_fails_is_reported_and_the_others_go_on(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    suite["models"] = {"absent": str(tmp_path / "absent"), **parts["models"]}
    done = run_script("evaluate_suite.py", write(tmp_path, suite), "--output", tmp_path / "out")
    assert done.stderr.startswith(f"no folder {tmp_path / 'absent'}: it is looked for on the Hub for model absent\n")
    assert done.returncode == 1, done.stderr
    assert "3 of 4 cells finished, 1 failed" in done.stdout
    error = tmp_path / "out/cells/findings/absent/0/frozen/1/0.error.txt"
    assert "absent" in error.read_text()
    reason = error.read_text().splitlines()[-1]
    assert f"failed: cells/findings/absent/0/frozen/1/0: {reason}; traceback in {error}" in done.stderr
    assert f"| {reason}" in (tmp_path / "out/report.md").read_text()
    suite["models"]["absent"] = parts["models"]["pretrained"][0]
    done = run_script("evaluate_suite.py", write(tmp_path, suite), "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not error.exists()
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["cells"] == {"planned": 4, "finished": 4, "failed": {}}


def test_what_is_not_there_is_said_before_anything_runs(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    absent = {"kind": "segmentation", "dataset": str(tmp_path / "lungs")}
    suite = parts | {"tasks": {"lungs": absent, **parts["tasks"]}, "models": {"random": {"random": "org/none"}}}
    monkeypatch.setattr(command, "run_suite", lambda *_: [])
    monkeypatch.setattr("sys.argv", ["evaluate", str(write(tmp_path, suite)), "--output", str(tmp_path / "out")])
    command.main()
    assert capsys.readouterr().err.splitlines() == [
        f"no folder {tmp_path / 'lungs'}: task lungs will fail until its cache is there",
        "no folder org/none: it is looked for on the Hub for model random",
    ]


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
    with pytest.raises(ValueError, match=r"pretrained, finetuned: freeze found, which is no flag of classification"):
        read_suite(write(tmp_path, suite))


def test_other_settings_are_refused(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    suite["models"] = {"pretrained": parts["models"]["pretrained"][0]}
    run_suite(read_suite(write(tmp_path, suite)).cells, tmp_path / "out")
    suite["classification"] = OPTIONS | {"num_train_epochs": 3}
    with pytest.raises(ValueError, match=r"made with other settings \(options: .*2.*then.*3.*now\)"):
        run_suite(read_suite(write(tmp_path, suite)).cells, tmp_path / "out")


def test_other_weights_in_the_same_folder_are_refused(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    suite["models"] = {"pretrained": str(tmp_path / "model")}
    shutil.copytree(parts["models"]["pretrained"][0], tmp_path / "model")
    cells = read_suite(write(tmp_path, suite)).cells
    assert run_suite(cells, tmp_path / "out") == []
    shutil.copytree(parts["models"]["pretrained"][1], tmp_path / "model", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"made with other settings \(\S+model\.safetensors: \w+ then, \w+ now\)"):
        run_suite(cells, tmp_path / "out")
    shutil.rmtree(tmp_path / "model")  # the report can be made elsewhere
    assert is_finished(cells[0], tmp_path / "out")


def test_a_changed_cache_recipe_or_configuration_is_refused(parts: dict[str, Any], tmp_path: Path):
    recipe, cache, model = tmp_path / "mine.yaml", tmp_path / "cache", tmp_path / "model"
    recipe.write_text("learning_rate: 0.01\n")
    shutil.copytree(parts["tasks"]["findings"]["dataset"], cache)
    shutil.copytree(parts["models"]["pretrained"][0], model)
    suite = parts | {"tasks": {"findings": {"kind": "classification", "dataset": str(cache), "recipe": str(recipe)}}}
    suite |= {"models": {"random": {"random": str(model)}}, "label_fractions": [1]}
    [cell] = read_suite(write(tmp_path, suite)).cells
    assert run_suite([cell], tmp_path / "out") == []
    for file in (recipe, cache / "cache.json", model / "config.json"):
        before = file.read_text()
        file.write_text(before + "\n")
        with pytest.raises(ValueError, match=rf"made with other settings \({file}: \w+ then, \w+ now\)"):
            is_finished(cell, tmp_path / "out")
        file.write_text(before)
    assert is_finished(cell, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fractions": [1]}, "key(s) fractions found; expected some of title, tasks"),
        ({"protocols": ["linear"]}, "protocols linear found; expected some of frozen, frozen_levels, finetuned"),
        ({"paper_tables": ["V"]}, "paper_tables V found; expected some of I, II, III, IV"),
        ({"tasks": {"a": {"kind": "segmentation", "dataset": "x", "metric": "iou"}}}, "task a: metric iou found"),
        ({"classification": {"seed": 3}}, "frozen: flag seed found, which is up to the grid"),
        ({"segmentation": {"freeze_backbone": True}}, "frozen: flag freeze_backbone found"),
        ({"shortcuts": ["scanner"]}, "shortcuts scanner found; expected some of view, sex, source"),
        ({"compare": [["pretrained", "simclr"]]}, "compare simclr found; expected some of pretrained, random"),
        ({"tasks": {"a": {"kind": "detection", "dataset": "x"}}}, "task a"),
        ({"models": {"a": {"architecture": "x"}}}, "model a {'architecture': 'x'} found"),
    ],
)
def test_suites_that_are_wrong(change: dict[str, Any], message: str, parts: dict[str, Any], tmp_path: Path):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_suite(write(tmp_path, parts | change))


def test_suites_of_the_package_name_what_the_paper_has():
    known = paper_results()
    for name in suite_names():
        suite = read_suite(find_suite(name))
        for table in suite.paper_tables:
            rows = known[known["table"] == table]
            assert set(suite.paper.values()) == set(rows["dataset"])
            assert {cell.model for cell in suite.cells} <= set(rows["method"])
            assert {cell.label_fraction for cell in suite.cells} == set(rows["label_fraction"])
            assert {cell.protocol for cell in suite.cells} >= set(rows["protocol"])
    with pytest.raises(ValueError, match=r"suite 'table_5' found; expected .*table_1.*or the path of a \.yaml file"):
        find_suite("table_5")


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


def test_an_impossible_value_of_a_flag_fails_its_cell_alone(parts: dict[str, Any], tmp_path: Path):
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    wrong = {"weights": parts["models"]["pretrained"][0], "num_train_epochs": "many"}
    suite["models"] = {"wrong": wrong, **parts["models"]}
    cells = read_suite(write(tmp_path, suite)).cells
    [failed] = run_suite(cells, tmp_path / "out")
    assert failed.model == "wrong"
    reason = read_reason(tmp_path / "out" / failed.error_path)
    assert reason == "ValueError: argument --num_train_epochs/--num-train-epochs: invalid float value: 'many'"


def test_models_with_flags_of_their_own(parts: dict[str, Any], tmp_path: Path):
    """Context dropped at transfer, and all levels pooled: other features, the same weights."""
    model = parts["models"]["pretrained"][0]
    suite = parts | {"tasks": {"findings": parts["tasks"]["findings"]}, "label_fractions": [1]}
    suite |= {"models": {"kept": model, "dropped": {"weights": model, "drop_context": True}}}
    suite |= {"protocols": ["frozen", "frozen_levels"]}
    cells = read_suite(write(tmp_path, suite)).cells
    assert run_suite(cells, tmp_path / "out") == []
    results = [json.loads((tmp_path / "out" / cell.path / "results.json").read_text()) for cell in cells]
    assert [r["hyperparameters"]["pooled_levels"] for r in results] == ["last", "all"] * 2
    assert [r["drop_context"] for r in results] == [False, False, True, True]
    assert len({json.dumps(r["validation"]["auroc"]) for r in results}) == 4
