"""`push_to_hub` of the models against the Hub of the tests, and the guards of this Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from helpers import run_python, tiny_config
from loopback_hub import LoopbackHub

from mlvicx_hf import MLVICXImageProcessor, MLVICXModel

WEIGHTS = "model.safetensors"
IMPORTS = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
"""


def run(hub: LoopbackHub, cache: Path, code: str, *words: object, **more: str) -> Any:
    """What code prints last in a fresh process that uses the Hub, read as JSON."""
    done = run_python("-c", IMPORTS + dedent(code), *words, **(hub.environment(cache) | more))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(token="hf_secret") as hub:
        yield hub
        assert hub.unexpected == []


def ask(hub: LoopbackHub, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[HTTPResponse, bytes]:
    """One request without a client."""
    connection = HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_push_to_hub_simply_works(hub: LoopbackHub, tmp_path: Path):
    """With and without the package, in shards, on a branch, and into a repository with hashes of an older version."""
    MLVICXModel(tiny_config()).save_pretrained(tmp_path / "model")
    MLVICXImageProcessor(image_size=32).save_pretrained(tmp_path / "model")
    code = """
        import mlvicx_hf, torch
        from transformers import AutoImageProcessor, AutoModel

        def same(copy):
            return all(torch.equal(tensor, copy.state_dict()[name]) for name, tensor in model.state_dict().items())

        api.create_repo("org/tiny")
        api.upload_folder(repo_id="org/tiny", folder_path=sys.argv[1])
        model, processor = AutoModel.from_pretrained("org/tiny"), AutoImageProcessor.from_pretrained("org/tiny")
        api.create_repo("org/copy", private=True)
        hashes = ("0" * 64 + "  model.safetensors").encode()
        api.upload_file(repo_id="org/copy", path_or_fileobj=hashes, path_in_repo="SHA256SUMS")
        model.push_to_hub("org/copy")
        processor.push_to_hub("org/copy")
        model.push_to_hub("org/copy", revision="shards", max_shard_size="500KB")
        assert same(AutoModel.from_pretrained("org/copy"))
        assert same(AutoModel.from_pretrained("org/copy", revision="shards", cache_dir=sys.argv[1] + "/cache"))
        assert same(AutoModel.from_pretrained("org/copy", local_files_only=True))
        errors = {}
        for name, options in {"org/absent": {}, "org/tiny": {"revision": "absent"}}.items():
            try:
                AutoModel.from_pretrained(name, **options)
            except OSError as error:
                errors[name] = str(error)
        print(json.dumps([type(model).__name__, type(processor).__name__, errors]))
    """
    kind, processor, errors = run(hub, tmp_path / "cache", code, tmp_path / "model")
    assert (kind, processor) == ("MLVICXModel", "MLVICXImageProcessor")
    assert "is not a valid model identifier" in errors["org/absent"]
    assert "absent is not a valid git identifier" in errors["org/tiny"]
    copy = hub.repositories["org/copy"]
    assert copy.private
    assert {"config.json", "preprocessor_config.json", "modeling_mlvicx.py", WEIGHTS} <= set(copy.at("main").files)
    assert len([name for name in copy.at("shards").files if name.endswith(".safetensors")]) > 1

    code = """
        sys.modules["mlvicx_hf"] = None
        from transformers import AutoImageProcessor, AutoModel

        trust = {"trust_remote_code": True}
        for revision in ("main", "shards"):
            model = AutoModel.from_pretrained("org/copy", revision=revision, **trust)
        processor = AutoImageProcessor.from_pretrained("org/copy", **trust)
        model.push_to_hub("org/again")  # as the repository's own classes do
        processor.push_to_hub("org/again")
        model, processor = (auto.from_pretrained("org/again", **trust) for auto in (AutoModel, AutoImageProcessor))
        print(json.dumps([type(thing).__module__.split(".")[0] for thing in (model, processor)]))
    """
    assert run(hub, tmp_path / "remote", code) == ["transformers_modules"] * 2


def test_an_unknown_request_is_kept():
    with LoopbackHub() as hub:
        assert ask(hub, "GET", "/api/papers/org/space?blobs=1")[0].status == 501
        assert ask(hub, "POST", "/api/whoami-v2")[0].status == 501
        assert hub.unexpected == ["GET /api/papers/org/space?blobs=1", "POST /api/whoami-v2"]
        assert hub.requests == [("GET", "/api/papers/org/space", 501), ("POST", "/api/whoami-v2", 501)]


def test_a_fault_of_the_server_is_kept():
    with LoopbackHub() as hub, pytest.raises(ConnectionError):
        ask(hub, "POST", "/api/validate-yaml", b"no JSON")
    assert len(hub.unexpected) == 1
    assert hub.unexpected[0].startswith("JSONDecodeError")
