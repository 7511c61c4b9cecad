import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlvicx_hf.data.splits import (
    _NO_FINDING,
    check_no_patient_overlap,
    label_fraction,
    patient_strata,
    split_by_patient,
)

SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}

images = st.lists(
    st.tuples(
        st.integers(0, 30).map(lambda number: f"p{number}"), st.tuples(*[st.sampled_from([0.0, 1.0, math.nan])] * 3)
    ),
    min_size=1,
    max_size=80,
)


def unzip(rows: list[tuple[str, tuple[float, ...]]]) -> tuple[list[str], np.ndarray]:
    return [patient for patient, _ in rows], np.array([labels for _, labels in rows])


def test_a_patients_stratum_is_the_rarest_positive_label_over_all_images():
    patients = ["a", "a", "b", "c", "d", "e"]
    labels = [[1, 0], [0, 1], [1, 0], [math.nan, 0], [1, math.nan], [0, math.nan]]
    assert patient_strata(patients, labels) == {"a": 1, "b": 0, "c": _NO_FINDING, "d": 0, "e": _NO_FINDING}


def test_rarity_counts_patients_not_images():
    patients = ["a", "a", "a", "b", "c"]
    labels = [[1, 0], [1, 0], [1, 1], [0, 1], [0, 1]]
    assert patient_strata(patients, labels)["a"] == 0


@pytest.mark.parametrize("labels", [None, [[], []]])
def test_without_labels_there_is_one_stratum(labels: list[list[float]] | None):
    assert patient_strata(["b", "a"], labels) == {"a": _NO_FINDING, "b": _NO_FINDING}


def test_labels_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"labels of shape \(1, 2\) found; expected \[2, L\]"):
        patient_strata(["a", "b"], [[0, 1]])


@given(images, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_no_patient_is_in_two_splits_and_the_order_of_images_does_not_matter(rows, seed):
    patients, labels = unzip(rows)
    splits = split_by_patient(patients, labels, SHARES, seed)
    by_patient = {}
    for patient, split in zip(patients, splits, strict=True):
        assert by_patient.setdefault(patient, split) == split
    order = np.random.default_rng(seed).permutation(len(rows))
    again = split_by_patient([patients[index] for index in order], labels[order], SHARES, seed)
    assert again == [splits[index] for index in order]


@given(images, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_shares_are_met_within_one_patient(rows, seed):
    patients, labels = unzip(rows)
    splits = dict(zip(patients, split_by_patient(patients, labels, SHARES, seed), strict=True))
    for name, share in SHARES.items():
        assert abs(list(splits.values()).count(name) - share * len(splits)) < 1 + 1e-9


def test_splits_are_stratified():
    patients = [f"p{number}" for number in range(1000)]
    labels = [[float(number % 10 == 0), float(number % 50 == 1)] for number in range(1000)]
    splits = np.array(split_by_patient(patients, labels, SHARES, 0))
    for column in range(2):
        positive = np.array(labels)[:, column] == 1
        for name, share in SHARES.items():
            assert abs((splits[positive] == name).sum() - share * positive.sum()) <= 1.5


def test_another_seed_divides_otherwise_and_the_same_seed_alike():
    patients = [f"p{number}" for number in range(100)]
    first = split_by_patient(patients, None, SHARES, 0)
    assert first == split_by_patient(patients, None, SHARES, 0)
    assert first != split_by_patient(patients, None, SHARES, 1)


@pytest.mark.parametrize("shares", [{"train": 0.7}, {"train": 1.2, "test": -0.2}, {}])
def test_shares_that_do_not_add_up_are_refused(shares: dict[str, float]):
    with pytest.raises(ValueError, match="expected shares of 0 or more that add up to 1"):
        split_by_patient(["a"], None, shares, 0)


@given(images, st.integers(0, 5))
@settings(max_examples=80, deadline=None)
def test_label_fractions_are_nested_patient_wise_and_reach_every_stratum(rows, seed):
    patients, labels = unzip(rows)
    strata = patient_strata(patients, labels)
    smaller: set[int] = set()
    for fraction in (0.01, 0.1, 0.3, 1.0):
        indices = label_fraction(patients, labels, fraction, seed)
        assert list(indices) == sorted(set(indices.tolist()))
        chosen = {patients[index] for index in indices}
        assert {index for index, patient in enumerate(patients) if patient in chosen} == set(indices.tolist())
        assert {strata[patient] for patient in chosen} == set(strata.values())
        assert smaller <= set(indices.tolist())
        smaller = set(indices.tolist())
    assert len(smaller) == len(rows)


def test_label_fraction_takes_its_share_of_each_stratum():
    patients = [f"p{number}" for number in range(1000)]
    labels = np.array([[float(number < 100)] for number in range(1000)])
    indices = label_fraction(patients, labels, 0.1, 0)
    assert len(indices) == 100
    assert labels[indices].sum() == 10
    assert set(indices.tolist()) != set(label_fraction(patients, labels, 0.1, 1).tolist())


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, math.nan])
def test_fractions_out_of_range_are_refused(fraction: float):
    with pytest.raises(ValueError, match=r"expected above 0 and at most 1"):
        label_fraction(["a"], None, fraction, 0)


def test_overlap_is_refused_with_count_and_examples():
    check_no_patient_overlap({"train": ["a", "a", "b"], "test": ["c"]})
    with pytest.raises(ValueError, match=r"2 patient\(s\) in both train and test: a, b; expected each patient in one"):
        check_no_patient_overlap({"train": ["a", "b"], "validation": ["d"], "test": ["b", "a", "c"]})
