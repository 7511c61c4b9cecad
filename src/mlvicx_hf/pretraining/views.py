"""Two random views of every image, made in batches on the device and seeded by (seed, epoch, sample).

These are the six transforms of section III-A of the paper. It gives no magnitudes; they are arguments here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.streams import RandomStream, stream_generator

# One uniform number in [0, 1) for each, in this order. The views of a run depend on nothing else.
DRAWS = (
    *("area", "ratio", "left", "top", "flip", "angle"),
    *("jitter", "brightness", "contrast", "blur", "sigma", "solarize"),
)


def view_draws(
    seed: int,
    epoch: int,
    samples: Sequence[int] | np.ndarray,
    views: int = 2,
    stream: RandomStream = RandomStream.VIEWS,
) -> Tensor:
    """Uniform numbers behind the views of each sample.

    Args:
        seed: of the run.
        epoch: counted from 0.
        samples: indices in the data set, [B].
        views: of each sample.
        stream: of independent numbers.

    Returns:
        Float32 [B, views, len(DRAWS)] in [0, 1), on the CPU.
    """
    draws = np.empty((len(samples), views, len(DRAWS)), np.float32)
    for row, sample in zip(draws, samples, strict=True):
        stream_generator(seed, epoch, stream, int(sample)).random(out=row, dtype=np.float32)
    return torch.from_numpy(draws)


class ViewPlan(NamedTuple):
    """What happens to B images in one of their views.

    It is made on the CPU, perhaps in another process. A device that has it computes the view without asking back: which
    images are blurred or solarised are numbers of images, not masks whose true values would have to be counted first.
    """

    warp: Tensor  # affine maps from view to image coordinates, both in [-1, 1]: float32 [B, 2, 3]
    gain: Tensor  # factor of the grey values, float32 [B]
    offset: Tensor  # factor of the view's mean, which is added, float32 [B]
    blurred: Tensor  # numbers of the images to blur, int64 [b]
    sigma: Tensor  # standard deviation of each of these Gaussians in pixels, float32 [b]
    solarized: Tensor  # numbers of the images to solarise, int64 [s]


@dataclass(frozen=True)
class TwoViewAugmentation:
    """The two views, from uint8 to model input: `plan` says what happens, `apply` computes it.

    Crop, rotation and flip are one bilinear warp. Brightness and contrast are one affine map, clamped once. Pairs of
    probabilities are those of view 1 and of view 2.
    """

    image_size: int = 224  # side of the views in pixels
    crop_area: tuple[float, float] = (0.2, 1.0)  # range of the crop's share of the image's area
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # range of the crop's width over height, log-uniform
    flip: float = 0.5  # probability of a horizontal flip
    flip_together: bool = False  # both views of an image are flipped, or none
    rotation: float = 10.0  # largest angle in degrees, in both directions; the outside of the image is black
    brightness: float = 0.4  # largest change of the brightness factor from 1
    contrast: float = 0.4  # largest change of the contrast factor from 1, about the view's mean
    jitter: float = 0.8  # probability of changing brightness and contrast
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # range of the Gaussian's standard deviation in pixels of the view
    blur: tuple[float, float] = (1.0, 0.1)  # probabilities of the Gaussian blur
    solarize: tuple[float, float] = (0.0, 0.2)  # probabilities of inverting what is above the threshold
    solarize_threshold: float = 0.5  # in [0, 1]
    mean: float | list[float] = 0.5  # subtracted from grey values in [0, 1] at the end, as the image processor does
    std: float | list[float] = 0.25  # by which they are divided; lists have one number a channel
    num_channels: int = 1  # channels of the views; more than one repeats the grey image

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size={self.image_size} found; expected 1 or more")
        for name in ("brightness", "contrast"):  # beyond 1 a factor would be negative and invert the image
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}={getattr(self, name)} found; expected a change in [0, 1]")
        low, high = self.crop_area
        if not 0 < low <= high <= 1:
            raise UserError(f"crop_area={self.crop_area} found; expected 0 < low <= high <= 1")
        if not 0 < self.crop_ratio[0] <= 1 <= self.crop_ratio[1]:
            raise UserError(f"crop_ratio={self.crop_ratio} found; expected 0 < low <= 1 <= high")
        if not 0 < self.blur_sigma[0] <= self.blur_sigma[1]:
            raise UserError(f"blur_sigma={self.blur_sigma} found; expected 0 < low <= high")
        for name in ("flip", "jitter", "blur", "solarize"):
            value = getattr(self, name)
            if not all(0 <= p <= 1 for p in (value if isinstance(value, tuple) else (value,))):
                raise UserError(f"{name}={value} found; expected probabilities in [0, 1]")

    def __call__(self, images: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
        """Plan both views and make them.

        Args:
            images: uint8 [B, 1, S, S], on the device that does the work; [B, 2, S, S] has an image for each view.
            draws: from `view_draws`, [B, 2, len(DRAWS)], on the CPU.

        Returns:
            view_1 and view_2, float32 [B, num_channels, image_size, image_size].

        Raises:
            UserError: images of another type or shape.
        """
        plan_1, plan_2 = (ViewPlan(*(part.to(images.device) for part in plan)) for plan in self.plan(draws))
        return self.apply(images, (plan_1, plan_2))

    def plan(self, draws: Tensor) -> tuple[ViewPlan, ViewPlan]:
        """Decide what happens to B images in view 1 and in view 2, from `view_draws` [B, 2, len(DRAWS)] on the CPU."""
        if self.flip_together:
            draws = draws.clone()
            draws[:, 1, DRAWS.index("flip")] = draws[:, 0, DRAWS.index("flip")]
        plan_1, plan_2 = (self.plan_view(draws[:, view].double(), view) for view in (0, 1))
        return plan_1, plan_2

    def apply(self, images: Tensor, plans: tuple[ViewPlan, ViewPlan]) -> tuple[Tensor, Tensor]:
        """Make the planned views; see `__call__`. All tensors are on the device that does the work."""
        sources = self.sources(images)
        view_1, view_2 = (
            self.normalise(self.grey_view(pixels, plan)) for pixels, plan in zip(sources, plans, strict=True)
        )
        return view_1, view_2

    def sources(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Grey values of what view 1 and view 2 are made of: of the same images, or of two, uint8 [B, 2, S, S]."""
        first = self.pixels(images[:, :1])
        return first, first if images.shape[1] == 1 else self.pixels(images[:, 1:])

    def pixels(self, images: Tensor) -> Tensor:
        """Grey values in [0, 1] of images, uint8 [B, 1, S, S], averaged where they are much larger than the views.

        Raises:
            UserError: images of another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 1:
            raise UserError(f"images {images.dtype} {tuple(images.shape)} found; expected uint8 [B, 1, S, S]")
        pixels = images.float() / 255
        shrink = images.shape[-1] // self.image_size
        if shrink > 1:  # the bilinear warp alone would alias
            pixels = F.avg_pool2d(pixels, shrink)
        return pixels

    def plan_view(self, draws: Tensor, view: int) -> ViewPlan:
        """Decide what happens in view 1 (0) or 2 (1), from float64 draws [B, len(DRAWS)]."""
        draw = dict(zip(DRAWS, draws.unbind(1), strict=True))  # float64 [B] each
        changed = draw["jitter"] < self.jitter
        brightness = torch.where(changed, 1 + self.brightness * _scale(draw["brightness"], -1, 1), 1.0)
        contrast = torch.where(changed, 1 + self.contrast * _scale(draw["contrast"], -1, 1), 1.0)
        blurred = (draw["blur"] < self.blur[view]).nonzero()[:, 0]
        return ViewPlan(
            warp=self.geometry(draw).float(),
            gain=(brightness * contrast).float(),
            offset=(brightness * (1 - contrast)).float(),
            blurred=blurred,
            sigma=_scale(draw["sigma"][blurred], *self.blur_sigma).float(),
            solarized=(draw["solarize"] < self.solarize[view]).nonzero()[:, 0],
        )

    def grey_view(self, pixels: Tensor, plan: ViewPlan) -> Tensor:
        """Make a planned view of `pixels`, as grey values in [0, 1]: [B, 1, image_size, image_size]."""
        x = self.warp(pixels, plan.warp)
        mean = x.mean((1, 2, 3), keepdim=True)
        gain, offset = plan.gain[:, None, None, None], plan.offset[:, None, None, None]
        x = x.mul_(gain).add_(offset * mean).clamp_(0, 1)
        x = self._blur(x, plan.blurred, plan.sigma)
        return self._solarize(x, plan.solarized)

    def normalise(self, x: Tensor) -> Tensor:
        """Turn grey values [B, 1, S, S] into model input, in place where that is possible: [B, num_channels, S, S]."""
        mean, std = (
            each[0] if isinstance(each, list) and len(set(each)) == 1 else each for each in (self.mean, self.std)
        )
        if not isinstance(mean, list) and not isinstance(std, list):
            return x.sub_(mean).div_(std).expand(-1, self.num_channels, -1, -1)
        values = (each if isinstance(each, list) else [each] * self.num_channels for each in (mean, std))
        # Numbers instead of a tensor: the device would wait for its copy.
        return torch.cat([(x - mean) / std for mean, std in zip(*values, strict=True)], 1)

    def geometry(self, draw: dict[str, Tensor]) -> Tensor:
        """Affine maps from view to image coordinates, both in [-1, 1]: [B, 2, 3]."""
        area = _scale(draw["area"], *self.crop_area)
        # The ratios for which a crop of this area still fits into the image.
        low = area.log().clamp(min=math.log(self.crop_ratio[0]))
        high = (-area.log()).clamp(max=math.log(self.crop_ratio[1]))
        ratio = (low + (high - low) * draw["ratio"]).exp()
        width, height = (area * ratio).sqrt(), (area / ratio).sqrt()  # shares of the image's side
        center_x = (1 - width) * (2 * draw["left"] - 1)
        center_y = (1 - height) * (2 * draw["top"] - 1)
        angle = _scale(draw["angle"], -1, 1) * math.radians(self.rotation)
        mirror = torch.where(draw["flip"] < self.flip, -1.0, 1.0)
        cos, sin = angle.cos(), angle.sin()
        x_row = torch.stack([width * cos * mirror, -width * sin, center_x], 1)
        y_row = torch.stack([height * sin * mirror, height * cos, center_y], 1)
        return torch.stack([x_row, y_row], 1)

    def warp(self, pixels: Tensor, geometry: Tensor) -> Tensor:
        """Take the view of an affine map [B, 2, 3]; see `geometry`."""
        side = self.image_size
        centers = (2 * torch.arange(side, device=pixels.device, dtype=pixels.dtype) + 1) / side - 1  # of the pixels
        x, y, shift = geometry[:, None, None].unbind(-1)  # [B, 1, 1, 2] each
        grid = x * centers[:, None] + (y * centers[:, None, None] + shift)  # [B, S, S, 2], as F.affine_grid's
        return F.grid_sample(pixels, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def _blur(self, x: Tensor, chosen: Tensor, sigma: Tensor) -> Tensor:
        if len(chosen) == 0:
            return x
        radius = min(math.ceil(4 * self.blur_sigma[1]), self.image_size - 1)
        place = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
        kernel = (-(place**2) / (2 * sigma[:, None] ** 2)).exp()  # [b, K]
        kernel = (kernel / kernel.sum(1, keepdim=True))[:, None, None]  # [b, 1, 1, K]
        blurred = F.pad(x[chosen, 0][None], (radius,) * 4, mode="reflect")  # [1, b, S + 2R, S + 2R]
        for one in (kernel, kernel.mT):  # along the rows, then along the columns
            blurred = F.conv2d(blurred, one, groups=len(chosen))
        return x.index_copy_(0, chosen, blurred[0][:, None])

    def _solarize(self, x: Tensor, chosen: Tensor) -> Tensor:
        if len(chosen) == 0:
            return x
        some = x[chosen]
        return x.index_copy_(0, chosen, torch.where(some >= self.solarize_threshold, 1 - some, some))


def _scale(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw
