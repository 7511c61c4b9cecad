"""Divide images into splits and label fractions: by patient, stratified, seeded, whatever the order of the images.

Labels are [N, L] arrays of 1, 0 and NaN (unknown, which is not positive), or None for collections without labels.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some

_NO_FINDING = -1  # stratum of patients without a positive label

Labels = npt.ArrayLike | None


def patient_strata(patient_ids: Sequence[str], labels: Labels) -> dict[str, int]:
    """Find the stratum of each patient: the column of the patient's rarest positive label, or `_NO_FINDING`.

    Rarity is counted in patients. Of equally rare labels the first counts.
    """
    patients, rows = np.unique(np.asarray(patient_ids, dtype=object), return_inverse=True)
    if labels is None or np.size(labels) == 0:
        return dict.fromkeys(patients.tolist(), _NO_FINDING)
    table = np.asarray(labels, dtype=float)
    if table.ndim != 2 or len(table) != len(patient_ids):
        raise UserError(f"labels of shape {table.shape} found; expected [{len(patient_ids)}, L] like the patients")
    positive = np.zeros((len(patients), table.shape[1]), dtype=bool)  # [P, L]
    np.logical_or.at(positive, rows, table == 1)
    rarest_first = np.argsort(positive.sum(axis=0), kind="stable")
    first = positive[:, rarest_first].argmax(axis=1)
    strata = np.where(positive.any(axis=1), rarest_first[first], _NO_FINDING)
    return dict(zip(patients.tolist(), strata.tolist(), strict=True))


def _shuffled_strata(patient_ids: Sequence[str], labels: Labels, seed: int) -> list[list[str]]:
    """List the patients of each stratum in the seed's order, the smallest stratum first."""
    groups: dict[int, list[str]] = defaultdict(list)
    for patient, stratum in patient_strata(patient_ids, labels).items():
        groups[stratum].append(patient)
    ordered = sorted(groups.items(), key=lambda group: (len(group[1]), group[0]))
    return [sorted(patients, key=lambda patient: patient_hash(patient, seed)) for _, patients in ordered]


def patient_hash(patient: str, seed: int) -> str:
    """Hash a patient and the seed to a pseudo-random string, which orders the patients."""
    return hashlib.sha256(f"{seed}:{patient}".encode()).hexdigest()


def first_patients(patient_ids: Sequence[str], limit: int, seed: int) -> list[int]:
    """Choose at most `limit` of the rows, patient by patient in the seed's order. The rows keep their order."""
    order = sorted(range(len(patient_ids)), key=lambda row: (patient_hash(patient_ids[row], seed), row))
    return sorted(order[:limit])


def split_by_patient(
    patient_ids: Sequence[str], labels: Labels, fractions: Mapping[str, float], seed: int
) -> list[str]:
    """Divide images into splits so that no patient is in two splits and each stratum is divided alike.

    Give the patients, stratum by stratum, to the split that lacks most of its share so far. This meets the shares
    within one patient over all, and within about one patient in each stratum.

    Args:
        patient_ids: patient of each image, [N].
        labels: [N, L] or None.
        fractions: split → share of the patients; the shares add up to 1.
        seed: another seed gives another division.

    Returns:
        Name of the split of each image, [N].

    Raises:
        UserError: the fractions are negative or do not add up to 1.
    """
    if any(share < 0 for share in fractions.values()) or not math.isclose(sum(fractions.values()), 1, abs_tol=1e-6):
        raise UserError(f"fractions={dict(fractions)} found; expected shares of 0 or more that add up to 1")
    names = [name for name, share in fractions.items() if share > 0]
    counts = dict.fromkeys(names, 0)
    split_of: dict[str, str] = {}
    for patients in _shuffled_strata(patient_ids, labels, seed):
        for patient in patients:
            neediest = max(names, key=lambda name: fractions[name] * (len(split_of) + 1) - counts[name])
            split_of[patient] = neediest
            counts[neediest] += 1
    return [split_of[patient] for patient in patient_ids]


def label_fraction(patient_ids: Sequence[str], labels: Labels, fraction: float, seed: int) -> npt.NDArray[np.int64]:
    """Choose the images of a share of the patients, for training with few labels.

    Take whole patients, the same share of each stratum and at least one patient of it. With the same seed a smaller
    fraction is a subset of a larger one.

    Args:
        patient_ids: patient of each image, [N].
        labels: [N, L] or None.
        fraction: share of the patients, above 0 and at most 1.
        seed: another seed gives another subset.

    Returns:
        Indices of the images in ascending order.

    Raises:
        UserError: the fraction is outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise UserError(f"fraction={fraction} found; expected above 0 and at most 1")
    chosen = {
        patient
        for patients in _shuffled_strata(patient_ids, labels, seed)
        for patient in patients[: max(1, round(fraction * len(patients)))]
    }
    return np.array([index for index, patient in enumerate(patient_ids) if patient in chosen], dtype=np.int64)


def check_no_patient_overlap(splits: Mapping[str, Sequence[str]]) -> None:
    """Refuse splits that share a patient.

    Raises:
        UserError: two splits share patients. The message names the splits and some of the patients.
    """
    patients = {name: set(ids) for name, ids in splits.items()}
    for one, other in combinations(patients, 2):
        shared = sorted(patients[one] & patients[other])
        if shared:
            raise UserError(
                f"{len(shared)} patient(s) in both {one} and {other}: {some(shared)}; expected each patient in one "
                "split"
            )
