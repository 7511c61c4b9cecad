"""Make a folder that can be published on the Hub."""

from pathlib import Path

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.common.files import check_output, new_output
from mlvicx_hf.encoders.loading import load_model, saved_class
from mlvicx_hf.models import modeling_mlvicx
from mlvicx_hf.models.hub_mlvicx import AUTO_MAP, IMAGE_PROCESSOR_AUTO_MAP


def export(source: str | Path, output: str | Path, *, with_expanders: bool = False, card: str | None = None) -> Path:
    """Write and return a folder to publish on the Hub, with weights, constants and code, whole or not at all.

    With this package imported, every Auto class loads the folder. Without it, transformers runs the code in the folder
    if asked to: `AutoModel.from_pretrained(folder, trust_remote_code=True)`. Only `AutoBackbone.from_pretrained` takes
    no folder but a name on the Hub. For a folder, write:

        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        backbone = type(AutoBackbone.from_config(config, trust_remote_code=True)).from_pretrained(folder)

    Args:
        source: folder or Hub name of a saved model of any class.
        output: new or empty folder.
        with_expanders: keep the expanders and the aggregation of a pretraining run, to go on with pretraining;
            otherwise only its encoder is exported.
        card: text of the model card, README.md.

    Raises:
        OSError: as `load_model`; or an output that is not empty.
        UserError: as `load_model`; or `with_expanders` for a model that has none.
    """
    output = check_output(Path(output))
    saved = saved_class(source)
    if with_expanders and saved is not modeling_mlvicx.MLVICXForPreTraining:
        raise UserError(f"{source}: a {saved.__name__} found; with_expanders expects a MLVICXForPreTraining")
    model, processor = load_model(source, saved if with_expanders else None)
    model.config.auto_map = dict(AUTO_MAP)
    processor.auto_map = dict(IMAGE_PROCESSOR_AUTO_MAP)
    with new_output(output) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
    return output
