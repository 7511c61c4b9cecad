"""Models by the name or folder that a user gives, and folders to publish."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers.utils import IMAGE_PROCESSOR_NAME, cached_file

from . import modeling_mlvicx
from .configuration_mlvicx import MLVICXConfig
from .image_processing_mlvicx import MLVICXImageProcessor
from .integrity_mlvicx import SUMS, sha256
from .modeling_mlvicx import MLVICXModel, MLVICXPreTrainedModel
from .provenance import new_folder

# What transformers loads from a folder of an installation without this package, see `export`.
AUTO_MAP = {
    "AutoConfig": "configuration_mlvicx.MLVICXConfig",
    "AutoModel": "modeling_mlvicx.MLVICXModel",
    "AutoModelForPreTraining": "modeling_mlvicx.MLVICXForPreTraining",
    "AutoModelForImageClassification": "modeling_mlvicx.MLVICXForImageClassification",
    "AutoModelForSemanticSegmentation": "modeling_mlvicx.MLVICXForSemanticSegmentation",
    "AutoBackbone": "modeling_mlvicx.MLVICXBackbone",
}
# By backend: from a plain name, pipelines guess that of a video processor and ask the user whether to trust its code.
IMAGE_PROCESSOR_AUTO_MAP = {"AutoImageProcessor": {"torchvision": "image_processing_mlvicx.MLVICXImageProcessor"}}
CODE = tuple(f"{name}_mlvicx.py" for name in ("configuration", "image_processing", "integrity", "loss", "modeling"))


def check_source(source: str) -> str:
    """Refuse a path that does not exist before the Hub client takes it for the name of a repository.

    Args:
        source: folder or Hub name ("name" or "organisation/name").

    Returns:
        The source.

    Raises:
        FileNotFoundError: a path, by its looks, at which there is no model.
    """
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{source} holds no config.json; expected the folder of a saved model")
    if not path.exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1 or not source):
        raise FileNotFoundError(f"{source!r} found; expected a folder that exists, or a name on the Hub")
    return source


def check_output(output: Path) -> Path:
    """Refuse to write over something.

    Raises:
        FileExistsError: a file, or a folder with something in it.
    """
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise FileExistsError(f"{output} is there already; expected a new or an empty folder")
    return output


def saved_class(source: str | Path) -> type[MLVICXPreTrainedModel]:
    """The class that a saved model's configuration names as its architecture.

    Raises:
        ValueError: a model of another type, or a class that is not of this package.
    """
    values, _ = MLVICXConfig.get_config_dict(check_source(str(source)))
    model_type = values.get("model_type")
    if model_type != MLVICXConfig.model_type:
        raise ValueError(f"{source}: a model of type {model_type!r} found; expected {MLVICXConfig.model_type!r}")
    names = [reference.rpartition(".")[2] for key, reference in AUTO_MAP.items() if key != "AutoConfig"]
    found = values.get("architectures") or []
    if len(found) != 1 or found[0] not in names:
        raise ValueError(f"{source}: architectures={found} found; expected one of {', '.join(names)}")
    return getattr(modeling_mlvicx, found[0])


def load_model(
    source: str | Path, model_class: type[MLVICXPreTrainedModel] | None = None
) -> tuple[MLVICXPreTrainedModel, MLVICXImageProcessor]:
    """A saved model, whole, and its image processor.

    Args:
        source: folder or Hub name.
        model_class: by default the class that was saved, but the encoder of a pretraining run.

    Returns:
        The model in evaluation mode and the type of its weights, and the image processor.

    Raises:
        OSError: no model, damaged weights, or no image processor beside them.
        ValueError: a model of another type, weights that lack some of the class's, or an image processor that does not
            fit the model.
    """
    saved = saved_class(source)
    if model_class is None:
        model_class = MLVICXModel if saved is modeling_mlvicx.MLVICXForPreTraining else saved
    model, loading = model_class.from_pretrained(source, output_loading_info=True, ignore_mismatched_sizes=True)
    expected = f"expected all of a {model_class.__name__} with {len(model.config.id2label)} label(s)"
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        raise ValueError(f"{source}: weight {name} of shape {tuple(found)} found, not {tuple(wanted)}; {expected}")
    missing, unknown = loading["missing_keys"], loading["unexpected_keys"]
    if missing:
        count = f"{len(missing)} of {len(model.state_dict())}"
        raise ValueError(f"{source}: weights without {count} tensors found, such as {min(missing)}; {expected}")
    if unknown:
        raise ValueError(
            f"{source}: weights with {len(unknown)} more tensors found, such as {min(unknown)}; {expected}"
        )
    return model, load_image_processor(source, model.config)


def load_image_processor(source: str | Path, config: MLVICXConfig) -> MLVICXImageProcessor:
    """The image processor saved beside a model.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one of another class, or with other channels than the model.
    """
    if cached_file(str(source), IMAGE_PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False) is None:
        raise FileNotFoundError(f"{source} holds no {IMAGE_PROCESSOR_NAME}; expected the model's image processor")
    values, _ = MLVICXImageProcessor.get_image_processor_dict(source)
    found = values.get("image_processor_type")
    if found != MLVICXImageProcessor.__name__:
        raise ValueError(f"{source}: image processor {found} found; expected {MLVICXImageProcessor.__name__}")
    processor = MLVICXImageProcessor.from_pretrained(source)
    if processor.num_channels != config.num_channels:
        raise ValueError(
            f"{source}: image processor with num_channels={processor.num_channels} found; "
            f"expected {config.num_channels}, as the model's"
        )
    return processor


def export(source: str | Path, output: str | Path, *, with_expanders: bool = False, card: str | None = None) -> Path:
    """Write a folder to publish on the Hub: weights, constants, code, hashes; whole or not at all.

    With this package imported, the folder loads through every Auto class. Without it, transformers runs the code in the
    folder: `AutoModel.from_pretrained(folder, trust_remote_code=True)`, likewise AutoConfig, AutoImageProcessor,
    AutoModelForPreTraining, AutoModelForImageClassification and AutoModelForSemanticSegmentation.
    `AutoBackbone.from_pretrained` takes names on the Hub only. For a folder:

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        backbone = type(AutoBackbone.from_config(config, trust_remote_code=True)).from_pretrained(folder)

    Args:
        source: folder or Hub name of a saved model of any class.
        output: new or empty folder.
        with_expanders: keep the expanders and the aggregation of a pretraining run, to go on with pretraining; by
            default its encoder alone is exported.
        card: text of the README.md, the model card.

    Returns:
        The output folder.

    Raises:
        OSError: see `load_model`; an output that is not empty.
        ValueError: see `load_model`; `with_expanders` for a model that has none.
    """
    output = check_output(Path(output))
    saved = saved_class(source)
    if with_expanders and saved is not modeling_mlvicx.MLVICXForPreTraining:
        raise ValueError(f"{source}: a {saved.__name__} found; with_expanders expects a MLVICXForPreTraining")
    model, processor = load_model(source, saved if with_expanders else None)
    model.config.auto_map = dict(AUTO_MAP)
    processor.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)  # type: ignore[attr-defined]  # transformers reads it, undeclared
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name in CODE:
            shutil.copyfile(Path(__file__).parent / name, folder / name)
        write_sums(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return output


def write_sums(folder: Path) -> None:
    """Write the SHA-256 hashes of a folder's files, for `sha256sum --check` and `integrity_mlvicx.check_weights`."""
    files = sorted(file for file in folder.iterdir() if file.name not in (SUMS, "README.md"))
    (folder / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")
