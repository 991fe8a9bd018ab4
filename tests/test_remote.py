"""Shards on servers: the same samples as from local files, or an error that says what happened."""

import errno
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torchvision.transforms import ToTensor

from clipattr.data import remote, transfer, web
from clipattr.data.images import image_loader
from clipattr.data.index import build_index
from clipattr.data.pixels import Pixels
from clipattr.data.shards import find_shards, size_of, version_of
from clipattr.data.transfer import RemoteFile, TransferError
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.start import describe_shards
from clipattr.main import _message
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


@pytest.fixture
def urls(paths: list[Path], served: Served) -> str:
    for path in paths:
        served.put(f"/a/{path.name}", path.read_bytes())
    return f"{served.url}/a/{{0..2}}.tar"


# The same samples


@pytest.mark.parametrize("limit", [None, 0, "two shards"])
@pytest.mark.parametrize("has_cache", [True, False])
def test_index_and_samples_are_those_of_local_files(
    paths: list[Path],
    urls: str,
    tmp_path: Path,
    limit: int | str | None,
    has_cache: bool,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(remote, "BLOCK", 1000)  # a walk of many requests
    cache = tmp_path / "cache" if has_cache else None
    if limit == "two shards":
        limit = sum(path.stat().st_size for path in paths[:2])
    assert limit is None or isinstance(limit, int)
    shards = find_shards(urls, cache=cache, download_limit=limit)
    local, found = build_index(paths, cache=None), build_index(shards, cache=cache)
    assert contents(found) == contents(local)
    assert found.fingerprint == local.fingerprint
    assert [size_of(shard) for shard in shards] == [path.stat().st_size for path in paths]
    expected = {None: ["0.tar", "1.tar", "2.tar"], 0: []}.get(limit, ["0.tar", "1.tar"])
    assert copies(tmp_path / "cache") == (expected if has_cache else [])


def test_seeks_and_reads_are_those_of_a_file(urls: str, paths: list[Path]):
    shard = find_shards(urls)[2]
    with shard.open("rb") as ours, paths[2].open("rb") as theirs:
        for offset, whence, size in [(5, 0, 7), (-9, 2, 20), (-3, 1, 2), (0, 0, -1), (0, 2, 1)]:
            assert ours.seek(offset, whence) == theirs.seek(offset, whence)
            assert ours.read(size) == theirs.read(size)
            assert ours.tell() == theirs.tell()


def test_copy_and_table_are_used_again(urls: str, served: Served, tmp_path: Path):
    before = contents(build_index(find_shards(urls, cache=tmp_path), cache=tmp_path))
    served.requests.clear()
    shards = find_shards(urls, cache=tmp_path)
    assert len(served.requests) == 3
    assert contents(build_index(shards, cache=tmp_path)) == before
    assert len(served.requests) == 3


def test_shard_is_small_and_travels(urls: str, tmp_path: Path):
    shards = only_remote(find_shards(urls, cache=tmp_path))
    again = pickle.loads(pickle.dumps(shards[0]))
    assert again == shards[0]
    assert len({*shards, again}) == 3
    assert len(pickle.dumps(shards[0])) < 1000


def test_shards_of_one_name_have_their_own_copies(
    served: Served, paths: list[Path], tmp_path: Path
):
    """webdataset's cache_dir gives val the bytes of train."""
    specs = [served.put(f"/{p.stem}/0000.tar", p.read_bytes()) for p in paths[:2]]
    shards = [shard for spec in specs for shard in find_shards(spec, cache=tmp_path)]
    samples = contents(build_index(shards, cache=tmp_path))
    assert [key for key, _, _ in samples] == ["0-0", "0-1", "1-0", "1-1", "1-2"]
    assert copies(tmp_path) == ["0000.tar", "0000.tar"]


def test_replaced_shard_is_noticed(served: Served, paths: list[Path], tmp_path: Path):
    """Of the same size: the version alone tells."""
    old, new = (
        write_shard(tmp_path / f"{key}.tar", [sample(key)]).read_bytes() for key in ("a", "b")
    )
    url = served.put("/0.tar", old, '"1"')
    before = find_shards(url, cache=tmp_path)
    assert build_index(before, cache=tmp_path).key(0) == "a"
    described = describe_shards(url, "data.shards")
    served.put("/0.tar", new, '"2"')
    after = find_shards(url, cache=tmp_path)
    assert build_index(after, cache=tmp_path).key(0) == "b"
    assert version_of(after[0]) != version_of(before[0])
    assert describe_shards(url, "data.shards") != described


@pytest.mark.parametrize("is_copied", [True, False])
def test_shard_that_is_replaced_while_it_is_used(served: Served, tmp_path: Path, is_copied: bool):
    content = write_shard(tmp_path / "0.tar", [sample("a")]).read_bytes()
    url = served.put("/0.tar", content, '"1"')
    shards = find_shards(url, cache=tmp_path if is_copied else None)
    served.put("/0.tar", content, '"2"')
    with pytest.raises(DataError, match="it was replaced since it was found"):
        build_index(shards, cache=tmp_path)


# What servers do


def test_404_is_one_clear_error(urls: str, served: Served):
    del served.files["/a/1.tar"]
    with pytest.raises(DataError) as caught:
        find_shards(urls)
    expected = f"data.shards={urls!r}: {served.url}/a/1.tar cannot be read: HTTP 404 Not Found"
    assert str(caught.value) == expected
    assert served.count("/a/1.tar") == 1  # no retry


@pytest.mark.parametrize(("failures", "is_error"), [([500, 503], False), ([500] * 3, True)])
def test_trouble_of_the_server_is_waited_for(
    urls: str, served: Served, tmp_path: Path, failures: list[int | str], is_error: bool
):
    shards = find_shards(urls, cache=tmp_path)
    served.failures["/a/1.tar"] = failures
    if is_error:
        with pytest.raises(DataError, match=r"/a/1.tar: cannot be read: HTTP 500 .*; start again"):
            build_index(shards, cache=tmp_path)
    else:
        assert len(build_index(shards, cache=tmp_path)) == 9
    assert served.count("/a/1.tar") == 1 + 3


@pytest.mark.parametrize("is_copied", [True, False])
def test_cut_body_is_asked_for_again(
    urls: str, paths: list[Path], served: Served, tmp_path: Path, is_copied: bool
):
    shards = find_shards(urls, cache=tmp_path if is_copied else None)
    served.failures["/a/2.tar"] = ["cut", "cut"]
    assert contents(build_index(shards, cache=None)) == contents(build_index(paths, cache=None))
    served.failures["/a/2.tar"] = ["cut"] * 3
    for shard in only_remote(shards):
        shard.discard_copy()
    with pytest.raises(DataError, match=r"/a/2.tar: cannot be read: .*\d+ of \d+ bytes came"):
        build_index(shards, cache=None)
    assert copies(tmp_path) == (["0.tar", "1.tar"] if is_copied else [])


def test_server_that_ignores_ranges(urls: str, served: Served, tmp_path: Path):
    """Whole shards can be copied; a whole shard for each sample is refused."""
    shards = find_shards(urls)
    served.has_ranges = False
    with pytest.raises(DataError, match=f"{served.url}/a/0.tar would be read in parts.* Range"):
        find_shards(urls)
    assert [name for name, *_ in describe_shards(urls, "data.shards")] == [
        "0.tar",
        "1.tar",
        "2.tar",
    ]
    with pytest.raises(TransferError, match="ignores the header Range"):
        only_remote(shards)[0].read(0, 10)
    copied = find_shards(urls, cache=tmp_path)
    assert len(build_index(copied, cache=tmp_path)) == 9
    assert served.count("/a/0.tar", whole=True) == 1


def test_nobody_listens(served: Served, urls: str):
    with serve() as other:
        nobody = other.url
    with pytest.raises(DataError, match="0.tar cannot be read: no connection: .*refused"):
        find_shards(f"{nobody}/0.tar")


@pytest.mark.parametrize("target", ["file://{path}", "ftp://127.0.0.1/0.tar", "data:,x"])
def test_redirect_to_another_scheme_is_not_opened(served: Served, paths: list[Path], target: str):
    served.redirects["/0.tar"] = target.format(path=paths[0])
    with pytest.raises(DataError, match="HTTP 302: the server sends on to an address that is not"):
        find_shards(f"{served.url}/0.tar")


def test_redirect_is_followed_without_the_password(served: Served, paths: list[Path]):
    with serve() as other:
        served.redirects["/0.tar"] = other.put("/b.tar", paths[0].read_bytes())
        url = served.url.replace("://", "://user:pass%40word@") + "/0.tar"
        assert len(build_index(find_shards(url), cache=None)) == 2
        assert set(served.authorizations) == {"Basic dXNlcjpwYXNzQHdvcmQ="}
        assert set(other.authorizations) == {None}


def test_https_is_not_left():
    request = web.Request("https://host/a.tar")
    with pytest.raises(web.HTTPError) as caught:
        web._Redirects().redirect_request(
            request,
            fp=None,
            code=302,
            msg="",
            headers={},
            newurl="http://host/a.tar",
        )
    caught.value.close()


# One download


def _build(urls: str, cache: Path, start: Any) -> None:
    start.wait()
    assert len(build_index(find_shards(urls, cache=cache), cache=None)) == 9


def test_two_processes_download_once(urls: str, served: Served, tmp_path: Path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)
    processes = [context.Process(target=_build, args=(urls, tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [served.count(f"/a/{number}.tar", whole=True) for number in range(3)] == [1, 1, 1]


def _download_slowly(urls: str, cache: Path) -> None:
    def stream(file: RemoteFile) -> Iterator[bytes]:
        yield bytes(100)
        time.sleep(60)

    web.stream = stream  # pyright: ignore[reportAttributeAccessIssue]
    find_shards(urls, cache=cache)[0].open("rb")


def test_killed_download_is_not_taken_for_whole(urls: str, paths: list[Path], tmp_path: Path):
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_download_slowly, args=(urls, tmp_path))
    process.start()
    deadline = time.monotonic() + 20
    while not list((tmp_path / "shards").glob(".*.tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert copies(tmp_path) == []
    shards = find_shards(urls, cache=tmp_path)
    assert contents(build_index(shards, cache=None)) == contents(build_index(paths, cache=None))
    assert not list((tmp_path / "shards").glob(".*.tmp-*"))


def test_damaged_copy_is_fetched_again(urls: str, served: Served, tmp_path: Path):
    shards = only_remote(find_shards(urls, cache=tmp_path))
    assert shards[0].copy
    shards[0].open().close()
    shards[0].copy.write_bytes(bytes(300))
    with pytest.raises(DataError, match="0.tar, byte 0: truncated"):
        build_index(shards, cache=tmp_path)
    assert len(build_index(shards, cache=tmp_path)) == 9


def test_cache_that_is_full(urls: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remote, "atomic_file", fail)
    message = r"the cache '.*/shards' cannot hold a shard of \d+ bytes: No space left on device"
    with pytest.raises(ConfigError, match=message):
        build_index(find_shards(urls, cache=tmp_path), cache=None)


def test_nasty_names_stay_in_the_cache(served: Served, paths: list[Path], tmp_path: Path):
    name = "..%2F..%2Fx%00y%20" + "z" * 300 + ".tar"
    url = served.put(f"/{name}", paths[0].read_bytes())
    shards = find_shards(url, cache=tmp_path / "cache")
    assert len(build_index(shards, cache=None)) == 2
    (copy,) = (tmp_path / "cache" / "shards").glob("[!.]*")
    assert copy.name.endswith("zzz.tar")
    assert {path.name for path in tmp_path.iterdir()} == {"local", "cache"}


# The tool


def test_clipattr_index_reads_urls(
    urls: str, served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run_index([urls]) == 0
    assert "3 shards, 9 samples" in capsys.readouterr().out
    assert run_index([urls, "--cache", str(tmp_path)]) == 0
    assert copies(tmp_path) == ["0.tar", "1.tar", "2.tar"]
    served.requests.clear()
    build_index(find_shards(urls, cache=tmp_path), cache=tmp_path)
    assert len(served.requests) == 3
    assert run_index([urls, "--checksums"]) == 2
    assert f"{served.url}/a/0.tar: checksums stand beside" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
@pytest.mark.parametrize("workers", [0, 1])
def test_an_outage_stops_the_run_and_leaves_no_hole(urls: str, served: Served, workers: int):
    """A healthy image would be left out of a cache for ever."""
    index = build_index(find_shards(urls), cache=None)
    path = next(iter(served.files))
    served.failures[path] = [503] * 1000
    loader = image_loader(index, Pixels(ToTensor()), batch_size=2, workers=workers)
    with pytest.raises(TransferError, match="HTTP 503") as raised:
        list(loader)
    message = _message(raised.value)
    assert message.startswith(served.url)
    assert "Traceback" not in message
