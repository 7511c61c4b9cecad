"""PCRLv2 (Zhou et al., TPAMI 2023): a pyramid of a decoder's scales, which agree across views, and a restored crop."""

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlvicx_hf.common.arguments import option
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.streams import RandomStream, stream_generator
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, Objective, Schedule, ViewSpecification
from .decoders import RestorationDecoder, squared_error
from .distortions import CutOut
from .parts import ProjectionHead, cosines, mean_over_batch


@dataclass(frozen=True)
class PCRLv2Options:
    """Options of PCRLv2."""

    local_views: int = option("Small views of an image; 0 for none.", 6, least=0)
    local_size: int = option("Side of the small views in pixels.", 96, above=0)
    restoration_weight: float = option("Weight of the restored image and of the restored scale.", 1.0, above=0)


class Pyramid(NamedTuple):
    """What the decoder says of one view.

    Attributes:
        maps: of every scale, coarsest first, [B, C_i, H_i, W_i].
        embeddings: p_i, the normalised means of the maps, [B, C_i] each.
        predictions: u_i of these, [B, C_i] each.
    """

    maps: list[Tensor]
    embeddings: list[Tensor]
    predictions: list[Tensor]


class PCRLv2Objective(Objective):
    """D(v₁, v₂) + 1/(2L) Σ_l [D(v₁, l) + D(v₂, l)] + MSE(o₁, g₁) + β·MSE(s₁, g₁), with L small views l.

    D compares two views on one scale, drawn for each pair and step: −½ cos(u(x), p(y)) − ½ cos(u(y), p(x)), without
    gradient through p. o₁ is restored from the decoder's last map, s₁ from that of the scale drawn for v₁ and v₂; β
    falls from 1 to 0 as a cosine by epochs.
    """

    options_class = PCRLv2Options
    model: MLVICXModel

    def __init__(self, model: MLVICXModel, options: PCRLv2Options) -> None:
        super().__init__(model, options)
        if options.local_views:
            _check_size(model, options.local_size)
        self.schedule = Schedule(0, 1, 1, 1, 0)
        self.decoder = RestorationDecoder(model.channels, skips=False)
        widths = self.decoder.widths
        self.restoration = nn.Conv2d(widths[-1], 1, 3, padding=1)
        self.scale_restorations = nn.ModuleList(_scale_restoration(width) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
        self.predictors = nn.ModuleList(ProjectionHead([width, 2 * width, width]) for width in widths)
        self.scales, self.scale_weight = [0] * (1 + 2 * options.local_views), 1.0

    @classmethod
    def views(cls, options: PCRLv2Options) -> ViewSpecification:
        """Views with cut-outs, the crop of view 1, and small views."""
        local = ("local",) if options.local_views else ()
        return ViewSpecification(
            extras=("target_1", *local),
            normalised_targets=True,
            distortion=CutOut(),
            local_views=options.local_views,
            local_size=options.local_size,
        )

    def prepare(self, schedule: Schedule) -> None:
        """The scales are drawn from the seed, and β falls by the epochs."""
        self.schedule = schedule

    def compile(self, *arguments: Any, **options: Any) -> None:
        """Compile the pyramid of a view alone: a compiler would make all the rest anew for every draw of scales."""
        self.pyramid = torch.compile(self.pyramid, *arguments, **options)  # type: ignore[method-assign]  # hides the plain one

    def start_step(self, step: int) -> None:
        """Draw a scale for each pair of views, and find β."""
        generator = stream_generator(self.schedule.seed, step, RandomStream.STEP)
        self.scales = generator.integers(0, len(self.norms), len(self.scales)).tolist()
        epoch = step // self.schedule.batches
        self.scale_weight = (1 + math.cos(math.pi * epoch / self.schedule.epochs)) / 2

    def pyramid(self, view: Tensor) -> Pyramid:
        """All scales of one view [B, C, H, W]."""
        maps = self.decoder(self.model.refined_maps(view), view.shape[2:])
        embeddings = [norm(each.mean((2, 3))) for norm, each in zip(self.norms, maps, strict=True)]
        return Pyramid(maps, embeddings, [head(p) for head, p in zip(self.predictors, embeddings, strict=True)])

    def embed(self, view: Tensor) -> Embeddings:
        """The embedding of the coarsest scale, [B, C]."""
        return {"embeddings": self.pyramid(view).embeddings[0]}

    def encode(self, view_1: Tensor, view_2: Tensor, *extras: Tensor) -> tuple[Embeddings, Embeddings]:
        """The terms of each image, [B, 1] each, and the embeddings of the coarsest scale, to be watched."""
        target, scale = extras[0], self.scales[0]
        one, two = self.pyramid(view_1), self.pyramid(view_2)
        made = {"embeddings": one.embeddings[0].detach(), "agreements": disagreement(one, two, scale)}
        restored = self.restoration(one.maps[-1])
        small = self.scale_restorations[scale](one.maps[scale])
        size = tuple(target.shape[2:])
        enlarged = F.interpolate(small, size, mode="bilinear", align_corners=False)
        made["errors"] = squared_error(restored, target)
        # Every process must give each weight a gradient, also the heads of scales that were not drawn: then it is 0.
        heads = (self.norms, self.predictors, self.scale_restorations)
        idle = torch.stack([p.sum() for head in heads for p in head.parameters()]).sum() * 0
        made["scale_errors"] = squared_error(enlarged, target) + idle
        if self.options.local_views:
            made["local_agreements"] = self._local_disagreement(one, two, extras[1])
        return made, {"embeddings": two.embeddings[0].detach()}

    def _local_disagreement(self, one: Pyramid, two: Pyramid, local: Tensor) -> Tensor:
        """Mean of D over both views and all small views, [B, L, C, s, s], of each image: [B, 1]."""
        pyramids = [self.pyramid(each) for each in local.unbind(1)]
        pairs = [(view, small) for small in pyramids for view in (one, two)]
        found = [disagreement(*pair, scale) for pair, scale in zip(pairs, self.scales[1:], strict=True)]
        return torch.stack(found).mean(0)

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        agreement = mean_over_batch(embeddings_1["agreements"])
        error, small = (mean_over_batch(embeddings_1[name]) for name in ("errors", "scale_errors"))
        terms = {"global_cosine_loss": agreement, "restoration_loss": error, "scale_restoration_loss": small}
        loss = agreement + self.options.restoration_weight * (error + self.scale_weight * small)
        if "local_agreements" in embeddings_1:
            terms["local_cosine_loss"] = mean_over_batch(embeddings_1["local_agreements"])
            loss = loss + terms["local_cosine_loss"]
        pair = embeddings_1["embeddings"], embeddings_2["embeddings"]
        return LossOutput(loss, terms, {"embeddings": pair})


def _check_size(model: MLVICXModel, side: int) -> None:
    """Refuse small views that a backbone made for one size of images does not take."""
    copied, views = copy.deepcopy(model), torch.empty(2, model.config.num_channels, side, side, device="meta")
    try:
        nn.Module.to(copied, "meta")
        copied.refined_maps(views)
    except (RuntimeError, AssertionError) as error:
        found = f"local_size={side} found with backbone={model.config.backbone!r}"
        raise UserError(f"{found}, which takes one size alone; expected local_views=0") from error


def disagreement(one: Pyramid, two: Pyramid, scale: int) -> Tensor:
    """D of two views on a scale, of each image: [B, 1]."""
    first = cosines(one.predictions[scale], two.embeddings[scale].detach())
    second = cosines(two.predictions[scale], one.embeddings[scale].detach())
    return -(first + second)[:, None] / 2


def _scale_restoration(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Conv2d(width, 1, 1)
    )
