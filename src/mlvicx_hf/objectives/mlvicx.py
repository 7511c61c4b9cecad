"""MLVICX: variance, invariance and covariance of global and of multi-level embeddings (Eq. 5)."""

from typing import ClassVar

from torch import Tensor

from mlvicx_hf.models.modeling_mlvicx import MLVICXForPreTraining, MLVICXForPreTrainingOutput

from .base import Embeddings, LossOutput, Objective


class MLVICXObjective(Objective):
    """`MLVICXForPreTraining` as an objective; a branch whose weight is 0 has no embeddings.

    Args:
        model: encoder, aggregation, expanders and loss.
    """

    model_class = MLVICXForPreTraining
    unused: ClassVar[tuple[str, ...]] = ()
    model: MLVICXForPreTraining

    def __init__(self, model: MLVICXForPreTraining) -> None:
        super().__init__(model)
        config = model.config
        self.target_deviation = config.variance_target
        self.remedy = (
            f"a higher variance_weight (now {config.variance_weight:g}) or covariance_weight (now "
            f"{config.covariance_weight:g}), "
        )

    def embed(self, view: Tensor) -> Embeddings:
        """z and m, [B, r] each."""
        z, m = self.model.embed(view)
        named = {"global_embeddings": z, "multi_level_embeddings": m}
        return {name: embedding for name, embedding in named.items() if embedding is not None}

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """Eq. 5, with the losses and the unweighted terms of both branches."""
        pairs = {name: (embedding, embeddings_2[name]) for name, embedding in embeddings_1.items()}
        output = self.model.add_losses(MLVICXForPreTrainingOutput(**pairs))  # type: ignore[arg-type]  # two of its fields
        assert output.loss is not None
        terms = {name: value for name, value in output.items() if name != "loss" and name not in pairs}
        return LossOutput(output.loss, terms, pairs)
