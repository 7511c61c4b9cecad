"""Intervals of the difference between groups of runs."""

import json
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import mlvicx
from scipy.integrate import quad
from scipy.stats import norm

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.evaluation.runs import Predictions, read_run
from mlvicx_hf.evaluation.statistics import compare_runs, difference, estimate

PATIENTS = 150


def write_run(folder: Path, noise: float, seed: int, images: int = 2 * PATIENTS) -> Path:
    """Predictions of one label: the truth plus noise."""
    truth = np.random.default_rng(0).integers(0, 2, images)
    scores = truth + noise * np.random.default_rng(seed).standard_normal(images)
    table = {
        "source": [f"test:{i}.png" for i in range(images)],
        "patient_id": [f"{i // 2}" for i in range(images)],
        "label:Edema": truth,
        "probability:Edema": 1 / (1 + np.exp(-scores)),
    }
    folder.mkdir()
    pd.DataFrame(table).to_csv(folder / "test_predictions.csv", index=False)
    return folder


def test_a_clear_gain_has_an_interval_without_zero_and_no_gain_has_one_with_it(tmp_path: Path) -> None:
    good = [write_run(tmp_path / f"good{i}", 0.5, i) for i in range(2)]
    bad = [write_run(tmp_path / f"bad{i}", 3.0, 10 + i) for i in range(2)]
    same = [write_run(tmp_path / f"same{i}", 3.0, 20 + i) for i in range(2)]
    gain = compare_runs(good, bad, samples=200)
    assert 0 < gain["low"] < gain["difference"] < gain["high"]
    none = compare_runs(same, bad, samples=200)
    assert none["low"] < 0 < none["high"]
    assert compare_runs(good, bad, samples=200) == gain
    mirrored = compare_runs(bad, good, samples=200)
    assert mirrored["difference"] == -gain["difference"]
    assert mirrored["low"] == pytest.approx(-gain["high"])


def test_an_interval_of_average_precision_is_not_pulled_up_by_the_draws(tmp_path: Path) -> None:
    """Draws raise average precision, and that of the better model more, so a percentile interval would lie too high."""
    written = (("good", 0.6, 1), ("bad", 2.0, 2))
    runs = [read_run(write_run(tmp_path / name, noise, seed)) for name, noise, seed in written]
    ours, theirs = (estimate([run], samples=400)["auprc_macro"] for run in runs)
    found, plain = difference(ours, theirs), np.percentile(ours.draws - theirs.draws, [2.5, 97.5])
    assert [found["low"], found["high"]] == pytest.approx([2 * found["difference"] - end for end in reversed(plain)])
    area = [estimate([run], samples=400)["auroc_macro"] for run in runs]
    found, plain = difference(*area), np.percentile(area[0].draws - area[1].draws, [2.5, 97.5])
    assert [found["low"], found["high"]] == pytest.approx(list(plain))


@pytest.mark.parametrize(("pixels", "refused"), [(9, False), (900, True)])
def test_a_structure_may_be_lost_at_a_smaller_side_if_it_has_few_pixels(
    tmp_path: Path, pixels: int, refused: bool
) -> None:
    runs = [write_overlaps(tmp_path / name, 0.8, 0) for name in ("large", "small")]
    for run, shown in zip(runs, (pixels, 0), strict=True):
        table = pd.read_csv(run / "test_overlaps.csv", dtype={"patient_id": str})
        table.loc[0, [name for name in table if name.endswith(":lungs")]] = shown
        table.to_csv(run / "test_overlaps.csv", index=False)
    with pytest.raises(UserError, match="other images or labels") if refused else nullcontext():
        compare_runs(runs[:1], runs[1:], samples=20)


def test_runs_of_one_group_repeat_one_another(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, 1, seed) for seed, name in enumerate("abc")]
    for run, fraction in zip(runs, (1.0, 1.0, 0.3), strict=True):
        about = {"protocol": "frozen", "label_fraction": fraction, "data": {"patients_known": fraction == 1}}
        (run / "results.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"c: label_fraction 0\.3 found, and 1\.0 in .*a; expected runs that differ in"):
        compare_runs([runs[0], runs[2]], [runs[1]], samples=10)
    for name, change in (
        ("learning_rate", {"hyperparameters": {"learning_rate": 1}}),
        ("max_train", {"max_train_samples": 9}),
        ("drop_context", {"drop_context": True}),
        ("image_size", {"image_size": 224}),
    ):
        for run in runs[:2]:
            about = json.loads((run / "results.json").read_text())
            about |= {"hyperparameters": {"learning_rate": 2}, "image_size": 96, "drop_context": False}
            about |= change if run == runs[1] else {}
            (run / "results.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=name):
            compare_runs(runs[:2], [runs[2]], samples=10)
        (runs[1] / "results.json").write_text((runs[0] / "results.json").read_text())
    found = compare_runs(runs[:1], runs[2:], samples=10)
    assert (found["runs_sd"], found["patients_known"]) == ("n/a", False)
    assert compare_runs(runs[:1], runs[1:2], samples=10)["patients_known"]
    (runs[1] / "results.json").unlink()
    assert compare_runs(runs[:1], runs[1:2], samples=10)["patients_known"] is None


def test_runs_on_other_images_or_without_predictions_are_refused(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run", 1, 0), write_run(tmp_path / "other", 1, 0, images=20)
    with pytest.raises(ValueError, match=r"other was tested on other images or labels than"):
        compare_runs([run], [other], samples=10)
    with pytest.raises(FileNotFoundError, match=r"absent holds no test_predictions\.csv and no test_overlaps\.csv"):
        compare_runs([run], [tmp_path / "absent"], samples=10)
    with pytest.raises(UserError, match="samples=0 found; expected 1 or more"):
        compare_runs([run], [run], samples=0)
    table = run / "test_predictions.csv"
    alone = write_run(tmp_path / "alone", 1, 0)
    one_each = pd.read_csv(table).assign(patient_id=lambda rows: rows.index)
    one_each.to_csv(alone / "test_predictions.csv", index=False)
    with pytest.raises(UserError, match="alone names other patients of the same test images than"):
        compare_runs([run], [alone], samples=10)
    for content, message in (
        ("", "expected the table that the run wrote"),
        (table.read_text().replace(",", ";"), "expected source, patient_id, label:…"),
        (table.read_text().replace("patient_id", "patient"), "expected patient_id as well"),
        (table.read_text().replace("probability:", "score:"), "expected probability:Edema as well"),
    ):
        table.write_text(content)
        with pytest.raises(UserError, match=rf"test_predictions\.csv: .*{message}"):
            compare_runs([run], [other], samples=10)
        write_run(tmp_path / "again", 1, 0).joinpath("test_predictions.csv").rename(table)
        (tmp_path / "again").rmdir()


def test_a_macro_score_is_the_same_mean_in_every_draw() -> None:
    truth = np.zeros((60, 3))
    truth[:30, 0] = 1
    truth[:2, 1] = 1  # the third label cannot be scored at all
    scores = np.random.default_rng(0).random((60, 3))
    patients = np.arange(60).astype(str)
    run = Predictions(patients, patients, ("common", "rare", "absent"), {}, truth, scores)
    everything, lacking = np.ones(60), np.ones(60)
    lacking[:2] = 0
    found = run.scores(np.stack([everything, lacking]))
    assert found["auroc_macro"][0] == pytest.approx((found["auroc:common"][0] + found["auroc:rare"][0]) / 2)
    assert np.isfinite(found["auroc:common"][1])
    assert np.isnan(found["auroc_macro"][1])
    assert np.isfinite(estimate([run], samples=200)["auroc_macro"].interval).all()  # both patients lack in one of 7
    truth[1, 1] = 0  # in one of 3
    truth[:, 2] = truth[:, 1][::-1]  # and the third label in another third
    found = estimate([run], samples=500)
    assert np.isnan(found["auroc_macro"].interval).all()  # fewer than half of the draws have all
    assert np.isfinite(found["auroc:common"].interval).all()


def test_the_interval_of_average_precision_covers_the_truth():
    """Draws score higher than the patients do: of many labels, the percentile interval lies above the truth."""
    shift, share = 1.5, 0.04  # of the positives' scores; of the positives
    above = quad(
        lambda t: norm.pdf(t - shift) * norm.sf(t - shift) / (share * norm.sf(t - shift) + (1 - share) * norm.sf(t)),
        -8,
        9,
    )
    expected, names = share * above[0], np.arange(400).astype(str)
    basic, percentile = [], []
    for seed in range(15):
        generator = np.random.default_rng(seed)
        truth = np.stack([generator.permutation(names.astype(int) < 16) for _ in range(30)], 1).astype(float)
        scores = generator.normal(size=truth.shape) + shift * truth
        run = Predictions(names, names, tuple(map(str, range(30))), {}, truth, scores)
        found = estimate([run], samples=100, seed=seed)["auprc_macro"]
        basic.append(found.interval[0] <= expected <= found.interval[1])
        low, high = np.percentile(found.draws, [2.5, 97.5])
        percentile.append(low <= expected <= high)
    assert np.mean(basic) > 0.8
    assert np.mean(percentile) < 0.3


def test_an_interval_holds_its_score_even_if_draws_raise_it_by_more_than_they_differ():
    names, outside = np.arange(300).astype(str), 0
    for seed in range(4):
        generator = np.random.default_rng(seed)
        truth = np.stack([generator.permutation(300) < 8 for _ in range(60)], 1).astype(float)
        run = Predictions(names, names, tuple(map(str, range(60))), {}, truth, generator.normal(size=truth.shape))
        found = estimate([run], samples=100)["auprc_macro"]
        basic = 2 * found.value - np.nanpercentile(found.draws, [97.5, 2.5])
        outside += not basic[0] <= found.value <= basic[1]
        assert found.interval == pytest.approx((min(basic[0], found.value), max(basic[1], found.value)))
    assert outside  # so the score would have stood outside
    one = estimate([run], samples=1)["auroc_macro"]
    assert one.interval[0] <= one.value <= one.interval[1]


def test_what_cannot_be_scored_is_said(tmp_path: Path) -> None:
    for name in ("one", "two"):
        file = write_run(tmp_path / name, 1, 0) / "test_predictions.csv"
        pd.read_csv(file).assign(**{"label:Edema": 1}).to_csv(file, index=False)
    (tmp_path / "two" / "results.json").write_text('{"seed": 3, "data": {"data_hash": "ab"}, "epochs_trained": 2}')
    output = tmp_path / "found.json"
    words = ["--runs", tmp_path / "one", "--baselines", tmp_path / "two", "--samples", 20, "--output", output]
    said = mlvicx("compare", *words).stdout
    assert "AUROC macro n/a (SD n/a) against n/a (SD n/a): difference n/a" in said
    found = json.loads(output.read_text())
    assert found["difference"] == "n/a"
    assert (found["labels"], found["images"], found["patients"]) == (["Edema"], 2 * PATIENTS, PATIENTS)
    assert [each["folder"] for each in found["run_folders"]] == [str(tmp_path / "one")]
    assert found["baseline_folders"] == [{"folder": str(tmp_path / "two"), "seed": 3, "data": {"data_hash": "ab"}}]
    assert found["code"]["torch"] == torch.__version__
    assert "found.json is there already; expected a new file" in mlvicx("compare", *words).stderr


def write_overlaps(folder: Path, share: float, seed: int) -> Path:
    """Masks of 100 pixels of which about that share was found, with nothing beside them."""
    generator = np.random.default_rng(seed)
    found = (100 * np.clip(share + 0.05 * generator.standard_normal(PATIENTS), 0, 1)).astype(int)
    table = {"source": [f"test:{i}.png" for i in range(PATIENTS)], "patient_id": [f"{i // 2}" for i in range(PATIENTS)]}
    table |= {"overlap:lungs": found, "predicted:lungs": found, "true:lungs": np.full(PATIENTS, 100)}
    folder.mkdir()
    pd.DataFrame(table).to_csv(folder / "test_overlaps.csv", index=False)
    return folder


def test_segmenters_are_compared_by_dice(tmp_path: Path) -> None:
    good, bad = write_overlaps(tmp_path / "good", 0.8, 0), write_overlaps(tmp_path / "bad", 0.7, 1)
    found = compare_runs([good], [bad], samples=100)
    assert found["metric"] == "Dice"
    larger = bad / "test_overlaps.csv"
    table = pd.read_csv(larger, dtype={"patient_id": str})
    names = [name for name in table if name.endswith(":lungs")]
    table.assign(**{name: 4 * table[name] for name in names}).to_csv(larger, index=False)
    assert compare_runs([good], [bad], samples=100) == found  # scored at twice the side
    counts = pd.read_csv(good / "test_overlaps.csv")
    overlap = counts["overlap:lungs"].to_numpy()
    assert found["runs"] == pytest.approx(np.mean(2 * overlap / (overlap + 100)))
    assert 0 < found["low"] < found["difference"] < found["high"]
    with pytest.raises(ValueError, match="other images or labels"):
        compare_runs([good], [write_run(tmp_path / "classifier", 1, 0, images=PATIENTS)], samples=5)
