"""A web server on the loopback device that serves bytes, and misbehaves when it is told to."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from clipattr.data.index import ShardIndex
from clipattr.data.remote import RemoteShard
from tests.tars import sample, write_shard


class Served:
    """The files of a server, how it answers for them, and the requests that came."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files: dict[str, bytes] = {}
        self.etags: dict[str, str] = {}
        self.has_ranges = True
        self.redirects: dict[str, str] = {}
        # Answers given before the file: status codes, or "cut" for half of what was announced.
        self.failures: dict[str, list[int | str]] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.authorizations: list[str | None] = []

    def put(self, path: str, content: bytes, etag: str = '"1"') -> str:
        """Serve a file; its URL."""
        self.files[path], self.etags[path] = content, etag
        return self.url + path

    def count(self, path: str, *, whole: bool = False) -> int:
        """How often a file was asked for; with `whole`, not in parts."""
        return sum(p == path and (r is None or not whole) for p, r in self.requests)


class _Handler(BaseHTTPRequestHandler):
    served: Served

    def do_GET(self) -> None:
        served = self.served
        path = self.path.partition("?")[0]
        asked = self.headers.get("Range")
        served.requests.append((path, asked))
        served.authorizations.append(self.headers.get("Authorization"))
        failures = served.failures.get(path)
        failure = failures.pop(0) if failures else None
        if isinstance(failure, int):
            self.send_error(failure)
        elif path in served.redirects:
            self.send_response(302)
            self.send_header("Location", served.redirects[path])
            self.end_headers()
        elif path not in served.files:
            self.send_error(404)
        else:
            self._send(path, asked, is_cut=failure == "cut")

    def _send(self, path: str, asked: str | None, *, is_cut: bool) -> None:
        content = self.served.files[path]
        size = len(content)
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or "")
        if found and self.served.has_ranges:
            first, last = int(found[1]), min(int(found[2]), size - 1)
            content = content[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if self.served.etags[path]:
            self.send_header("ETag", self.served.etags[path])
        self.end_headers()
        try:
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        except (BrokenPipeError, ConnectionResetError):  # it has read enough
            return

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def serve() -> Iterator[Served]:
    """A running server."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.served = Served(f"http://127.0.0.1:{server.server_port}")
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield handler.served
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def write_local(folder: Path) -> list[Path]:
    """Three shards of different sizes."""
    folder.mkdir()
    return [
        write_shard(
            folder / f"{number}.tar",
            [sample(f"{number}-{i}", bin=os.urandom(100 * i)) for i in range(number + 2)],
        )
        for number in range(3)
    ]


def contents(index: ShardIndex) -> list[tuple[str, str, dict[str, bytes]]]:
    found = [index.sample(row) for row in range(len(index))]
    return [(s.key, s.shard.name, {name: s.read(name) for name in s.fields}) for s in found]


def only_remote(shards: list[Any]) -> list[RemoteShard]:
    assert all(isinstance(shard, RemoteShard) for shard in shards)
    return shards


def copies(cache: Path) -> list[str]:
    return sorted(path.name[17:] for path in (cache / "shards").glob("[!.]*"))
