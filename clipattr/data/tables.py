"""The samples of one shard as columns, and the file in which they are kept."""

import hashlib
import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import Int64, Shaped

from clipattr.atomic import write_bytes
from clipattr.data.remote import RemoteShard, Shard
from clipattr.data.tar import BLOCK
from clipattr.errors import ConfigError

# Another number when another version finds other samples in the same bytes.
TABLE_FORMAT = 1


class ShardTable(NamedTuple):
    """Row r is the sample keys[r] (UTF-8); offset and size are -1 where it lacks the field."""

    fields: tuple[str, ...]
    keys: Shaped[np.ndarray, " row"]
    offsets: Int64[np.ndarray, "row field"]
    sizes: Int64[np.ndarray, "row field"]

    def key(self, row: int) -> str:
        """The key of a sample."""
        return self.keys[row].decode()

    def names(self, row: int) -> list[str]:
        """The fields that a sample has."""
        places = zip(self.fields, self.offsets[row].tolist(), strict=True)
        return [name for name, offset in places if offset >= 0]

    def first_byte(self, row: int) -> int:
        """Where the header of the sample's first field stands."""
        return int(self.offsets[row][self.offsets[row] >= 0].min()) - BLOCK


def table_file(cache: Path, shard: Shard) -> Path:
    """Where the table of a shard is kept: another path, size or version is another shard."""
    if isinstance(shard, RemoteShard):
        identity = [TABLE_FORMAT, shard.file.url, shard.size, shard.version]
    else:
        stat = shard.stat()
        identity = [TABLE_FORMAT, str(shard.resolve()), stat.st_size, stat.st_mtime_ns]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return cache / "index" / f"{name[:32]}.table"


def save_table(file: Path, table: ShardTable) -> None:
    """Write the table as a whole: the crc32 of what follows, and the columns as safetensors."""
    width = table.keys.dtype.itemsize
    content = safetensors.numpy.save(
        {
            "fields": np.frombuffer(json.dumps(table.fields).encode(), dtype=np.uint8),
            "keys": table.keys.view(np.uint8).reshape(len(table.keys), width),
            "offsets": table.offsets,
            "sizes": table.sizes,
        }
    )
    try:
        write_bytes(file, _checksum(content) + content)
    except OSError as error:
        raise ConfigError(f"the cache {str(file.parent)!r} cannot be written: {error}") from None


def load_table(file: Path) -> ShardTable | None:
    """The table that was kept; None when there is none, or a damaged one."""
    try:
        content = file.read_bytes()
    except OSError:
        return None
    if content[:4] != _checksum(content[4:]):
        return None
    columns = safetensors.numpy.load(content[4:])
    keys = columns["keys"].view(f"S{columns['keys'].shape[1]}").reshape(len(columns["keys"]))
    fields = tuple(json.loads(columns["fields"].tobytes()))
    return ShardTable(fields, keys, columns["offsets"], columns["sizes"])


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
