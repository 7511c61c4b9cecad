"""Models by the name or folder that a user gives, and folders to publish."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import check_output, new_folder, sha256
from mlvicx_hf.encoders.loading import load_model, saved_class
from mlvicx_hf.models import modeling_mlvicx
from mlvicx_hf.models.integrity_mlvicx import SUMS

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
        raise UserError(f"{source}: a {saved.__name__} found; with_expanders expects a MLVICXForPreTraining")
    model, processor = load_model(source, saved if with_expanders else None)
    model.config.auto_map = dict(AUTO_MAP)
    processor.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)  # type: ignore[attr-defined]  # transformers reads it, undeclared
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        for name in CODE:
            shutil.copyfile(Path(modeling_mlvicx.__file__).parent / name, folder / name)
        write_sums(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return output


def write_sums(folder: Path) -> None:
    """Write the SHA-256 hashes of a folder's files, for `sha256sum --check` and `integrity_mlvicx.check_weights`."""
    files = sorted(file for file in folder.iterdir() if file.name not in (SUMS, "README.md"))
    (folder / SUMS).write_text("".join(f"{sha256(file)}  {file.name}\n" for file in files), encoding="utf-8")
