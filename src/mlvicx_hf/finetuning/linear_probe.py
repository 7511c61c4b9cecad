"""The frozen protocol: a linear layer on features that are computed once."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.utils.data import Dataset, StackDataset
from transformers import EvalPrediction, Trainer, TrainerState, TrainingArguments, get_scheduler
from transformers.trainer_utils import PredictionOutput

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.progress import progress_bar
from mlvicx_hf.data.reading.sampling import PatientBalancedSampler
from mlvicx_hf.encoders.external import ExternalEncoder
from mlvicx_hf.encoders.features import encode
from mlvicx_hf.models.loss_mlvicx import own_precision
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification, MLVICXModel

from .data import LabelledImages

# What a `ProbeTrainer` does not do: argument of the Trainer → the only value that it takes.
NOT_FOLLOWED: dict[str, Any] = {
    "gradient_accumulation_steps": 1, "max_steps": -1, "bf16": False, "fp16": False, "report_to": [],
    "eval_on_start": False,
}  # fmt: skip
PLATEAU = "reduce_lr_on_plateau"  # the only schedule that it does not follow either


class LinearProbe(nn.Module):
    """The linear layer of a classifier, trained on standardised features of its frozen encoder.

    Standardising with the mean and deviation of the training features makes one learning rate fit encoders of any
    scale, pretrained and random alike. It is an affine map before an affine map: `fold` moves it into the layer.

    Args:
        model: classifier whose linear layer is trained, in place.
        features: training features [N, C].
        encode: features are computed from `pixel_values` in every step instead of given.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, model: MLVICXForImageClassification, features: Tensor, encode: bool) -> None:
        super().__init__()
        model.freeze_backbone()
        self.classifier = model.classifier
        self.encoder = model.mlvicx if encode else None
        self.loss: Callable[[Tensor, Tensor], Tensor] = model.compute_loss
        deviation = features.std(0, correction=0)
        self.register_buffer("mean", features.mean(0))
        self.register_buffer("deviation", deviation.clamp(min=1e-3 * float(deviation.max()) + 1e-12))

    def forward(
        self, features: Tensor | None = None, pixel_values: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Logits [B, L], and the loss if labels are given, from features [B, C] or images."""
        if self.encoder is not None:
            features = self.encoder(pixel_values).pooler_output
        assert features is not None
        with own_precision(features):  # rounded to bfloat16, many scores would be equal
            logits = self.classifier((features.to(self.mean.dtype) - self.mean) / self.deviation)
        return {"logits": logits} if labels is None else {"loss": self.loss(logits, labels), "logits": logits}

    @torch.no_grad()
    def fold(self) -> None:
        """Make the linear layer work on plain features, with the same logits."""
        self.classifier.weight.div_(self.deviation)
        self.classifier.bias.sub_(self.classifier.weight @ self.mean)


class FeatureStore:
    """Features of images by encoder and image, so that the runs of a grid encode every image once.

    Those of all levels are kept, whichever are asked for: 4 kB an image with ResNet-18, in memory.
    """

    def __init__(self) -> None:
        self.encoders: dict[str, dict[str, Tensor]] = {}

    def encode(
        self, encoder: MLVICXModel, images: LabelledImages, batch_size: int, device: torch.device
    ) -> dict[str, Tensor]:
        """Encode images as `encoders.features.encode` does, but each of them once.

        Args:
            encoder: on that device.
            images: of one split of a cache.
            batch_size: images encoded at a time.
            device: of the encoder.
        """
        known = self.encoders.setdefault(f"{_hash_of(encoder)} {images.key}", {})
        lacking = [row for row, name in enumerate(images.names) if name not in known]
        if lacking:
            found = encode(encoder, images.rows(lacking), batch_size, device, levels="all")["features"]
            known.update(zip((images.names[row] for row in lacking), found, strict=True))
        features = torch.stack([known[name] for name in images.names])
        if encoder.config.pooled_levels == "last":
            features = features[:, -encoder.channels[-1] :].contiguous()
        return {"features": features, "labels": images.labels}


def _hash_of(encoder: MLVICXModel) -> str:
    """Of weights and of what is done with them."""
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    config = encoder.config
    # One entry, because the order of several would vary from call to call.
    source = encoder.source if isinstance(encoder, ExternalEncoder) else None
    use = {"use": f"{source}, {config.backbone}, {float(config.context_gain)}, {config.context_placement}"}
    return hashlib.sha256(safetensors.torch.save(tensors, use)).hexdigest()


def prepare_probe(
    model: MLVICXForImageClassification,
    training: Dataset[Any],
    cache_features: bool,
    batch_size: int,
    device: torch.device,
    store: FeatureStore | None = None,
) -> tuple[LinearProbe, Callable[[Dataset[Any]], Dataset[Any]]]:
    """The probe of the frozen protocol, and what it takes: features computed once, or the images themselves.

    Args:
        model: classifier whose linear layer is trained, in place.
        training: images whose features give the scale.
        cache_features: whether the features are computed once.
        batch_size: images encoded at a time.
        device: on which they are encoded.
        store: of features that other runs have computed or will want.

    Returns:
        The probe, and a function that makes of the images of any split what the probe takes.
    """
    encoder = model.mlvicx
    nn.Module.to(encoder, device)
    how: Callable[..., dict[str, Tensor]] = encode if store is None else store.encode
    scale = how(encoder, training, batch_size, device)
    probe = LinearProbe(model, scale["features"], encode=not cache_features)

    def prepare(images: Dataset[Any]) -> Dataset[Any]:
        if not cache_features:
            return images
        columns = scale if images is training else how(encoder, images, batch_size, device)
        return StackDataset(**columns)  # type: ignore[arg-type]  # it takes tensors, too

    return probe, prepare


def order_seed(settings: TrainingArguments) -> int:
    """Seed of the order of images: `data_seed` if the user gives one."""
    return settings.seed if settings.data_seed is None else settings.data_seed


def make_optimizer(
    settings: TrainingArguments, groups: Sequence[dict[str, Any]], total: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimiser and schedule of the Trainer for groups of weights and this number of steps.

    Raises:
        UserError: arguments that they refuse.
    """
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(settings)
        optimizer = kind(groups, **options)
        scheduler = get_scheduler(
            settings.lr_scheduler_type,
            optimizer,
            settings.get_warmup_steps(total),
            total,
            scheduler_specific_kwargs=settings.lr_scheduler_kwargs,  # type: ignore[arg-type]  # parsed, no text any more
        )
    except (ImportError, TypeError, ValueError) as error:
        given = settings.to_dict()
        found = ", ".join(f"{name}={given[name]}" for name in ("optim", "lr_scheduler_type", "lr_scheduler_kwargs"))
        raise UserError(f"{found} found, which do not fit: {error}") from error
    return optimizer, scheduler


class ProbeTrainer:
    """`train_with_trainer` for a probe on features in memory, without what a step of the Trainer costs.

    Optimiser, schedule, batches and their order, clipping and early stopping are the Trainer's.
    The arguments are those of `train_with_trainer`; the probe and the splits come from `prepare_probe`.

    Raises:
        UserError: arguments that it does not follow.
    """

    def __init__(
        self,
        probe: LinearProbe,
        splits: Mapping[str, Dataset[Any]],
        settings: TrainingArguments,
        patience: int,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]],
        patients: Sequence[str] | None = None,
    ) -> None:
        for name, expected in NOT_FOLLOWED.items():
            found = getattr(settings, name, expected)  # transformers of another version may lack one
            if found != expected:
                raise UserError(f"{name}={found} found with fast_probe; expected {expected}")
        if settings.lr_scheduler_type == PLATEAU:
            raise UserError(f"lr_scheduler_type={PLATEAU} found with fast_probe; expected another schedule")
        self.probe, self.splits, self.settings, self.patience = probe, splits, settings, patience
        self.compute_metrics, self.patients = compute_metrics, patients
        self.state = TrainerState()

    def train(self) -> ProbeTrainer:
        """Train, and restore the best epoch."""
        settings = self.settings
        features, labels = self._tensors(self.splits["train"])
        total = math.ceil(settings.num_train_epochs * -(-len(labels) // settings.train_batch_size))
        self.probe.to(self.settings.device)
        layer = self.probe.classifier
        decayed = {"params": [layer.weight], "weight_decay": settings.weight_decay}
        optimizer, scheduler = make_optimizer(settings, [decayed, {"params": [layer.bias], "weight_decay": 0.0}], total)
        best: dict[str, Tensor] = {}
        with progress_bar(math.ceil(settings.num_train_epochs), "training", "epoch") as bar:
            for epoch, order in enumerate(self._orders(len(labels))):
                for rows in order.split(settings.train_batch_size)[: total - self.state.global_step]:
                    self._step(features[rows], labels[rows], optimizer)
                    scheduler.step()
                    self.state.global_step += 1
                if self._is_best(epoch + 1):
                    best = {name: value.clone() for name, value in self.probe.state_dict().items()}
                bar.update()
                if epoch + 1 - self._best_epoch >= self.patience or self.state.global_step == total:
                    break
        self.probe.load_state_dict(best)
        return self

    def predict(self, images: Dataset[Any]) -> PredictionOutput:
        """Logits and labels of features in memory."""
        features, labels = self._tensors(images)
        self.probe.eval()
        with torch.no_grad():
            logits = self.probe(features)["logits"]
        self.probe.train()
        return PredictionOutput(logits.cpu().numpy(), labels.cpu().numpy(), {})

    def is_world_process_zero(self) -> bool:
        """Whether this process writes the results."""
        return self.settings.process_index == 0

    def _tensors(self, images: Any) -> tuple[Tensor, Tensor]:
        features, labels = images.datasets["features"], images.datasets["labels"]
        return features.to(self.settings.device), labels.to(self.settings.device)

    def _orders(self, images: int) -> Iterator[Tensor]:
        """Rows of every epoch, in the Trainer's order."""
        sampler: Any
        seed = order_seed(self.settings)
        if self.patients is None:
            sampler = SeedableRandomSampler(range(images), generator=torch.Generator(), data_seed=seed)
        else:
            sampler = PatientBalancedSampler(self.patients, seed)
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            yield torch.tensor(list(sampler))

    def _step(self, features: Tensor, labels: Tensor, optimizer: torch.optim.Optimizer) -> None:
        self.probe(features, labels=labels)["loss"].backward()
        if self.settings.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.probe.classifier.parameters(), self.settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def _is_best(self, epoch: int) -> bool:
        """Score the validation split after an epoch; whether no epoch before was as good."""
        done = self.predict(self.splits["validation"])
        metric = str(self.settings.metric_for_best_model)
        score = self.compute_metrics(EvalPrediction(done.predictions, done.label_ids))[metric]  # type: ignore[arg-type]  # arrays, here
        self.state.epoch = float(epoch)
        self.state.log_history.append({"step": self.state.global_step, "epoch": float(epoch), f"eval_{metric}": score})
        better = self.state.best_metric is None or score > self.state.best_metric
        if better:
            self.state.best_metric, self.state.best_global_step, self._best_epoch = score, self.state.global_step, epoch
        return better
