"""What a run watches besides its loss: effective rank and spread of every embedding and level, and probes.

The loss of a run that collapses may go on falling. `Watcher` measures what shows the collapse, and names its place and
a remedy.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from mlvicx_hf.encoders.features import evaluating
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.objectives import Objective
from mlvicx_hf.objectives.base import EmbeddingPairs
from mlvicx_hf.scoring.embeddings import describe_embeddings

from .probe import Probe

# Warn below these limits. Each stands beside what healthy runs kept; test_collapse.py runs both kinds.
LOW_DEVIATION = 0.1  # of embeddings, over the objective's target; healthy: 0.2 and more
LOW_RANK = 2.0  # RankMe of embeddings; healthy: 4.1 and more of 32. In batches of less than 34 images the limit is
LOW_RANK_SHARE = 0.03  # of the way from 1 to min(N, D)
LOW_LEVEL_DEVIATION = 0.01  # of a level, over its start; healthy: 0.3 and more
LOW_LEVEL_RANK = 1.2  # of a level, RankMe itself; healthy: 5 and more
RECOVERED = 2.0  # a figure above so many times its limit is well again, and its next fall warns anew
START = 20  # first measurements of a level, whose median is its start, once there are START_AT_LEAST
START_AT_LEAST = 3
MAX_IMAGES = 64  # of a batch that go through the encoder once more for the figures of the levels


class Rule(NamedTuple):
    """A figure, the limit below which it means collapse, and the warning for that case."""

    name: str
    figure: float
    limit: float
    warning: str


class Watcher:
    """Measures a model while it is pretrained, and changes nothing of it: not its mode, statistics or random state.

    Args:
        objective: as created, not the wrapper of a distributed run.
        processor: of the run.
        probe_dataset: labelled cache for the probes; None for none.
        probe_steps: steps between probes.
        device: of the model.

    Raises:
        FileNotFoundError: there is no such cache.
        UserError: a cache without usable labels.
    """

    def __init__(
        self,
        objective: Objective,
        processor: MLVICXImageProcessor,
        probe_dataset: str | Path | None = None,
        probe_steps: int = 1000,
        device: torch.device | str = "cpu",
    ) -> None:
        self.objective, self.encoder, self.device = objective, objective.encoder, device
        self.probe_steps = probe_steps
        self._probe = None if probe_dataset is None else Probe(probe_dataset, processor)
        self._starts: dict[str, list[float]] = {}  # first deviations of the levels
        self._warned: set[str] = set()

    def resume(self, metrics: Path) -> None:
        """Remember how the levels of an interrupted run started, from its `metrics.jsonl`."""
        for line in metrics.read_text().splitlines():
            self._remember(json.loads(line))

    def scalars(self, embeddings: EmbeddingPairs, view: Tensor) -> dict[str, float]:
        """RankMe, mean standard deviation and mean correlation of the first view's embeddings and of every level.

        The levels' figures are those of their spatial means in evaluation mode, centred for RankMe. For these, some
        images of `view`, the first one [B, C, H, W], are encoded again.
        """
        found: dict[str, float] = {}
        for name, (first, _) in embeddings.items():
            found |= describe_embeddings(name, first.detach())
        with evaluating(self.encoder):
            maps = self.encoder.refined_maps(view[:MAX_IMAGES])
        for level, refined in enumerate(maps):
            found |= describe_embeddings(f"level_{level}", refined.mean((2, 3)), centre=True)
        return found

    def probe(self, step: int, last: bool = False) -> dict[str, float]:
        """Scores of the probes after a step, see `Probe`; empty when none is due. After the last step they are."""
        if self._probe is None or (step % self.probe_steps and not last):
            return {}
        return self._probe(self.encoder, self.device)

    def check(self, scalars: dict[str, float], embeddings: EmbeddingPairs) -> list[str]:
        """Warnings of collapse by what `scalars` gave: each once, and again only after its figure has been well."""
        warnings = []
        self._remember(scalars)
        for rule in (*self._embedding_rules(scalars, embeddings), *self._level_rules(scalars)):
            if rule.figure < rule.limit and rule.name not in self._warned:
                self._warned.add(rule.name)
                warnings.append(rule.warning)
            elif rule.figure > RECOVERED * rule.limit:
                self._warned.discard(rule.name)
        return warnings

    def _remember(self, scalars: dict[str, float]) -> None:
        for level in range(len(self.encoder.channels)):
            name = f"level_{level}_deviation"
            start = self._starts.setdefault(name, [])
            if name in scalars and len(start) < START:
                start.append(scalars[name])

    def _embedding_rules(self, scalars: dict[str, float], embeddings: EmbeddingPairs) -> Iterator[Rule]:
        target = self.objective.target_deviation
        remedy = f"Try {self.objective.remedy}a lower base_learning_rate or a longer warm-up (warmup_epochs)"
        for name, (first, _) in embeddings.items():
            if f"{name}_rankme" not in scalars:
                continue
            rank, deviation, full = scalars[f"{name}_rankme"], scalars[f"{name}_deviation"], min(first.shape)
            text = (
                f"{name} collapse to a point: their mean standard deviation is {deviation:.2g}, the target {target:g}."
            )
            yield Rule(f"{name}_deviation", deviation, LOW_DEVIATION * target, f"{text} {remedy}")
            limit = min(LOW_RANK - 1, LOW_RANK_SHARE * (full - 1))
            text = f"{name} collapse to few directions: RankMe is {rank:.2f} of at most {full}."
            yield Rule(f"{name}_rankme", rank - 1, limit, f"{text} {remedy}")

    def _level_rules(self, scalars: dict[str, float]) -> Iterator[Rule]:
        context = self.encoder.config.use_context
        for level in range(len(self.encoder.channels)):
            if f"level_{level}_rankme" not in scalars:
                continue
            rank, deviation = scalars[f"level_{level}_rankme"], scalars[f"level_{level}_deviation"]
            remedy = "Try a lower base_learning_rate or a longer warm-up (warmup_epochs)"
            if context:
                remedy += f", and look whether its context gate (mlvicx.context.{level}) has closed"
            past = self._starts[f"level_{level}_deviation"]
            start = median(past) if len(past) >= START_AT_LEAST else 0.0
            limit = max(LOW_LEVEL_DEVIATION * start, torch.finfo(torch.float32).tiny)
            text = f"level {level} of the encoder gives nearly the same for all images: the mean standard deviation of "
            text += f"its features is {deviation:.2g}, at the start {start:.2g}."
            yield Rule(f"level_{level}_deviation", deviation, limit, f"{text} {remedy}")
            text = f"level {level} of the encoder varies in one direction only: RankMe of its centred features is "
            yield Rule(f"level_{level}_rankme", rank, LOW_LEVEL_RANK, f"{text}{rank:.2f}. {remedy}")
