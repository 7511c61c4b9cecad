"""SimCLR (Chen et al., ICML 2020): each view finds its partner among all other views of the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mlvicx_hf.common.arguments import option
from mlvicx_hf.models.loss_mlvicx import own_precision
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, Objective
from .parts import ProjectionHead, gather, unit_vectors


@dataclass(frozen=True)
class SimCLROptions:
    """Options of SimCLR."""

    temperature: float = option("Temperature T: 0.5 suits small batches, 0.1 large ones.", 0.5, above=0)
    projection_size: int = option("Width of the embeddings.", 128, above=0)


class SimCLRObjective(Objective):
    """The loss NT-Xent on a head of two layers, the last one with a batch normalisation without shift."""

    options_class = SimCLROptions
    remedy = "a higher temperature, "

    def __init__(self, model: MLVICXModel, options: SimCLROptions) -> None:
        super().__init__(model, options)
        width = model.pooled_features
        self.projector = ProjectionHead([width, width, options.projection_size], last="scale")
        self.target_deviation = options.projection_size**-0.5

    def embed(self, view: Tensor) -> Embeddings:
        """Project the pooled features: [B, projection_size], of any length."""
        return {"embeddings": self.projector(self.model(view).pooler_output)}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """NT-Xent over the global batch."""
        pair = [unit_vectors(gather(each["embeddings"])) for each in (embeddings_1, embeddings_2)]
        loss = nt_xent(pair[0], pair[1], self.options.temperature)
        one, two = (unit_vectors(each["embeddings"]) for each in (embeddings_1, embeddings_2))
        return LossOutput(loss, {"contrastive_loss": loss}, {"embeddings": (one, two)})


def nt_xent(z_1: Tensor, z_2: Tensor, temperature: float) -> Tensor:
    """Compute −log of exp(z_i·z_j/T) over the sum of exp(z_i·z_k/T), k ≠ i; the mean over the 2B views i.

    Args:
        z_1: unit vectors of view 1, [B, D].
        z_2: of view 2, the partners j.
        temperature: T.
    """
    with own_precision(z_1):
        count, z = len(z_1), torch.cat([z_1, z_2])
        logits = z @ z.T / temperature
        numbers = torch.arange(2 * count, device=z.device)
        logits = logits.masked_fill(numbers[:, None] == numbers, -torch.inf)
        return F.cross_entropy(logits, (numbers + count) % (2 * count))
