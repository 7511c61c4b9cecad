"""BYOL (Grill et al., NeurIPS 2020): predict what a slowly moving copy says of the other view."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mlvicx_hf.common.arguments import option
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, Objective, Schedule
from .parts import (
    ProjectionHead,
    cosines,
    follow,
    mean_over_batch,
    momentum_copy,
    note_on_momentum,
    scale_momentum,
    unit_vectors,
)


@dataclass(frozen=True)
class BYOLOptions:
    """Options of BYOL."""

    hidden_size: int = option("Width inside projector and predictor.", 4096, above=0)
    projection_size: int = option("Width of the projections.", 256, above=0)
    target_momentum: float = option("Momentum of the target in the first step; it rises to 1.", 0.99, least=0, most=1)
    scale_momentum: bool = option("Scale the momentum from a batch of reference_batch to that of the run.", True)
    reference_batch: int = option("Batch for which target_momentum is meant.", 4096, above=0)


class BYOLObjective(Objective):
    """Σ over both views of 2 − 2 cos(q(g(h)), ḡ(h̄′)); h̄ and ḡ are momentum copies without gradients."""

    options_class = BYOLOptions
    remedy = "a higher target_momentum, "

    def __init__(self, model: MLVICXModel, options: BYOLOptions) -> None:
        super().__init__(model, options)
        self.schedule = Schedule(0, options.reference_batch, 1, 1, 0)
        width, hidden, size = model.pooled_features, options.hidden_size, options.projection_size
        self.projector = ProjectionHead([width, hidden, size])
        self.predictor = ProjectionHead([size, hidden, size])
        self.target_model, self.target_projector = momentum_copy(model), momentum_copy(self.projector)
        self.target_deviation = size**-0.5

    def prepare(self, schedule: Schedule) -> None:
        """The momentum depends on the batch and on the number of steps."""
        self.schedule = schedule
        self.notes += note_on_momentum(self.momentum(0), schedule.total_steps, "target_momentum")

    def embed(self, view: Tensor) -> Embeddings:
        """The prediction, and the target for the other view, [B, projection_size] each."""
        prediction = self.predictor(self.projector(self.model(view).pooler_output))
        with torch.no_grad():
            target = self.target_projector(self.target_model(view).pooler_output)
        return {"predictions": prediction, "targets": target}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch, from 0 to 8."""
        one, two = embeddings_1["predictions"], embeddings_2["predictions"]
        target_1, target_2 = embeddings_1["targets"].detach(), embeddings_2["targets"].detach()
        loss = mean_over_batch(4 - 2 * cosines(one, target_2) - 2 * cosines(two, target_1))
        units = unit_vectors(one), unit_vectors(two)
        return LossOutput(loss, {"cosine_loss": loss}, {"predictions": units})

    def momentum(self, step: int) -> float:
        """1 − (1−τ₀)(cos(π s/S) + 1)/2 after s of S steps, scaled to the batch."""
        options, schedule = self.options, self.schedule
        done = step / schedule.total_steps
        momentum = 1 - (1 - options.target_momentum) * (math.cos(math.pi * done) + 1) / 2
        if options.scale_momentum:
            momentum = scale_momentum(momentum, schedule.batch_size, options.reference_batch)
        return momentum

    def update(self, step: int) -> None:
        """Move the target."""
        momentum = self.momentum(step)
        follow(self.target_model, self.model, momentum)
        follow(self.target_projector, self.projector, momentum)
