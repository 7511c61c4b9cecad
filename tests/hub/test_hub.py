import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ROOT, run_code, run_python, tiny_config
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    AutoModelForSemanticSegmentation,
    ResNetConfig,
    pipeline,
)

from mlvicx_hf import (
    MLVICXBackbone,
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXImageProcessor,
    MLVICXModel,
    MLVICXPreTrainedModel,
)
from mlvicx_hf.common.errors import UserError
from mlvicx_hf.hub import folder as hub

CODE = {file.name for file in (ROOT / "src" / "mlvicx_hf" / "models").glob("*_mlvicx.py")}
FILES = {"config.json", "model.safetensors", "preprocessor_config.json", *CODE}
FINDINGS = {"id2label": {0: "Edema", 1: "Mass", 2: "Nodule"}}
HEART = {"id2label": {0: "background", 1: "heart"}, "decoder_hidden_sizes": [32, 16, 16, 8, 8]}


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(folder: Path, model_class: type[MLVICXPreTrainedModel], **values: Any) -> Path:
    """A model with normalisation statistics of its own, and its image processor."""
    torch.manual_seed(0)
    model = model_class(tiny_config(**values))
    encoder = model.base_model.train()
    for seed in range(3):
        encoder(noise(8, encoder.config.num_channels, 32, 32, seed=seed))
    model.eval()
    if isinstance(model, MLVICXForSemanticSegmentation):  # every class somewhere
        with torch.no_grad():
            model.decoder.classifier.bias -= model(noise(8, 1, 32, 32)).logits.mean((0, 2, 3))
    model.save_pretrained(folder)
    processor = MLVICXImageProcessor(image_size=32, image_mean=0.45, num_channels=encoder.config.num_channels)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models, not exported."""
    root = tmp_path_factory.mktemp("sources")
    return {
        "run": saved(root / "run", MLVICXForPreTraining),
        "classifier": saved(root / "classifier", MLVICXForImageClassification, backbone="test_convnext", **FINDINGS),
        "segmenter": saved(root / "segmenter", MLVICXForSemanticSegmentation, **HEART),
        "backbone": saved(root / "backbone", MLVICXBackbone, out_features=["stage2", "stage4"]),
    }


@pytest.fixture(scope="module")
def folders(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same, exported; `encoder` is the run without its expanders."""
    root = tmp_path_factory.mktemp("exported")
    exported = {name: hub.export(source, root / name, with_expanders=name == "run") for name, source in sources.items()}
    return exported | {"encoder": hub.export(sources["run"], root / "encoder", card="# A model\n")}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


# -- what is in the folder ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("run", "MLVICXForPreTraining"),
        ("encoder", "MLVICXModel"),
        ("classifier", "MLVICXForImageClassification"),
        ("segmenter", "MLVICXForSemanticSegmentation"),
        ("backbone", "MLVICXBackbone"),
    ],
)
def test_an_exported_folder_holds_everything(folders: dict[str, Path], name: str, architecture: str):
    folder = folders[name]
    assert {file.name for file in folder.iterdir()} == FILES | ({"README.md"} if name == "encoder" else set())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == [architecture]
    autos = ("Model", "ModelForPreTraining", "ModelForImageClassification", "ModelForSemanticSegmentation", "Backbone")
    assert config["auto_map"].keys() == {"AutoConfig", *(f"Auto{auto}" for auto in autos)}
    for reference in config["auto_map"].values():
        module, name_of_class = reference.split(".")
        assert f"\nclass {name_of_class}(" in (folder / f"{module}.py").read_text()
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    name_of_class = "image_processing_mlvicx.MLVICXImageProcessor"
    assert processor["auto_map"] == {"AutoImageProcessor": {"torchvision": name_of_class}}
    for file in CODE:
        assert (folder / file).read_bytes() == (ROOT / "src" / "mlvicx_hf" / "models" / file).read_bytes()
        assert "mlvicx_hf import" not in (folder / file).read_text()


def test_weights_are_the_sources(sources: dict[str, Path], folders: dict[str, Path]):
    for name, source in sources.items():
        assert equal(tensors(folders[name]), tensors(source)), name
    run = tensors(sources["run"])
    encoder = {key.removeprefix("mlvicx."): tensor for key, tensor in run.items() if key.startswith("mlvicx.")}
    assert 0 < len(encoder) < len(run)
    assert equal(tensors(folders["encoder"]), encoder)
    assert (folders["encoder"] / "README.md").read_text() == "# A model\n"


def test_no_path_of_the_machine_is_published(sources: dict[str, Path], folders: dict[str, Path], tmp_path: Path):
    twice = hub.export(folders["classifier"], tmp_path / "twice")
    private = {str(path).encode() for source in sources.values() for path in source.parents if len(path.parts) > 2}
    private |= {str(path).encode() for path in (ROOT, Path.home(), tmp_path, folders["run"].parent)} - {b"/"}
    for folder in (*folders.values(), twice):
        for file in folder.iterdir():
            content = file.read_bytes()
            assert not [path for path in private if path in content], file
            assert file.suffix == ".py" or b"name_or_path" not in content, file


def test_an_export_of_an_export_is_the_same(folders: dict[str, Path], tmp_path: Path):
    for name in ("classifier", "backbone"):
        twice = hub.export(folders[name], tmp_path / name)
        for file in FILES:
            assert (twice / file).read_bytes() == (folders[name] / file).read_bytes(), file


def test_half_precision_stays(sources: dict[str, Path], tmp_path: Path):
    model = MLVICXModel.from_pretrained(sources["run"], dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    shutil.copy(sources["run"] / "preprocessor_config.json", tmp_path / "half")
    folder = hub.export(tmp_path / "half", tmp_path / "out")
    assert AutoModel.from_pretrained(folder).dtype == torch.bfloat16
    assert equal(tensors(folder), tensors(tmp_path / "half"))


# -- with the package and without it -----------------------------------------------------------------------------------

CHILD = """
import sys

mode, inputs, outputs, scratch, run, encoder, labelled, masked, levels = sys.argv[1:]
if mode == "package":
    import mlvicx_hf

    trust, home = {}, "mlvicx_hf."
else:
    sys.modules["mlvicx_hf"] = None
    try:
        import mlvicx_hf.models.modeling_mlvicx
    except ImportError:
        trust, home = {"trust_remote_code": True}, "transformers_modules."
    else:
        raise AssertionError("the package can be imported")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForPreTraining, AutoModelForSemanticSegmentation, pipeline
from PIL import Image

images = list(load_file(inputs)["images"].numpy())
found = {}


def ours(thing):
    assert type(thing).__module__.startswith(home), type(thing)
    return thing


if mode == "remote":
    for auto, folder in ((AutoModel, encoder), (AutoModelForImageClassification, labelled), (AutoConfig, run)):
        try:
            auto.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            assert "Please pass the argument `trust_remote_code=True`" in str(error), error
        else:
            raise AssertionError("code ran without consent")

with torch.no_grad():
    config = ours(AutoConfig.from_pretrained(levels, **trust))
    processor = ours(AutoImageProcessor.from_pretrained(run, **trust))
    x = found["pixel_values"] = processor(images)["pixel_values"]
    for name, folder in (("run", run), ("encoder", encoder), ("labelled", labelled)):
        output = ours(AutoModel.from_pretrained(folder, **trust))(x, output_hidden_states=True)
        found |= {f"{name}_pooled": output.pooler_output, f"{name}_last": output.last_hidden_state}
        found |= {f"{name}_{i}": tensor for i, tensor in enumerate(output.hidden_states)}
    output = ours(AutoModelForPreTraining.from_pretrained(run, **trust))(x, x.flip(-1))
    found |= {"loss": output.loss, "z": output.global_embeddings[0], "m": output.multi_level_embeddings[1]}
    classifier = ours(AutoModelForImageClassification.from_pretrained(labelled, **trust))
    found["labels"] = classifier(x).logits
    segmenter = ours(AutoModelForSemanticSegmentation.from_pretrained(masked, **trust))
    output = segmenter(x, labels=torch.ones(len(x), *x.shape[2:], dtype=torch.long))
    found |= {"mask_loss": output.loss, "masks": output.logits}
    maps = ours(AutoImageProcessor.from_pretrained(masked, **trust)).post_process_semantic_segmentation(
        output, [image.shape for image in images]
    )
    found |= {f"map_{i}": tensor for i, tensor in enumerate(maps)}
    backbone = type(ours(AutoBackbone.from_config(config, **trust))).from_pretrained(levels)
    assert backbone.out_features == ["stage2", "stage4"]
    found |= {f"stage_{i}": tensor for i, tensor in enumerate(ours(backbone)(x).feature_maps)}
    pipe = pipeline("image-classification", model=labelled, **trust)
    scores = pipe(Image.fromarray(images[0]), top_k=None)
    found["scores"] = torch.tensor([{row["label"]: row["score"] for row in scores}[n] for n in ("Edema", "Nodule")])
    classifier.save_pretrained(scratch)
    if mode == "remote":  # code comes along
        AutoImageProcessor.from_pretrained(labelled, **trust).save_pretrained(scratch)
        AutoImageProcessor.from_pretrained(scratch, **trust)
    again = ours(AutoModelForImageClassification.from_pretrained(scratch, **trust))
    assert torch.equal(again(x).logits, found["labels"])
save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, outputs)
assert (mode == "package") == any(name.startswith("mlvicx_hf.") for name in sys.modules)
print("done")
"""


@pytest.mark.lowest
def test_the_same_bits_with_the_package_and_without(folders: dict[str, Path], tmp_path: Path):
    images = torch.randint(0, 256, (4, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "inputs.safetensors")
    names = ("run", "encoder", "classifier", "segmenter", "backbone")
    for mode in ("package", "remote"):
        start = run_code if mode == "package" else partial(run_python, "-c")
        done = start(
            CHILD,
            mode,
            tmp_path / "inputs.safetensors",
            tmp_path / f"{mode}.safetensors",
            tmp_path / f"{mode}-again",
            *(folders[name] for name in names),
            HF_MODULES_CACHE=str(tmp_path / f"{mode}-modules"),
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "done"  # and no question whether to trust code
    package, remote = load_file(tmp_path / "package.safetensors"), load_file(tmp_path / "remote.safetensors")
    assert package.keys() == remote.keys()
    assert package["map_0"].shape == (40, 50)
    assert package["map_0"].unique().tolist() == [0, 1]  # two classes, so a map says something
    assert [name for name, tensor in package.items() if not torch.equal(tensor, remote[name])] == []
    assert (tmp_path / "package.safetensors").read_bytes() == (tmp_path / "remote.safetensors").read_bytes()
    assert {file.name for file in (tmp_path / "remote-again").iterdir()} == FILES
    assert not (tmp_path / "package-modules" / "transformers_modules").exists()


def test_a_backbone_of_a_folder(folders: dict[str, Path]):
    """`AutoBackbone.from_pretrained` wants a name on the Hub, the classes themselves do not."""
    config = AutoConfig.from_pretrained(folders["encoder"])
    backbone_class = type(AutoBackbone.from_config(config))
    assert backbone_class is MLVICXBackbone
    backbone = backbone_class.from_pretrained(folders["encoder"], out_features=["stem", "stage3"])
    x = noise(2, 1, 32, 32)
    with torch.no_grad():
        maps = AutoModel.from_pretrained(folders["encoder"])(x, output_hidden_states=True).hidden_states
        for level, found in zip((0, 3), backbone(x).feature_maps, strict=True):
            assert torch.equal(found, maps[level])


# -- damage, and saving again ------------------------------------------------------------------------------------------


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.mark.parametrize("length", [0, 100, -1])
def test_truncated_weights_are_refused(folders: dict[str, Path], tmp_path: Path, length: int):
    folder = copy(folders["encoder"], tmp_path / "truncated")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(OSError, match=r"truncated: .*damaged"):
        AutoModel.from_pretrained(folder)


def test_a_model_of_an_exported_folder_is_saved_elsewhere(folders: dict[str, Path], tmp_path: Path):
    model = AutoModelForImageClassification.from_pretrained(folders["classifier"])
    torch.nn.init.ones_(model.classifier.weight)
    model.save_pretrained(tmp_path / "new")
    assert {file.name for file in (tmp_path / "new").iterdir()} == FILES - {"preprocessor_config.json"}  # code, too
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
    assert (again.classifier.weight == 1).all()


def test_a_model_is_saved_into_the_exported_folder_it_is_from(folders: dict[str, Path], tmp_path: Path):
    folder = copy(folders["classifier"], tmp_path / "own")
    model = AutoModelForImageClassification.from_pretrained(folder)
    torch.nn.init.ones_(model.classifier.weight)
    model.save_pretrained(folder)
    assert {file.name for file in folder.iterdir()} == FILES
    assert (AutoModelForImageClassification.from_pretrained(folder).classifier.weight == 1).all()


# -- what cannot be exported -------------------------------------------------------------------------------------------


def edited(folder: Path, to: Path, file: str, **values: Any) -> Path:
    copy(folder, to)
    content = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(content | values))
    return to


def broken(kind: str, sources: dict[str, Path], folder: Path) -> Path:
    if kind == "another model":
        ResNetConfig().save_pretrained(folder)
        return folder
    if kind == "empty":
        folder.mkdir()
        return folder
    if kind == "unknown backbone":
        return edited(sources["run"], folder, "config.json", backbone="resnet17")
    if kind == "unknown class":
        return edited(sources["run"], folder, "config.json", architectures=["MLVICXForDetection"])
    if kind == "no class":
        return edited(sources["run"], folder, "config.json", architectures=None)
    if kind == "no head":
        return edited(sources["run"], folder, "config.json", architectures=["MLVICXForImageClassification"])
    if kind == "other labels":
        return edited(sources["classifier"], folder, "config.json", id2label={str(i): str(i) for i in range(5)})
    if kind == "another processor":
        name = {"image_processor_type": "ViTImageProcessor"}
        return edited(sources["run"], folder, "preprocessor_config.json", **name)
    if kind == "colour processor":
        return edited(sources["run"], folder, "preprocessor_config.json", num_channels=3)
    copy(sources["run"], folder)
    (folder / {"no processor": "preprocessor_config.json", "no weights": "model.safetensors"}[kind]).unlink()
    return folder


@pytest.mark.parametrize(
    ("kind", "error", "parts"),
    [
        ("another model", ValueError, ["source: ", "'resnet' found", "expected 'mlvicx'"]),
        ("empty", FileNotFoundError, ["source holds no config.json"]),
        ("unknown class", ValueError, ["source: ", "['MLVICXForDetection'] found", "expected one of MLVICXBackbone, "]),
        ("unknown backbone", UserError, ["backbone='resnet17' found"]),
        ("no class", UserError, ["source: ", "architectures=[] found"]),
        ("no head", ValueError, ["source: ", "without 2 of ", "classifier.bias", "all of a MLVICXForImageClassificat"]),
        ("other labels", ValueError, ["classifier.bias of shape (3,) found, not (5,)", "with 5 label(s)"]),
        ("no processor", FileNotFoundError, ["source holds no preprocessor_config.json"]),
        ("another processor", ValueError, ["source: ", "ViTImageProcessor found", "expected MLVICXImageProcessor"]),
        ("colour processor", ValueError, ["source: ", "num_channels=3 found", "expected 1"]),
        ("no weights", OSError, ["source", "model.safetensors"]),
    ],
)
def test_what_is_not_a_whole_model_is_refused(
    sources: dict[str, Path], tmp_path: Path, kind: str, error: type[Exception], parts: list[str]
):
    source = broken(kind, sources, tmp_path / "source")
    with pytest.raises(error) as caught:
        hub.export(source, tmp_path / "out")
    for part in parts:
        assert part in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_expanders_of_a_model_without_any(sources: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"MLVICXForImageClassification found; with_expanders expects a MLVICXForPre"):
        hub.export(sources["classifier"], tmp_path / "out", with_expanders=True)


def test_nothing_is_written_over(sources: dict[str, Path], tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        with pytest.raises(FileExistsError, match=f"{name} is there already; expected a new or an empty folder"):
            hub.export(sources["run"], tmp_path / name)
    with pytest.raises(FileExistsError, match="there already"):
        hub.export(sources["run"], sources["run"])
    assert (tmp_path / "full" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert hub.export(sources["run"], tmp_path / "empty") == tmp_path / "empty"
    assert {file.name for file in (tmp_path / "empty").iterdir()} == FILES


def test_written_whole_or_not_at_all(sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(processor: MLVICXImageProcessor, folder: Path) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(MLVICXImageProcessor, "save_pretrained", full)
    with pytest.raises(OSError, match="no space left"):
        hub.export(sources["run"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# -- pipelines ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 36)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize("kind", ["image", "file"])
@torch.no_grad()
def test_pipelines(folders: dict[str, Path], picture: Path, kind: str):
    given = Image.open(picture) if kind == "image" else str(picture)
    processor = AutoImageProcessor.from_pretrained(folders["run"])
    x = processor(Image.open(picture))["pixel_values"]

    scores = pipeline("image-classification", model=str(folders["classifier"]))(given, top_k=None)
    logits = AutoModelForImageClassification.from_pretrained(folders["classifier"])(x).logits[0]
    expected = dict(zip(FINDINGS["id2label"].values(), logits.sigmoid().tolist(), strict=True))
    assert {row["label"]: row["score"] for row in scores} == pytest.approx(expected, abs=1e-6)

    extract = pipeline("image-feature-extraction", model=str(folders["encoder"]))
    output = AutoModel.from_pretrained(folders["encoder"])(x)
    np.testing.assert_allclose(extract(given, pool=True), output.pooler_output, atol=1e-6)
    np.testing.assert_allclose(extract(given), output.last_hidden_state, atol=1e-6)

    rows = pipeline("image-segmentation", model=str(folders["segmenter"]))(given)
    logits = AutoModelForSemanticSegmentation.from_pretrained(folders["segmenter"])(x).logits[0]
    # 48 x 36 into 32 x 32 leaves borders of 4 pixels to the left and right
    inner = torch.nn.functional.interpolate(logits[None, :, :, 4:-4], (48, 36), mode="bilinear")[0].argmax(0)
    assert [row["label"] for row in rows] == ["background", "heart"]
    for label, row in enumerate(rows):
        assert np.array_equal(np.asarray(row["mask"]), (inner == label).numpy() * 255)


def test_a_segmenter_with_one_logit_in_the_pipeline(tmp_path: Path, picture: Path):
    """The pipeline looks for the name of class 1, the structure, and one label has only the name of class 0."""
    folder = saved(tmp_path / "one", MLVICXForSemanticSegmentation, **(HEART | {"id2label": {0: "heart"}}))
    segment = pipeline("image-segmentation", model=str(folder))
    segment.model.decoder.classifier.bias.data.fill_(1e4)
    with pytest.raises(KeyError, match="1"):
        segment(str(picture))
    segment.model.decoder.classifier.bias.data.fill_(-1e4)
    assert [(row["label"], np.unique(row["mask"]).tolist()) for row in segment(str(picture))] == [("heart", [255])]


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["resnet18", "convnext_atto", "regnety_002"])
def test_backbones_from_pretraining_to_segmentation(tmp_path: Path, backbone: str):
    """One step, saved, loaded, exported, loaded, and a segmentation decoder on top.

    Outputs are compared in float64: loaded weights lie at other addresses in memory, which moves the last bit.
    """
    torch.manual_seed(0)
    model = MLVICXForPreTraining(tiny_config(backbone=backbone, image_size=64))
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    loss = model(noise(4, 1, 64, 64), noise(4, 1, 64, 64, seed=1)).loss
    loss.backward()
    optimizer.step()
    assert loss.isfinite()
    first, last = "mlvicx.backbone", "multi_level_expander"
    for part in (first, last):
        assert any(not torch.equal(before[n], t) for n, t in model.named_parameters() if n.startswith(part)), part
    model.eval().save_pretrained(tmp_path / "run")
    MLVICXImageProcessor(image_size=64).save_pretrained(tmp_path / "run")
    folder = hub.export(tmp_path / "run", tmp_path / "out")
    assert equal(tensors(tmp_path / "run"), model.state_dict())
    x = noise(2, 1, 64, 64, seed=2).double()
    close = {"rtol": 1e-10, "atol": 1e-12}
    with torch.no_grad():
        pooled, expected = model.double().mlvicx(x).pooler_output, model.embed(x)
        again = AutoModelForPreTraining.from_pretrained(tmp_path / "run").double()
        torch.testing.assert_close(again.embed(x), expected, **close)
        encoder = AutoModel.from_pretrained(folder).double()
        torch.testing.assert_close(encoder(x).pooler_output, pooled, **close)
        sizes = [8] * len(encoder.channels)
        segmenter = AutoModelForSemanticSegmentation.from_pretrained(folder, num_labels=1, decoder_hidden_sizes=sizes)
        logits = segmenter.double()(x).logits
        assert logits.shape == (2, 1, 64, 64)
        assert logits.isfinite().all()
        torch.testing.assert_close(segmenter.mlvicx(x).pooler_output, pooled, **close)
