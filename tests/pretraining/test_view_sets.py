"""What a step sees besides two views: targets, distortions, turns and small views, all functions of the sample."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from mlvicx_hf.objectives.base import ViewSpecification
from mlvicx_hf.objectives.distortions import (
    COPY,
    ERASE,
    ERASE_OUTSIDE,
    LEAVE,
    CutOut,
    DistortedBox,
    Distortion,
    distort,
)
from mlvicx_hf.pretraining.view_sets import ViewSet
from mlvicx_hf.pretraining.views import TwoViewAugmentation

ALL = ("target_1", "target_2", "turned_1", "turned_2", "turns_1", "turns_2", "local")
AUGMENT = TwoViewAugmentation(image_size=32)
PLAIN = replace(AUGMENT, brightness=0.0, contrast=0.0, blur=(0.0, 0.0), solarize=(0.0, 0.0))


def images(count: int = 6, side: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, side, side), generator=generator, dtype=torch.uint8)


def made(augment: TwoViewAugmentation, wanted: ViewSpecification, samples: list[int] | None = None) -> list[Tensor]:
    numbers = list(range(6)) if samples is None else samples
    view_set = ViewSet(augment, wanted)
    return list(view_set.apply(images()[numbers], *view_set.plan(3, 1, np.array(numbers))))


def test_extras_come_in_the_order_that_is_asked_for():
    wanted = ViewSpecification(extras=ALL, local_views=3, local_size=16)
    shapes = [tuple(each.shape) for each in made(replace(AUGMENT, num_channels=3), wanted)]
    view, plain = (6, 3, 32, 32), (6, 1, 32, 32)
    assert shapes == [view, view, plain, plain, plain, plain, (6, 6), (6, 6), (6, 3, 3, 16, 16)]
    views = made(AUGMENT, ViewSpecification())
    for one, other in zip(views, made(AUGMENT, ViewSpecification(extras=("target_1",))), strict=False):
        assert torch.equal(one, other)  # the two views do not depend on what else is made


@pytest.mark.parametrize("distortion", [None, CutOut()])
def test_everything_depends_on_the_sample_alone(distortion: Distortion | None):
    wanted = ViewSpecification(extras=ALL, local_views=2, local_size=16, distortion=distortion)
    together, apart = made(AUGMENT, wanted), made(AUGMENT, wanted, [4, 1])
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(other, one[[4, 1]], rtol=0, atol=1e-6)


def test_targets_are_the_views_without_their_change_of_grey_values():
    view_1, view_2, target_1, target_2 = made(
        PLAIN, ViewSpecification(extras=("target_1", "target_2"), normalised_targets=True)
    )
    torch.testing.assert_close(target_1, view_1)
    torch.testing.assert_close(target_2, view_2)
    grey = made(AUGMENT, ViewSpecification(extras=("target_1",)))[2]
    torch.testing.assert_close((grey - 0.5) / 0.25, target_1)


def test_upright_targets_are_neither_turned_nor_mirrored():
    upright = replace(PLAIN, rotation=0.0, flip=0.0)
    expected = made(upright, ViewSpecification(extras=("target_1",)))[2]
    found = made(replace(PLAIN, rotation=20.0, flip=1.0), ViewSpecification(extras=("target_1",), upright_targets=True))
    torch.testing.assert_close(found[2], expected)
    assert not torch.allclose((found[0] * 0.25) + 0.5, expected, atol=0.05)


def test_turned_views_are_those_of_numpy():
    wanted = ViewSpecification(extras=("turned_2", "turns_2"))
    view_set = ViewSet(AUGMENT, wanted)
    numbers = np.arange(40)
    many = images(40)
    plans, more = view_set.plan(0, 0, numbers)
    _, view_2, turned, code = view_set.apply(many, plans, more)
    for view, found, bits in zip(view_2[:, 0].numpy(), turned[:, 0].numpy(), code.int().tolist(), strict=True):
        expected = view[::-1] if bits[0] else view
        expected = expected[:, ::-1] if bits[1] else expected
        assert sum(bits[2:]) == 1
        np.testing.assert_array_equal(found, np.rot90(expected, bits[2:].index(1)))
    assert code.mean(0).min() > 0.1  # all flips and angles are drawn


def test_small_views_show_small_parts():
    """Of an image whose grey values are the places, from left to right."""
    ramp = torch.arange(40, dtype=torch.uint8).expand(6, 1, 40, 40).contiguous() * 6
    augment = replace(PLAIN, rotation=0.0, flip=0.0)
    view_set = ViewSet(augment, ViewSpecification(extras=("local",), local_views=4, local_size=8))
    local = view_set.apply(ramp, *view_set.plan(0, 0, np.arange(6)))[2]
    width = (local[..., -1] - local[..., 0]).mean(-1) * 0.25 * 255 / 6 / 7 * 8  # in pixels of the image
    assert 40 * (0.05 * 3 / 4) ** 0.5 - 1 < width.min() < width.max() < 40 * (0.3 * 4 / 3) ** 0.5 + 1
    assert width.std() > 1


@pytest.mark.parametrize(("side", "ratio"), [(16, 1.0), (64, 0.25)])
def test_small_views_of_large_images_are_averaged_first(side: int, ratio: float):
    """Of noise, whose spread shrinks with the side of the squares that are averaged: 4 = 0.55 · 64 / 8."""
    noise = torch.randint(0, 256, (64, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    augment = replace(PLAIN, rotation=0.0, flip=0.0)
    view_set = ViewSet(augment, ViewSpecification(extras=("local",), local_views=2, local_size=8))
    spread = view_set.apply(noise, *view_set.plan(0, 0, np.arange(64)))[2].std().item()
    whole = augment.normalise(noise.float() / 255).std().item()
    assert 0.55 < spread / (whole * ratio) < 1


class Given(Distortion):
    """Boxes by kind, the same for every image of that number."""

    boxes: ClassVar[int] = 3
    fill = 0.0
    plans: ClassVar[list[tuple[int, list[DistortedBox]]]] = [
        (LEAVE, []),
        (ERASE, [DistortedBox(1, 2, 3, 4), DistortedBox(5, 0, 2, 2)]),
        (ERASE_OUTSIDE, [DistortedBox(1, 2, 5, 4)]),
        (COPY, [DistortedBox(0, 0, 3, 2, 4, 5), DistortedBox(1, 1, 2, 2, -1, 3), DistortedBox(5, 6, 2, 1, 0, -6)]),
    ]

    def draw(self, generator: np.random.Generator, side: int) -> tuple[int, list[DistortedBox]]:
        return self.plans[int(generator.integers(4))]


def test_boxes_are_erased_and_copied_as_in_loops():
    generators = [np.random.default_rng(seed) for seed in range(12)]
    plan = Given().plan(generators, 8)
    assert set(plan.kind.tolist()) == {LEAVE, ERASE, ERASE_OUTSIDE, COPY}
    pixels = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = distort(pixels.clone(), plan, 0.25)[:, 0].numpy()
    for image, kind, result in zip(pixels[:, 0].numpy(), plan.kind.tolist(), found, strict=True):
        boxes = dict(Given.plans)[kind]
        expected = image.copy() if kind != ERASE_OUTSIDE else np.full_like(image, 0.25)
        for left, top, width, height, right_by, down_by in boxes:
            for y in range(top, top + height):
                for x in range(left, left + width):
                    copied = image[y + down_by, x + right_by] if kind == COPY else image[y, x]
                    expected[y, x] = 0.25 if kind == ERASE else copied
        np.testing.assert_array_equal(result, expected)


def test_cut_outs_are_three_boxes_of_a_seventh_of_the_side():
    plan = CutOut().plan([np.random.default_rng(seed) for seed in range(50)], 224)
    left, top, width, height, _, _ = plan.boxes.unbind(-1)
    assert set(width.flatten().tolist()) == set(height.flatten().tolist()) == {32}
    assert left.min() >= 0
    assert max(left.max(), top.max()) <= 224 - 32
    assert left.float().std() > 40
    erased = made(PLAIN, ViewSpecification(distortion=CutOut()))[0]
    assert (erased == 0).sum((1, 2, 3)).min() >= 25  # the mean grey of the normalisation, 5 of 32 pixels wide


@pytest.mark.parametrize(
    ("augment", "wanted", "message"),
    [
        (AUGMENT, ViewSpecification(extras=("local",), local_views=1), "local_size=96 found with images of 40 pixels"),
        (AUGMENT, ViewSpecification(aligned=True), r"expected --crop_area 1 1 --flip 0 \(or the option aligned=false"),
    ],
)
def test_views_that_cannot_be_made_are_refused(augment: TwoViewAugmentation, wanted: ViewSpecification, message: str):
    with pytest.raises(ValueError, match=message):
        ViewSet(augment, wanted).check(40)
    ViewSet(replace(AUGMENT, crop_area=(1.0, 1.0), flip=0.0), ViewSpecification(aligned=True)).check(40)
