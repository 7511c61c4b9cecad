"""Losses of the methods for radiographs against loops in float64 that are written from the equations."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from methods import small_objective, small_views
from test_losses import EXACT, dot
from torch import Tensor

from mlvicx_hf.objectives.caid import BoxesOrCopies
from mlvicx_hf.objectives.distortions import COPY, ERASE, ERASE_OUTSIDE, LEAVE

CLOSE = {"rtol": 1e-10, "atol": 1e-12}
COUNT = 4  # images


def naive_info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> float:
    """The mean over the queries; vectors of any length."""
    total = 0.0
    for query, key in zip(queries, keys, strict=True):
        length = math.sqrt(dot(query, query))
        positive = math.exp(dot(query, key) / length / math.sqrt(dot(key, key)) / temperature)
        negatives = sum(math.exp(dot(query, other) / length / temperature) for other in queue)
        total -= math.log(positive / (positive + negatives))
    return total / len(queries)


def naive_mean_square(one: Any, other: Any) -> float:
    differences = [(a - b) ** 2 for a, b in zip(one.flatten().tolist(), other.flatten().tolist(), strict=True)]
    return sum(differences) / len(differences)


def naive_grid(maps: Tensor, side: int) -> Tensor:
    """Means over the cells of a grid, whose borders are rounded outwards, of maps [B, C, H, W]."""
    size = maps.shape[-1]
    cells = [(i * size // side, -(-(i + 1) * size // side)) for i in range(side)]
    rows = [[maps[:, :, a:b, c:d].mean((2, 3)) for c, d in cells] for a, b in cells]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


# -- Inter-MoCo --------------------------------------------------------------------------------------------------------


def stage_maps(objective: Any) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Maps of the four stages of queries and of keys, and their projections."""
    view_1, view_2 = small_views("inter_moco", COUNT)
    keys, key_maps = objective.make_keys(view_2)
    maps = objective.model.refined_maps(view_1)
    return list(maps[1:]), key_maps[1:], objective.projector(maps[-1].mean((2, 3))), keys


def test_inter_moco_adds_the_distances_of_the_levels():
    objective: Any = small_objective("inter_moco", level_weight=0.3).double().eval()
    maps, key_maps, queries, keys = stage_maps(objective)
    expected = naive_info_nce(queries, keys, objective.queue.keys, 0.07)
    for query, key, grid in zip(maps, key_maps, (16, 16, 4, 4), strict=True):
        side = min(grid, query.shape[-1])
        expected += 0.3 * naive_mean_square(naive_grid(query, side), naive_grid(key, side))
    found = objective(*small_views("inter_moco", COUNT))
    torch.testing.assert_close(found.loss.item(), expected, **CLOSE)
    assert found.terms["level_loss"] > 0.001


def test_maps_are_averaged_to_the_grids_of_the_paper():
    objective: Any = small_objective("inter_moco").double().eval()
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.rand(2, 1, 224, 224, generator=generator, dtype=torch.float64) for _ in range(2))
    distances = objective(one, two, return_loss=False)[0]["distances"]
    maps, keys = objective.model.refined_maps(one)[1:], objective.make_keys(two)[1][1:]
    for level, side in enumerate((16, 16, 4, 4)):
        for image in range(2):
            query, key = (naive_grid(each[level][[image]], side) for each in (maps, keys))
            torch.testing.assert_close(distances[image, level].item(), (query - key).square().mean().item(), **CLOSE)


def test_inter_moco_may_compare_the_levels_as_barlow_twins():
    objective: Any = small_objective("inter_moco:barlow", correlation_weight=0.2).double().eval()
    maps, key_maps, queries, keys = stage_maps(objective)
    expected = naive_info_nce(queries, keys, objective.queue.keys, 0.07)
    for projector, query, key in zip(objective.level_projectors, maps, key_maps, strict=True):
        one, two = (projector(each.mean((2, 3))).detach().numpy() for each in (query, key))
        one, two = ((each - each.mean(0)) / np.sqrt(each.var(0) + 1e-5) for each in (one, two))
        for i in range(16):
            for j in range(16):
                entry = sum(one[n, i] * two[n, j] for n in range(COUNT)) / COUNT
                expected += 0.2 / 32 * (entry - (i == j)) ** 2
    torch.testing.assert_close(objective(*small_views("inter_moco", COUNT)).loss.item(), expected, **CLOSE)


# -- CAiD --------------------------------------------------------------------------------------------------------------


def test_caid_adds_the_error_of_the_restored_images():
    objective: Any = small_objective("caid", restoration_weight=3).double().eval()
    view_1, view_2, target = small_views("caid", COUNT)
    maps = objective.model.refined_maps(view_1)
    queries, keys = objective.projector(maps[-1].mean((2, 3))), objective.make_keys(view_2)[0]
    restored = objective.restoration(objective.decoder(maps, (32, 32))[-1])
    assert restored.shape == target.shape == (COUNT, 1, 32, 32)
    assert 0 <= target.min() < target.max() <= 1
    expected = naive_info_nce(queries, keys, objective.queue.keys, 0.2) + 3 * naive_mean_square(restored, target)
    torch.testing.assert_close(objective(view_1, view_2, target).loss.item(), expected, **CLOSE)


def test_the_decoder_of_caid_is_a_u_net():
    objective: Any = small_objective("caid").double().eval()
    maps = objective.model.refined_maps(small_views("caid", COUNT)[0])
    made = objective.decoder(maps, (32, 32))
    assert [tuple(each.shape[1:]) for each in made] == [
        (256, 2, 2), (128, 4, 4), (64, 8, 8), (32, 16, 16), (16, 32, 32)
    ]  # fmt: skip
    enlarged = maps[-1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(made[0], objective.decoder.blocks[0](torch.cat([enlarged, maps[-2]], 1)), **EXACT)


def test_distortions_of_caid_have_the_sizes_and_shares_of_the_paper():
    drawn = [BoxesOrCopies().draw(np.random.default_rng(seed), 224) for seed in range(2000)]
    shares = {kind: sum(each == kind for each, _ in drawn) / len(drawn) for kind in (LEAVE, ERASE, ERASE_OUTSIDE, COPY)}
    assert shares == {
        LEAVE: pytest.approx(0.35, abs=0.03), ERASE: pytest.approx(0.3, abs=0.03),
        ERASE_OUTSIDE: pytest.approx(0.05, abs=0.02), COPY: pytest.approx(0.3, abs=0.03),
    }  # fmt: skip
    sides = {ERASE: (10, 70), ERASE_OUTSIDE: (154, 174), COPY: (10, 15)}
    for kind, (least, most) in sides.items():
        boxes = [box for each, found in drawn if each == kind for box in found]
        lengths = {length for box in boxes for length in (box.width, box.height)}
        assert (min(lengths), max(lengths)) == (least, most)
        margin = 3 if kind == ERASE else 0
        assert min(min(box.left, box.top) for box in boxes) >= margin
        assert max(max(box.left + box.width, box.top + box.height) for box in boxes) <= 224 - margin
        if kind == COPY:
            assert all(abs(box.right_by) >= box.width or abs(box.down_by) >= box.height for box in boxes)
            assert all(0 <= box.left + box.right_by <= 224 - box.width for box in boxes)
            assert all(0 <= box.top + box.down_by <= 224 - box.height for box in boxes)
        else:
            assert not any(box.right_by or box.down_by for box in boxes)
    counts = [len(found) for kind, found in drawn if kind == ERASE]
    assert sum(count == 1 for count in counts) / len(counts) == pytest.approx(0.1, abs=0.04)
    assert max(counts) == 10


# -- PCRL --------------------------------------------------------------------------------------------------------------


def restored(objective: Any, maps: list[Tensor]) -> Tensor:
    return objective.restoration(objective.decoder(maps, (32, 32))[-1])


def naive_mixture(one: Tensor, other: Tensor, share: float) -> Tensor:
    return share * one + (1 - share) * other


def naive_noise_contrast(query: Tensor, key: Tensor, queue: Tensor, normaliser: float, batches: int) -> float:
    """Of one pair of unit vectors."""

    def probability(other: Tensor) -> float:
        return math.exp(dot(query, other) / 0.2) / normaliser

    noise = len(queue) / batches
    total = math.log(probability(key) / (probability(key) + noise + 1e-5))
    return -total - sum(math.log(noise / (probability(other) + noise + 1e-5)) for other in queue)


@pytest.mark.parametrize("name", ["pcrl_v1", "pcrl_v1:nce"])
def test_pcrl_is_the_loop(name: str):
    objective: Any = small_objective(name).double().eval()
    objective.start_step(2)
    views = small_views(name, COUNT)
    x_1, x_2, g_1, g_2, m_1, m_2, a_1, a_2 = views
    alpha_1, alpha_2, share = objective.shares()
    order = objective.partners(COUNT)
    assert sorted(order.tolist()) == list(range(COUNT))
    assert min(alpha_1, alpha_2, share) >= 0.5

    k, e = objective.make_keys(x_2)
    s = list(objective.model.refined_maps(x_1))
    q = objective.projector(s[-1].mean((2, 3)))
    gate_1, gate_2 = (objective.gate(a)[:, :, None, None] for a in (a_1, a_2))
    s_gated, e_gated = [*s[:-1], s[-1] * gate_1], [*e[:-1], e[-1] * gate_2]
    mixed = [naive_mixture(one, two, alpha_1) for one, two in zip(s_gated, e_gated, strict=True)]
    error = naive_mean_square(restored(objective, s_gated), m_1)
    error += naive_mean_square(restored(objective, mixed), naive_mixture(m_1, m_2, alpha_1))

    x_1, x_2, g_1, g_2, k_mixture = (naive_mixture(each, each[order], share) for each in (x_1, x_2, g_1, g_2, k))
    k_mixed, e = objective.make_keys(x_2)
    s = list(objective.model.refined_maps(x_1))
    q_mixed = objective.projector(s[-1].mean((2, 3)))
    mixed = [naive_mixture(one, two, alpha_2) for one, two in zip(s, e, strict=True)]
    error += naive_mean_square(restored(objective, s), g_1)
    error += naive_mean_square(restored(objective, mixed), naive_mixture(g_1, g_2, alpha_2))

    pairs, queue = [(q, k), (q_mixed, k_mixed), (q_mixed, k_mixture)], objective.queue.keys
    if name == "pcrl_v1":
        contrast = sum(naive_info_nce(*pair, queue, 0.2) for pair in pairs) / 3
    else:
        unit = [torch.nn.functional.normalize(each, dim=1) for each in (q, k)]
        others = [[unit[1][i], *queue] for i in range(COUNT)]
        values = [math.exp(dot(unit[0][i], other) / 0.2) for i in range(COUNT) for other in others[i]]
        normaliser = sum(values) / len(values) * objective.batches
        contrast = sum(
            naive_noise_contrast(pair[0][i], pair[1][i], queue, normaliser, objective.batches) / COUNT / 3
            for pair in [[torch.nn.functional.normalize(each, dim=1) for each in both] for both in pairs]
            for i in range(COUNT)
        )
    torch.testing.assert_close(objective(*views).loss.item(), contrast + error / 4, **CLOSE)


def test_the_normaliser_of_pcrl_is_that_of_the_first_step():
    objective: Any = small_objective("pcrl_v1:nce")
    assert objective.normaliser == 0
    objective(*(view.float() for view in small_views("pcrl_v1")))
    objective.update(1)
    first = objective.normaliser.clone()
    assert first > 0
    objective.start_step(1)
    objective(*(view.float() for view in small_views("pcrl_v1", epoch=1)))
    objective.update(2)
    assert objective.normaliser == first


def test_three_batches_of_keys_enter_the_queue_of_pcrl():
    objective: Any = small_objective("pcrl_v1", queue_size=16).double()
    keys = objective(*small_views("pcrl_v1"), return_loss=False)[1]
    objective(*small_views("pcrl_v1"))
    objective.update(1)
    normal = torch.nn.functional.normalize
    expected = torch.cat([normal(keys["mixtures"], dim=1), normal(keys["mixed_keys"], dim=1)])
    torch.testing.assert_close(objective.queue.keys, expected)


# -- PCRLv2 ------------------------------------------------------------------------------------------------------------


def naive_disagreement(objective: Any, one: Tensor, two: Tensor, scale: int) -> float:
    sides = []
    for view in (one, two):
        maps = objective.decoder(objective.model.refined_maps(view), view.shape[2:])
        p = objective.norms[scale](maps[scale].mean((2, 3)))
        sides.append((p, objective.predictors[scale](p)))
    (p_1, u_1), (p_2, u_2) = sides
    total = 0.0
    for i in range(COUNT):
        for u, p in ((u_1[i], p_2[i]), (u_2[i], p_1[i])):
            total -= dot(u, p) / math.sqrt(dot(u, u) * dot(p, p)) / 2
    return total / COUNT


@pytest.mark.parametrize("step", [0, 5])
def test_pcrl_v2_is_the_loop(step: int):
    objective: Any = small_objective("pcrl_v2").double().eval()
    objective.start_step(step)
    view_1, view_2, target, local = views = small_views("pcrl_v2", COUNT)
    assert local.shape == (COUNT, 2, 1, 16, 16)
    scales = objective.scales
    assert len(scales) == 5
    expected = naive_disagreement(objective, view_1, view_2, scales[0])
    for number in range(2):
        for which, view in enumerate((view_1, view_2)):
            scale = scales[1 + 2 * number + which]
            expected += naive_disagreement(objective, view, local[:, number], scale) / 4
    maps = objective.decoder(objective.model.refined_maps(view_1), (32, 32))
    expected += naive_mean_square(objective.restoration(maps[-1]), target)
    small = objective.scale_restorations[scales[0]](maps[scales[0]])
    enlarged = torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")
    weight = (1 + math.cos(math.pi * (step // 4) / 1)) / 2  # an epoch has four steps, the run one epoch
    expected += weight * naive_mean_square(enlarged, target)
    torch.testing.assert_close(objective(*views).loss.item(), expected, **CLOSE)


def test_the_scales_of_pcrl_v2_are_drawn_anew_in_every_step():
    objective: Any = small_objective("pcrl_v2")
    drawn = []
    for step in range(200):
        objective.start_step(step)
        drawn.append(list(objective.scales))
    objective.start_step(7)
    assert objective.scales == drawn[7]
    counts = np.bincount(np.array(drawn).flatten(), minlength=5)
    assert counts.min() > 150  # of 200 on the average
    assert objective.decoder.blocks[0][0].in_channels == objective.model.channels[-1]  # no skip connections
