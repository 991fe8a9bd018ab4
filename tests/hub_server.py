"""A hub in this process: repositories, branches, commits (regular and LFS) and downloads."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import close_session, constants

OWNER, TOKEN = "somebody", "hf_the_token_of_somebody"


class HubServer(ThreadingHTTPServer):
    """`files[repository, branch][path]`; writing needs TOKEN, and so does what is private."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[str] = set()
        self.gated: set[str] = set()
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.status: int | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: HubServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = self.read_body()
        self.server.requests.append(f"{self.command} {path}")
        routes = [
            (r"/api/repos/create", self.create),
            (r"/api/validate-yaml", self.validate),
            (r"/api/models/([^/]+/[^/]+)/branch/(.+)", self.branch),
            (r"/api/models/([^/]+/[^/]+)/preupload/(.+)", self.preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/(.+)", self.commit),
            (r"/api/models/([^/]+/[^/]+)/revision/(.+)", self.revision),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", self.tree),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self.batch),
            (r"/upload/(\w+)", self.upload),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.resolve),
        ]
        if self.server.status is not None:
            self.reply({"error": "no"}, self.server.status)
            return
        for pattern, route in routes:
            match = re.fullmatch(pattern, path)
            if match:
                route(*match.groups())
                return
        self.reply({"error": f"no route for {path}"}, 500)

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def is_known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def may_write(self, owner: str) -> bool:
        if not self.is_known:
            self.reply({"error": "Invalid credentials"}, 401)
        elif owner != OWNER:
            self.reply({"error": f"no rights in {owner}"}, 403)
        return self.is_known and owner == OWNER

    def find(self, repository: str, revision: str) -> dict[str, bytes] | None:
        """The files of a branch, or of the commit that is its newest one."""
        is_shown = repository not in self.server.private or self.is_known
        branches = {
            name: files for (owner, name), files in self.server.files.items() if owner == repository
        }
        if not branches or not is_shown:
            self.reply({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        if repository in self.server.gated:
            self.reply({"error": "Access is restricted"}, 403, {"X-Error-Code": "GatedRepo"})
            return None
        for name, files in branches.items():
            if revision in (name, commit_of(files)):
                return files
        self.reply({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def create(self) -> None:
        asked = json.loads(self.body)
        owner, name = asked.get("organization") or OWNER, asked["name"]
        if self.may_write(owner):
            repository = f"{owner}/{name}"
            exists = (repository, "main") in self.server.files
            self.server.files.setdefault((repository, "main"), {})
            is_private = asked.get("private") or asked.get("visibility") == "private"
            if is_private and not exists:
                self.server.private.add(repository)
            url = {"url": f"{self.server.endpoint}/{repository}"}
            self.reply(url, 409 if exists else 200)

    def validate(self) -> None:
        text = json.loads(self.body)["content"]
        self.reply({"errors": [], "warnings": []} if text.startswith("---\n") else {}, 200)

    def branch(self, repository: str, branch: str) -> None:
        files = self.find(repository, "main")
        if files is not None and self.may_write(repository.partition("/")[0]):
            exists = (repository, branch) in self.server.files
            self.server.files.setdefault((repository, branch), dict(files))
            self.reply({}, 409 if exists else 200)

    def preupload(self, repository: str, revision: str) -> None:
        if self.find(repository, revision) is not None:
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.reply({"files": modes})

    def batch(self, _repository: str) -> None:
        objects = [
            {
                **each,
                "actions": {"upload": {"href": f"{self.server.endpoint}/upload/{each['oid']}"}},
            }
            for each in json.loads(self.body)["objects"]
        ]
        self.reply({"transfer": "basic", "objects": objects})

    def upload(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self.reply({})

    def commit(self, repository: str, revision: str) -> None:
        files = self.find(repository, revision)
        if files is None or not self.may_write(repository.partition("/")[0]):
            return
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
        commit = commit_of(files)
        url = f"{self.server.endpoint}/{repository}/commit/{commit}"
        self.reply({"success": True, "commitUrl": url, "commitOid": commit})

    def revision(self, repository: str, revision: str) -> None:
        files = self.find(repository, revision)
        if files is not None:
            siblings = [{"rfilename": name} for name in files]
            self.reply({"id": repository, "sha": commit_of(files), "siblings": siblings})

    def tree(self, repository: str, revision: str) -> None:
        files = self.find(repository, revision)
        if files is not None:
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(content),
                    "oid": commit_of({"": content}),
                }
                for name, content in files.items()
            ]
            self.reply(entries)

    def resolve(self, repository: str, revision: str, name: str) -> None:
        files = self.find(repository, revision)
        if files is None:
            return
        if name not in files:
            self.reply({}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        etag = hashlib.sha256(files[name]).hexdigest()
        self.reply(files[name], 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_of(files)})

    def log_message(self, format: str, *args: object) -> None:
        pass


def commit_of(files: dict[str, bytes]) -> str:
    state = hashlib.sha1()
    for name, content in sorted(files.items()):
        state.update(name.encode() + b"\0" + content)
    return state.hexdigest()


@contextmanager
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The hub, as HF_ENDPOINT and HF_HUB_CACHE would name it to a new process."""
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        use_endpoint(server.endpoint, monkeypatch)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server
        close_session()
        server.shutdown()
        thread.join()


def use_endpoint(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    close_session()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.split("/", 3)[3]
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{endpoint}/{template}")
    # Uploads go by LFS, for which the hub is asked where to.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
