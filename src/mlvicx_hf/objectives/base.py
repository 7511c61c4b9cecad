"""The seam between the pretraining loop and what it minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

Embeddings = dict[str, Tensor]  # of one view, by name: [B, D] each
EmbeddingPairs = dict[str, tuple[Tensor, Tensor]]  # of both views


class LossOutput(NamedTuple):
    """What a batch gives.

    Attributes:
        loss: the scalar to minimise; under torch.distributed that of the global batch.
        terms: named scalars for `metrics.jsonl`. The curves group them by the last word of the name: `…_loss`,
            `…_invariance`, `…_variance`, `…_covariance`; other names share one panel.
        embeddings: the embeddings to watch for collapse, of this process's samples.
    """

    loss: Tensor
    terms: dict[str, Tensor]
    embeddings: EmbeddingPairs


class Objective(nn.Module, ABC):
    """A method of pretraining: the networks that it trains, and the loss of two views.

    Parameters and persistent buffers of this module (projectors, momentum encoders, queues) are saved in every
    checkpoint and restored by a resume. Set `requires_grad_(False)` for weights that the optimiser must not move.

    Args:
        model: the network that a run saves with `save_pretrained`; its `base_model` is the encoder.
    """

    model_class: ClassVar[type[PreTrainedModel]] = MLVICXModel  # of `model`
    target_deviation: float = 0.0  # standard deviation of healthy embeddings; far below it a run warns; 0: no warning
    start: str = ""  # where the weights came from, if they are not random
    remedy: str = ""  # what may help against a collapse, such as "a higher variance_weight, "

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def encoder(self) -> MLVICXModel:
        """The part of `model` that other tasks use."""
        return self.encoder_of(self.model)

    @staticmethod
    def encoder_of(model: PreTrainedModel) -> MLVICXModel:
        """The encoder of a model of `model_class`."""
        encoder = model.base_model
        assert isinstance(encoder, MLVICXModel)
        return encoder

    @abstractmethod
    def embed(self, view: Tensor) -> Embeddings:
        """Named embeddings [B, D] of one view [B, C, H, W]. Targets that have no gradient are welcome among them."""

    @abstractmethod
    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """Loss of this process's batch from the embeddings of both views.

        A step calls it once, with micro-batches too. It must not use anything of the views but their embeddings.
        """

    def update(self, step: int) -> None:
        """Do what follows a step of the optimiser: move momentum encoders, fill queues. The default does nothing.

        Args:
            step: steps that are done.
        """

    def forward(
        self, view_1: Tensor, view_2: Tensor, return_loss: bool = True
    ) -> LossOutput | tuple[Embeddings, Embeddings]:
        """Embed both views, each in a pass of its own, and take the loss.

        This is one call, so that distributed data parallel, autocast and `compile` act on all of it. Override it where
        the views have different parts, such as query and key.

        Args:
            view_1: [B, C, H, W].
            view_2: [B, C, H, W].
            return_loss: false returns the embeddings alone.
        """
        embeddings = self.embed(view_1), self.embed(view_2)
        return self.loss(*embeddings) if return_loss else embeddings
