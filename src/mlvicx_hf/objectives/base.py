"""The seam between the pretraining loop and what it minimises."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .distortions import Distortion

# Fields of a configuration that describe the heads and the loss of MLVICX.
OF_LEVELS = (
    "multi_level_weight",
    "aggregation_levels",
    "aggregation_size",
    "aggregation_channels",
    "aggregation_resize",
)
OF_MLVICX = (
    *("expander_dims", "expander_final_norm", "invariance_weight", "variance_weight", "covariance_weight"),
    *("global_weight", "invariance_reduction", *OF_LEVELS),
)

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


@dataclass(frozen=True)
class Schedule:
    """The course of a run, as far as an objective may need it.

    Raises:
        UserError: epochs that are less than a step.
    """

    seed: int
    batch_size: int  # images of a step, over all processes
    batches: int  # steps of an epoch
    epochs: float  # the last may be a part of one
    images: int  # of an epoch

    def __post_init__(self) -> None:
        if self.total_steps < 1:
            raise UserError(f"epochs={self.epochs:g} found; expected a step at least, of {self.batches} in an epoch")

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return round(self.epochs * self.batches)


@dataclass(frozen=True)
class ViewSpecification:
    """What a step makes of each image, besides its two random views.

    S is the side of the views, B the number of images.

    Attributes:
        extras: what follows the two views in a call of the objective, in this order:
            "target_1", "target_2": the crop of the view without its change of grey values, [B, 1, S, S];
            "turned_1", "turned_2": the view after random flips and a random number of quarter turns, [B, 1, S, S];
            "turns_1", "turns_2": these, as 0 and 1: vertical flip, horizontal flip, one of four angles, [B, 6];
            "local": small views, [B, local_views, C, local_size, local_size].
        upright_targets: targets show the crop before flip and rotation; otherwise after them.
        normalised_targets: targets are normalised as the views are; otherwise they are grey values in [0, 1].
        distortion: of the two views, after the change of grey values.
        local_views: number of small views of an image.
        local_size: their side in pixels.
        local_area: range of their share of the image's area.
        aligned: the two views must show the same part of the image, so that their maps lie on each other.
    """

    extras: tuple[str, ...] = ()
    upright_targets: bool = False
    normalised_targets: bool = False
    distortion: Distortion | None = None
    local_views: int = 0
    local_size: int = 96
    local_area: tuple[float, float] = (0.05, 0.3)
    aligned: bool = False


class OwnRate(NamedTuple):
    """Parameters whose learning rate differs from that of the rest.

    Attributes:
        parameters: of the objective, all of them trained.
        ratio: of their rate over that of the rest.
        constant: their rate is the peak, times the ratio, in every step.
        under_lars: for LARS alone, which adapts the rate of matrices and not of vectors.
    """

    parameters: Sequence[nn.Parameter]
    ratio: float = 1.0
    constant: bool = False
    under_lars: bool = False


class Objective(nn.Module, ABC):
    """A method of pretraining: the networks that it trains, and the loss of two views.

    Parameters and persistent buffers of this module (projectors, momentum encoders, queues) are saved in every
    checkpoint and restored by a resume. Set `requires_grad_(False)` for weights that the optimiser must not move.

    A class with `options_class` is made of the model and of the options, any other class of the model alone.

    Args:
        model: the network that a run saves with `save_pretrained`; its `base_model` is the encoder.
        options: an `options_class`; None for a class without.
    """

    model_class: ClassVar[type[PreTrainedModel]] = MLVICXModel  # of `model`
    options_class: ClassVar[type | None] = None  # a frozen dataclass whose fields are made by `common.arguments.option`
    unused: ClassVar[tuple[str, ...]] = OF_MLVICX  # fields of the configuration that change nothing
    synchronise_norms: ClassVar[bool] = True  # on several GPUs, batch statistics are those of the global batch
    inexact_accumulation: ClassVar[str] = ""  # why micro-batches would train another method; empty if they do not
    target_deviation: float = 0.0  # standard deviation of healthy embeddings; far below it a run warns; 0: no warning
    remedy: str = ""  # what may help against a collapse, such as "a higher variance_weight, "

    def __init__(self, model: PreTrainedModel, options: Any = None) -> None:
        super().__init__()
        self.model, self.options = model, options
        self.notes: list[str] = []  # lines to print when training begins, such as where the weights came from

    @property
    def encoder(self) -> MLVICXModel:
        """The part of `model` that other tasks use."""
        encoder = self.model.base_model
        assert isinstance(encoder, MLVICXModel)
        return encoder

    @classmethod
    def configure(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Change the fields of the model's configuration to what the method needs. The default changes none."""
        return values

    @classmethod
    def views(cls, options: Any) -> ViewSpecification:
        """What a step needs besides two views, by the options of the method. The default needs nothing."""
        return ViewSpecification()

    def prepare(self, schedule: Schedule) -> None:
        """Learn the course of the run before its first step, and check the options against it.

        Raises:
            UserError: an option that does not fit.
        """

    def start_step(self, step: int) -> None:
        """Do what precedes a step, such as drawing its random numbers. The default does nothing.

        Args:
            step: counted from 0. The numbers must depend on nothing but the seed and the step.
        """

    def own_rates(self) -> list[OwnRate]:
        """Parameters that have a learning rate of their own; by default none."""
        return []

    @abstractmethod
    def embed(self, view: Tensor) -> Embeddings:
        """Named embeddings [B, D] of one view [B, C, H, W]. Targets that have no gradient are welcome among them."""

    @abstractmethod
    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """Loss of this process's batch from the embeddings of both views.

        A step calls it once, with micro-batches too. It must not use anything of the views but their embeddings. A term
        that is a mean over images, such as the error of a reconstruction, is an embedding [B, 1]: its value for each
        image.
        """

    def update(self, step: int) -> None:
        """Do what follows a step of the optimiser: move momentum encoders, fill queues. The default does nothing.

        Args:
            step: steps that are done.
        """

    def forward(
        self, view_1: Tensor, view_2: Tensor, *extras: Tensor, return_loss: bool = True
    ) -> LossOutput | tuple[Embeddings, Embeddings]:
        """Embed both views, each in a pass of its own, and take the loss.

        This is one call, so that distributed data parallel, autocast and `compile` act on all of it. Override `encode`
        where the views have different parts, such as query and key.

        Args:
            view_1: [B, C, H, W].
            view_2: [B, C, H, W].
            extras: as `views` names them.
            return_loss: false returns the embeddings alone.
        """
        embeddings = self.encode(view_1, view_2, *extras)
        return self.loss(*embeddings) if return_loss else embeddings

    def encode(self, view_1: Tensor, view_2: Tensor, *extras: Tensor) -> tuple[Embeddings, Embeddings]:
        """Embeddings of view 1 and of view 2; see `forward`."""
        assert not extras
        return self.embed(view_1), self.embed(view_2)
