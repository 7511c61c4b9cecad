"""The report of a suite against its own predictions, its pictures and twins, and what a kill changes: nothing."""

from __future__ import annotations

import copy
import json
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from helpers import hidden_checkout, make_cache, save_encoders
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score

from kills import KILLED, Forks
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.collections.nih14 import NIH_FINDINGS
from mlvicx_hf.evaluation.suite.analysis import analyse
from mlvicx_hf.evaluation.suite.grid import read_suite
from mlvicx_hf.evaluation.suite.paper import paper_results, paper_tables
from mlvicx_hf.evaluation.suite.report import _beside, compose, layout, write_report
from mlvicx_hf.evaluation.suite.running import evaluate_suite


@pytest.fixture(scope="module", autouse=True)
def _no_commit() -> Iterator[None]:
    """Hide the checkout, so that a commit during the tests does not tell two reports apart."""
    with hidden_checkout():
        yield


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, the first with two pretrainings, on two findings; views, sexes and ages known; the file."""
    folder = tmp_path_factory.mktemp("suite")
    rows = [
        {
            "patient_id": f"p{i // 2}",
            "split": ("test", "test", "validation", "train", "train")[i // 2 % 5],
            "view": "PA" if i % 2 else "AP",
            "sex": "F" if i // 2 % 2 else "M",
            "age": 20 + i,
            "_draw": {"disc": i % 3 == 0, "stripes": i % 4 < 2},
            "disc": int(i % 3 == 0),
            "stripes": int(i % 4 < 2) if i % 7 else "",
        }
        for i in range(100)
    ]
    models = save_encoders(folder, 2)
    content = {
        "title": "Two findings",
        "tasks": {"findings": {"kind": "classification", "dataset": str(make_cache(folder, rows)), "paper": "NIH"}},
        "models": {"Rand. Init": {"random": models[0]}, "MLVICX": models},
        "protocols": ["frozen"],
        "label_fractions": [0.3, 1],
        "seeds": [0, 1],
        "paper_tables": ["IV", "II"],
        "classification": {"num_train_epochs": 3, "report_to": "none", "use_cpu": True},
    }
    file = folder / "suite.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def output(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("output")
    outcome = evaluate_suite(str(suite), folder, samples=200)
    assert (outcome.planned, outcome.finished, outcome.failed) == (12, 12, 0)
    return folder


@pytest.fixture(scope="module")
def report(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "report.json").read_text())
    return found


def setting(report: dict[str, Any], model: str, fraction: float) -> dict[str, Any]:
    rows = [row for row in report["settings"] if (row["model"], row["label_fraction"]) == (model, fraction)]
    assert len(rows) == 1
    return rows[0]


def predictions(output: Path, model: str, member: int, fraction: str, seed: int) -> pd.DataFrame:
    return pd.read_csv(output / f"cells/findings/{model}/{member}/frozen/{fraction}/{seed}/test_predictions.csv")


def cell_results(output: Path, model: str, member: int, fraction: str, seed: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (output / f"cells/findings/{model}/{member}/frozen/{fraction}/{seed}/results.json").read_text()
    )
    return found


def macro_auroc(table: pd.DataFrame) -> float:
    """Over the labels that the images know with both values."""
    scores = []
    for label in ("disc", "stripes"):
        known = table.dropna(subset=[f"label:{label}"])
        if known[f"label:{label}"].nunique() == 2:
            scores.append(roc_auc_score(known[f"label:{label}"], known[f"probability:{label}"]))
    return float(np.mean(scores))


def test_scores_are_those_of_the_predictions(output: Path, report: dict[str, Any]):
    row = setting(report, "MLVICX", 0.3)
    tables = [predictions(output, "MLVICX", member, "0.3", seed) for member in range(2) for seed in range(2)]
    for metric, function in (("auroc", roc_auc_score), ("auprc", average_precision_score)):
        for label in ("disc", "stripes"):
            values = []
            for table in tables:
                known = table.dropna(subset=[f"label:{label}"])
                values.append(function(known[f"label:{label}"], known[f"probability:{label}"]))
            score = row["scores"][f"{metric}:{label}"]
            assert score["mean"] == pytest.approx(np.mean(values))
            assert score["sd"] == pytest.approx(np.std(values, ddof=1))
            assert score["low"] <= score["mean"] <= score["high"]
            assert score["runs"] == 4
    results = json.loads((output / "cells/findings/MLVICX/1/frozen/0.3/1/results.json").read_text())
    assert results["test"]["auprc"]["disc"] == pytest.approx(values_of(tables[3], "disc"))


def values_of(table: pd.DataFrame, label: str) -> float:
    return float(average_precision_score(table[f"label:{label}"], table[f"probability:{label}"]))


def test_pairs_are_seeds_where_one_model_has_one_pretraining(report: dict[str, Any], output: Path):
    row = next(row for row in report["comparisons"] if row["label_fraction"] == 1)
    assert (row["model"], row["baseline"]) == ("MLVICX", "Rand. Init")
    assert row["paired"]["unit"] == "seeds"
    assert row["paired"]["pairs"] == 2

    def macro(model: str, member: int, seed: int) -> float:
        return macro_auroc(predictions(output, model, member, "1", seed))

    ours = [np.mean([macro("MLVICX", member, seed) for member in range(2)]) for seed in range(2)]
    theirs = [macro("Rand. Init", 0, seed) for seed in range(2)]
    assert row["difference"] == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert row["paired"]["t_p"] == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)


def test_runs_without_a_counterpart_are_left_out_of_a_difference(suite: Path, output: Path):
    """As in a grid that is not finished: seed 1 of the first pretraining at 100 % has no counterpart."""
    planned = read_suite(suite)
    cells = [c for c in planned.cells if c.label_fraction == 1 and (c.model, c.seed) != ("Rand. Init", 1)]
    report = analyse(planned, cells, output, samples=50)
    [row] = report["comparisons"]
    ours = [macro_auroc(predictions(output, "MLVICX", member, "1", 0)) for member in range(2)]
    theirs = macro_auroc(predictions(output, "Rand. Init", 0, "1", 0))
    assert row["difference"] == pytest.approx(np.mean(ours) - theirs)
    assert row["left_out"] == 2
    text = compose(report).to_markdown()
    assert "Runs without a counterpart of the same seed were left out, 2 times." in text


def test_groups_are_scored_on_the_same_labels(suite: Path, output: Path, tmp_path: Path):
    """No image of a woman shows stripes, so the mean of men leaves stripes out, too."""
    planned = read_suite(suite)
    cells = [cell for cell in planned.cells if (cell.model, cell.label_fraction, cell.seed) == ("Rand. Init", 1, 0)]
    shutil.copytree(output / cells[0].path, tmp_path / cells[0].path)
    file = tmp_path / cells[0].path / "test_predictions.csv"
    table = pd.read_csv(file)
    table.loc[table["sex"] == "F", "label:stripes"] = 0
    table.to_csv(file, index=False)
    found = analyse(planned, cells, tmp_path, samples=50)["settings"][0]["subgroups"]["sex"]
    for sex, rows in table.groupby("sex"):
        expected = roc_auc_score(rows["label:disc"], rows["probability:disc"])
        assert found[sex]["mean"] == pytest.approx(expected)
        assert found[sex]["labels"] == ["disc"]
    men = table["sex"] == "M"
    table.loc[men, "label:disc"], table.loc[men, "label:stripes"] = 0, np.arange(men.sum()) % 2  # nothing is shared
    table.to_csv(file, index=False)
    report = analyse(planned, cells, tmp_path, samples=50)
    found = report["settings"][0]["subgroups"]["sex"]
    assert [(found[sex]["mean"], found[sex]["labels"]) for sex in "FM"] == [("n/a", [])] * 2
    assert "| sex | F | " in compose(report).to_markdown()


def test_subgroups_calibration_decisions_and_shortcuts(report: dict[str, Any], output: Path):
    row = setting(report, "MLVICX", 1)
    assert set(row["subgroups"]) == {"view", "sex", "age"}
    assert set(row["subgroups"]["age"]) == {"18-39", "40-64", "65+"}
    assert sum(group["images"] for group in row["subgroups"]["view"].values()) == 40
    assert 0 <= row["calibration"]["ece_macro"] <= 1
    assert set(row["decisions"]["disc"]) == {"sensitivity", "specificity", "accuracy"}
    found = [cell_results(output, "MLVICX", m, "1", s)["test"] for m in range(2) for s in range(2)]
    for when in ("before", "after"):
        for name in ("ece_macro", "brier_macro"):
            mean = np.mean([test["calibration"][when][name] for test in found])
            assert row["confidence"][when][name] == pytest.approx(mean)
    tables = [predictions(output, "MLVICX", m, "1", s) for m in range(2) for s in range(2)]
    wrong = [
        np.mean((known[f"probability:{label}"] > 0.5) != (known[f"label:{label}"] == 1))
        for table in tables
        for label in ("disc", "stripes")
        for known in [table.dropna(subset=[f"label:{label}"])]
    ]
    assert row["confidence"]["errors"]["1"] == pytest.approx(np.mean(wrong))
    assert list(row["confidence"]["errors"]) == ["1", "0.9", "0.8", "0.7", "0.6", "0.5"]
    text = (output / "report.md").read_text()
    changed = text.split("### What calibration on validation changed\n")[1].split("\n#")[0]
    assert "findings, frozen, 100 %, MLVICX" in changed
    assert "30 %" not in changed
    women = [macro_auroc(table[table["sex"] == "F"]) for table in tables]
    assert row["subgroups"]["sex"]["F"]["mean"] == pytest.approx(np.mean(women))
    told = {(found["model"], found["kind"]) for found in report["shortcuts"]}
    assert told == {(model, kind) for model in ("Rand. Init", "MLVICX") for kind in ("view", "sex")}
    assert all(0 <= found["low"] <= found["auroc"] <= found["high"] <= 1 for found in report["shortcuts"])
    assert report["not_audited"] == ["source"]
    assert "Not audited: source. A view or sex counts if 10 training images and 10 test images have it" in text
    assert {found["model"] for found in report["search"]} == {"Rand. Init", "MLVICX"}
    precision = f"{report['search'][0]['precision']:.3f}"
    assert precision in text.split("## Search\n")[1].split("\n#")[0]


def test_paper_tables_have_the_papers_layout_and_our_figures_beside(report: dict[str, Any]):
    head, lines = layout("IV", report["tables"]["IV"])
    assert head == ["protocol", "loss", "1 %", "10 %", "30 %"]
    assert [line[:2] for line in lines[:3]] == [["fine-tuned", n] for n in ("L_L only", "L_G only", "MLVICX")]
    ours = setting(report, "MLVICX", 0.3)["scores"]["auroc_macro"]["mean"]
    assert lines[5] == ["frozen", "MLVICX", "– (0.601)", "– (0.661)", f"{ours:.3f} (0.691)"]
    head, lines = layout("II", report["tables"]["II"])
    assert head[2] == "Rand. Init"
    assert head[-1] == "MLVICX"
    assert len(lines) == 20


def test_a_single_run_has_no_deviation_beside_the_papers(suite: Path, output: Path, tmp_path: Path):
    read = read_suite(suite)
    shutil.copytree(output, tmp_path / "out")
    found = analyse(read, [cell for cell in read.cells if (cell.member, cell.seed) == (0, 0)], tmp_path / "out", 10)
    row = {"paper": 0.48, "paper_sd": 0.01, "ours": 0.75, "ours_sd": 0.021}
    assert _beside(row) == "0.750 ± 0.021 (0.48 ± 0.01)"
    ours = [row["ours_sd"] for rows in found["tables"].values() for row in rows if row["ours"] is not None]
    assert ours
    assert set(ours) == {None}
    assert _beside(row | {"ours_sd": None}) == "0.750 (0.48 ± 0.01)"


def test_pictures_are_written_beside_what_lies_there(report: dict[str, Any], tmp_path: Path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "mine.txt").write_text("precious")
    write_report(report, tmp_path)
    assert (tmp_path / "figures" / "mine.txt").read_text() == "precious"
    assert len(list((tmp_path / "figures").glob("*.png"))) == 3


def test_data_that_seeds_or_copies_change_are_described(report: dict[str, Any]):
    changed = copy.deepcopy(report)
    (about,) = changed["tasks"].values()
    about["train"] = {"1": {"images": [12, 1038], "patients": [7]}}
    about["data"]["copies_across_splits"] = 18
    text = compose(changed).to_markdown()
    assert "100 %: 12 to 1,038 |" in text
    assert "Copies of an image are in two splits: findings, 18 pairs. Scores may be too good." in text
    assert "Copies of an image" not in compose(report).to_markdown()


def test_the_papers_figures():
    known = paper_results()
    assert paper_tables() == ["I", "II", "III", "IV"]
    assert set(known["column"]) == {"Mean", "Dice", *NIH_FINDINGS}
    assert known.groupby("table").size().to_dict() == {"I": 720, "II": 240, "III": 48, "IV": 18}
    means = known[(known["table"] == "I") & (known["column"] == "Mean")].set_index(["label_fraction", "method"])[
        "value"
    ]
    assert list(means.xs("MLVICX", level=1)) == [0.642, 0.733, 0.763, 0.790]
    findings = known[(known["table"] == "I") & (known["column"] != "Mean")]
    distance = (findings.groupby(["label_fraction", "method"])["value"].mean() - means).abs()
    assert (distance < 0.004).sum() == 40  # the paper's own means do not all fit its columns: 0.030 off at most
    assert distance.max() == pytest.approx(0.0296, abs=1e-4)


class Outline(HTMLParser):
    """What an HTML file is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tables = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [str(dict(attrs)[name]) for name in ("src", "href") if name in dict(attrs)]
        self.tables += tag == "table"
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_needs_nothing_else_and_its_twins_say_the_same(output: Path):
    html, markdown = ((output / name).read_text() for name in ("report.html", "report.md"))
    outline = Outline()
    outline.feed(html)
    assert outline.open == []
    assert outline.sources
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert outline.tables == markdown.count("| --- |")
    assert "not a medical device" in html.lower()
    for name in ("label_efficiency", "differences", "reliability"):
        assert (output / f"figures/{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"figures/{name}.png" in markdown


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks(["mlvicx_hf.evaluation.suite.running"]) as found:
        yield found


def test_a_killed_grid_goes_on_to_the_same_report(suite: Path, output: Path, tmp_path: Path, forks: Forks):
    process = forks.start("evaluate", suite, "--output", tmp_path / "out", "--samples", 200)
    while len(list(tmp_path.glob("out/cells/**/cell.json"))) < 3:
        assert process.poll() is None, process.output
        time.sleep(0.02)
    process.kill()
    assert process.wait() == KILLED
    assert len(list(tmp_path.glob("out/cells/**/cell.json"))) < 12
    assert not (tmp_path / "out/report.json").exists()
    assert evaluate_suite(str(suite), tmp_path / "out", samples=200).finished == 12
    for name in ("report.json", "report.md", "report.html"):
        assert (tmp_path / "out" / name).read_bytes() == (output / name).read_bytes(), name


def test_two_processes_on_one_grid_make_the_same_report(suite: Path, output: Path, tmp_path: Path, forks: Forks):
    processes = [forks.start("evaluate", suite, "--output", tmp_path / "out", "--samples", 200) for _ in range(2)]
    for process in processes:
        assert process.wait() == 0, process.output
    assert (tmp_path / "out/report.json").read_bytes() == (output / "report.json").read_bytes()


def test_a_report_alone_runs_no_cell(suite: Path, output: Path, tmp_path: Path):
    outcome = evaluate_suite(str(suite), tmp_path / "none", report_only=True)
    assert (outcome.planned, outcome.finished, outcome.failed, outcome.report) == (12, 0, 0, None)
    shutil.copytree(output, tmp_path / "out")
    shutil.rmtree(tmp_path / "out/cells/findings/MLVICX/1")
    found = evaluate_suite(str(suite), tmp_path / "out", report_only=True, samples=20).report
    assert found is not None
    assert found["cells"] == {"planned": 12, "finished": 8, "failed": {}}


def test_a_finished_grid_is_reported_without_its_cache(
    suite: Path, output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = yaml.safe_load(suite.read_text())
    shutil.copytree(output, tmp_path / "out")
    cache = Path(content["tasks"]["findings"]["dataset"])
    cache.rename(cache.with_name("moved"))
    try:
        outcome = evaluate_suite(str(suite), tmp_path / "out", samples=20)
    finally:
        cache.with_name("moved").rename(cache)
    assert (outcome.finished, outcome.failed) == (12, 0)
    assert f"no folder {cache}" in capsys.readouterr().err


def test_other_test_images_are_refused(suite: Path, output: Path, tmp_path: Path):
    read = read_suite(suite)
    shutil.copytree(output, tmp_path / "out")
    file = tmp_path / "out/cells/findings/MLVICX/0/frozen/1/0/test_predictions.csv"
    table = pd.read_csv(file)
    table["label:disc"] = 1 - table["label:disc"]
    table.to_csv(file, index=False)
    with pytest.raises(UserError, match=r"MLVICX/0/frozen/1/0 was tested on other images or labels than"):
        analyse(read, read.cells, tmp_path / "out", 10)


def test_cells_of_an_earlier_version_say_nothing_of_calibration(suite: Path, output: Path, tmp_path: Path):
    shutil.copytree(output, tmp_path / "out")
    for file in (tmp_path / "out").glob("cells/**/results.json"):
        content = json.loads(file.read_text())
        del content["calibration"], content["test"]["calibration"], content["test"]["answers"]
        file.write_text(json.dumps(content))
    outcome = evaluate_suite(str(suite), tmp_path / "out", report_only=True, samples=10)
    assert outcome.finished == 12
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Calibration and decisions" in text
    assert "What calibration" not in text


def test_cells_of_another_cache_are_refused(suite: Path, output: Path, tmp_path: Path):
    read = read_suite(suite)
    shutil.copytree(output, tmp_path / "out")
    file = tmp_path / "out/cells/findings/MLVICX/0/frozen/1/0/results.json"
    file.write_text(re.sub(r'"split_hash": "\w+"', '"split_hash": "0"', file.read_text()))
    with pytest.raises(
        ValueError, match=r"MLVICX/0/frozen/1/0 was run with split_hash 0, other cells of task findings"
    ):
        analyse(read, read.cells, tmp_path / "out", 10)
