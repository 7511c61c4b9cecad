"""Positives from the same patient: who is paired, of what a pair is a function, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import make_cache
from runs import assert_same_bits, interrupted, pretrain, start

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.reading.sampling import PatientPartners
from mlvicx_hf.objectives.base import ViewSpecification
from mlvicx_hf.pretraining.view_sets import ViewSet
from mlvicx_hf.pretraining.views import TwoViewAugmentation, view_draws

PATIENTS = ["a", "b", "a", "c", "a", "b"]
VIEWS = ["PA", "PA", "AP", "PA", "PA", "AP"]


def test_partners_are_other_images_of_the_patient_and_all_of_them_come():
    partners = PatientPartners(PATIENTS, None, seed=0)
    found = {row: {partners(epoch, row) for epoch in range(40)} for row in range(6)}
    assert found == {0: {2, 4}, 1: {5}, 2: {0, 4}, 3: {3}, 4: {0, 2}, 5: {1}}
    assert partners.share == 5 / 6


def test_partners_of_the_same_view():
    partners = PatientPartners(PATIENTS, VIEWS, seed=0)
    assert [partners(3, row) for row in range(6)] == [4, 1, 2, 3, 0, 5]
    assert partners.share == 2 / 6


def test_a_partner_depends_on_seed_epoch_and_sample_alone():
    patients = ["x"] * 50
    one, other = PatientPartners(patients, None, seed=5), PatientPartners(patients, None, seed=6)
    rows = list(range(50))
    assert [one(1, row) for row in reversed(rows)] == [one(1, row) for row in rows][::-1]
    assert [one(1, row) for row in rows] != [one(2, row) for row in rows]
    assert [one(1, row) for row in rows] != [other(1, row) for row in rows]
    assert all(one(epoch, row) != row for epoch in range(3) for row in rows)


def test_each_view_has_its_own_image_and_both_are_flipped_or_none():
    plain = {"brightness": 0.0, "contrast": 0.0, "blur": (0.0, 0.0), "solarize": (0.0, 0.0), "rotation": 0.0}
    augment = TwoViewAugmentation(image_size=32, crop_area=(1.0, 1.0), crop_ratio=(1, 1), flip_together=True, **plain)
    ramp = torch.arange(32, dtype=torch.uint8).expand(8, 1, 32, 32)
    images = torch.cat([ramp, ramp * 4], 1)
    one, two = augment(images, view_draws(0, 0, np.arange(8)))
    grey_1, grey_2 = one * augment.std + augment.mean, two * augment.std + augment.mean
    torch.testing.assert_close(grey_2, 4 * grey_1)  # the same flips
    flipped = grey_1[:, 0, 0, 0] > grey_1[:, 0, 0, -1]
    assert 0 < flipped.sum() < 8
    same, again = augment(ramp, view_draws(0, 0, np.arange(8)))
    assert torch.equal(same, one)
    assert torch.equal(again, one)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 patients of two images each, in different views, and one of a single image."""
    rows = [{"patient_id": f"p{i // 2}", "split": "train", "view": ("PA", "AP")[i % 2]} for i in range(45)]
    return make_cache(tmp_path_factory.mktemp("pairs"), rows)


def test_a_run_says_the_share_and_resumes_to_the_bit(pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = ("--positives", "same_patient", "--checkpoint_steps", 3, "--save_total_limit", 9)
    whole = pretrain(pairs, tmp_path / "whole", *flags)
    assert "positives=same_patient: 97.8% of the images have another one" in capsys.readouterr().out
    assert json.loads((whole / "run.json").read_text())["pair_share"] == 44 / 45
    cut = interrupted(whole, tmp_path / "cut", 3)
    assert_same_bits(pretrain(pairs, cut, *flags, "--resume"), whole)
    plain = pretrain(pairs, tmp_path / "plain")
    assert (plain / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes()
    assert "pair_share" not in json.loads((plain / "run.json").read_text())


@pytest.mark.parametrize("objective", ["simclr", "byol", "caid"])
def test_other_methods_take_them(pairs: Path, tmp_path: Path, objective: str):
    options = ["--objective_options", "queue_size=8"] if objective == "caid" else []
    run = start(pairs, tmp_path / "run", "--positives", "same_patient", "--objective", objective, *options)
    batch = next(iter(run.remaining_batches()))
    assert batch.images.shape == (8, 2, 32, 32)
    assert run.objective(*run.make_views(batch)).loss.isfinite()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--positives", "same_patient_same_view"), "no patient of .* has two such images"),
        (("--positives", "same_patient", "--streaming"), "positives=same_patient found with streaming"),
        (
            ("--positives", "same_patient", "--objective", "inter_moco", "--objective_options", "queue_size=8"),
            "expected --positives same_image",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(pairs: Path, tmp_path: Path, flags: tuple[str, ...], message: str):
    with pytest.raises(UserError, match=message):
        start(pairs, tmp_path / "run", *flags)


def test_small_views_are_flipped_as_the_views_that_they_are_compared_with():
    augment = TwoViewAugmentation(image_size=32, crop_area=(1.0, 1.0), rotation=0, flip_together=True)
    wanted = ViewSpecification(extras=("local",), local_views=3, local_size=16)
    plans, more = ViewSet(augment, wanted).plan(0, 0, np.arange(16))
    sides = torch.stack([plan.warp[:, 0, 0].sign() for plan in (*plans, *more.local)])
    assert (sides == sides[:1]).all()
    assert len(sides[0].unique()) == 2
