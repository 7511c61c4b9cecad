"""Barlow Twins (Zbontar et al., ICML 2021): the cross-correlation of both views' embeddings becomes the identity."""

# ruff: noqa: RUF009 - `option` makes a field

from dataclasses import dataclass

from torch import Tensor

from mlvicx_hf.common.arguments import option
from mlvicx_hf.models.layers_mlvicx import Expander
from mlvicx_hf.models.loss_mlvicx import own_precision
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, Objective, OwnRate
from .parts import gather


@dataclass(frozen=True)
class BarlowTwinsOptions:
    """Options of Barlow Twins."""

    redundancy_weight: float = option("Weight of the correlations off the diagonal, lambda.", 0.0051, above=0)
    projector_dims: list[int] = option("Widths of the projector's linear layers.", [8192, 8192, 8192], above=0)
    vector_rate_ratio: float = option("Learning rate of vectors (norms, biases) over that of matrices.", 0.024, above=0)


class BarlowTwinsObjective(Objective):
    """Σ_i (1−C_ii)² + λ Σ_{i≠j} C_ij² on a projector of three layers without biases.

    Under LARS the rate of vectors is smaller, since LARS adapts the rate of matrices alone: the loss is a sum over D²
    entries, and norms would run away.
    """

    options_class = BarlowTwinsOptions
    remedy = "a higher redundancy_weight, "

    def __init__(self, model: MLVICXModel, options: BarlowTwinsOptions) -> None:
        super().__init__(model, options)
        self.projector = Expander(model.pooled_features, list(options.projector_dims), final_norm=False)

    def own_rates(self) -> list[OwnRate]:
        """Vectors."""
        vectors = [p for p in self.parameters() if p.requires_grad and p.ndim <= 1]
        return [OwnRate(vectors, self.options.vector_rate_ratio, under_lars=True)]

    def embed(self, view: Tensor) -> Embeddings:
        """Project the pooled features: [B, D]."""
        return {"embeddings": self.projector(self.model(view).pooler_output)}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        pair = embeddings_1["embeddings"], embeddings_2["embeddings"]
        diagonal, rest = correlation_terms(*(gather(each) for each in pair))
        loss = diagonal + self.options.redundancy_weight * rest
        return LossOutput(loss, {"diagonal_loss": diagonal, "off_diagonal_loss": rest}, {"embeddings": pair})


def correlation_terms(z_1: Tensor, z_2: Tensor) -> tuple[Tensor, Tensor]:
    """Compute Σ_i (1−C_ii)² and Σ_{i≠j} C_ij² of the cross-correlation C of two views' embeddings, [B, D] each.

    Embeddings are standardised over the batch by the biased variance + 1e-5, as a batch normalisation does.
    """
    with own_precision(z_1):
        one, two = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (z_1, z_2))
        correlation = one.T @ two / len(one)
        diagonal = correlation.diagonal()
        on = (1 - diagonal).square().sum()
        return on, correlation.square().sum() - diagonal.square().sum()
