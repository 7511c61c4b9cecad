"""What the methods of MoCo's family share: a momentum copy that makes keys, and a queue of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlvicx_hf.common.arguments import option
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.models.loss_mlvicx import own_precision
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, Objective, Schedule
from .parts import (
    KeyQueue,
    follow,
    gather,
    mean_over_batch,
    momentum_copy,
    note_on_momentum,
    scale_momentum,
    unit_vectors,
)


@dataclass(frozen=True)
class ContrastOptions:
    """Options of every method with keys and a queue."""

    temperature: float = option("Temperature T of the contrastive loss.", 0.2, above=0)
    projection_size: int = option("Width of queries and keys.", 128, above=0)
    queue_size: int = option(
        "Keys in the queue: a multiple of the batch, at most a quarter of the images.", 16384, above=0
    )
    key_momentum: float = option("Momentum of the network that makes the keys.", 0.999, least=0, most=1)
    scale_momentum: bool = option("Scale the momentum from a batch of reference_batch to that of the run.", True)
    reference_batch: int = option("Batch for which key_momentum is meant.", 256, above=0)
    key_images: int = option(
        "Images that the key network normalises together (a group may hold one more); 0 for all.", 16
    )

    def __post_init__(self) -> None:
        if self.key_images < 0 or self.key_images == 1:
            raise UserError(f"objective_options: key_images={self.key_images} found; expected 0, or 2 or more")


class MomentumContrast(Objective):
    """Queries of view 1, keys of view 2 from a momentum copy, and a queue of the keys of earlier steps.

    If the batch statistics of query and key came from the same images, the network could tell the pair by them. MoCo
    shuffles the keys over GPUs. Here the key network normalises groups of a few images, so one device is enough, and
    statistics are never shared over processes.

    Args:
        model: the encoder.
        options: of the method.
        head: of the queries, [B, D] to [B, projection_size].
    """

    model: MLVICXModel
    synchronise_norms = False
    pushed = 1  # batches of keys in a step

    def __init__(self, model: MLVICXModel, options: ContrastOptions, head: nn.Module) -> None:
        super().__init__(model, options)
        self.momentum, self.projector = options.key_momentum, head
        self.key_model, self.key_projector = momentum_copy(model), momentum_copy(head)
        self.queue = KeyQueue(options.queue_size, options.projection_size)
        self.new_keys: list[Tensor] = []  # of this step, for the queue
        self.target_deviation = options.projection_size**-0.5

    def prepare(self, schedule: Schedule) -> None:
        """Check the queue, and scale the momentum to the batch."""
        options, batch = self.options, schedule.batch_size
        if options.queue_size % batch:
            raise UserError(
                f"queue_size={options.queue_size} found with batch_size={batch}; expected a multiple of the batch"
            )
        if 4 * options.queue_size > schedule.images:
            most = schedule.images // 4 // batch * batch
            advice = f"{most} or less" if most else f"{4 * batch} images or more"
            raise UserError(
                f"queue_size={options.queue_size} found with {schedule.images} images; expected {advice}: in a queue "
                "of more than a quarter of the images, many keys are of the query's own image"
            )
        if options.scale_momentum:
            self.momentum = scale_momentum(options.key_momentum, batch, options.reference_batch)
        self.notes += note_on_momentum(self.momentum, schedule.total_steps, "key_momentum")

    @torch.no_grad()
    def make_keys(self, view: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Keys [B, projection_size], of any length, and the maps of all levels, by groups of images.

        Fewer than four images in a micro-batch of a process are one group: a group of one has no statistics.
        """
        size, count = self.options.key_images, 1
        if size:  # two groups at least, each of two images or more: one group would be the query's batch again
            count = max(1, min(max(2, -(-len(view) // size)), len(view) // 2))
        groups = view.tensor_split(count)
        maps = [self.key_model.refined_maps(group) for group in groups]
        keys = [self.key_projector(self.key_model.pool(each)) for each in maps]
        return torch.cat(keys), [torch.cat(level) for level in zip(*maps, strict=True)]

    def embed(self, view: Tensor) -> Embeddings:
        """Queries [B, projection_size], of any length."""
        return {"queries": self.projector(self.model(view).pooler_output)}

    def encode(self, view_1: Tensor, view_2: Tensor, *extras: Tensor) -> tuple[Embeddings, Embeddings]:
        """Queries of view 1, keys of view 2."""
        assert not extras
        return self.embed(view_1), {"keys": self.make_keys(view_2)[0]}

    def contrastive_loss(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """InfoNCE against the queue, over the global batch. The keys enter the queue after the step.

        Returns:
            The loss, and the unit vectors of both, of this process.
        """
        queries, keys = unit_vectors(queries), unit_vectors(keys.detach())
        self.new_keys.append(gather(keys))
        values = info_nce(queries, keys, self.queue.keys, self.options.temperature)
        return mean_over_batch(values), (queries, keys)

    def update(self, step: int) -> None:
        """Move the key network, and fill the queue."""
        follow(self.key_model, self.model, self.momentum)
        follow(self.key_projector, self.projector, self.momentum)
        for number, keys in enumerate(self.new_keys):
            self.queue.push(keys, (step - 1) * self.pushed + number)
        self.new_keys = []


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Compute −log of exp(q·k⁺/T) over exp(q·k⁺/T) + Σ_j exp(q·k_j/T) for each query: [B].

    Args:
        queries: unit vectors, [B, D].
        keys: k⁺, [B, D].
        queue: k_j, [K, D].
        temperature: T.
    """
    with own_precision(queries):
        logits = queue_logits(queries, keys, queue, temperature)
        return logits.logsumexp(1) - logits[:, 0]


def queue_logits(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Compute q·k⁺/T and q·k_j/T of each query; arguments as for `info_nce`: [B, 1 + K]."""
    positive = (queries * keys).sum(1, keepdim=True)
    return torch.cat([positive, queries @ queue.to(queries.dtype).T], 1) / temperature
