"""Inter-MoCo (Kaku et al., NeurIPS 2021): MoCo, and features of the inner levels that agree as well."""

# ruff: noqa: RUF009 - `option` makes a field

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlvicx_hf.common.arguments import option
from mlvicx_hf.models.layers_mlvicx import Expander, average_pool
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .barlow_twins import correlation_terms
from .base import Embeddings, LossOutput, ViewSpecification
from .decoders import squared_error
from .momentum_contrast import ContrastOptions, MomentumContrast
from .parts import gather, mean_over_batch

GRIDS = (16, 16, 4, 4)  # sides to which the maps of four stages are averaged
CORRELATION_SCALE = 1 / 32  # s of the Barlow variant


@dataclass(frozen=True)
class InterMoCoOptions(ContrastOptions):
    """Options of Inter-MoCo."""

    temperature: float = option("Temperature T of the contrastive loss.", 0.07, above=0)
    reference_batch: int = option("Batch for which key_momentum is meant.", 16, above=0)
    variant: str = option("Compare the levels by mean squares, or as Barlow Twins.", "mse", choices=("mse", "barlow"))
    level_weight: float = option("Weight of each level's mean square.", 0.25, above=0)
    correlation_weight: float = option("Weight of the correlation terms of the Barlow variant, lambda.", 5e-5, above=0)
    level_dims: list[int] = option(
        "Widths of the levels' projectors in the Barlow variant.", [2048, 2048, 2048], above=0
    )
    aligned: bool = option("Demand views without crop and flip, whose maps lie on each other.", True)


class InterMoCoObjective(MomentumContrast):
    """InfoNCE on one linear layer, plus a comparison of the stages' maps of query and key.

    mse: Σ_l ¼ mean((q_l − k_l)²) of maps averaged to 16×16 and 4×4. barlow: λ·s·(Σ_i (1−C_ii)² + Σ_{i≠j} C_ij²) of
    pooled and projected levels. No gradient goes through the key network.
    """

    options_class = InterMoCoOptions

    def __init__(self, model: MLVICXModel, options: InterMoCoOptions) -> None:
        super().__init__(model, options, nn.Linear(model.pooled_features, options.projection_size))
        self.stages = [level for level, name in enumerate(model.config.stage_names) if name != "stem"]
        if options.variant == "barlow":
            dims = list(options.level_dims)
            self.level_projectors = nn.ModuleList(Expander(model.channels[level], dims, False) for level in self.stages)

    @classmethod
    def views(cls, options: InterMoCoOptions) -> ViewSpecification:
        """Neither crop nor flip."""
        return ViewSpecification(aligned=options.aligned)

    def encode(self, view_1: Tensor, view_2: Tensor, *extras: Tensor) -> tuple[Embeddings, Embeddings]:
        """Queries and keys, and what the variant compares: distances of the levels [B, 4], or their embeddings."""
        assert not extras
        keys, key_maps = self.make_keys(view_2)
        maps = self.model.refined_maps(view_1)
        queries = self.projector(self.model.pool(maps))
        pairs = [(maps[level], key_maps[level]) for level in self.stages]
        if self.options.variant == "mse":
            distances = [_distance(*pair, GRIDS[min(n, len(GRIDS) - 1)]) for n, pair in enumerate(pairs)]
            return {"queries": queries, "distances": torch.stack(distances, 1)}, {"keys": keys}
        one, two = {"queries": queries}, {"keys": keys}
        for number, (projector, (query, key)) in enumerate(zip(self.level_projectors, pairs, strict=True)):
            one[f"level_{number}"] = projector(query.mean((2, 3)))
            two[f"level_{number}"] = projector(key.mean((2, 3)))  # the projector learns from both
        return one, two

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        options = self.options
        contrast, pair = self.contrastive_loss(embeddings_1["queries"], embeddings_2["keys"])
        if options.variant == "mse":
            levels = options.level_weight * mean_over_batch(embeddings_1["distances"]) * len(self.stages)
        else:
            terms = [
                correlation_terms(gather(value), gather(embeddings_2[name]))
                for name, value in embeddings_1.items()
                if name.startswith("level_")
            ]
            total = torch.stack([diagonal + rest for diagonal, rest in terms]).sum()
            levels = options.correlation_weight * CORRELATION_SCALE * total
        losses = {"contrastive_loss": contrast, "level_loss": levels}
        return LossOutput(contrast + levels, losses, {"queries": pair})


def _distance(query: Tensor, key: Tensor, grid: int) -> Tensor:
    """Mean square of the difference of two maps on a grid, of each image: [B]."""
    side = min(grid, *query.shape[2:])  # a smaller map stays as it is
    query, key = (average_pool(each, side) for each in (query, key))
    return squared_error(query, key)[:, 0]
