"""A prepared cache on the Hub and back: the real client and the real `datasets`, against a loopback server."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import assert_users_error, make_cache, mlvicx, mlvicx_elsewhere, run_code
from loopback_hub import LoopbackHub

from mlvicx_hf.common.errors import UserError
from mlvicx_hf.data.cache.cache import load_cache
from mlvicx_hf.hub.publishing import push_cache

NAME = "org/radiographs"

FETCH = """
from huggingface_hub import snapshot_download
from mlvicx_hf.data.cache.cache import load_cache

cache = load_cache(snapshot_download("org/radiographs", repo_type="dataset"))
print(cache.manifest["split_hash"], *(len(part) for part in cache.datasets.values()))
"""

LOAD = """
import datasets

loaded = datasets.load_dataset("org/radiographs")
for split, part in loaded.items():
    print(split, len(part), part[0]["image"].size, part[0]["source"])
stream = datasets.load_dataset("org/radiographs", split="test", streaming=True)
print(sum(1 for row in stream))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"patient_id": f"p{i // 2}", "Edema": i // 2 % 2, "_draw": {"disc": i // 2 % 2 == 1}} for i in range(40)]
    return make_cache(tmp_path_factory.mktemp("cache"), rows)


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        yield hub
        assert hub.unexpected == []


def test_a_cache_is_published_fetched_and_loaded(cache: Path, hub: LoopbackHub, tmp_path: Path):
    environment = hub.environment(tmp_path / "home")
    (done,) = mlvicx_elsewhere(("publish", "--dataset", cache, "--repo_id", NAME, "--tag", "v1"), **environment)
    assert done.returncode == 0, done.stderr
    assert f"published as {NAME} at " in done.stdout
    repository = hub.repositories[f"datasets/{NAME}"]
    assert repository.private
    assert repository.tags.keys() == {"v1"}
    stored = repository.at("main").files
    assert stored.keys() - {".gitattributes"} == {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()}
    for name, file in stored.items():
        assert name == ".gitattributes" or file.content == (cache / name).read_bytes()

    loaded = run_code(FETCH + LOAD, **environment)
    assert loaded.returncode == 0, loaded.stderr
    fetched, *lines = loaded.stdout.splitlines()
    assert fetched.split() == [load_cache(cache).manifest["split_hash"], "28", "4", "8"]
    assert [line.split()[:2] for line in lines[:3]] == [["train", "28"], ["validation", "4"], ["test", "8"]]
    assert "(32, 32) folder:" in lines[0]
    assert lines[3] == "8"

    nobody = run_code(FETCH, **hub.environment(tmp_path / "other", token=""))
    assert nobody.returncode != 0


def test_a_dry_run_shows_card_and_files_and_sends_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mlvicx_hf.hub.publishing.HfApi", None)
    done = mlvicx("publish", "--dataset", cache, "--repo_id", NAME, "--dry_run")
    assert done.returncode == 0, done.stderr
    assert "Research use only. Not a medical device." in done.stdout
    assert "bytes  splits.csv" in done.stdout
    assert f"would go to {NAME} (private, main); nothing was sent" in done.stdout
    assert push_cache(cache, NAME, dry_run=True)["private"]
    done = mlvicx("publish", "--dataset", cache, "--repo_id", "bad name!", "--dry_run")
    assert_users_error(done, "bad name!")
    done = mlvicx("publish", "--dataset", cache, "--repo_id", NAME, "--card", "x")
    assert_users_error(done, "--card found; --dataset does not take it")


@pytest.mark.parametrize("name", ["patients.xlsx", ".git/config", "train/notes.txt", "deep/train/a.arrow"])
def test_files_that_prepare_did_not_write_are_never_sent(cache: Path, tmp_path: Path, name: str):
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "cache" / name).write_text("Erika Mustermann")
    with pytest.raises(UserError, match=f"{re.escape(name)} found, which `mlvicx prepare` did not write"):
        push_cache(tmp_path / "cache", NAME, dry_run=True)


def test_a_public_repository_is_not_filled_with_private_images(cache: Path, hub: LoopbackHub, tmp_path: Path):
    environment = hub.environment(tmp_path / "home")
    words = ("publish", "--dataset", cache, "--repo_id", NAME)
    done, again = mlvicx_elsewhere((*words, "--public"), words, **environment)
    assert done.returncode == 0, done.stderr
    assert_users_error(again, f"{NAME} is there already and is public; expected a private or a new repository")
    repository = hub.repositories[f"datasets/{NAME}"]
    assert not repository.private
    assert len(repository.commits) == 2  # the Hub's own and the first push


def test_the_card_tells_what_is_in_the_cache(cache: Path):
    card = (cache / "README.md").read_text()
    manifest = json.loads((cache / "cache.json").read_text())
    assert "path: train/*.arrow" in card
    assert "| images | 28 | 4 | 8 |" in card
    positive = [f"{counts['positives']['Edema']} of {counts['images']}" for counts in manifest["splits"].values()]
    assert f"| Edema | {' | '.join(positive)} |" in card
    assert manifest["split_hash"] in card
    assert "Research use only. Not a medical device." in card
