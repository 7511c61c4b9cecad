"""Load a saved model for inference, and record where it came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import sha256
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXForImageClassification, MLVICXForSemanticSegmentation, MLVICXModel

from .loading import check_source, load_model, looking_for, saved_class

WEIGHTS = "model*.safetensors"  # one file, or shards
FILES = ["*.json", WEIGHTS]  # of a repository; no code


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, and where it came from."""

    source: str  # folder or Hub name
    revision: str | None  # commit on the Hub; None for a folder
    model: Any  # in float32; a model without a head is a `MLVICXModel`
    processor: MLVICXImageProcessor
    weights: dict[str, str]  # SHA-256 hash of every weights file, by name
    labels: list[str]  # names of the head's outputs, in their order

    def describe(self) -> dict[str, Any]:
        """Where it came from, for a result file."""
        return {"model": self.source, "revision": self.revision, "weights_sha256": self.weights}


def load(
    source: str,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    expected: type[Any] | None = None,
) -> LoadedModel:
    """Load a saved model with the installed classes; never run the code in its repository.

    Args:
        source: folder or Hub name.
        revision: branch, tag or commit on the Hub.
        device: of the model.
        expected: class that the model must have; None for any.

    Raises:
        UserError: a model of another type or class, weights that do not fit the configuration, or labels that repeat.
        OSError: files that are absent, damaged or not reachable.
    """
    folder = _folder(check_source(source), revision)
    saved = saved_class(folder)
    headless = saved not in (MLVICXForImageClassification, MLVICXForSemanticSegmentation)
    loaded: Any = load_model(folder, MLVICXModel if headless else saved)
    model, processor = loaded
    if expected is not None and not isinstance(model, expected):
        raise UserError(f"{source}: {type(model).__name__} found; expected a {expected.__name__}")
    labels = [] if headless else [model.config.id2label[i] for i in range(model.num_labels)]
    if len(set(labels)) < len(labels):
        raise UserError(f"{source}: labels {', '.join(labels)} found; expected each name once")
    weights = weights_of(folder)
    commit = None if Path(source).is_dir() else folder.name
    return LoadedModel(source, commit, model.to(device, torch.float32).eval(), processor, weights, labels)


def weights_of(place: Path) -> dict[str, str]:
    """SHA-256 of every weights file of a model's folder, or of a file of weights, by name; of anything else, none."""
    files = sorted(place.glob(WEIGHTS)) if place.is_dir() else filter(Path.is_file, [place])
    return {file.name: sha256(file) for file in files}


def _folder(source: str, revision: str | None) -> Path:
    """Find the folder of a model's files: its own, or that of one commit in the Hub's cache."""
    if not Path(source).is_dir():
        with looking_for(source):
            return Path(snapshot_download(source, revision=revision, allow_patterns=FILES, ignore_patterns="*/*"))
    if revision is not None:
        raise UserError(f"revision={revision!r} of the folder {source} found; only models on the Hub have revisions")
    if not any(Path(source).glob(WEIGHTS)):
        raise FileNotFoundError(f"{source} holds no {WEIGHTS}; expected the weights of a saved model")
    return Path(source)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """On GPUs, compute convolutions in full float32 and with the same bits each time.

    `torch.backends.cudnn.flags` alone fails in a program that has set the newer `fp32_precision` of cuDNN.
    """
    cudnn = torch.backends.cudnn
    convolutions = getattr(cudnn, "conv", None)
    if convolutions is None:  # before torch 2.9
        with cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
            yield
        return
    before = (cudnn.deterministic, cudnn.benchmark, convolutions.fp32_precision)
    cudnn.deterministic, cudnn.benchmark, convolutions.fp32_precision = True, False, "ieee"
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, convolutions.fp32_precision = before


def infer(loaded: LoadedModel, pixels: Tensor, embed: bool) -> tuple[Tensor, Tensor]:
    """Run one forward pass in float32.

    Args:
        loaded: the model.
        pixels: [R, C, S, S].
        embed: compute embeddings, too.

    Returns:
        Logits [R, …] of the head, and embeddings [R, C] on the CPU; an empty tensor [R, 0] instead of missing ones.

    Raises:
        FloatingPointError: results that are not finite.
    """
    nothing = torch.empty(len(pixels), 0)
    with torch.inference_mode(), exact_convolutions():
        output = loaded.model(pixels.to(loaded.model.device), output_hidden_states=embed)
        logits = nothing if isinstance(loaded.model, MLVICXModel) else output.logits
        # the encoder's `pooler_output`, which the heads do not return
        embeddings = loaded.model.base_model.pool(output.hidden_states).cpu() if embed else nothing
    if not (logits.isfinite().all() and embeddings.isfinite().all()):
        raise FloatingPointError(f"{loaded.source} gives values that are not finite; expected a trained model")
    return logits, embeddings
