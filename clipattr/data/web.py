"""Files of http and https servers, whole and in parts, on urllib of the standard library.

Its answers are seen as they are: whether a server gave the part or everything, which version of the
file, from where. Another scheme is never opened, not by a redirect either. Each request is a
connection of its own.
"""

import base64
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException, HTTPResponse, responses
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote, urlsplit, urlunsplit
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from clipattr.data.transfer import PIECE, LostConnectionError, RemoteFile, TransferError
from clipattr.redact import hide_secrets

SCHEMES = ("http", "https")
TIMEOUT = 60.0
PARTIAL = 206
PUNCTUATION = "%/:?@!$&'()*+,;=~[]|"
# The server is in trouble or busy; another answer says that it will not change its mind.
WORTH_ANOTHER_TRY = {408, 429, *range(500, 600)}


def ask(url: str) -> RemoteFile:
    """Size and version.

    One byte is asked for, not the head: a URL that was signed for reading allows nothing else, and
    the answer says whether the server can give parts.
    """
    with _request(url, "bytes=0-0") as response:
        if response.status == PARTIAL:
            size = response.headers.get("Content-Range", "").rpartition("/")[2]
        else:
            size = response.headers.get("Content-Length", "")
        if not size.isdecimal():
            raise TransferError("the server does not say how large it is")
        return RemoteFile(url, int(size), _version(response), response.status == PARTIAL)


def read(file: RemoteFile, offset: int, size: int) -> bytes:
    """A part of the file."""
    with _request(file.url, f"bytes={offset}-{offset + size - 1}") as response:
        if response.status != PARTIAL:
            raise TransferError(
                "the server ignores the header Range and sends the whole file: give it a cache "
                "and a download limit that holds it, or another server"
            )
        _check_version(response, file)
        start = response.headers.get("Content-Range", "").partition("-")[0]
        if start != f"bytes {offset}":
            raise TransferError(f"asked for byte {offset}, the server sends {start!r}")
        return response.read(size)


def stream(file: RemoteFile) -> Iterator[bytes]:
    """The whole file, piece by piece."""
    with _request(file.url, None) as response:
        _check_version(response, file)
        while piece := response.read(PIECE):
            yield piece


def _version(response: HTTPResponse) -> str:
    """What the server says beside the size: nothing, if it says nothing."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _check_version(response: HTTPResponse, file: RemoteFile) -> None:
    version = _version(response)
    if version != file.version:
        raise TransferError(
            f"it was replaced since it was found: its version was {file.version!r} and is "
            f"{version!r} now. Start again"
        )


@contextmanager
def _request(url: str, byte_range: str | None) -> Iterator[HTTPResponse]:
    """The answer of the server; all that goes wrong with it is a TransferError."""
    request = _build_request(url)
    if byte_range:
        request.add_header("Range", byte_range)
    try:
        with _opener().open(request, timeout=TIMEOUT) as response:
            yield response
    except HTTPError as error:
        with error:
            raise _describe(error) from None
    except TransferError:
        raise
    except URLError as error:
        raise LostConnectionError(f"no connection: {hide_secrets(str(error.reason))}") from None
    except (HTTPException, OSError) as error:
        what = hide_secrets(str(error)) or type(error).__name__
        raise LostConnectionError(f"the connection was lost: {what}") from None


def _describe(error: HTTPError) -> TransferError:
    if 300 <= error.code < 400:
        return TransferError(
            f"HTTP {error.code}: the server sends on to an address that is not opened; allowed "
            "are http and https, from https only https, and ten steps"
        )
    what = f"HTTP {error.code} {responses.get(error.code, '')}".rstrip()
    return (LostConnectionError if error.code in WORTH_ANOTHER_TRY else TransferError)(what)


def _build_request(url: str) -> Request:
    """User and password become a header, which a redirect does not take to another server."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    # What is quoted already stays.
    path, query = (quote(part, safe=PUNCTUATION) for part in (parts.path, parts.query))
    request = Request(urlunsplit((parts.scheme, host, path, query, "")))
    if at:
        token = base64.b64encode(unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request


class _Redirects(HTTPRedirectHandler):
    def redirect_request(
        self,
        req: Request,
        fp: Any,
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> Request | None:
        scheme = urlsplit(newurl).scheme.lower()
        if scheme not in SCHEMES or (req.type == "https" and scheme != "https"):
            raise HTTPError(req.full_url, code, msg, headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@cache
def _opener() -> OpenerDirector:
    """Without the handlers of file:, ftp: and data: that urllib's own has."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler(),
        UnknownHandler(),
        HTTPHandler(),
        HTTPSHandler(context=ssl.create_default_context()),
        HTTPDefaultErrorHandler(),
        _Redirects(),
        HTTPErrorProcessor(),
    ):
        opener.add_handler(handler)
    return opener
