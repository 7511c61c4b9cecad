"""The Hub of the tests, against the real clients: what they do here they do on huggingface.co.

Noted for whoever publishes or loads models with huggingface_hub 2.4: a download is checked for its size only, and one
that is cut resumes from the last whole 10 MiB.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest
from helpers import run_python, tiny_config
from loopback_hub import LoopbackHub, Repository
from safetensors.numpy import save_file

from mlvicx_hf import MLVICXImageProcessor, MLVICXModel

MIB = 1024 * 1024
WEIGHTS = "model.safetensors"
IMPORTS = """
import json, sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
api = HfApi()
"""


def run(hub: LoopbackHub, cache: Path, code: str, *words: object, **more: str) -> Any:
    """What code prints last in a fresh process that uses the Hub, read as JSON."""
    done = run_python("-c", IMPORTS + dedent(code), *words, **(hub.environment(cache) | more))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@dataclass
class Published:
    """A public model of two commits, the first tagged v1, and a private one."""

    hub: LoopbackHub
    folder: Path
    first: str
    second: str

    @property
    def weights(self) -> bytes:
        return (self.folder / WEIGHTS).read_bytes()

    def statuses(self, method: str, path: str) -> list[int]:
        """Of the requests for a file."""
        return [it.status for it in self.hub.requests if it.method == method and it.path.endswith(f"/{path}")]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    folder = tmp_path_factory.mktemp("model")
    (folder / "nested").mkdir()
    (folder / "nested" / "notes.txt").write_text("×\n")
    (folder / "config.json").write_text('{"version": 1}')
    (folder / "README.md").write_text("---\nlicense: mit\npipeline_tag: image-feature-extraction\n---\n# Model\n")
    save_file({"weight": np.random.default_rng(0).random(3_000_000, np.float32)}, folder / WEIGHTS)
    code = """
        api.create_repo("org/model")
        api.create_repo("org/model", exist_ok=True)
        first = api.upload_folder(repo_id="org/model", folder_path=sys.argv[1], commit_message="First").oid
        again = api.upload_folder(repo_id="org/model", folder_path=sys.argv[1]).oid
        api.create_tag("org/model", tag="v1")
        api.create_branch("org/model", branch="try/out", revision="v1")
        change = {"path_or_fileobj": b'{"version": 2}', "path_in_repo": "config.json", "commit_message": "Second"}
        second = api.upload_file(repo_id="org/model", parent_commit=first, **change).oid
        api.create_repo("private-model", private=True)
        api.upload_file(repo_id="tester/private-model", path_or_fileobj=b"{}", path_in_repo="config.json")
        print(json.dumps([first, again, second]))
    """
    with LoopbackHub(token="hf_secret") as hub:
        first, again, second = run(hub, tmp_path_factory.mktemp("publisher"), code, folder)
        assert again == first  # nothing new, no commit
        assert first != second
        yield Published(hub, folder, first, second)


@pytest.fixture(autouse=True)
def nothing_unexpected(published: Published) -> Iterator[None]:
    published.hub.requests.clear()
    yield
    published.hub.heal()
    assert published.hub.unexpected == []


def ask(hub: LoopbackHub, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[HTTPResponse, bytes]:
    """One request without a client."""
    connection = HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def test_history_and_what_the_hub_says_about_a_model(published: Published, tmp_path: Path):
    code = """
        info, old = api.model_info("org/model"), api.model_info("org/model", revision="v1")
        refs = api.list_repo_refs("org/model")
        tree = {file.path: file for file in api.list_repo_tree("org/model", recursive=True)}
        lfs = tree["model.safetensors"].lfs
        print(json.dumps({
            "user": api.whoami()["name"],
            "shas": [info.sha, old.sha],
            "private": [info.private, api.model_info("tester/private-model").private],
            "card": [info.card_data.license, info.pipeline_tag],
            "siblings": [file.rfilename for file in info.siblings],
            "branches": {it.name: it.target_commit for it in refs.branches},
            "tags": {it.name: it.target_commit for it in refs.tags},
            "tree": sorted(tree), "top": sorted(it.path for it in api.list_repo_tree("org/model")),
            "below": [it.path for it in api.list_repo_tree("org/model", "nested")],
            "lfs": [lfs.sha256, lfs.size], "regular": tree["config.json"].lfs,
            "paths": [it.path for it in api.get_paths_info("org/model", ["config.json", "nested", "absent"])],
            "exists": [api.file_exists("org/model", name) for name in ("config.json", "absent.json")],
        }))
    """
    said = run(published.hub, tmp_path, code)
    files = [".gitattributes", "README.md", "config.json", WEIGHTS, "nested/notes.txt"]
    assert said == {
        "user": "tester",
        "shas": [published.second, published.first],
        "private": [False, True],
        "card": ["mit", "image-feature-extraction"],
        "siblings": files,
        "branches": {"main": published.second, "try/out": published.first},
        "tags": {"v1": published.first},
        "tree": sorted([*files, "nested"]),
        "top": sorted([*files[:-1], "nested"]),
        "below": ["nested/notes.txt"],
        "lfs": [sha256(published.weights).hexdigest(), len(published.weights)],
        "regular": None,
        "paths": ["config.json", "nested"],
        "exists": [True, False],
    }
    commits = published.hub.repositories["org/model"].commits
    assert [commit.title for commit in commits.values()] == ["initial commit", "First", "Second"]
    assert commits[published.second].parent == published.first


def test_a_tag_pins_old_content_and_the_cache_works_offline(published: Published, tmp_path: Path):
    code = """
        main, tag = [Path(snapshot_download("org/model", revision=revision)) for revision in (None, "v1")]
        branch = hf_hub_download("org/model", "config.json", revision="try/out")
        configurations = [main / "config.json", tag / "config.json", Path(branch)]
        versions = [json.loads(path.read_text())["version"] for path in configurations]
        print(json.dumps([str(main), str(tag), versions]))
    """
    main, tag, versions = downloaded = run(published.hub, tmp_path, code)
    assert versions == [2, 1, 1]
    assert (Path(main).name, Path(tag).name) == (published.second, published.first)
    for file in (it for it in published.folder.rglob("*") if it.is_file()):
        assert (Path(tag) / file.relative_to(published.folder)).read_bytes() == file.read_bytes()
    assert published.statuses("GET", WEIGHTS) == [200]  # unchanged by the second commit: downloaded once

    asked = len(published.hub.requests)
    assert run(published.hub, tmp_path, code, HF_HUB_OFFLINE="1") == downloaded
    assert len(published.hub.requests) == asked


def test_a_commit_on_an_old_state_is_refused(published: Published, tmp_path: Path):
    code = """
        try:
            api.upload_file(
                repo_id="org/model", path_or_fileobj=b"", path_in_repo="late.txt", parent_commit=sys.argv[1]
            )
        except HfHubHTTPError as error:
            print(json.dumps([error.response.status_code, str(error)]))
    """
    status, message = run(published.hub, tmp_path, code, published.first)
    assert status == 412
    assert "A commit has happened since" in message
    assert "late.txt" not in published.hub.repositories["org/model"].at("main").files


def test_what_is_not_there_or_not_allowed_gives_the_errors_of_the_client(published: Published, tmp_path: Path):
    published.hub.repositories["org/gated"] = Repository("org/gated", private=False, gated=True)
    code = """
        def error(name, file="config.json", **options):
            try:
                hf_hub_download(name, file, **options)
            except (HfHubHTTPError, ValueError) as error:
                return [type(error).__name__, error.response.status_code]

        def card(text):
            try:
                api.upload_file(repo_id="org/model", path_or_fileobj=text, path_in_repo="README.md")
            except ValueError as error:
                return str(error)

        private = "tester/private-model"
        print(json.dumps({
            "repository": error("org/absent"),
            "repository without token": error("org/absent", token=False),
            "revision": error("org/model", revision="absent"),
            "file": error("org/model", "absent.json"),
            "private without token": error(private, token=False),
            "private, wrong token": error(private, token="hf_wrong"),
            "private": error(private),
            "gated": error("org/gated", ".gitattributes", token=False),
            "public without token": error("org/model", token=False),
            "card": card(b"---\\nlicense: [\\n---\\n"),
        }))
    """
    found = run(published.hub, tmp_path, code)
    assert "Invalid metadata in README.md" in found.pop("card")
    assert found == {
        "repository": ["RepositoryNotFoundError", 404],
        "repository without token": ["RepositoryNotFoundError", 401],
        "revision": ["RevisionNotFoundError", 404],
        "file": ["RemoteEntryNotFoundError", 404],
        "private without token": ["RepositoryNotFoundError", 401],
        "private, wrong token": ["HfHubHTTPError", 401],
        "private": None,
        "gated": ["GatedRepoError", 401],
        "public without token": None,
    }


DOWNLOAD = f'print(json.dumps(hf_hub_download("org/model", "{WEIGHTS}")))'


@pytest.mark.parametrize(("after", "second"), [(11 * MIB, 206), (MIB, 200)])
def test_a_download_that_is_cut_once_arrives_whole(published: Published, tmp_path: Path, after: int, second: int):
    """The client keeps whole 10 MiB and asks for the rest; cut before, it starts again."""
    published.hub.cut(WEIGHTS, after=after, times=1)
    path = run(published.hub, tmp_path, DOWNLOAD)
    assert Path(path).read_bytes() == published.weights
    assert published.statuses("GET", WEIGHTS) == [200, second]


def test_a_download_that_is_always_cut_leaves_nothing_in_the_cache(published: Published, tmp_path: Path):
    """The user sees httpx2's RemoteProtocolError (no OSError) after six attempts, a second apart."""
    published.hub.cut(WEIGHTS, after=MIB)
    done = run_python("-c", IMPORTS + DOWNLOAD, **published.hub.environment(tmp_path))
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("httpx2.RemoteProtocolError: peer closed connection")
    assert published.statuses("GET", WEIGHTS) == [200] * 6
    cache = tmp_path / "hub" / "models--org--model"
    assert list(cache.glob("blobs/*")) + list(cache.glob("snapshots/*/*")) == []

    published.hub.heal()
    assert Path(run(published.hub, tmp_path, DOWNLOAD)).read_bytes() == published.weights


def test_the_client_does_not_notice_content_of_the_right_length(published: Published, tmp_path: Path):
    """Why the package compares weights with published hashes itself."""
    published.hub.corrupt(WEIGHTS)
    path = Path(run(published.hub, tmp_path, DOWNLOAD))
    content, expected = path.read_bytes(), sha256(published.weights).hexdigest()
    assert len(content) == len(published.weights)
    assert np.count_nonzero(np.frombuffer(content, np.uint8) != np.frombuffer(published.weights, np.uint8)) == 16
    assert path.resolve().name == expected  # the cache calls it by the hash that it has not

    published.hub.heal()
    assert Path(run(published.hub, tmp_path, DOWNLOAD)).read_bytes() == content  # and keeps it


def test_parts_and_headers_of_a_file(published: Published):
    hub, size = published.hub, len(published.weights)
    address = f"/org/model/resolve/main/{WEIGHTS}"
    head, nothing = ask(hub, "HEAD", address)
    etag = f'"{sha256(published.weights).hexdigest()}"'
    expected = {"X-Repo-Commit": published.second, "ETag": etag, "X-Linked-Etag": etag, "X-Linked-Size": str(size)}
    assert {name: head.headers[name] for name in expected} == expected
    assert (head.headers["Content-Length"], head.headers["Accept-Ranges"], nothing) == (str(size), "bytes", b"")

    for asked, part in {"0-7": slice(0, 8), "-3": slice(size - 3, size), f"{size - 2}-": slice(size - 2, size)}.items():
        response, content = ask(hub, "GET", address, Range=f"bytes={asked}")
        assert (response.status, content) == (206, published.weights[part])
        assert response.headers["Content-Range"] == f"bytes {part.start}-{part.stop - 1}/{size}"
    response, _ = ask(hub, "GET", address, Range=f"bytes={size}-")
    assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{size}")

    response, content = ask(hub, "GET", "/org/model/resolve/main/config.json")
    # printf '{"version": 2}' | git hash-object --stdin
    assert (response.headers["ETag"], content) == ('"cdb829c33827a8c3f94748575609b4cf153dd3da"', b'{"version": 2}')


def test_uploads_need_the_user_and_the_announced_content(published: Published):
    hub, announced = published.hub, sha256(b"announced").hexdigest()
    response, content = ask(hub, "PUT", f"/lfs-objects/{announced}", b"something else")
    assert response.status == 400
    assert announced in json.loads(content)["error"]
    user = {"Authorization": "Bearer hf_secret"}
    lines = [
        {"key": "header", "value": {"summary": "Never uploaded"}},
        {"key": "lfsFile", "value": {"path": WEIGHTS, "oid": announced, "size": 9, "algo": "sha256"}},
    ]
    commit = "\n".join(map(json.dumps, lines)).encode()
    assert ask(hub, "POST", "/api/models/org/model/commit/main", commit)[0].status == 401
    assert ask(hub, "POST", "/api/models/org/model/commit/main", commit, **user)[0].status == 400
    verify = json.dumps({"oid": announced, "size": 9}).encode()
    assert ask(hub, "POST", f"/lfs-objects/{announced}/verify", verify, **user)[0].status == 404
    assert hub.repositories["org/model"].at("main").sha == published.second


def test_weights_large_files_and_binary_files_are_lfs_files(published: Published):
    sizes = {"small.safetensors": 3, "large.txt": 11 * MIB, "image.png": 3, "config.json": 3}
    samples = {name: b"\0\1\2" if name == "image.png" else b"abc" for name in sizes}
    files = [{"path": name, "size": size, "sample": b64encode(samples[name]).decode()} for name, size in sizes.items()]
    address, body = "/api/models/org/model/preupload/main", json.dumps({"files": files}).encode()
    _, content = ask(published.hub, "POST", address, body, Authorization="Bearer hf_secret")
    modes = {file["path"]: file["uploadMode"] for file in json.loads(content)["files"]}
    assert modes == dict.fromkeys(sizes, "lfs") | {"config.json": "regular"}


def test_an_unknown_request_is_kept():
    with LoopbackHub() as hub:
        assert ask(hub, "GET", "/api/papers/org/space?blobs=1")[0].status == 501
        assert ask(hub, "POST", "/api/whoami-v2")[0].status == 501
        assert hub.unexpected == ["GET /api/papers/org/space?blobs=1", "POST /api/whoami-v2"]
        assert hub.requests == [("GET", "/api/papers/org/space", 501), ("POST", "/api/whoami-v2", 501)]


def test_push_to_hub_simply_works(published: Published, tmp_path: Path):
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
    kind, processor, errors = run(published.hub, tmp_path / "cache", code, tmp_path / "model")
    assert (kind, processor) == ("MLVICXModel", "MLVICXImageProcessor")
    assert "is not a valid model identifier" in errors["org/absent"]
    assert "absent is not a valid git identifier" in errors["org/tiny"]
    copy = published.hub.repositories["org/copy"]
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
    assert run(published.hub, tmp_path / "remote", code) == ["transformers_modules"] * 2


def test_a_fault_of_the_server_is_kept():
    with LoopbackHub() as hub, pytest.raises(ConnectionError):
        ask(hub, "POST", "/api/validate-yaml", b"no JSON")
    assert len(hub.unexpected) == 1
    assert hub.unexpected[0].startswith("JSONDecodeError")
