"""Intervals of the difference between groups of runs."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mlvicx_hf.evaluation.statistics import compare_runs

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


def test_runs_on_other_images_or_without_predictions_are_refused(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run", 1, 0), write_run(tmp_path / "other", 1, 0, images=20)
    with pytest.raises(ValueError, match=r"other was tested on other images or labels than"):
        compare_runs([run], [other], samples=10)
    with pytest.raises(FileNotFoundError, match=r"absent holds no test_predictions\.csv and no test_overlaps\.csv"):
        compare_runs([run], [tmp_path / "absent"], samples=10)


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
    counts = pd.read_csv(good / "test_overlaps.csv")
    overlap = counts["overlap:lungs"].to_numpy()
    assert found["runs"] == pytest.approx(np.mean(2 * overlap / (overlap + 100)))
    assert 0 < found["low"] < found["difference"] < found["high"]
    with pytest.raises(ValueError, match="other images or labels"):
        compare_runs([good], [write_run(tmp_path / "classifier", 1, 0, images=PATIENTS)], samples=5)
