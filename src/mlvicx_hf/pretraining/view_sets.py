"""Everything that a step sees of its images: two views, and what the objective asks for besides."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.streams import RandomStream, stream_generator
from mlvicx_hf.objectives.base import ViewSpecification
from mlvicx_hf.objectives.distortions import BoxPlan, distort

from .views import DRAWS, TwoViewAugmentation, ViewPlan, view_draws

Views = tuple[Tensor, ...]  # view 1 and view 2, [B, C, S, S] each, then the extras of a `ViewSpecification`


class MorePlans(NamedTuple):
    """What happens to B images besides their two views; empty for what the objective does not ask for."""

    targets: tuple[Tensor, ...] = ()  # affine maps from target to image coordinates, float32 [B, 2, 3], of each view
    distortions: tuple[BoxPlan, ...] = ()  # of each view
    turns: tuple[Tensor, ...] = ()  # vertical flip, horizontal flip, quarter turns; int64 [B, 3], of each view
    local: tuple[ViewPlan, ...] = ()  # of each small view


class ViewSet:
    """Two views and extras: `plan` says what happens, `apply` computes it.

    Args:
        augment: makes the two views.
        specification: what the objective asks for.
    """

    def __init__(self, augment: TwoViewAugmentation, specification: ViewSpecification) -> None:
        self.augment, self.specification = augment, specification
        self.local = replace(
            augment,
            image_size=specification.local_size,
            crop_area=specification.local_area,
            blur=(augment.blur[0],) * 2,
            solarize=(augment.solarize[0],) * 2,
        )

    def check(self, side: int, paired: bool = False) -> None:
        """Compare the specification with the views, with the side of the images in pixels, and with the positives.

        Args:
            side: of the images.
            paired: view 2 is made of another image.

        Raises:
            UserError: small views that are larger than the images, or views that cannot lie on each other.
        """
        wanted, augment = self.specification, self.augment
        if wanted.local_views and wanted.local_size > side:
            raise UserError(
                f"local_size={wanted.local_size} found with images of {side} pixels; expected {side} or less"
            )
        if wanted.aligned and paired:
            raise UserError(
                "positives of the same patient found; this objective compares the maps of both views place by place, "
                "so expected --positives same_image (or the option aligned=false)"
            )
        if wanted.aligned and (augment.crop_area != (1.0, 1.0) or augment.flip != 0):
            raise UserError(
                f"crop_area={augment.crop_area} and flip={augment.flip:g} found; this objective compares the maps of "
                "both views place by place, so expected --crop_area 1 1 --flip 0 (or the option aligned=false)"
            )

    def plan(self, seed: int, epoch: int, samples: np.ndarray) -> tuple[tuple[ViewPlan, ViewPlan], MorePlans | None]:
        """Decide on the CPU what happens to the images of these samples, [B], in an epoch, counted from 0."""
        draws, wanted = view_draws(seed, epoch, samples), self.specification
        plans = self.augment.plan(draws)
        if not wanted.extras and wanted.distortion is None:
            return plans, None

        def generators(stream: RandomStream) -> list[np.random.Generator]:
            return [stream_generator(seed, epoch, stream, int(sample)) for sample in samples]

        more = MorePlans()
        if any(name.startswith("target") for name in wanted.extras):
            maps = [plan.warp for plan in plans]
            if wanted.upright_targets:
                maps = [self._upright(draws[:, view].double()) for view in range(len(plans))]
            more = more._replace(targets=tuple(maps))
        if wanted.distortion is not None:
            side = self.augment.image_size
            views = [generators(RandomStream.DISTORTION_1), generators(RandomStream.DISTORTION_2)]
            more = more._replace(distortions=tuple(wanted.distortion.plan(each, side) for each in views))
        if any(name.startswith("turn") for name in wanted.extras):
            views = [generators(RandomStream.TURNS_1), generators(RandomStream.TURNS_2)]
            turns = [np.stack([each.integers(0, (2, 2, 4)) for each in view]) for view in views]
            more = more._replace(turns=tuple(torch.from_numpy(each) for each in turns))
        if wanted.local_views:
            small = view_draws(seed, epoch, samples, wanted.local_views, RandomStream.LOCAL).double()
            if self.augment.flip_together:
                small[:, :, DRAWS.index("flip")] = draws[:, :1, DRAWS.index("flip")].double()
            more = more._replace(local=tuple(self.local.plan_view(each, 0) for each in small.unbind(1)))
        return plans, more

    def _upright(self, draws: Tensor) -> Tensor:
        """Affine maps of the crops alone."""
        draw = dict(zip(DRAWS, draws.unbind(1), strict=True))
        return replace(self.augment, rotation=0.0, flip=0.0).geometry(draw).float()

    def apply(self, images: Tensor, plans: tuple[ViewPlan, ViewPlan], more: MorePlans | None) -> Views:
        """Make the planned views and extras; all tensors are on one device.

        Args:
            images: uint8 [B, 1, S, S]; or [B, 2, S, S], where view 2 has an image of its own.
            plans: of both views.
            more: of the extras.
        """
        if more is None:
            return self.augment.apply(images, plans)
        augment, wanted = self.augment, self.specification
        sources = augment.sources(images)
        grey = [augment.grey_view(pixels, plan) for pixels, plan in zip(sources, plans, strict=True)]  # [B, 1, S, S]
        if wanted.distortion is not None:
            fill = wanted.distortion.fill
            fill = float(np.mean(augment.mean)) if fill is None else fill
            grey = [distort(view, plan, fill) for view, plan in zip(grey, more.distortions, strict=True)]
        views = [augment.normalise(view) for view in grey]
        made: dict[str, Tensor] = {}
        for number, warp in enumerate(more.targets, 1):
            if f"target_{number}" in wanted.extras:
                target = augment.warp(sources[number - 1], warp)
                made[f"target_{number}"] = augment.normalise(target)[:, :1] if wanted.normalised_targets else target
        for number, (turns, view) in enumerate(zip(more.turns, views, strict=False), 1):
            made[f"turned_{number}"] = _turn(view[:, :1], turns)
            made[f"turns_{number}"] = _code(turns).to(view.dtype)
        if more.local:
            # The bilinear warp alone would alias the largest crop of a large image. Smaller ones lose some detail.
            largest = wanted.local_area[1] ** 0.5 * images.shape[-1]
            whole = F.avg_pool2d(images[:, :1].float() / 255, max(1, int(largest / wanted.local_size)))
            small = [self.local.normalise(self.local.grey_view(whole, plan)) for plan in more.local]
            made["local"] = torch.stack(small, 1)
        return (*views, *(made[name] for name in wanted.extras))


def _turn(views: Tensor, turns: Tensor) -> Tensor:
    """Flip and turn [B, 1, S, S] by [B, 3]: vertically, horizontally, then by quarter turns."""
    vertical, horizontal, quarters = turns[:, :, None, None, None].unbind(1)
    views = torch.where(vertical == 1, views.flip(2), views)
    views = torch.where(horizontal == 1, views.flip(3), views)
    turned = views
    for number in (1, 2, 3):
        turned = torch.where(quarters == number, views.rot90(number, (2, 3)), turned)
    return turned


def _code(turns: Tensor) -> Tensor:
    """Flips and one of four angles as 0 and 1: [B, 3] to [B, 6]."""
    angles = torch.arange(4, device=turns.device)
    return torch.cat([turns[:, :2], (turns[:, 2:] == angles).long()], 1)
