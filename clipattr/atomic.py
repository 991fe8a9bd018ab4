"""Files that are whole or not there, for a reader and for a restart after a kill."""

import os
import re
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

# A temporary file that nobody wrote to for so long was left by a process that was killed.
STALE_SECONDS = 3600

_OWNER = re.compile(r"\.tmp-(?P<host>[A-Za-z0-9-]+)-(?P<process>\d{1,9})-[0-9a-f]+$")


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes its name when the block ends without an error.

    The temporary file lies beside the target, because a rename is atomic within a file system only;
    its content is on the disk before the rename.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Machines that share a folder may have equal process numbers, and containers equal names.
    owner = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.tmp-{owner}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file as a whole."""
    with atomic_file(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def sweep_temporary(folder: Path) -> None:
    """Remove what killed writers left: processes of this machine that are gone, or an hour ago."""
    for path in folder.glob(".*.tmp-*"):
        if _is_abandoned(path):
            path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:  # it has just been finished
        return False
    owner = _OWNER.search(path.name)
    if owner is not None and owner["host"] == _host() and not _is_running(int(owner["process"])):
        return True
    return age > STALE_SECONDS


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True


def _host() -> str:
    """The name of this machine in the characters of a file name."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())[:24] or "host"
