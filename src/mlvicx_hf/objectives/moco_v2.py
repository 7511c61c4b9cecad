"""MoCo v2 (Chen et al., 2020): InfoNCE of a query, its key, and a queue of keys."""

from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput
from .momentum_contrast import ContrastOptions, MomentumContrast
from .parts import ProjectionHead


class MoCoV2Objective(MomentumContrast):
    """InfoNCE on a head of two layers without batch normalisation."""

    options_class = ContrastOptions

    def __init__(self, model: MLVICXModel, options: ContrastOptions) -> None:
        width = model.pooled_features
        super().__init__(model, options, ProjectionHead([width, width, options.projection_size], norm=False))

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        loss, pair = self.contrastive_loss(embeddings_1["queries"], embeddings_2["keys"])
        return LossOutput(loss, {"contrastive_loss": loss}, {"queries": pair})
