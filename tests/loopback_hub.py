"""A Hugging Face Hub on this machine: models, datasets, their history, and the faults of a bad connection.

It speaks as much of the Hub's HTTP protocol as `huggingface_hub` 2.4 (without Xet), transformers 5.23 and `datasets`
5.2 use, so that tests run the real clients against it, in fresh processes (they read their environment when imported):

    with LoopbackHub(token="hf_secret") as hub:
        run_python("-c", code, **hub.environment(tmp_path))

A dataset is known as `datasets/org/name`, a Space as `spaces/org/name`. Not there: running Spaces, pull requests,
deleting or changing repositories and references, `.gitignore` rules, pages of long listings, Xet. A request for what is
not there is answered with 501 and kept in `hub.unexpected`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
LFS_SIZE = 10 * 1024 * 1024  # bytes; larger files are LFS files whatever they hold


# What is stored


def git_hash(kind: str, content: bytes) -> str:
    """SHA-1 hash by which git names an object."""
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class StoredFile:
    """One version of a file; git itself holds only a pointer to an LFS file."""

    content: bytes
    is_lfs: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        version = "version https://git-lfs.github.com/spec/v1"
        return f"{version}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @cached_property
    def blob_id(self) -> str:
        return git_hash("blob", self.pointer if self.is_lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.is_lfs else self.blob_id

    def listing(self, path: str) -> dict[str, Any]:
        """Its entry in a listing of the tree."""
        size = len(self.content)
        lfs = {"lfs": {"oid": self.sha256, "size": size, "pointerSize": len(self.pointer)}} if self.is_lfs else {}
        return {"type": "file", "path": path, "size": size, "oid": self.blob_id, **lfs}


@dataclass(frozen=True)
class Commit:
    """All files at one point of the history."""

    sha: str
    parent: str | None
    title: str
    files: dict[str, StoredFile]

    def entries(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder ("" for the root); none if there is no such folder."""
        listing = {path: file.listing(path) for path, file in self.files.items()}
        for parent in {str(parent) for path in self.files for parent in PurePosixPath(path).parents if parent.name}:
            tree_id = git_hash("tree", f"{self.sha} {parent}".encode())
            listing[parent] = {"type": "directory", "path": parent, "size": 0, "oid": tree_id}
        return [
            listing[path]
            for path in sorted(listing)
            if PurePosixPath(folder) in (PurePosixPath(path).parents if recursive else [PurePosixPath(path).parent])
        ]


@dataclass
class Repository:
    """A model or dataset with its history; a new one holds what the Hub puts there."""

    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        self.commit("main", "initial commit", {".gitattributes": StoredFile(attributes, is_lfs=False)})

    def commit(self, branch: str, title: str, files: dict[str, StoredFile]) -> Commit:
        """Put a commit with these files on a branch."""
        parent = self.branches.get(branch)
        tree = [f"{path} {file.blob_id}" for path, file in sorted(files.items())]
        sha = git_hash("commit", "\n".join([self.name, str(parent), title, *tree]).encode())
        self.commits[sha] = Commit(sha, parent, title, files)
        self.branches[branch] = sha
        return self.commits[sha]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, a tag or a hash names (also the first seven characters or more of one)."""
        sha = self.branches.get(revision) or self.tags.get(revision)
        if sha is None and len(revision) >= 7:
            sha = next((known for known in self.commits if known.startswith(revision)), None)
        if sha is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[sha]


# The server


class Request(NamedTuple):
    """What was asked and answered."""

    method: str
    path: str
    status: int


@dataclass
class Cut:
    """A connection that breaks after so many bytes, the next `times` times or always."""

    after: int
    times: int | None


class Server(ThreadingHTTPServer):
    """Listens, and keeps its own faults for `hub.unexpected`, where a test sees them."""

    request_queue_size = 64  # the client downloads in eight threads

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        super().__init__(("127.0.0.1", 0), partial(HubRequest, hub))

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if not isinstance(error, ConnectionError):  # a client that was killed
            self.hub.unexpected.append(repr(error))


class LoopbackHub:
    """A Hub on 127.0.0.1 while the `with` block runs, with one user, who may read and write everything.

    Args:
        token: of the user. Without it public repositories can be read; with another one nothing.
    """

    def __init__(self, token: str = "hf_loopback") -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS files by SHA-256 hash
        self.requests: list[Request] = []
        self.unexpected: list[str] = []
        self.lock = threading.Lock()
        self._cuts: dict[str, Cut] = {}
        self._corrupted: set[str] = set()
        self._server = Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, cache: Path, token: str | None = None) -> dict[str, str]:
        """Variables for a child process that uses this Hub.

        Args:
            cache: folder of the child's own cache, which a later child may share.
            token: the user's if None; "" for nobody's.
        """
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token if token is None else token,
            "HUGGING_FACE_HUB_TOKEN": "",  # older name of HF_TOKEN, read where that is empty
            "HF_TOKEN_PATH": str(cache / "token"),
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_MODULES_CACHE": str(cache / "modules"),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",  # for which transformers asks a server on the internet
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def cut(self, path: str, after: int, times: int | None = None) -> None:
        """Close the connection after so many bytes of the answer, the next `times` downloads of the file or always."""
        self._cuts[path] = Cut(after, times)

    def corrupt(self, path: str) -> None:
        """Flip the lowest bit of up to 16 bytes in the middle of a file when it is sent; headers stay as they are."""
        self._corrupted.add(path)

    def heal(self) -> None:
        """Take all faults away."""
        self._cuts.clear()
        self._corrupted.clear()

    def content_to_send(self, path: str, content: bytes) -> bytes:
        """Content of a file, with its fault."""
        if path not in self._corrupted:
            return content
        middle = len(content) // 2
        return content[:middle] + bytes(byte ^ 1 for byte in content[middle : middle + 16]) + content[middle + 16 :]

    def next_cut(self, path: str) -> int | None:
        """Number of bytes after which this download of a file breaks, if it does."""
        cut = self._cuts.get(path)
        if cut is None or cut.times == 0:
            return None
        if cut.times is not None:
            cut.times -= 1
        return cut.after


# The protocol


@dataclass
class Reply:
    """Body (JSON unless bytes), status and headers of an answer, and the bytes after which the connection breaks."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None


class HubError(Exception):
    """An answer that says what is wrong; the client chooses its exception by `X-Error-Code`."""

    def __init__(self, status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        error = {"X-Error-Message": message, "X-Error-Code": code} if code else {"X-Error-Message": message}
        self.reply = Reply({"error": message}, status, error | (headers or {}))


Answer = Callable[..., Reply]
ROUTES: list[tuple[str, re.Pattern[str], bool, Answer]] = []
REPOSITORY = "(?P<repository>[^/]+/[^/]+)"
DATASET = "(?:(?P<kind>datasets|spaces)/)?"  # models have nothing in front of their name
API = f"/api/(?P<kind>models|datasets|spaces)/{REPOSITORY}"
REVISION = "(?P<revision>[^/]+)"


def route(method: str, pattern: str, needs_user: bool = False) -> Callable[[Answer], Answer]:
    """Let a method answer requests whose path is the pattern, a regular expression; its groups are the arguments."""

    def register(answer: Answer) -> Answer:
        ROUTES.append((method, re.compile(pattern), needs_user, answer))
        return answer

    return register


def front_matter(readme: str) -> Any:
    """Metadata of a card, {} without; YAML's own errors pass."""
    block = re.match(r"---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    return (yaml.safe_load(block[1]) if block else None) or {}


def requested_part(header: str, size: int) -> slice:
    """Which bytes of a file a Range header asks for."""
    match = re.fullmatch(r"bytes=(\d+)-(\d*)|bytes=-(\d+)", header)
    assert match, f"{header!r}: no single range"
    first, last, length = match.groups()
    start = int(first) if first else max(size - int(length), 0)
    stop = min(int(last) + 1, size) if last else size
    if start >= stop:
        raise HubError(416, f"{header} of a file of {size} bytes", headers={"Content-Range": f"bytes */{size}"})
    return slice(start, stop)


class HubRequest(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    query: dict[str, list[str]]
    body: bytes

    def __init__(self, hub: LoopbackHub, *args: Any) -> None:
        self.hub = hub
        super().__init__(*args)

    def log_message(self, format: str, *args: Any) -> None:
        """Not printed: `hub.requests` has them."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.hub.lock:
            try:
                reply = self._dispatch(url.path)
            except HubError as error:
                reply = error.reply
            # Before it is sent: a test whose client has the answer also finds the request.
            self.hub.requests.append(Request(self.command, url.path, reply.status))
        self._send(reply)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def _dispatch(self, path: str) -> Reply:
        token = self.headers.get("Authorization")
        method = "GET" if self.command == "HEAD" else self.command
        for known_method, pattern, needs_user, answer in ROUTES:
            match = pattern.fullmatch(path)
            if known_method != method or match is None:
                continue
            if token not in (None, f"Bearer {self.hub.token}"):
                raise HubError(401, "Invalid credentials in Authorization header")
            if needs_user and token is None:
                raise HubError(401, "Invalid username or password.")
            groups: dict[str, Any] = {name: unquote(value or "") for name, value in match.groupdict().items()}
            if "repository" in groups:
                kind = groups.pop("kind")
                folder = f"{kind}/" if kind in ("datasets", "spaces") else ""
                groups["repository"] = self._repository(folder + groups["repository"])
            return answer(self, **groups)
        raise self._unexpected()

    def _send(self, reply: Reply) -> None:
        body = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: reply.cut_after])
            self.close_connection |= reply.cut_after is not None

    def _unexpected(self) -> HubError:
        self.hub.unexpected.append(f"{self.command} {self.path}")
        return HubError(501, f"not there: {self.command} {self.path}")

    def _signed_in(self) -> bool:
        return "Authorization" in self.headers  # a wrong token does not come this far

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        hidden = repository is not None and repository.private and not self._signed_in()
        if repository is None or hidden:
            raise HubError(404 if self._signed_in() else 401, "Repository not found", "RepoNotFound")
        return repository

    @route("GET", "/api/whoami-v2", needs_user=True)
    def who_am_i(self) -> Reply:
        access = {"accessToken": {"displayName": "loopback", "role": "write"}}
        return Reply({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": access})

    @route("POST", "/api/repos/create", needs_user=True)
    def create_repository(self) -> Reply:
        wanted = json.loads(self.body)
        kind = wanted.get("type", "model")
        if kind not in ("model", "dataset", "space") or (kind == "space") != ("sdk" in wanted):
            raise self._unexpected()
        name = f"{'' if kind == 'model' else f'{kind}s/'}{wanted['organization'] or USER}/{wanted['name']}"
        url = {"url": f"{self.hub.endpoint}/{name}"}
        if name in self.hub.repositories:
            return Reply(url | {"error": f"You already created this {kind} repo"}, 409)
        self.hub.repositories[name] = Repository(name, private=wanted.get("visibility") == "private")
        return Reply(url)

    @route("POST", "/api/validate-yaml")
    def validate_card(self) -> Reply:
        """Only whether it is YAML; the Hub also checks what it says."""
        try:
            metadata = front_matter(json.loads(self.body)["content"])
        except yaml.YAMLError as error:
            return Reply({"errors": [{"message": str(error)}]}, 400)
        return Reply({"warnings": [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]})

    @route("POST", f"{API}/preupload/{REVISION}", needs_user=True)
    def choose_upload(self, repository: Repository, revision: str) -> Reply:
        stored = repository.at(revision).files
        files = []
        for file in json.loads(self.body)["files"]:
            path, is_text = file["path"], b"\0" not in base64.b64decode(file["sample"])
            is_lfs = path.endswith(".safetensors") or file["size"] > LFS_SIZE or not is_text
            known = {"oid": stored[path].etag} if path in stored else {}
            files.append({"path": path, "uploadMode": "lfs" if is_lfs else "regular", "shouldIgnore": False, **known})
        return Reply({"files": files})

    @route("POST", rf"/{DATASET}{REPOSITORY}\.git/info/lfs/objects/batch", needs_user=True)
    def announce_objects(self, repository: Repository) -> Reply:
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            address = f"{self.hub.endpoint}/lfs-objects/{wanted['oid']}"
            actions = {"actions": {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}}
            objects.append(wanted | ({} if wanted["oid"] in self.hub.objects else actions))
        return Reply({"transfer": "basic", "objects": objects})

    @route("PUT", "/lfs-objects/(?P<oid>[0-9a-f]{64})")
    def store_object(self, oid: str) -> Reply:
        found = hashlib.sha256(self.body).hexdigest()
        if found != oid:
            raise HubError(400, f"SHA-256 hash {found} found; expected {oid}")
        self.hub.objects[oid] = self.body
        return Reply({})

    @route("POST", "/lfs-objects/(?P<oid>[0-9a-f]{64})/verify", needs_user=True)
    def verify_object(self, oid: str) -> Reply:
        size = json.loads(self.body)["size"]
        if oid not in self.hub.objects or len(self.hub.objects[oid]) != size:
            raise HubError(404, f"no object {oid} of {size} bytes")
        return Reply({})

    @route("POST", f"{API}/commit/{REVISION}", needs_user=True)
    def add_commit(self, repository: Repository, revision: str) -> Reply:
        if "create_pr" in self.query:
            raise self._unexpected()
        if revision not in repository.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        head = repository.at(revision)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        if not head.sha.startswith(header["value"].get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(head.files)
        for operation in operations:
            self._apply(operation["key"], operation["value"], files)
        commit = repository.commit(revision, header["value"]["summary"], files)
        url = f"{self.hub.endpoint}/{repository.name}/commit/{commit.sha}"
        return Reply({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, StoredFile]) -> None:
        """Change the files by one operation of a commit."""
        path = value["path"]
        if key == "file":
            files[path] = StoredFile(base64.b64decode(value["content"]), is_lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise HubError(400, f"{path}: {value['oid']} was not uploaded")
            files[path] = StoredFile(self.hub.objects[value["oid"]], is_lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise self._unexpected()

    @route("GET", f"{API}/refs")
    def list_references(self, repository: Repository) -> Reply:
        def listed(kind: str, names: dict[str, str]) -> list[dict[str, str]]:
            return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

        branches, tags = listed("heads", repository.branches), listed("tags", repository.tags)
        return Reply({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("POST", f"{API}/branch/(?P<name>[^/]+)", needs_user=True)
    def create_branch(self, repository: Repository, name: str) -> Reply:
        return self._refer(repository.branches, name, repository.at(json.loads(self.body).get("startingPoint", "main")))

    @route("POST", f"{API}/tag/{REVISION}", needs_user=True)
    def create_tag(self, repository: Repository, revision: str) -> Reply:
        return self._refer(repository.tags, json.loads(self.body)["tag"], repository.at(revision))

    def _refer(self, references: dict[str, str], name: str, commit: Commit) -> Reply:
        if name in references:
            raise HubError(409, f"{name} already exists")
        references[name] = commit.sha
        return Reply({}, 201)

    @route("GET", f"{API}(?:/revision/{REVISION})?")
    def describe_repository(self, repository: Repository, revision: str) -> Reply:
        commit = repository.at(revision or "main")
        readme = commit.files.get("README.md")
        card = front_matter(readme.content.decode()) if readme else {}
        derived = {name: card[name] for name in ("tags", "pipeline_tag", "library_name") if name in card}
        identity = {
            "id": repository.name.removeprefix("datasets/").removeprefix("spaces/"),
            "sha": commit.sha,
            "private": repository.private,
            "gated": False,
        }
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return Reply({**identity, "siblings": siblings, **derived, "cardData": card})

    @route("GET", f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?")
    def list_tree(self, repository: Repository, revision: str, folder: str) -> Reply:
        recursive = self.query.get("recursive", [""])[0].lower() == "true"
        entries = repository.at(revision).entries(folder, recursive)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return Reply(entries)

    @route("POST", f"{API}/paths-info/{REVISION}")
    def describe_paths(self, repository: Repository, revision: str) -> Reply:
        wanted = parse_qs(self.body.decode())["paths"]
        entries = repository.at(revision).entries("", recursive=True)
        return Reply([entry for entry in entries if entry["path"] in wanted])

    @route("GET", f"/{DATASET}{REPOSITORY}/resolve/{REVISION}/(?P<path>.+)")
    def download(self, repository: Repository, revision: str, path: str) -> Reply:
        commit = repository.at(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        file = commit.files[path]
        size = len(file.content)
        headers["ETag"] = f'"{file.etag}"'
        if file.is_lfs:
            headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(size)}
        if self.command == "HEAD":
            return Reply(file.content, 200, headers)
        content, status = self.hub.content_to_send(path, file.content), 200
        if "Range" in self.headers:
            part = requested_part(self.headers["Range"], size)
            content, status = content[part], 206
            headers["Content-Range"] = f"bytes {part.start}-{part.stop - 1}/{size}"
        return Reply(content, status, headers, self.hub.next_cut(path))
