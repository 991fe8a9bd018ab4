"""What can happen to a transfer, whatever the protocol: lost connections and retries."""

import errno
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from clipattr.errors import DataError
from clipattr.redact import hide_secrets

Result = TypeVar("Result")
# Seconds before the second and the third try.
PAUSES = (0.5, 2.0)
PIECE = 1 << 20


class TransferError(OSError, DataError):
    """A remote file that cannot be read, and why: no sample is broken, so that the run stops."""

    def __init__(self, what: str, *_: object) -> None:
        super().__init__(errno.EIO, what)

    def __str__(self) -> str:
        return str(self.strerror)

    def __reduce__(self) -> tuple[type["TransferError"], tuple[str]]:
        return type(self), (str(self.strerror),)


class LostConnectionError(TransferError):
    """A failure that another try may not meet."""


class RemoteFile(NamedTuple):
    """What a server says of a file.

    Attributes:
        url: its address, with all that is needed to ask for it.
        size: in bytes.
        version: another text when the file was replaced.
        has_ranges: whether parts of it can be asked for.
    """

    url: str
    size: int
    version: str
    has_ranges: bool = True

    def __repr__(self) -> str:
        return f"RemoteFile({hide_secrets(self.url)!r}, {self.size}, {self.version!r})"


def retry(action: Callable[[], Result]) -> Result:
    """The result of the action, which is repeated after lost connections."""
    for pause in PAUSES:
        try:
            return action()
        except LostConnectionError:
            time.sleep(pause)
    return action()
