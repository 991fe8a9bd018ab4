"""Which split and shard each sample goes to: a pure function of names, sizes and options.

Order and split are hashes of the sample's name, not draws of a generator: they are the same with
every version of every library, and samples that are added to the source leave the split of the
others alone.
"""

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from clipattr.build.sources import Source
from clipattr.errors import ConfigError, DataError

# The headers of a sample's members, and those of its members that are not counted.
OVERHEAD = 4096
# The order in which splits are written and reported; others come behind, sorted.
SPLITS = ("train", "val", "valid", "validation", "test")
SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")


class Limits(NamedTuple):
    """How much a shard holds at most, but one sample at least.

    Bytes are those of the source: images that are made smaller give smaller shards.
    """

    samples: int = 10_000
    bytes: int = 1_000_000_000


class Place(NamedTuple):
    """One shard: its split ("" when there are none), its number there, and its rows."""

    split: str
    number: int
    rows: Int64[np.ndarray, " sample"]

    @property
    def stem(self) -> str:
        """The name of the shard's files."""
        return f"{self.number:06d}"

    def key(self, position: int) -> str:
        """The key of a sample: unique over all splits, and without a dot."""
        prefix = f"{self.split}-" if self.split else ""
        return f"{prefix}{self.stem}-{position:06d}"


def place_samples(
    source: Source,
    limits: Limits,
    *,
    split: Mapping[str, float] | None = None,
    shuffle: bool = True,
    seed: int = 0,
) -> list[Place]:
    """All shards, split by split; every row of the source is in one of them.

    Without `split`, those of the source hold, if it has any.
    """
    names = np.array([_hash(f"order {seed}", name) for name in source.names], dtype=np.uint64)
    everything = np.argsort(names, kind="stable") if shuffle else np.arange(len(names))
    if not split:
        return _place_in_own_splits(source, everything, limits)
    groups = source.names if source.groups is None else source.groups
    chosen = _choose_splits(groups, split)[everything]
    places: list[Place] = []
    for number, name in enumerate(split):
        rows = everything[chosen == number]
        if not len(rows):
            raise DataError(f"split {name!r} gets none of the {len(names)} samples")
        places += _cut(source, name, rows, limits)
    return places


def _place_in_own_splits(
    source: Source, rows: Int64[np.ndarray, " sample"], limits: Limits
) -> list[Place]:
    """As the source says: `split` would have asked for others."""
    if source.splits is None:
        return _cut(source, "", rows, limits)
    chosen = np.array(source.splits)[rows]
    return [
        place
        for name in order_splits(source.splits)
        for place in _cut(source, name, rows[chosen == name], limits)
    ]


def order_splits(splits: Sequence[str]) -> list[str]:
    """Each once: train, val and test, and then others."""
    found = set(splits)
    return [name for name in SPLITS if name in found] + sorted(found.difference(SPLITS))


def parse_split(text: str) -> dict[str, float]:
    """train=0.9,val=0.1: parts that sum to 1."""
    parts: dict[str, float] = {}
    for entry in text.split(","):
        name, _, part = (word.strip() for word in entry.partition("="))
        try:
            share = float(part)
        except ValueError:
            share = -1.0
        if not SPLIT_NAME.fullmatch(name) or name in parts or not 0 < share < 1:
            raise ConfigError(
                f"split={text!r}: {entry!r} is no part; write for example train=0.9,val=0.1"
            )
        parts[name] = share
    total = sum(parts.values())
    if abs(total - 1) > 1e-9:
        raise ConfigError(f"split={text!r}: the parts sum to {total:g}, allowed is 1")
    return parts


def _choose_splits(
    groups: Sequence[str], split: Mapping[str, float]
) -> Int64[np.ndarray, " sample"]:
    """The number of the split of each sample. The seed has no say: another order, same split."""
    hashes: UInt64[np.ndarray, " sample"] = np.array(
        [_hash("split", group) for group in groups], dtype=np.uint64
    )
    bounds: Float64[np.ndarray, " split"] = np.cumsum(list(split.values()))[:-1]
    return np.searchsorted(bounds, hashes / 2.0**64, side="right").astype(np.int64)


def _hash(purpose: str, text: str) -> int:
    content = f"{purpose}\0{text}".encode("utf-8", "surrogateescape")
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "big")


def _cut(
    source: Source, split: str, rows: Int64[np.ndarray, " sample"], limits: Limits
) -> list[Place]:
    """Neighbours go into one shard until a limit is reached."""
    starts = [0]
    n_bytes = 0
    for position, size in enumerate((source.sizes[rows] + OVERHEAD).tolist()):
        is_full = position - starts[-1] == limits.samples or n_bytes + size > limits.bytes
        if is_full and position > starts[-1]:
            starts.append(position)
            n_bytes = 0
        n_bytes += size
    parts = np.split(rows, starts[1:])
    return [Place(split, number, part) for number, part in enumerate(parts)]
