"""CAiD (Hosseinzadeh Taher et al., MIDL 2022) on MoCo v2: contrast, and a decoder that undoes distortions."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from mlvicx_hf.common.arguments import option
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, ViewSpecification
from .decoders import RestorationDecoder, squared_error
from .distortions import COPY, ERASE, ERASE_OUTSIDE, LEAVE, DistortedBox, Distortion
from .momentum_contrast import ContrastOptions, MomentumContrast
from .parts import ProjectionHead, mean_over_batch

REFERENCE_SIDE = 224  # of the images for which the sizes of the boxes are meant
STOP = 0.1  # probability that no further box is erased
ATTEMPTS = 100  # to find a place that does not overlap


@dataclass(frozen=True)
class CAiDOptions(ContrastOptions):
    """Options of CAiD."""

    restoration_weight: float = option("Weight of the mean square error of the restored image.", 10.0, above=0)


class BoxesOrCopies(Distortion):
    """30 %: erase up to ten boxes; 5 %: erase all but up to ten large boxes; 30 %: copy ten small boxes elsewhere."""

    boxes = 10
    fill = 0.0

    def draw(self, generator: np.random.Generator, side: int) -> tuple[int, list[DistortedBox]]:
        """Boxes in proportion to the image's side."""
        kind = generator.random()
        scale = side / REFERENCE_SIDE
        if kind <= 0.30:
            return ERASE, self._erased(generator, side, (10 * scale, 70 * scale), margin=round(3 * scale))
        if kind <= 0.35:
            return ERASE_OUTSIDE, self._erased(generator, side, (side - 70 * scale, side - 50 * scale), margin=0)
        if kind <= 0.65:
            return COPY, self._copied(generator, side, (10 * scale, 15 * scale))
        return LEAVE, []

    def _erased(
        self, generator: np.random.Generator, side: int, sizes: tuple[float, float], margin: int
    ) -> list[DistortedBox]:
        found: list[DistortedBox] = []
        for _ in range(self.boxes):
            width, height = (min(_size(generator, sizes), side - 2 * margin) for _ in range(2))
            left = int(generator.integers(margin, side - margin - width + 1))
            top = int(generator.integers(margin, side - margin - height + 1))
            found.append(DistortedBox(left, top, width, height))
            if generator.random() < STOP:
                break
        return found

    def _copied(self, generator: np.random.Generator, side: int, sizes: tuple[float, float]) -> list[DistortedBox]:
        found = []
        for _ in range(self.boxes):
            width, height = (_size(generator, sizes) for _ in range(2))
            most = (side - width + 1, side - height + 1)
            from_left, from_top = (int(each) for each in generator.integers(0, most))
            for _ in range(ATTEMPTS):
                left, top = (int(each) for each in generator.integers(0, most))
                if abs(left - from_left) >= width or abs(top - from_top) >= height:
                    found.append(DistortedBox(left, top, width, height, from_left - left, from_top - top))
                    break
        return found


def _size(generator: np.random.Generator, sizes: tuple[float, float]) -> int:
    return max(1, round(generator.uniform(*sizes)))


class CAiDObjective(MomentumContrast):
    """InfoNCE(q, k) + 10·MSE(r(v₁), t₁): r restores the crop in grey values from the distorted view of the query.

    The target is the crop before its flip, so the decoder cannot know whether to mirror.
    """

    options_class = CAiDOptions

    def __init__(self, model: MLVICXModel, options: CAiDOptions) -> None:
        width = model.pooled_features
        super().__init__(model, options, ProjectionHead([width, width, options.projection_size], norm=False))
        self.decoder = RestorationDecoder(model.channels)
        self.restoration = nn.Sequential(nn.Conv2d(self.decoder.widths[-1], 1, 3, padding=1), nn.Sigmoid())

    @classmethod
    def views(cls, options: CAiDOptions) -> ViewSpecification:
        """Distorted views, and the upright crop of view 1 in grey values."""
        return ViewSpecification(extras=("target_1",), upright_targets=True, distortion=BoxesOrCopies())

    def encode(self, view_1: Tensor, view_2: Tensor, *extras: Tensor) -> tuple[Embeddings, Embeddings]:
        """Queries and the error of each restored image [B, 1]; keys."""
        (target,) = extras
        maps = self.model.refined_maps(view_1)
        restored = self.restoration(self.decoder(maps, view_1.shape[2:])[-1])
        queries = self.projector(self.model.pool(maps))
        return {"queries": queries, "errors": squared_error(restored, target)}, {"keys": self.make_keys(view_2)[0]}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        contrast, pair = self.contrastive_loss(embeddings_1["queries"], embeddings_2["keys"])
        error = mean_over_batch(embeddings_1["errors"])
        terms = {"contrastive_loss": contrast, "restoration_loss": error}
        return LossOutput(contrast + self.options.restoration_weight * error, terms, {"queries": pair})
