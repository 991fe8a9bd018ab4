"""Object stores, what is refused, and secrets in URLs."""

import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from clipattr.data import objects, transfer
from clipattr.data.check import check_shards
from clipattr.data.index import build_index
from clipattr.data.shards import find_shards
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.start import describe_shards
from clipattr.tools import run_index
from tests.remote_server import Served, contents, copies, only_remote, serve, write_local
from tests.tars import sample, write_shard


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def served() -> Iterator[Served]:
    with serve() as server:
        yield server


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return write_local(tmp_path / "local")


# Secrets


def test_secrets_are_used_and_never_shown(
    served: Served, paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    url = served.put("/0.tar", paths[0].read_bytes())
    signed = url.replace("://", "://user:hunter2@") + "?X-Signature=s3cr3t&b=1,2"
    (shard,) = only_remote(find_shards(signed, cache=tmp_path))
    shown = [str(shard), repr(shard), repr(shard.file), shard.name, repr(copies(tmp_path))]
    assert shown[0] == url
    shown.append(str(describe_shards(signed, "data.shards")))
    missing = signed.replace("0.tar", "1.tar")
    for wrong in (missing, missing + "{", missing.replace("8", "x"), signed.replace("0.tar", "")):
        with pytest.raises(DataError) as caught:
            find_shards(wrong)
        shown.append("".join(traceback.format_exception(caught.value)))
    served.failures["/0.tar"] = [500] * 9
    shown.append(str(check_shards([shard]).problems))
    with pytest.raises(DataError) as caught:
        build_index([shard], cache=tmp_path)
    shown.append("".join(traceback.format_exception(caught.value)))
    assert run_index([missing]) == 2
    shown.append(str(capsys.readouterr()))
    for text in shown:
        assert "s3cr3t" not in text
        assert "hunter2" not in text
    assert set(served.authorizations) == {"Basic dXNlcjpodW50ZXIy"}


# What is refused


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("pipe:curl http://h/0.tar?k=s3cr3t", "with pipe:, which is not opened; .*s3://, gs://"),
        ("{pipe:,http://h/}0.tar", "with pipe:, which is not opened"),
        ("file:///etc/passwd", "with file:, which is not opened; allowed are local paths"),
        ("ftp://host/s3cr3t.tar", "with ftp:, which is not opened"),
        ("http:/host/0.tar://", "with http:, which is not opened"),
        ("http://host/train/", "cannot be listed; name its shards with a brace pattern"),
        ("http://host/{0..1.tar", "is no brace pattern"),
        ("http://host:x/0.tar", "whose host or port is not valid"),
        ("http:///0.tar", "whose host or port is not valid"),
        ("http://host/a b.tar?s3cr3t", "that holds blanks: write %20"),
        ("http://host/a#b.tar", "write '#' as %23"),
    ],
)
def test_what_is_not_opened(spec: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        find_shards(spec)
    assert "s3cr3t" not in str(caught.value)


@pytest.mark.parametrize("name", ["a#b.tar", "a?b.tar", "a%20b.tar", "http:b.tar"])
def test_local_names_are_names(tmp_path: Path, name: str):
    path = write_shard(tmp_path / name, [sample("a")])
    assert find_shards(str(path)) == [path]
    assert len(build_index([path], cache=tmp_path)) == 1


# Object stores


class Memory(MemoryFileSystem):
    """What s3fs is to fsspec: the same calls, another protocol."""

    protocol = "s3"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    etags: dict[str, str] = {}
    known: dict[str, dict[str, Any]] = {}  # s3fs, too, remembers what it was told

    def invalidate_cache(self, path: str | None = None) -> None:
        self.known.clear()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("s3://").strip("/")

    def _with_etag(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in entry.items() if k != "created"} | {
            "ETag": self.etags.get(entry["name"], "1")
        }

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        if path not in self.known:
            self.known[path] = self._with_etag(super().info(path, **kwargs))
        return self.known[path]

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        entries = super().ls(path, detail=detail, **kwargs)
        return [self._with_etag(entry) for entry in entries] if detail else entries


@pytest.fixture
def bucket(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> Memory:
    monkeypatch.setitem(_registry, "s3", Memory)
    monkeypatch.setattr(Memory, "store", {})
    monkeypatch.setattr(Memory, "etags", {})
    monkeypatch.setattr(Memory, "known", {})
    files = Memory()
    for path in reversed(paths):
        files.pipe(f"s3://bucket/train/{path.name}", path.read_bytes())
    files.pipe("s3://bucket/train/notes.txt", b"no shard")
    files.pipe("s3://bucket/train/deeper/9.tar", b"not in this folder")
    files.pipe("s3://bucket/empty/notes.txt", b"no shard")
    return files


@pytest.mark.parametrize("spec", ["train/", "train", "train/{0..2}.tar", "train/{0,1,2}.tar"])
@pytest.mark.parametrize("is_copied", [True, False])
def test_object_stores(
    bucket: Memory, paths: list[Path], tmp_path: Path, spec: str, is_copied: bool
):
    shards = find_shards(f"s3://bucket/{spec}", cache=tmp_path if is_copied else None)
    assert [str(shard) for shard in shards] == [f"s3://bucket/train/{n}.tar" for n in range(3)]
    index = build_index(shards, cache=tmp_path)
    assert contents(index) == contents(build_index(paths, cache=None))
    assert copies(tmp_path) == (["0.tar", "1.tar", "2.tar"] if is_copied else [])


def test_version_of_an_object(bucket: Memory):
    before = find_shards("s3://bucket/train/0.tar")
    assert find_shards("s3://bucket/train/0.tar") == before
    assert find_shards("s3://bucket/train/")[:1] == before
    bucket.etags["/bucket/train/0.tar"] = "2"
    assert find_shards("s3://bucket/train/0.tar") != before


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("train/{0..3}.tar", "s3://bucket/train/3.tar cannot be read: there is no such object"),
        ("nowhere/", "s3://bucket/nowhere/ cannot be read: there is no such object or folder"),
        ("empty/", "the folder holds no .tar file"),
    ],
)
def test_objects_that_are_not_there(bucket: Memory, spec: str, message: str):
    with pytest.raises(DataError, match=message):
        find_shards(f"s3://bucket/{spec}")


@pytest.mark.parametrize(
    ("error", "message", "tries"),
    [
        (PermissionError(), "the store refuses access: check your login", 1),
        (RuntimeError("no keys"), "RuntimeError: no keys", 1),
        (OSError("https://h/x?sig=s3cr3t is slow"), "https://h/x is slow", 3),
    ],
)
def test_troubles_of_a_store(
    bucket: Memory, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, tries: int
):
    calls = []

    def fail(*_: object, **__: object) -> None:
        calls.append(1)
        raise error

    monkeypatch.setattr(Memory, "info", fail)
    with pytest.raises(DataError, match=f"s3://bucket/0.tar cannot be read: {message}"):
        find_shards("s3://bucket/0.tar")
    assert len(calls) == tries


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    def fail(scheme: str) -> None:
        raise ImportError(f"Install {scheme} package")

    monkeypatch.setattr(objects.fsspec, "filesystem", fail)
    with pytest.raises(ConfigError, match=r"gs:// needs a package .*pip install 'clipattr\[gs\]'"):
        find_shards("gs://bucket/0.tar")
