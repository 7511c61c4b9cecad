"""PCRL (Zhou et al., ICCV 2021), in its authors' improved form: contrast, and restored crops of mixed features."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mlvicx_hf.common.arguments import option
from mlvicx_hf.common.streams import RandomStream, stream_generator
from mlvicx_hf.models.loss_mlvicx import own_precision
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel

from .base import Embeddings, LossOutput, Schedule, ViewSpecification
from .decoders import RestorationDecoder, squared_error
from .distortions import CutOut
from .momentum_contrast import ContrastOptions, MomentumContrast, queue_logits
from .parts import ProjectionHead, gather, mean_over_batch, unit_vectors

CODE_SIZE, GATE_SIZE = 6, 256  # numbers that tell flips and quarter turns; width inside the gate
NOISE_EPSILON = 1e-5


@dataclass(frozen=True)
class PCRLv1Options(ContrastOptions):
    """Options of PCRL."""

    reference_batch: int = option("Batch for which key_momentum is meant.", 64, above=0)
    contrast: str = option(
        "InfoNCE as in the paper, or the noise contrast (NCE) of the authors' code, with a constant Z.",
        "info_nce",
        choices=("info_nce", "nce"),
    )


class PCRLv1Objective(MomentumContrast):
    """⅓ of three contrasts plus ¼ of four errors of restored images.

    Contrasts: query and key; query and key of images mixed with others of the batch; that query and the mixture of the
    keys. Errors: the turned view from the query's maps, whose last one is gated by the turns; the mixture of both
    turned views from the mixture of query's and key's maps; and for mixed images, without gates, their mixed crops
    likewise.
    """

    options_class = PCRLv1Options
    inexact_accumulation = "it mixes the images of a batch, which micro-batches would keep apart"
    pushed = 3

    def __init__(self, model: MLVICXModel, options: PCRLv1Options) -> None:
        size = options.projection_size
        super().__init__(model, options, ProjectionHead([model.pooled_features, size, size], norm=False))
        self.decoder = RestorationDecoder(model.channels)
        self.restoration = nn.Conv2d(self.decoder.widths[-1], 1, 3, padding=1)
        self.gate = nn.Sequential(
            nn.Linear(CODE_SIZE, GATE_SIZE),
            nn.ReLU(inplace=True),
            nn.Linear(GATE_SIZE, model.channels[-1]),
            nn.Sigmoid(),
        )
        self.seed, self.batches, self.step = 0, 1, 0
        self.register_buffer("normaliser", torch.zeros(()))  # Z; 0 until the first step has found it
        self.normaliser: Tensor
        self.found_normaliser: Tensor | None = None

    @classmethod
    def views(cls, options: PCRLv1Options) -> ViewSpecification:
        """Views with cut-outs; these again, turned; and the upright crops."""
        extras = ("target_1", "target_2", "turned_1", "turned_2", "turns_1", "turns_2")
        return ViewSpecification(extras=extras, upright_targets=True, normalised_targets=True, distortion=CutOut())

    def prepare(self, schedule: Schedule) -> None:
        """As in the base class; the noise contrast also depends on the number of batches."""
        super().prepare(schedule)
        self.seed, self.batches = schedule.seed, schedule.batches

    def start_step(self, step: int) -> None:
        """The mixtures are drawn from seed and step."""
        self.step = step

    def shares(self) -> list[float]:
        """α₁, α₂ and λ of the step: max(β, 1−β) of a uniform β each."""
        draws = stream_generator(self.seed, self.step, RandomStream.STEP).random(3)
        return [float(max(draw, 1 - draw)) for draw in draws]

    def partners(self, count: int) -> Tensor:
        """A permutation π of the images of a process, which are mixed in pairs: [B], on the CPU."""
        generator = stream_generator(self.seed, self.step, RandomStream.STEP)
        generator.random(3)  # those of `shares`
        return torch.from_numpy(generator.permutation(count))

    def encode(self, view_1: Tensor, view_2: Tensor, *extras: Tensor) -> tuple[Embeddings, Embeddings]:
        """Queries and keys of images and of mixed images, and four errors of each image, [B, 4]."""
        target_1, target_2, turned_1, turned_2, turns_1, turns_2 = extras
        plain_share, mixed_share, image_share = self.shares()
        keys, key_maps = self.make_keys(view_2)
        queries, maps = self._query(view_1)
        maps, key_maps = self._gated(maps, turns_1), self._gated(key_maps, turns_2)
        errors = self._errors(maps, key_maps, turned_1, turned_2, plain_share)

        partner = self.partners(len(view_1)).to(view_1.device, non_blocking=True)
        view_1, view_2, target_1, target_2, mixture = (
            each[partner].lerp(each, image_share) for each in (view_1, view_2, target_1, target_2, keys)
        )
        mixed_keys, key_maps = self.make_keys(view_2)
        mixed_queries, maps = self._query(view_1)
        errors += self._errors(maps, key_maps, target_1, target_2, mixed_share)
        one = {"queries": queries, "mixed_queries": mixed_queries, "errors": torch.cat(errors, 1)}
        return one, {"keys": keys, "mixed_keys": mixed_keys, "mixtures": mixture}

    def _query(self, view: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        maps = self.model.refined_maps(view)
        return self.projector(self.model.pool(maps)), maps

    def _gated(self, maps: Sequence[Tensor], turns: Tensor) -> list[Tensor]:
        """Multiply each channel of the last map by a gate, which follows from the turns [B, 6]."""
        return [*maps[:-1], maps[-1] * self.gate(turns)[:, :, None, None]]

    def _errors(
        self, maps: Sequence[Tensor], key_maps: Sequence[Tensor], target: Tensor, other: Tensor, share: float
    ) -> list[Tensor]:
        """Errors of the target restored from the query's maps, and of its mixture from mixed maps; [B, 1] each."""
        mixed = [key.lerp(query, share) for query, key in zip(maps, key_maps, strict=True)]
        size = target.shape[2:]
        restored, restored_mixture = (self.restoration(self.decoder(each, size)[-1]) for each in (maps, mixed))
        return [squared_error(restored, target), squared_error(restored_mixture, other.lerp(target, share))]

    def loss(self, embeddings_1: Embeddings, embeddings_2: Embeddings) -> LossOutput:
        """The loss of the global batch."""
        one, two = embeddings_1, embeddings_2
        pairs = [
            (unit_vectors(one[query]), unit_vectors(two[key].detach()))
            for query, key in (("queries", "keys"), ("mixed_queries", "mixed_keys"), ("mixed_queries", "mixtures"))
        ]
        if self.options.contrast == "nce":
            contrast = self._noise_contrast(pairs)
        else:
            contrast = torch.stack([self.contrastive_loss(*pair)[0] for pair in pairs]).mean()
        error = mean_over_batch(one["errors"])
        terms = {"contrastive_loss": contrast, "restoration_loss": error}
        return LossOutput(contrast + error, terms, {"queries": pairs[0]})

    def _noise_contrast(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean NCE of three pairs of unit vectors; the first step's first pair gives Z for good."""
        temperature, queue = self.options.temperature, self.queue.keys
        with own_precision(queue):
            values = [noise_values(*pair, queue, temperature) for pair in pairs]
            first = mean_over_batch(values[0]).detach() * self.batches
            self.found_normaliser = normaliser = torch.where(self.normaliser == 0, first, self.normaliser)
            losses = [noise_contrast(each / normaliser, 1 / self.batches) for each in values]
        self.new_keys += [gather(keys) for _, keys in pairs]
        return torch.stack([mean_over_batch(each) for each in losses]).mean()

    def update(self, step: int) -> None:
        """As in the base class, and keep Z."""
        super().update(step)
        if self.found_normaliser is not None:
            self.normaliser.copy_(self.found_normaliser)


def noise_values(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """exp(q·k/T) of each query with its key, then with the queue: [B, 1 + K]."""
    return queue_logits(queries, keys, queue, temperature).exp()


def noise_contrast(probabilities: Tensor, noise: float) -> Tensor:
    """−log P⁺/(P⁺ + Kp + ε) − Σ_j log Kp/(P_j + Kp + ε) of each query: [B].

    Args:
        probabilities: P⁺, then P_j of the K keys of the queue, [B, 1 + K].
        noise: p.
    """
    expected = (probabilities.shape[1] - 1) * noise
    total = probabilities + expected + NOISE_EPSILON
    positive = (probabilities[:, 0] / total[:, 0]).log()
    return -(positive + (expected / total[:, 1:]).log().sum(1))
