"""Whether two sets of images are apart, as those of a fit and those that judge it must be."""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Sequence

from clipattr.data import ShardIndex
from clipattr.data.remote import RemoteShard, Shard
from clipattr.data.shards import Sample
from clipattr.errors import ConfigError

logger = logging.getLogger(__name__)

# Copies under other names that real collections have among their own splits.
_TOLERATED = 0.01
# The end of a compressed picture is unlike that of any other of its size.
_END = 64


def check_apart(first: ShardIndex, second: ShardIndex, where: str, rule: str) -> None:
    """Raise ConfigError where the second set holds a shard, or pictures, of the first.

    Pictures are the same when their bytes are. Under the same key that is a copy of a sample and
    refused; single ones under other keys are told.

    Args:
        first: usable samples.
        second: usable samples.
        where: the two settings, for the message.
        rule: why they must be apart.
    """
    check_shards(first.shards, second, where, rule)
    copies = _find_copies(first, second)
    same_key = next((two.key for one, two in copies if one.key == two.key), None)
    if same_key is not None:
        raise ConfigError(f"{where}: the image {same_key} is in both; {rule}")
    words = f"{where}: {len(copies)} of {len(second)} images are in both under other keys"
    if len(copies) > _TOLERATED * len(second):
        raise ConfigError(f"{words}, the first is {copies[0][1].key}; {rule}")
    if copies:
        logger.warning("%s, the first is %s", words, copies[0][1].key)


def check_shards(first: Sequence[Shard], second: ShardIndex, where: str, rule: str) -> None:
    """Raise ConfigError where the second set holds one of these shards, by whatever path."""
    shared = {_place(one) for one in first} & {_place(one) for one in second.shards}
    if shared:
        raise ConfigError(f"{where}: both have {min(shared)}; {rule}")


def _place(shard: Shard) -> str:
    """The same for all paths to one file."""
    return str(shard) if isinstance(shard, RemoteShard) else str(shard.resolve())


def _find_copies(first: ShardIndex, second: ShardIndex) -> list[tuple[Sample, Sample]]:
    """Each picture of the second set that the first has too; little is read of the others."""
    sizes = {_size(second[row]) for row in range(len(second))}
    rows: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for row in range(len(first)):
        sample = first[row]
        if _size(sample) in sizes:
            rows[_size(sample), _end(sample)].append(row)
    sizes = {size for size, _ in rows}
    contents: dict[tuple[int, bytes], dict[bytes, list[int]]] = {}
    copies: list[tuple[Sample, Sample]] = []
    for row in range(len(second)):
        sample = second[row]
        if _size(sample) not in sizes:
            continue
        place = (_size(sample), _end(sample))
        if place not in rows:
            continue
        if place not in contents:
            contents[place] = _group_by_content(first, rows[place])
        if alike := contents[place].get(_digest(sample)):
            # Of several copies the one under its key says most.
            best = next((one for one in alike if first.key(one) == sample.key), alike[0])
            copies.append((first[best], sample))
    return copies


def _group_by_content(index: ShardIndex, rows: list[int]) -> dict[bytes, list[int]]:
    found: dict[bytes, list[int]] = defaultdict(list)
    for row in rows:
        found[_digest(index[row])].append(row)
    return found


def _field(sample: Sample) -> str:
    name = sample.image_field
    assert name is not None, "every usable sample has an image"
    return name


def _size(sample: Sample) -> int:
    return sample.fields[_field(sample)][1]


def _digest(sample: Sample) -> bytes:
    return hashlib.sha256(sample.read(_field(sample))).digest()


def _end(sample: Sample) -> bytes:
    """The last bytes of the picture."""
    offset, size = sample.fields[_field(sample)]
    n = min(_END, size)
    return sample._replace(fields={_field(sample): (offset + size - n, n)}).read(_field(sample))
