"""The samples of shards that are read from end to end, without an index.

A shard is walked strictly (`clipattr.data.tar`): of one that was cut, no matter where, the samples
before the cut are taken, but for the last, which may lack a field. webdataset takes a cut for the
end of the shard, and may join the fields of a cut shard with those of the next.
"""

from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from clipattr.data.faults import Problems
from clipattr.data.remote import Shard
from clipattr.data.scan import is_file, split_name
from clipattr.data.shards import BadSample
from clipattr.data.tar import TarError, walk_file
from clipattr.errors import DataError

# A request of a shard that is not copied, or a read of a disk.
READ_AHEAD = 8 << 20
MAX_FIELD_BYTES = 1 << 28
# From here on it is no accident: the set cannot be read.
MAX_BARREN_SHARDS = 100


class RawSample(NamedTuple):
    """The fields of a sample as they stand in a shard."""

    shard: str
    key: str
    fields: dict[str, bytes]


def mix(
    items: Iterator[RawSample | BadSample], size: int, generator: np.random.Generator
) -> Iterator[RawSample | BadSample]:
    """Samples drawn from a buffer, once it is full; reports are passed on at once."""
    held: list[RawSample] = []
    for item in items:
        if isinstance(item, BadSample):
            yield item
        elif len(held) < size:
            held.append(item)
        else:
            place = int(generator.integers(size))
            yield held[place]
            held[place] = item


def read_shards(
    shards: Sequence[Shard], generator: np.random.Generator
) -> Iterator[RawSample | BadSample]:
    """All samples of all shards, in pass after pass.

    Raises:
        DataError: when nothing can be read.
    """
    # So many draws hold a whole pass, wherever they begin.
    limit = min(2 * len(shards) - 1, MAX_BARREN_SHARDS)
    n_barren = 0
    while True:
        for number in generator.permutation(len(shards)).tolist():
            has_sample = False
            reason = "holds no sample"
            for item in read_shard(shards[number]):
                if isinstance(item, RawSample):
                    has_sample = True
                else:
                    reason = item.reason
                yield item
            n_barren = 0 if has_sample else n_barren + 1
            if n_barren == limit:
                raise DataError(
                    f"none of {n_barren} shards that were drawn in a row has a sample; the last "
                    f"is {shards[number]}: {reason}"
                )


def read_shard(shard: Shard) -> Iterator[RawSample | BadSample]:
    """The samples of a shard in their order, and what is wrong with it."""
    name = str(shard)
    try:
        with shard.open("rb", buffering=READ_AHEAD) as file:
            yield from _group(file, name)
    except TarError as damage:
        yield BadSample(name, "", f"is damaged {damage}")
    except OSError as error:
        yield BadSample(name, "", f"cannot be read: {error}")


def _group(file: BinaryIO, shard: str) -> Iterator[RawSample | BadSample]:
    """A sample is handed on when the next begins or the shard has ended well, else not at all."""
    problems = Problems(shard)
    seen: set[str] = set()
    current: RawSample | BadSample | None = None
    for member in walk_file(file):
        key, field = split_name(member.name) if is_file(member, problems) else ("", "")
        if not key:
            continue
        if current is None or key != current.key:
            if current is not None:
                yield current
            is_new = key not in seen
            seen.add(key)
            what = "its fields do not stand side by side, or the key comes twice"
            current = RawSample(shard, key, {}) if is_new else BadSample(shard, key, what)
        if isinstance(current, RawSample):
            if field in current.fields:
                current = BadSample(shard, key, f"the field {field!r} comes twice")
            elif member.size > MAX_FIELD_BYTES:
                current = BadSample(shard, key, f"{field} has {member.size} bytes")
            else:
                file.seek(member.offset)
                current.fields[field] = file.read(member.size)
    if current is not None:
        yield current
    for problem in problems:
        yield BadSample(shard, problem.key, problem.what)
