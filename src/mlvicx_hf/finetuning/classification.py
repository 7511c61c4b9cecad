"""Classification on a prepared cache: a linear layer on the encoder, frozen or fine-tuned (section IV-B)."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, softmax
from torch import nn
from transformers import EvalPrediction, Trainer

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.text import some
from mlvicx_hf.data.cache.cache import Cache, load_cache
from mlvicx_hf.data.collections.base import SPLITS
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification
from mlvicx_hf.scoring.calibration import CALIBRATION_BINS, UNSURE, score_calibration
from mlvicx_hf.scoring.labels import (
    has_both_values,
    score_accuracy,
    score_decisions,
    score_labels,
    score_precision,
    youden_thresholds,
)

from .arguments import ClassificationArguments, ClassifierArguments, LabelledDataArguments
from .calibration import Calibration, calibrate
from .data import LabelledImages, check_splits, keep_known
from .heads import load_config, load_for_task
from .linear_probe import FeatureStore, LinearProbe, ProbeTrainer, prepare_probe
from .results import write_images
from .training import FinetuningTask, Split, train_with_trainer

logger = logging.getLogger(__name__)


def load_classifier(
    arguments: ClassifierArguments, cache: Cache
) -> tuple[MLVICXForImageClassification, MLVICXImageProcessor]:
    """Load a classifier for the labels of a cache, and its image processor.

    Raises:
        UserError: a model of another kind, or whose encoder lacks weights; a class with the name of an answer.
    """
    if cache.exclusive and UNSURE in cache.label_names:
        raise UserError(
            f"class {UNSURE!r} found in {cache.path}; expected another name: it is an answer of classifiers"
        )
    config = load_config(arguments)
    names = dict(enumerate(cache.label_names))
    config.id2label, config.label2id = names, {name: i for i, name in names.items()}
    config.problem_type = "single_label_classification" if cache.exclusive else "multi_label_classification"
    config.positive_weights = config.decision_thresholds = config.calibration = None
    config.pooled_levels = arguments.pooled_levels or config.pooled_levels
    if arguments.positive_weights == "balanced":
        if cache.exclusive:
            raise UserError(
                "positive_weights='balanced' found for exclusive classes; expected none, or several findings"
            )
        config.positive_weights = balanced_weights(np.array(cache.datasets["train"]["labels"], dtype=np.float64))
    return load_for_task(MLVICXForImageClassification, config, arguments, cache.square, arguments.image_size)


def balanced_weights(labels: np.ndarray) -> list[float]:
    """Negatives over positives of each label [N, L], without the unknown (NaN); 1 where either is missing."""
    positives, negatives = (labels == 1).sum(0), (labels == 0).sum(0)
    return [float(n / p) if n and p else 1.0 for p, n in zip(positives, negatives, strict=True)]


def load_labelled_cache(path: str, allow_leak: bool = False) -> Cache:
    """Open a cache to classify, without the images of which no label is known.

    Raises:
        UserError: no labels, a split that is missing, or a validation split on which nothing can be scored.
    """
    cache = load_cache(path)
    cache.require_labels()
    check_splits(cache, allow_leak)
    known = {split: cache.labelled(split) for split in cache.datasets}
    cache = keep_known(cache, known, "class" if cache.exclusive else "label")
    tables = {split: np.array(images["labels"], dtype=np.float64) for split, images in cache.datasets.items()}
    if not any(map(has_both_values, np.concatenate(list(tables.values())).T)):
        raise UserError(
            f"{path}: all images have the same value of {some(cache.label_names)} where it is known; expected images "
            "with and without a finding, or of two classes at least"
        )
    if not any(map(has_both_values, tables["validation"].T)):
        raise UserError(
            f"{path}: no label has both values in the validation split, so no epoch can be chosen by it; "
            "expected more images (--max_images of `mlvicx prepare`?), or another --seed there"
        )
    return cache


@dataclass(frozen=True)
class Classified:
    """What a classifier said of the images of a split, and what is known of them."""

    logits: np.ndarray  # [N, L]
    labels: np.ndarray  # [N, L], 1, 0 or NaN; of exclusive classes the indices [N]
    names: Sequence[str]  # of the L labels
    exclusive: bool  # every image has exactly one of the labels
    calibration: Calibration | None = None  # that the scores are of; None as long as there is none

    @property
    def calibrated(self) -> np.ndarray:
        """Logits after calibration, [N, L] in float64."""
        return self.logits.astype(np.float64) if self.calibration is None else self.calibration.apply(self.logits)

    @property
    def probabilities(self) -> np.ndarray:
        """Probabilities after calibration, [N, L] in float64."""
        return softmax(self.calibrated, axis=1) if self.exclusive else expit(self.calibrated)

    @property
    def truth(self) -> np.ndarray:
        """Labels [N, L]: 1, 0 or NaN; exclusive classes are one-hot."""
        labels = self.labels.astype(np.float64)
        return np.eye(len(self.names))[labels.astype(int)] if self.exclusive else labels

    def scores(self, rows: Any = slice(None)) -> dict[str, Any]:
        """Score some of the images. Exclusive classes are scored one against the rest by their probability.

        Returns:
            `auroc_macro`, `auroc` by label, `num_scored_labels`, `auprc_macro`, `auprc` by label, `accuracy`.
        """
        scores, labels = (self.probabilities if self.exclusive else self.calibrated)[rows], self.truth[rows]
        found = score_labels(scores, labels, self.names) | score_precision(scores, labels, self.names)
        return found | score_accuracy(scores, labels, self.exclusive)

    def score_calibration(self) -> dict[str, Any]:
        """Score probabilities `before` and `after` calibration (`calibration`), and the answers (`answers`)."""
        assert self.calibration is not None
        both = {"before": replace(self, calibration=None), "after": self}
        found = {when: score_calibration(each.probabilities, self.truth, self.names) for when, each in both.items()}
        answers = self.calibration.score_answers(self.probabilities, self.truth, self.names)
        return {"calibration": {"bins": CALIBRATION_BINS} | found, "answers": answers}


class Classification(FinetuningTask):
    """Train a classifier. `store` holds features of a frozen encoder that several runs share.

    Raises:
        UserError: arguments that do not fit one another.
    """

    name = "classification"
    keeps_norms = True
    encoder: ClassifierArguments
    calibration: Calibration | None = None  # until it is chosen

    def __init__(
        self,
        encoder: ClassifierArguments,
        data: LabelledDataArguments,
        arguments: ClassificationArguments,
        store: FeatureStore | None = None,
    ) -> None:
        super().__init__(encoder, data, arguments)
        if not 0.5 < encoder.band_level < 1:
            raise UserError(f"band_level={encoder.band_level} found; expected a number above 0.5 and below 1")
        if encoder.fast_probe and not (encoder.freeze_backbone and encoder.cache_features):
            raise UserError("fast_probe found; expected freeze_backbone as well, with cache_features")
        if data.augment and encoder.freeze_backbone and encoder.cache_features:
            raise UserError("augment found with features that are computed once; expected cache_features=false as well")
        self.learning_rate = 1e-3 if encoder.freeze_backbone else 3e-4
        self.store = store

    def _load_cache(self) -> Cache:
        return load_labelled_cache(self.data.dataset, self.data.allow_leak)

    def _check_training(self) -> None:
        """Say which labels a split has with one value alone; refuse to train if that are all labels of train."""
        for split in SPLITS:
            table = np.array(self.cache.datasets[split]["labels"], dtype=np.float64)
            names = [
                name for name, label in zip(self.cache.label_names, table.T, strict=True) if not has_both_values(label)
            ]
            if split == "train" and len(names) == len(self.cache.label_names):
                raise UserError(
                    f"{self.data.dataset}: no label has both values in the {len(table)} training images that were "
                    "chosen; expected more of them: a larger label_fraction, or another seed"
                )
            if names:
                what = "no classifier can learn them" if split == "train" else "they get no score there"
                logger.warning("labels with a single value in %s, so %s: %s", split, what, some(names, 30))

    def _load_model(self) -> tuple[MLVICXForImageClassification, MLVICXImageProcessor]:
        return load_classifier(self.encoder, self.cache)

    def _images(self, split: str) -> LabelledImages:
        cache, augment = self.cache, self._augments and split == "train"
        return LabelledImages(cache.datasets[split], self.processor, cache.exclusive, cache.digest, augment)

    def _prepare(self, training: Split) -> tuple[nn.Module, Callable[[Split], Split]]:
        if not self.encoder.freeze_backbone:
            if self._freezes_batch_norm:
                self.model.freeze_batch_norm()
            return self.model, lambda images: images
        batch_size, device = self.settings.per_device_eval_batch_size, self.settings.device
        return prepare_probe(self.model, training, self.encoder.cache_features, batch_size, device, self.store)

    @property
    def _augments(self) -> bool:
        """By default, but features of a frozen encoder are usually computed once."""
        return not self.encoder.freeze_backbone if self.data.augment is None else self.data.augment

    def _train(
        self, trained: nn.Module, splits: Mapping[str, Split], patients: Sequence[str] | None
    ) -> Trainer | ProbeTrainer:
        how = (splits, self.settings, self.arguments.patience, self._scalars, patients)
        if isinstance(trained, LinearProbe) and self.encoder.fast_probe:
            return ProbeTrainer(trained, *how).train()
        return train_with_trainer(trained, *how)

    def _scalars(self, prediction: EvalPrediction) -> dict[str, float]:
        scores = self._outcome(prediction).scores()
        return {name: value for name, value in scores.items() if isinstance(value, (int, float))}

    def _outcome(self, found: Any) -> Classified:
        logits, labels = np.asarray(found.predictions), np.asarray(found.label_ids)
        if not np.isfinite(logits).all():
            raise FloatingPointError("logits that are not finite found; expected a lower learning_rate, or no fp16")
        return Classified(logits, labels, self.cache.label_names, self.cache.exclusive, self.calibration)

    def _evaluate(self, trainer: Trainer | ProbeTrainer, images: Split) -> Classified:
        return self._outcome(trainer.predict(images))

    def _choose(self, validation: Classified) -> dict[str, Any]:
        """Calibrate, and choose decision thresholds of the calibrated probabilities; exclusive classes have none."""
        hashes = {name: self.cache.manifest[name] for name in ("split_hash", "data_hash")}
        names, config = self.cache.label_names, self.model.config
        self.calibration = calibrate(validation.logits, validation.labels, names, self.encoder.band_level, hashes)
        config.calibration = self.calibration.record
        if not self.cache.exclusive:
            probabilities = replace(validation, calibration=self.calibration).probabilities
            thresholds = youden_thresholds(probabilities, validation.labels, names)
            config.decision_thresholds = {"values": thresholds, "criterion": "youden", "split": "validation"} | hashes
        calibration = self.calibration.record | {"not_fitted": self.calibration.not_fitted}
        return {"thresholds": config.decision_thresholds, "calibration": calibration}

    def _complete(self, trained: nn.Module) -> None:
        super()._complete(trained)
        assert self.calibration is not None
        self.calibration.fold(self.model.classifier)

    def _results(self, validation: Classified, test: Classified) -> dict[str, Any]:
        thresholds, scores = self.model.config.decision_thresholds, test.scores() | test.score_calibration()
        if thresholds is not None:
            scores["decisions"] = score_decisions(test.probabilities, test.labels, thresholds["values"])
        return {
            "labels": list(self.cache.label_names),
            "validation": replace(validation, calibration=self.calibration).scores(),
            "test": scores,
            "hyperparameters": {
                "positive_weights": self.encoder.positive_weights,
                "cache_features": self.encoder.freeze_backbone and self.encoder.cache_features,
                "fast_probe": self.encoder.fast_probe,
                "pooled_levels": self.model.config.pooled_levels,
                "image_size": self.processor.image_size,
            },
        }

    def _write_test(self, folder: Path, test: Classified) -> None:
        write_predictions(folder / "test_predictions.csv", self.cache, test.probabilities)


def write_predictions(path: Path, cache: Cache, probabilities: np.ndarray) -> None:
    """Write one row a test image: who and what it is, and of every label its truth and its probability."""
    test = cache.datasets["test"]
    columns = [f"{kind}:{name}" for kind in ("label", "probability") for name in cache.label_names]
    rows = (
        [*("" if math.isnan(label) else int(label) for label in labels), *(f"{value:.10g}" for value in row)]
        for labels, row in zip(test["labels"], probabilities.tolist(), strict=True)
    )
    write_images(path, test, columns, rows)


def finetune_classifier(
    encoder: ClassifierArguments,
    data: LabelledDataArguments,
    arguments: ClassificationArguments,
    store: FeatureStore | None = None,
) -> dict[str, Any]:
    """Train a classifier and test it once: see `Classification`."""
    return Classification(encoder, data, arguments, store).finetune()
