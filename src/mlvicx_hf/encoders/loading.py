"""Load models by the name or folder that a user gives."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.utils import validate_repo_id
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, cached_file

from mlvicx_hf.common.errors import UserError, user_input
from mlvicx_hf.models import modeling_mlvicx
from mlvicx_hf.models.configuration_mlvicx import MLVICXConfig
from mlvicx_hf.models.image_processing_mlvicx import MLVICXImageProcessor
from mlvicx_hf.models.modeling_mlvicx import MLVICXModel, MLVICXPreTrainedModel


def check_source(source: str) -> str:
    """Return a source, but refuse a path without a model, which the Hub client would take for a repository's name.

    Raises:
        FileNotFoundError: it looks like a path, and there is no model.
        UserError: it is a file, or no name that a repository can have.
    """
    path = Path(source)
    if path.is_file():
        raise UserError(f"{source}: a file found; expected the folder of a saved model")
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json; expected the folder of a saved model")
    if not path.exists():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1 or not source:
            raise FileNotFoundError(f"{source!r} found; expected a folder that exists, or a name on the Hub")
        with user_input():
            validate_repo_id(source)
    return source


@contextmanager
def looking_for(source: str | Path) -> Iterator[None]:
    """Name the source in an error that says no more than that a file or the Hub is not there."""
    try:
        yield
    except OSError as error:
        if Path(source).exists() or str(error).startswith(str(source)):
            raise
        raise OSError(f"{source}: not found here, nor on the Hub: {error}") from error


@contextmanager
def without_report() -> Iterator[None]:
    """Silence transformers' table of weights that are new, as those of a head always are: the caller looks itself."""
    logger = logging.getLogger("transformers.modeling_utils")

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    logger.addFilter(is_error)  # at a higher level, transformers 5.24 reports all layers as not sharded
    try:
        yield
    finally:
        logger.removeFilter(is_error)


def saved_class(source: str | Path) -> type[MLVICXPreTrainedModel]:
    """Find the class that a saved model's configuration names as its architecture.

    Raises:
        UserError: a model of another type, or a class of another package.
    """
    with looking_for(check_source(str(source))):
        values, _ = MLVICXConfig.get_config_dict(str(source))
    model_type = values.get("model_type")
    if model_type != MLVICXConfig.model_type:
        raise UserError(f"{source}: a model of type {model_type!r} found; expected {MLVICXConfig.model_type!r}")
    names = [name for name in modeling_mlvicx.__all__ if name != MLVICXPreTrainedModel.__name__]
    found = values.get("architectures") or []
    if len(found) != 1 or found[0] not in names:
        raise UserError(f"{source}: architectures={found} found; expected one of {', '.join(names)}")
    return getattr(modeling_mlvicx, found[0])


def load_model(
    source: str | Path, model_class: type[MLVICXPreTrainedModel] | None = None
) -> tuple[MLVICXPreTrainedModel, MLVICXImageProcessor]:
    """Load a whole saved model and its image processor.

    Args:
        source: folder or Hub name.
        model_class: by default the class that was saved; of a pretraining run, the encoder.

    Returns:
        The model, in evaluation mode and in the type of its weights, and the image processor.

    Raises:
        OSError: no model, damaged weights, or no image processor beside them.
        UserError: a model of another type, weights that are missing or left over, or an image processor that does not
            fit the model.
    """
    saved = saved_class(source)
    if model_class is None:
        model_class = MLVICXModel if saved is modeling_mlvicx.MLVICXForPreTraining else saved
    with user_input():  # a configuration that names no backbone, for one
        model, loading = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True)
    expected = f"expected all of a {model_class.__name__} with {len(model.config.id2label)} label(s)"
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise UserError(f"{source}: weight {name} of shape {tuple(found)} found, not {tuple(wanted)}; {expected}")
    missing, unknown = loading["missing_keys"], loading["unexpected_keys"]
    if missing:
        count = f"{len(missing)} of {len(model.state_dict())}"
        raise UserError(f"{source}: weights without {count} tensors found, such as {min(missing)}; {expected}")
    if unknown:
        raise UserError(f"{source}: weights with {len(unknown)} more tensors found, such as {min(unknown)}; {expected}")
    return model, load_image_processor(source, model.config)


def load_image_processor(source: str | Path, config: MLVICXConfig) -> MLVICXImageProcessor:
    """Load the image processor saved beside a model.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is of another class, or has other channels than the model.
    """
    if not Path(source).is_dir():
        with looking_for(source):
            cached_file(str(source), CONFIG_NAME)
    if cached_file(str(source), IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is None:
        raise FileNotFoundError(f"{source} holds no {IMAGE_PROCESSOR_NAME}; expected the model's image processor")
    values, _ = MLVICXImageProcessor.get_image_processor_dict(source)
    found = values.get("image_processor_type")
    if found != MLVICXImageProcessor.__name__:
        raise UserError(f"{source}: image processor {found} found; expected {MLVICXImageProcessor.__name__}")
    with user_input():
        processor = MLVICXImageProcessor.from_pretrained(source)
    if processor.num_channels != config.num_channels:
        raise UserError(
            f"{source}: image processor with num_channels={processor.num_channels} found; "
            f"expected {config.num_channels}, as the model's"
        )
    return processor
