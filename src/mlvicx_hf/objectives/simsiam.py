"""SimSiam (Chen and He, CVPR 2021): a predictor and a stopped gradient, with neither negatives nor momentum."""

from dataclasses import dataclass

from torch import Tensor

from mlvicx_hf.common.arguments import option
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, Objective, OwnRate
from .parts import ProjectionHead, cosines, mean_over_batch, unit_vectors


@dataclass(frozen=True)
class SimSiamOptions:
    """Options of SimSiam."""

    projection_size: int = option("Width of the projections.", 2048, above=0)
    predictor_size: int = option("Width inside the predictor.", 512, above=0)


class SimSiamObjective(Objective):
    """−½ cos(q(z₁), z₂) − ½ cos(q(z₂), z₁), where no gradient goes through the z on the right.

    The predictor's learning rate is constant.
    """

    options_class = SimSiamOptions

    def __init__(self, model: MLVICXModel, options: SimSiamOptions) -> None:
        super().__init__(model, options)
        width, size = model.pooled_features, options.projection_size
        self.projector = ProjectionHead([width, width, width, size], last="fixed")
        self.predictor = ProjectionHead([size, options.predictor_size, size])
        self.target_deviation = size**-0.5  # of unit vectors that fill the sphere

    def own_rates(self) -> list[OwnRate]:
        """The predictor."""
        return [OwnRate(list(self.predictor.parameters()), constant=True)]

    def embed(self, view: Tensor) -> Embeddings:
        """The projection z and its prediction q(z), [B, projection_size] each."""
        z = self.projector(self.model(view).pooler_output)
        return {"projections": z, "predictions": self.predictor(z)}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        z_1, z_2 = embeddings_1["projections"].detach(), embeddings_2["projections"].detach()
        one, two = embeddings_1["predictions"], embeddings_2["predictions"]
        loss = mean_over_batch(-(cosines(one, z_2) + cosines(two, z_1)) / 2)
        units = unit_vectors(z_1), unit_vectors(z_2)
        return LossOutput(loss, {"cosine_loss": loss}, {"projections": units})
