"""Order of the samples, with and without patients drawn equally often, and which views are taken."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import make_cache
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from mlvicx_hf.common.streams import RandomStream, stream_generator
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.data.reading.sampling import (
    EpochBatches,
    PatientBalancedSampler,
    choose_views,
    image_of,
    patient_balanced_order,
)

PATIENTS = st.lists(st.sampled_from("abcdefgh"), max_size=60)


@settings(deadline=None, max_examples=150)
@given(PATIENTS, st.integers(0, 2**31), st.integers(0, 300))
def test_every_patient_comes_equally_often_and_so_does_every_image_of_one(patients: list[str], seed: int, epoch: int):
    order = patient_balanced_order(patients, stream_generator(seed, epoch, RandomStream.ORDER))
    assert (order.dtype, order.shape) == (np.int64, (len(patients),))
    assert np.array_equal(order, patient_balanced_order(patients, stream_generator(seed, epoch, RandomStream.ORDER)))
    drawn = [patients[index] for index in order]
    names = sorted(set(patients))
    for start in range(0, len(drawn), max(1, len(names))):  # round by round
        part = drawn[start : start + len(names)]
        assert len(set(part)) == len(part)
    for name in names:
        images = [index for index in order if patients[index] == name]
        own = patients.count(name)
        for start in range(0, len(images), own):  # cycle by cycle
            part = images[start : start + own]
            assert len(set(part)) == len(part)
        assert abs(len(images) - len(patients) / len(names)) < 1


def test_over_many_epochs_patients_and_the_images_of_one_are_drawn_alike():
    patients = ["many"] * 7 + ["two"] * 2 + ["one"]
    draws = np.zeros(10)
    first = np.zeros(10)
    for epoch in range(3000):
        order = patient_balanced_order(patients, stream_generator(1, epoch, RandomStream.ORDER))
        draws += np.bincount(order, minlength=10)
        first[order[0]] += 1
    shares = draws / draws.sum()
    expected = np.repeat([1 / 21, 1 / 6, 1 / 3], [7, 2, 1])
    assert np.abs(shares - expected).max() < 4 * math.sqrt(0.25 / 30_000)
    assert np.abs(first / 3000 - expected).max() < 4 * math.sqrt(0.25 / 3000)  # nor does the place tell


def test_the_order_of_many_images_is_as_even():
    patients = [f"p{number // 4 if number % 5 else 0}" for number in range(200_000)]  # one has 40,000
    order = patient_balanced_order(patients, stream_generator(0, 0, RandomStream.ORDER))
    counts = np.unique(np.array(patients)[order], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_a_sampler_for_a_trainer():
    patients = [f"p{number // 3}" for number in range(20)]
    sampler = PatientBalancedSampler(patients, seed=3)
    first = list(sampler)
    assert first == list(sampler)
    assert all(type(index) is int for index in first)
    assert [index for batch in DataLoader(range(20), batch_size=4, sampler=sampler) for index in batch] == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert len(sampler) == 20
    assert list(PatientBalancedSampler(patients, seed=4)) != first


@settings(deadline=None, max_examples=30)
@given(PATIENTS.filter(lambda patients: len(patients) >= 8), st.integers(0, 5))
def test_batches_of_two_processes_share_the_balanced_order(patients: list[str], epoch: int):
    parts = [EpochBatches(len(patients), 4, 7, rank, 2, patients) for rank in range(2)]
    for part in parts:
        part.start_at(epoch, 1)
    order = patient_balanced_order(patients, stream_generator(7, epoch, RandomStream.ORDER))
    samples = [one + other for one, other in zip(*parts, strict=True)]
    found = [[image_of(sample) for sample in batch] for batch in samples]
    assert found == [order[start : start + 4].tolist() for start in range(4, len(patients) - 3, 4)]
    before = [(np.flatnonzero(order[:place] == image).size << 56) + image for place, image in enumerate(order.tolist())]
    assert samples == [before[start : start + 4] for start in range(4, len(patients) - 3, 4)]


def test_an_image_that_comes_very_often_stays_itself():
    batches = EpochBatches(600, 4, 7, patients=["alone", *["many"] * 599])
    samples = [sample for batch in batches for sample in batch]
    assert 0 <= min(samples) < max(samples) < 2**63
    assert sum(image_of(sample) == 0 for sample in samples) == 300
    assert len({sample for sample in samples if image_of(sample) == 0}) == 128


def test_views(tmp_path: Path):
    names = ["PA", "LATERAL", "AP", "", "LATERAL", "PA"]
    rows = [{"patient_id": f"p{number}", "view": view} for number, view in enumerate(names)]
    images = load_cache(make_cache(tmp_path, rows)).datasets["train"]
    assert images["view"][:] == ["PA", "LATERAL", "AP", "UNKNOWN", "LATERAL", "PA"]
    chosen, left_out = choose_views(images)
    assert (chosen["patient_id"][:], left_out) == (["p0", "p2", "p3", "p5"], 2)
    assert (len(choose_views(images, "all")[0]), choose_views(images, "all")[1]) == (6, 0)
    with pytest.raises(ValueError, match="views='lateral' found; expected one of frontal, all"):
        choose_views(images, "lateral")
    with pytest.raises(ValueError, match="2 lateral images found and no other"):
        choose_views(images.select([1, 4]))
