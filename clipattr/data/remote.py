"""Shards on http(s) servers, in object stores and on the hub: read in parts, or copied once.

What a server says of a shard is asked once, when shards are found; a copy or an index belongs to
the full URL and the version that it named, so a replaced shard meets neither. Nothing is ever given
to a shell, and no name inside a shard becomes a path.
"""

import hashlib
import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote, urlsplit

from braceexpand import braceexpand
from filelock import FileLock

from clipattr.atomic import atomic_file, sweep_temporary
from clipattr.data import objects, web
from clipattr.data.transfer import LostConnectionError, RemoteFile, TransferError, retry
from clipattr.errors import ConfigError, DataError
from clipattr.redact import hide_secrets

SCHEMES = (*web.SCHEMES, *objects.SCHEMES)
# Requests at a time while shards are found: thousands, one by one, would take minutes.
THREADS = 16
# A walk over the headers of a shard that is not copied reads so many bytes at a time.
BLOCK = 4 << 20


@dataclass(frozen=True, repr=False)
class RemoteShard:
    """A shard that is read from its server, or from its copy on this machine.

    What reads a `Path` of a local shard can read this. The URL that it shows has no secrets.

    Attributes:
        file: what the server said.
        copy: where the copy is kept; it is made when it is first read. None: only parts are read.
    """

    file: RemoteFile
    copy: Path | None = None

    def __str__(self) -> str:
        return hide_secrets(self.file.url)

    def __repr__(self) -> str:
        return f"RemoteShard({str(self)!r})"

    @property
    def name(self) -> str:
        """The last part of the URL."""
        is_web = self.file.url.startswith(web.SCHEMES)
        path = unquote(urlsplit(self.file.url).path) if is_web else self.file.url
        return path.rpartition("/")[2]

    @property
    def size(self) -> int:
        """In bytes."""
        return self.file.size

    @property
    def version(self) -> str:
        """Another text when the shard was replaced."""
        return self.file.version

    def is_file(self) -> bool:
        """It was there when it was found."""
        return True

    def open(
        self, mode: Literal["rb"] = "rb", buffering: int = io.DEFAULT_BUFFER_SIZE
    ) -> io.BufferedReader:
        """The bytes of the shard, seekable.

        Raises:
            OSError: when they cannot be fetched.
            ConfigError: when the copy cannot be written.
        """
        if self.copy is None:
            return io.BufferedReader(_Parts(self.file), max(buffering, BLOCK))
        try:
            copy = io.FileIO(self.copy, mode)
        except FileNotFoundError:
            _download(self.file, self.copy)
            copy = io.FileIO(self.copy, mode)
        return io.BufferedReader(copy, buffering)

    def read(self, offset: int, size: int) -> bytes:
        """A part of the shard: one request, or one read of the copy. Errors are those of `open`."""
        if self.copy is None:
            return retry(partial(_read_part, self.file, offset, size))
        with self.open() as file:
            file.seek(offset)
            return file.read(size)

    def discard_copy(self) -> None:
        """Forget a copy that turned out to be damaged: the next run fetches it again."""
        if self.copy is not None:
            self.copy.unlink(missing_ok=True)


Shard = Path | RemoteShard


def find_remote(
    spec: str, setting: str, *, cache: Path | None, download_limit: int | None
) -> list[RemoteShard]:
    """The shards that a URL, a brace pattern of URLs or a folder in a store names.

    They are copied to the cache in their order, as long as the sum of their sizes is within the
    limit; of the others, and of all without a cache, parts are read.
    """
    shown = f"{setting}={hide_secrets(spec)!r}"
    urls = _expand(spec, setting)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="find") as pool:
        found = [file for files in pool.map(partial(_find, shown=shown), urls) for file in files]
    if not found:
        raise DataError(f"{shown}: the folder holds no .tar file")
    total = 0
    shards = []
    for file in found:
        total += file.size
        is_copied = cache is not None and (download_limit is None or total <= download_limit)
        shards.append(RemoteShard(file, _copy_of(file, cache) if cache and is_copied else None))
    _check_ranges(shards, shown)
    return shards


def _expand(spec: str, setting: str) -> list[str]:
    try:
        urls = list(braceexpand(spec))
    except ValueError as error:
        raise DataError(
            f"{setting}={hide_secrets(spec)!r} is no brace pattern: {hide_secrets(str(error))}"
        ) from None
    for url in urls:
        _check_url(url, setting)
    return [scheme.lower() + rest for scheme, rest in (_split_scheme(url) for url in urls)]


def _split_scheme(url: str) -> tuple[str, str]:
    scheme, colon, rest = url.partition(":")
    return scheme, colon + rest


def _check_url(url: str, setting: str) -> None:
    """Of what is refused here no more than the scheme is shown: it may be a command, or a key."""
    scheme, rest = _split_scheme(url)
    if scheme.lower() not in SCHEMES or not rest.startswith("://"):
        raise DataError(
            f"{setting} names a shard with {scheme}:, which is not opened; allowed are local "
            f"paths and {', '.join(f'{name}://' for name in SCHEMES)}"
        )
    try:
        parts = urlsplit(url)
        is_valid = parts.netloc != "" and parts.port != 0
    except ValueError:
        parts, is_valid = urlsplit(""), False
    if not is_valid:
        raise DataError(f"{setting} names a URL with {scheme}:// whose host or port is not valid")
    if scheme.lower() not in web.SCHEMES:
        return
    if " " in url or not url.isprintable():
        raise DataError(f"{setting} names a URL with {scheme}:// that holds blanks: write %20")
    if parts.fragment:
        raise DataError(f"{setting}: in {hide_secrets(url)!r}, write '#' as %23")
    if parts.path.endswith("/") or not parts.path:
        raise DataError(
            f"{setting}={hide_secrets(url)!r}: a folder of a web server cannot be listed; name "
            "its shards with a brace pattern, such as https://host/{000..011}.tar"
        )


def _find(url: str, shown: str) -> list[RemoteFile]:
    try:
        if url.startswith(web.SCHEMES):
            return [retry(partial(web.ask, url))]
        return retry(partial(objects.find, url))
    except TransferError as error:
        raise DataError(f"{shown}: {hide_secrets(url)} cannot be read: {error}") from None


def _check_ranges(shards: Sequence[RemoteShard], shown: str) -> None:
    for shard in shards:
        if shard.copy is None and not shard.file.has_ranges:
            raise DataError(
                f"{shown}: {shard} would be read in parts, but its server ignores the header "
                "Range and sends whole files: set a cache and a download limit that hold it"
            )


def _copy_of(file: RemoteFile, cache: Path) -> Path:
    """Shards of one name, and versions of one shard, have different copies."""
    identity = hashlib.sha256(json.dumps([file.url, file.version, file.size]).encode())
    name = re.sub(r"[^A-Za-z0-9._-]", "_", RemoteShard(file).name)[-100:]
    return cache / "shards" / f"{identity.hexdigest()[:16]}-{name}"


def _read_part(file: RemoteFile, offset: int, size: int) -> bytes:
    if size <= 0:
        return b""
    read = web.read if file.url.startswith(web.SCHEMES) else objects.read
    content = read(file, offset, size)
    if len(content) != size:
        raise LostConnectionError(f"{len(content)} of {size} bytes came from byte {offset} on")
    return content


def _download(file: RemoteFile, copy: Path) -> None:
    """Make the copy, once for all processes that share the folder; it is whole or not there."""
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name(f".{copy.name}.lock")):
            if copy.exists():
                return
            sweep_temporary(copy.parent)
            with atomic_file(copy) as target:
                retry(partial(_transfer, file, target))
    except TransferError:
        raise
    except OSError as error:
        raise ConfigError(
            f"the cache {str(copy.parent)!r} cannot hold a shard of {file.size} bytes: "
            f"{error.strerror}. data.download_limit bounds what is copied"
        ) from error


def _transfer(file: RemoteFile, target: BinaryIO) -> None:
    target.seek(0)
    target.truncate()
    stream = web.stream if file.url.startswith(web.SCHEMES) else objects.stream
    size = 0
    for piece in stream(file):
        size += target.write(piece)
    if size != file.size:
        raise LostConnectionError(f"{size} of {file.size} bytes came")


class _Parts(io.RawIOBase):
    """The shard as a file each of whose reads is a request."""

    def __init__(self, file: RemoteFile) -> None:
        self.name = hide_secrets(file.url)
        self.mode = "rb"
        self._file = file
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}
        self._position = start[whence] + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._file.size - self._position)
        content = retry(partial(_read_part, self._file, self._position, size))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)
