"""Files of object stores and of the Hugging Face hub, through their fsspec packages.

Keys and tokens are what those packages find by themselves: the environment, their own logins.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from clipattr.data.transfer import LostConnectionError, RemoteFile, TransferError
from clipattr.errors import ConfigError
from clipattr.redact import hide_secrets

SCHEMES = ("s3", "gs", "hf")
BLOCK = 32 << 20
# What says that an object was replaced, the best first.
VERSIONS = (
    "ETag",
    "etag",
    "blob_id",
    "xet_hash",
    "generation",
    "LastModified",
    "mtime",
    "updated",
    "created",
)


def find(url: str) -> list[RemoteFile]:
    """The object of this name, or the .tar files of the folder, sorted."""
    files = _filesystem(url)
    with _translated():
        files.invalidate_cache()
        entry = files.info(url)
        if entry["type"] != "directory":
            return [_describe(url, entry)]
        entries = files.ls(url, detail=True)
    scheme = url.partition("://")[0]
    found = {f"{scheme}://{entry['name'].lstrip('/')}": entry for entry in entries}
    return [
        _describe(name, found[name])
        for name in sorted(found)
        if name.endswith(".tar") and found[name]["type"] == "file"
    ]


def read(file: RemoteFile, offset: int, size: int) -> bytes:
    """A part of the object."""
    files = _filesystem(file.url)
    # The others ask for the part alone; a file of the hub would read ahead.
    options = {"cache_type": "none"} if file.url.startswith("hf:") else {}
    with _translated():
        return files.cat_file(file.url, start=offset, end=offset + size, **options)


def stream(file: RemoteFile) -> Iterator[bytes]:
    """The whole object, block by block."""
    for offset in range(0, file.size, BLOCK):
        yield read(file, offset, min(BLOCK, file.size - offset))


def _filesystem(url: str) -> Any:
    """Fsspec keeps one for each process and thread."""
    scheme = url.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise ConfigError(
            f"{scheme}:// needs a package that is not installed ({error}): "
            f"pip install 'clipattr[{scheme}]'"
        ) from error


def _describe(url: str, entry: dict[str, Any]) -> RemoteFile:
    if not isinstance(entry["size"], int):
        raise TransferError("the store does not say how large it is")
    version = next((str(entry[name]) for name in VERSIONS if entry.get(name)), "")
    return RemoteFile(url, entry["size"], version)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise TransferError("there is no such object or folder") from None
    except PermissionError:
        raise TransferError("the store refuses access: check your login to it") from None
    except OSError as error:
        raise LostConnectionError(hide_secrets(str(error))) from None
    except Exception as error:  # noqa: BLE001  the packages' own, which are not installed everywhere
        what = hide_secrets(f"{type(error).__name__}: {error}")
        raise TransferError(what) from None
