"""Encoders of other libraries: features, images, and what is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import make_cache, mlvicx, tiny_config
from PIL import Image
from timm.models._hub import save_for_hf
from torch import Tensor, nn
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from mlvicx_hf import MLVICXBackbone, MLVICXConfig, MLVICXImageProcessor, MLVICXModel
from mlvicx_hf.common.errors import MissingExtraError, UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.encoders.external import ExternalEncoder, adapt, is_external
from mlvicx_hf.encoders.features import encode
from mlvicx_hf.finetuning.arguments import ClassifierArguments
from mlvicx_hf.finetuning.classification import load_classifier
from mlvicx_hf.finetuning.data import LabelledImages
from mlvicx_hf.finetuning.heads import ExternalClassifier
from mlvicx_hf.finetuning.linear_probe import FeatureStore
from mlvicx_hf.models.modeling_mlvicx import batch_norms

SMALL: dict[str, Any] = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28}
SMALL |= {"patch_size": 14, "intermediate_size": 48}
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def save(folder: Path, model: Any, **processor: Any) -> str:
    model.save_pretrained(folder)
    options = {"size": {"height": 28, "width": 28}, "image_mean": MEAN, "image_std": STD} | processor
    ViTImageProcessor(**options).save_pretrained(folder)
    return f"hub:{folder}"


def features(source: str, pixels: Tensor, image_size: int | None = None) -> Tensor:
    encoder = ExternalEncoder(adapt(source, image_size), MLVICXConfig(use_context=False), source).eval()
    with torch.no_grad():
        return encoder(pixels).pooler_output


@pytest.mark.parametrize("model_class", [Dinov2Model, ViTModel])
def test_a_transformer_from_a_folder_gives_its_pooled_output(tmp_path: Path, model_class: Any):
    torch.manual_seed(0)
    config = (Dinov2Config if model_class is Dinov2Model else ViTConfig)(**SMALL)
    model = model_class(config).eval()
    source = save(tmp_path / "vit", model)
    x = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(features(source, x), model(x).pooler_output)
    processor = adapt(source).processor
    assert (processor.image_size, processor.num_channels) == (28, 3)
    assert (processor.image_mean, processor.image_std) == (MEAN, STD)


def test_weights_in_half_precision_are_computed_in_single(tmp_path: Path):
    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**SMALL)).bfloat16().eval()
    x = torch.randn(2, 3, 28, 28)
    found = features(save(tmp_path / "vit", model), x)
    with torch.no_grad():
        assert torch.equal(found, model.float()(x).pooler_output)


def test_a_convolutional_one_is_flattened(tmp_path: Path):
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    x = torch.randn(2, 3, 28, 28)
    found = features(save(tmp_path / "resnet", model.eval()), x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x).last_hidden_state.mean((2, 3)))


def test_a_backbone_gives_the_mean_of_its_last_map(tmp_path: Path):
    model = Dinov2Backbone(Dinov2Config(**SMALL, out_features=["stage2"])).eval()
    x = torch.randn(2, 3, 28, 28)
    found = features(save(tmp_path / "backbone", model), x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x).feature_maps[-1].mean((2, 3)))


def test_the_crop_of_an_image_processor_is_the_side(tmp_path: Path):
    size = {"do_center_crop": True, "crop_size": {"height": 14, "width": 14}, "size": {"shortest_edge": 16}}
    source = save(tmp_path / "vit", Dinov2Model(Dinov2Config(**SMALL)))
    file = tmp_path / "vit" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | size | {"image_processor_type": "BitImageProcessor"}))
    assert adapt(source).processor.image_size == 14


def test_a_timm_model_on_the_hub_keeps_its_size_and_constants(tmp_path: Path):
    network = timm.create_model("test_resnet")
    network.pretrained_cfg |= {"mean": MEAN, "std": STD, "interpolation": "bicubic"}
    save_for_hf(network, str(tmp_path), safe_serialization=True)
    about = json.loads((tmp_path / "config.json").read_text())
    del about["model_args"]  # timm's own repositories have none here
    (tmp_path / "config.json").write_text(json.dumps(about))
    processor = adapt(f"hub:{tmp_path}").processor
    assert (processor.image_size, processor.num_channels) == (network.pretrained_cfg["input_size"][-1], 3)
    assert ([*processor.image_mean], [*processor.image_std], processor.resample) == (MEAN, STD, 3)


def test_an_image_processor_is_followed_or_refused(tmp_path: Path):
    model = Dinov2Model(Dinov2Config(**SMALL))
    plain = adapt(save(tmp_path / "plain", model, do_normalize=False)).processor
    gray = Image.new("L", (28, 28), 51)
    assert plain(gray, return_tensors="pt")["pixel_values"].unique().tolist() == pytest.approx([0.2])
    with pytest.raises(UserError, match=r"do_rescale=False, .*expected one that gives grey values from 0 to 1"):
        adapt(save(tmp_path / "raw", model, do_rescale=False))


def test_a_poolers_random_weights_are_refused(tmp_path: Path):
    source = save(tmp_path / "vit", ViTModel(ViTConfig(**SMALL), add_pooling_layer=False))
    with pytest.raises(UserError, match=r"2 weights of ViTModel are not saved, such as pooler\.dense\.bias"):
        adapt(source)


def test_an_encoder_without_pooled_output_is_refused(tmp_path: Path):
    source = save(tmp_path / "mae", ViTMAEModel(ViTMAEConfig(**SMALL)))
    with pytest.raises(UserError, match="ViTMAEModel without pooled output found"):
        features(source, torch.randn(1, 3, 28, 28))


def test_timm_from_a_file_gives_timms_features(tmp_path: Path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    source = f"timm:test_resnet:{tmp_path / 'weights.pth'}"
    x = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(features(source, x), network.forward_head(network.forward_features(x), pre_logits=True))
    processor = adapt(source).processor
    about = timm.get_pretrained_cfg("test_resnet")
    assert about is not None
    assert (processor.image_mean, processor.image_size) == (list(about.mean), about.input_size[-1])
    assert adapt(source, 64).processor.image_size == 64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("timm:resnet1x", "backbone='resnet1x' found; expected a timm model"),
        ("timm:test_resnet:weights.txt", "expected a file that ends with"),
        ("timm:test_convnext:{folder}/weights.pth", r"weights\.pth does not fit test_convnext"),
        (
            "timm:test_vit:{folder}/vit.pth",
            r"image_size=17: Input height \(17\) should be divisible",
        ),
        ("callable:nowhere:make", "No module named 'nowhere'"),
        ("callable:json:absent", "has no attribute 'absent'"),
        ("callable:json", "expected callable:module:function"),
    ],
)
def test_what_does_not_exist_or_fit_is_named(tmp_path: Path, source: str, message: str):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "vit.pth")
    side = 17 if "vit" in source else None  # which patches of 16 do not divide
    with pytest.raises(UserError, match=message):
        features(source.format(folder=tmp_path), torch.zeros(1, 3, 17, 17), side)


def test_a_backbone_that_transformers_lacks_is_refused(tmp_path: Path):
    MLVICXBackbone(tiny_config()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a MLVICXBackbone found, which transformers does not have; expected one of"):
        features(f"hub:{tmp_path}", torch.zeros(1, 1, 32, 32))


def test_torchxrayvision_gets_its_own_range(monkeypatch: pytest.MonkeyPatch):
    library = pytest.importorskip("torchxrayvision")
    torch.manual_seed(0)
    network = library.models.DenseNet(weights=None, num_classes=2).eval()
    monkeypatch.setattr(library.models, "get_model", {"densenet121-res224-all": network}.get)
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(features("xrv:densenet121-res224-all", x), network.features2(x))
    processor = adapt("xrv:densenet121-res224-all").processor
    assert processor.image_size == 224
    ends = processor(torch.tensor([[[0.0, 1.0]]]), do_resize=False, fit="squash")["pixel_values"][0]
    assert ends.flatten().tolist() == [-1024, 1024]
    source = "xrv:densenet121-res224-all"
    assert len(encode(ExternalEncoder(adapt(source), MLVICXConfig(), source), _Images(), 2)["features"]) == 3


class _Images(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": torch.full((1, 64, 64), float(index))}


def test_torchxrayvision_is_asked_for_when_it_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlvicx_hf.common.errors.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "\.\[xrv\]"'):
        adapt("xrv:densenet121-res224-all")


def make_maps() -> tuple[nn.Module, dict[str, Any]]:
    """A user's function whose encoder forgets to pool."""
    return nn.Conv2d(1, 4, 3), {"image_size": 16}


def make_features() -> tuple[nn.Module, dict[str, Any]]:
    """A user's function."""
    torch.manual_seed(3)
    layers = nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten()
    return nn.Sequential(*layers), {"image_size": 16, "image_mean": 0.4, "image_std": 0.2}


def test_a_users_function_makes_an_encoder():
    assert features(f"callable:{__name__}:make_features", torch.randn(2, 1, 16, 16)).shape == (2, 16)
    with pytest.raises(UserError, match=r"features \(1, 4, 14, 14\) of 1 image\(s\) found; expected a tensor \[B, D\]"):
        features(f"callable:{__name__}:make_maps", torch.randn(2, 1, 16, 16))


def test_what_is_external(tmp_path: Path):
    names = ["timm:resnet18", "hub:a/b", "xrv:x", "callable:a:b", "org/name", "runs/x", "random", "c:/models"]
    assert [is_external(name) for name in names] == [True, True, True, True, False, False, False, False]


# -- in a run and in a suite -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "patient_id": f"p{i}",
            "split": ("test", "validation", "train", "train")[i % 4],
            "_draw": {"disc": i % 8 < 4},
            "disc": int(i % 8 < 4),
        }
        for i in range(32)
    ]
    return make_cache(tmp_path_factory.mktemp("external"), rows)


@pytest.mark.parametrize("how", [["--freeze_backbone", "--fast_probe"], ["--freeze_backbone"], []])
def test_it_is_classified_with_like_ours(cache: Path, tmp_path: Path, how: list[str], monkeypatch: pytest.MonkeyPatch):
    from mlvicx_hf.commands.classify import main

    words = ["--dataset", str(cache), "--output_dir", str(tmp_path / "run"), "--use_cpu", *how]
    main(
        [*words, "--model", f"callable:{__name__}:make_features", "--num_train_epochs", "2", "--learning_rate", "0.01"]
    )
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["model"] == f"callable:{__name__}:make_features"
    assert results["hyperparameters"]["image_size"] == 16
    assert 0 <= results["test"]["auroc_macro"] <= 1
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_our_own_models_take_another_size(cache: Path, tmp_path: Path):
    from mlvicx_hf.commands.classify import main

    MLVICXModel(tiny_config(image_size=32)).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(32).save_pretrained(tmp_path / "model")
    words = ["--dataset", str(cache), "--output_dir", str(tmp_path / "run"), "--use_cpu", "--freeze_backbone"]
    main([*words, "--fast_probe", "--model", str(tmp_path / "model"), "--num_train_epochs", "1", "--image_size", "48"])
    assert MLVICXImageProcessor.from_pretrained(tmp_path / "run").image_size == 48
    assert MLVICXConfig.from_pretrained(tmp_path / "run").image_size == 48


def test_predict_says_that_it_cannot_load_it(cache: Path, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text('{"model_type": "external"}')
    (tmp_path / "run" / "model.safetensors").touch()
    Image.new("L", (32, 32), 128).save(tmp_path / "chest.png")
    done = mlvicx(
        "predict", "--model", tmp_path / "run", "--input", tmp_path / "chest.png", "--output", tmp_path / "out.csv"
    )
    assert done.returncode == 2
    assert "a model of type 'external' found; expected 'mlvicx'" in done.stderr


def test_a_suite_compares_them_and_keeps_features_by_their_weights(cache: Path, tmp_path: Path, capsys: Any):
    yaml = pytest.importorskip("yaml")
    from mlvicx_hf.evaluation.suite.grid import read_suite
    from mlvicx_hf.evaluation.suite.running import evaluate_suite

    source = save(tmp_path / "dinov2", Dinov2Model(Dinov2Config(**SMALL)))
    suite = {
        "tasks": {"discs": {"kind": "classification", "dataset": str(cache)}},
        "models": {
            "RAD": {"hub": source.removeprefix("hub:")},
            "own": {"callable": f"{__name__}:make_features", "image_size": 24},
        },
        "protocols": {"frozen": {"num_train_epochs": 2, "use_cpu": True}, "frozen_levels": {"use_cpu": True}},
        "shortcuts": ["view"],
    }
    file = tmp_path / "suite.yaml"
    file.write_text(yaml.safe_dump(suite))
    assert [cell.weights for cell in read_suite(file).cells] == [source, f"callable:{__name__}:make_features"]
    outcome = evaluate_suite(str(file), tmp_path / "out", samples=20)
    assert (outcome.planned, outcome.finished, outcome.failed) == (2, 2, 0)
    assert "has pooled features alone: no segmentation, no frozen_levels" in capsys.readouterr().err
    [results] = (tmp_path / "out").glob("cells/discs/own/**/results.json")
    assert json.loads(results.read_text())["hyperparameters"]["image_size"] == 24


def test_segmentation_with_one_is_refused(tmp_path: Path):
    from mlvicx_hf.finetuning.arguments import EncoderArguments
    from mlvicx_hf.finetuning.heads import load_config, load_for_task
    from mlvicx_hf.models.modeling_mlvicx import MLVICXForSemanticSegmentation

    arguments = EncoderArguments("timm:resnet18")
    with pytest.raises(UserError, match="with maps of levels"):
        load_for_task(MLVICXForSemanticSegmentation, load_config(arguments), arguments, (32, "pad"))


assert sys.modules[__name__]  # `callable:` finds the functions of this file by its name


def make_maxima() -> tuple[nn.Module, dict[str, Any]]:
    """The same weights as those of `make_features`, used otherwise."""
    network, settings = make_features()
    network[1] = nn.AdaptiveMaxPool2d(2)
    return network, settings


def test_features_of_another_function_with_the_same_weights_are_not_taken(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"patient_id": f"p{i}", "split": "train", "disc": i % 2} for i in range(4)]
    cache, store, found = load_cache(make_cache(tmp_path, rows)), FeatureStore(), []
    for name in ("make_features", "make_maxima"):
        model, processor = load_classifier(ClassifierArguments(f"callable:{__name__}:{name}"), cache)
        images = LabelledImages(cache.datasets["train"], processor, exclusive=False)
        found.append(store.encode(model.mlvicx, images, 4, torch.device("cpu"))["features"])
    assert (found[0] < found[1]).all()


def test_a_frozen_encoder_stays_in_evaluation_mode():
    source = f"callable:{__name__}:make_features"
    encoder = ExternalEncoder(adapt(source), MLVICXConfig(use_context=False), source)
    classifier = ExternalClassifier(encoder).train()
    assert encoder.training
    classifier.freeze_backbone()
    classifier.train()
    assert classifier.training
    assert not any(part.training for part in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def make_normalised() -> tuple[nn.Module, dict[str, Any]]:
    network, constants = make_features()
    return nn.Sequential(nn.BatchNorm2d(1), network), constants


def test_batch_normalisation_of_an_encoder_is_frozen_alone():
    source = f"callable:{__name__}:make_normalised"
    encoder = ExternalEncoder(adapt(source), MLVICXConfig(use_context=False), source)
    classifier = ExternalClassifier(encoder)
    classifier.freeze_batch_norm()
    classifier.eval().train()
    norms = batch_norms(encoder)
    assert norms
    assert {part for part in classifier.modules() if not part.training} == set(norms)
    kept = {parameter for norm in norms for parameter in norm.parameters()}
    assert {parameter for parameter in classifier.parameters() if not parameter.requires_grad} == kept
