"""`mlvicx publish` and `AutoModel.from_pretrained("org/mlvicx-resnet18")` over the wire, in fresh processes."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers import assert_users_error, mlvicx, mlvicx_elsewhere, run_code, run_python, tiny_config
from loopback_hub import LoopbackHub
from safetensors.torch import load_file

from mlvicx_hf import (
    MLVICXForImageClassification,
    MLVICXForPreTraining,
    MLVICXForSemanticSegmentation,
    MLVICXImageProcessor,
)

NAME = "org/mlvicx-resnet18"
PRETRAINING, CLASSIFIER, SEGMENTER = "org/mlvicx-pretraining", "org/mlvicx-classifier", "org/mlvicx-segmenter"

# Every Auto class by name, with the package or with the repository's own code.
CHILD = """
import sys

mode, outputs = sys.argv[1:]
if mode == "package":
    import mlvicx_hf

    trust, home = {}, "mlvicx_hf."
else:
    sys.modules["mlvicx_hf"] = None
    trust, home = {"trust_remote_code": True}, "transformers_modules."

import torch
from safetensors.torch import save_file
from transformers import AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
from transformers import AutoModelForPreTraining, AutoModelForSemanticSegmentation

image = torch.arange(40 * 50, dtype=torch.uint8).reshape(40, 50).numpy()
if mode == "package":
    model = AutoModel.from_pretrained("org/mlvicx-resnet18")
else:
    model = AutoModel.from_pretrained("org/mlvicx-resnet18", trust_remote_code=True)
processor = AutoImageProcessor.from_pretrained("org/mlvicx-resnet18", **trust)
config = AutoConfig.from_pretrained("org/mlvicx-resnet18", **trust)
x = processor(image)["pixel_values"].repeat(2, 1, 1, 1)
with torch.no_grad():
    pretraining = AutoModelForPreTraining.from_pretrained("org/mlvicx-pretraining", **trust)
    classifier = AutoModelForImageClassification.from_pretrained("org/mlvicx-classifier", **trust)
    segmenter = AutoModelForSemanticSegmentation.from_pretrained("org/mlvicx-segmenter", **trust)
    backbone = AutoBackbone.from_pretrained("org/mlvicx-resnet18", out_indices=[1, 3], **trust)
    found = {"pooled": model(x).pooler_output, "loss": pretraining(x, x.flip(-1)).loss}
    found |= {"labels": classifier(x).logits, "masks": segmenter(x).logits}
    found |= {f"level_{i}": m for i, m in enumerate(backbone(x).feature_maps)}
for thing in (model, processor, config, pretraining, classifier, segmenter, backbone):
    assert type(thing).__module__.startswith(home), type(thing)
save_file({name: tensor.contiguous().clone() for name, tensor in found.items()}, outputs)
"""

LOAD = """
import sys
from mlvicx_hf.common.errors import run

def main():
    import torch
    from transformers import AutoModel
    name, revisions, output = sys.argv[1:4]
    for revision in revisions.split(","):
        model = AutoModel.from_pretrained(name, revision=revision)
        if output:
            torch.save(model.state_dict(), f"{output}.{revision}")

run(main)
"""


def save(folder: Path, kind: str, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    labels = {"id2label": {0: "Edema", 1: "Mass"}}
    model = {
        "pretraining": lambda: MLVICXForPreTraining(tiny_config()),
        "classifier": lambda: MLVICXForImageClassification(tiny_config(**labels)),
        "segmenter": lambda: MLVICXForSemanticSegmentation(tiny_config(id2label={0: "background", 1: "lungs"})),
    }[kind]()
    model.save_pretrained(folder)
    MLVICXImageProcessor(image_size=32).save_pretrained(folder)
    (folder / "card.md").write_text("---\nlicense: apache-2.0\n---\n\nResearch use only. Not a medical device.\n")
    return folder


def push(folder: Path, name: str, *words: str) -> tuple[object, ...]:
    """The command that publishes a model."""
    return ("publish", "--model", folder, "--repo_id", name, "--card", folder / "card.md", *words)


def load(
    hub: LoopbackHub, cache: Path, name: str = NAME, revision: str = "main", output: object = "", **environment: str
) -> subprocess.CompletedProcess[str]:
    return run_code(LOAD, name, revision, output, **(hub.environment(cache) | environment))


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """A Hub to which the command published four repositories."""
    root = tmp_path_factory.mktemp("sources")
    folders = {kind: save(root / kind, kind) for kind in ("pretraining", "classifier", "segmenter")}
    with LoopbackHub() as loopback:
        commands = [
            push(folders["pretraining"], NAME, "--tag", "v1"),
            push(folders["pretraining"], PRETRAINING, "--with_expanders"),
            push(folders["classifier"], CLASSIFIER, "--private"),
            push(folders["segmenter"], SEGMENTER, "--revision", "main"),
        ]
        done = mlvicx_elsewhere(*commands, **loopback.environment(root / "cache"))
        assert [each.returncode for each in done] == [0] * 4, done
        assert f"published as {NAME} at " in done[0].stdout
        yield loopback
        assert loopback.unexpected == []


def weights(hub: LoopbackHub, name: str, revision: str) -> bytes:
    return hub.repositories[name].at(revision).files["model.safetensors"].content


@pytest.mark.slow
def test_what_was_published(hub: LoopbackHub):
    assert hub.repositories[CLASSIFIER].private
    assert not hub.repositories[NAME].private
    for name in (NAME, PRETRAINING, CLASSIFIER, SEGMENTER):
        repository = hub.repositories[name]
        files = repository.at("main").files
        assert {"README.md", "config.json", "model.safetensors", "modeling_mlvicx.py"} <= set(files)
        assert "card.md" not in files
        assert b"Not a medical device" in files["README.md"].content
    assert json.loads(hub.repositories[NAME].at("v1").files["config.json"].content)["architectures"] == ["MLVICXModel"]


@pytest.mark.slow
def test_every_auto_class_by_name_with_the_package_and_without(hub: LoopbackHub, tmp_path: Path):
    outputs = []
    for mode in ("package", "remote"):
        output = tmp_path / f"{mode}.safetensors"
        words, variables = (CHILD, mode, output), hub.environment(tmp_path / mode)
        done = run_code(*words, **variables) if mode == "package" else run_python("-c", *words, **variables)
        assert done.returncode == 0, done.stderr
        outputs.append(output.read_bytes())
    assert len(load_file(output)) == 6
    assert outputs[0] == outputs[1]
    offline = load(hub, tmp_path / "package", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9")
    assert offline.returncode == 0, offline.stderr


@pytest.mark.slow
def test_a_pinned_revision_stays_what_it_was(hub: LoopbackHub, tmp_path: Path):
    first = hub.repositories[NAME].at("v1").sha
    words = push(save(tmp_path / "new", "pretraining", seed=1), NAME)
    done, again = mlvicx_elsewhere(words, (*words, "--tag", "v1"), **hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert_users_error(again, "has the tag v1 already; expected a new one. Nothing was published")
    assert hub.repositories[NAME].at("v1").sha == first
    assert weights(hub, NAME, "main") != weights(hub, NAME, "v1")
    loaded = load(hub, tmp_path / "cache", revision=f"v1,{first},main", output=tmp_path / "state")
    assert loaded.returncode == 0, loaded.stderr
    for revision, expected in (("v1", "v1"), (first, "v1"), ("main", "main")):
        published = tmp_path / "published.safetensors"
        published.write_bytes(weights(hub, NAME, expected))
        state = torch.load(f"{tmp_path / 'state'}.{revision}")
        assert all(torch.equal(state[key], value) for key, value in load_file(published).items())


@pytest.mark.slow
def test_a_dry_run_sends_nothing(hub: LoopbackHub, tmp_path: Path):
    before = len(hub.requests)
    folder = save(tmp_path / "model", "segmenter")
    words = push(folder, "org/new", "--private", "--dry_run", "--tag", "v2")
    (done,) = mlvicx_elsewhere(words, **hub.environment(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "would go to org/new (private, main, tag v2); nothing was sent" in done.stdout
    assert "Not a medical device" in done.stdout
    assert "model.safetensors" in done.stdout
    assert len(hub.requests) == before
    assert "org/new" not in hub.repositories


@pytest.mark.slow
def test_what_cannot_be_pushed(hub: LoopbackHub, tmp_path: Path):
    folder = save(tmp_path / "model", "segmenter")
    commands = (push(folder, NAME, "--private"), push(folder, "org/a/b"))
    public, unnamed = mlvicx_elsewhere(*commands, **hub.environment(tmp_path / "cache"))
    assert_users_error(public, f"{NAME} is there already and is public")
    assert_users_error(unnamed, "org/a/b")
    strange = hub.environment(tmp_path / "cache", token="hf_wrong")
    (done,) = mlvicx_elsewhere(push(folder, "org/other"), **strange)
    assert_users_error(done, "401")
    assert "org/other" not in hub.repositories
    words = ("--model", folder, "--repo_id", "org/other", "--dry_run")  # no card, and no results to make one of
    assert_users_error(mlvicx("publish", *words), "results.json", "--card FILE")


@pytest.mark.slow
def test_a_name_that_is_not_there_and_one_that_is_private(hub: LoopbackHub, tmp_path: Path):
    absent = load(hub, tmp_path / "a", "org/absent")
    assert_users_error(absent, "org/absent", "not a valid model identifier")
    private = load(hub, tmp_path / "b", CLASSIFIER, HF_TOKEN="")
    assert_users_error(private, CLASSIFIER)
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    revision = load(hub, tmp_path / "c", NAME, "v9")
    assert_users_error(revision, "v9")


@pytest.mark.thorough
def test_a_download_that_breaks_and_one_that_is_corrupted(hub: LoopbackHub, tmp_path: Path):
    hub.cut("model.safetensors", after=100_000)
    broken = load(hub, tmp_path)
    assert_users_error(broken, NAME, "the download of the weights broke off")
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.heal()
    hub.corrupt("model.safetensors")
    corrupted = load(hub, tmp_path)
    assert_users_error(corrupted, NAME, "model.safetensors is damaged", "removed from the cache", "try again")
    assert not list(tmp_path.rglob("model.safetensors"))
    hub.heal()
    done = load(hub, tmp_path, output=tmp_path / "state")
    assert done.returncode == 0, done.stderr
    (kept,) = tmp_path.rglob("model.safetensors")
    assert kept.resolve().name == hashlib.sha256(kept.read_bytes()).hexdigest()
