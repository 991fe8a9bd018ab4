"""The index of image shards: where every field of every sample lies, in columns.

Built once from the tar headers, kept as one small file per shard. Row r is the same sample in every
process and on every machine, so that the order of training is a function of numbers alone.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64, Integer, Shaped
from tqdm import tqdm

from clipattr.data.faults import Fault, Problem, Problems
from clipattr.data.parallel import map_in_processes
from clipattr.data.remote import Shard
from clipattr.data.scan import scan_shard
from clipattr.data.shards import IMAGE_FIELDS, BadSample, Sample, check_bad
from clipattr.data.tables import ShardTable, load_table, save_table, table_file
from clipattr.data.tar import BLOCK
from clipattr.errors import DataError

ABSENT = -1


class ShardIndex:
    """Samples of shards; row r is `keys[r]` (UTF-8) in `shards[shard_numbers[r]]`.

    `offsets` and `sizes` say where the field of a column lies; both are -1 where a sample lacks it.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fields: tuple[str, ...],
        *,
        keys: Shaped[np.ndarray, " row"],
        shard_numbers: Int32[np.ndarray, " row"],
        offsets: Int64[np.ndarray, "row field"],
        sizes: Int64[np.ndarray, "row field"],
    ) -> None:
        self.shards = tuple(shards)
        self.fields = fields
        self.keys = keys
        self.shard_numbers = shard_numbers
        self.offsets = offsets
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> Sample:
        return self.sample(row)

    def key(self, row: int) -> str:
        """The key of a row."""
        return self.keys[row].decode()

    def sample(self, row: int) -> Sample:
        """One sample."""
        places = zip(self.fields, self.offsets[row].tolist(), self.sizes[row].tolist(), strict=True)
        found = {name: (offset, size) for name, offset, size in places if offset != ABSENT}
        return Sample(self.key(row), self.shards[self.shard_numbers[row]], found)

    def has(self, *names: str) -> Bool[np.ndarray, " row"]:
        """Which rows have any of the fields."""
        columns = [number for number, name in enumerate(self.fields) if name in names]
        return (self.offsets[:, columns] != ABSENT).any(axis=1)

    def first_byte(self, row: int) -> int:
        """Where the header of the sample's first field stands in its shard."""
        return int(self.offsets[row][self.offsets[row] != ABSENT].min()) - BLOCK

    def select(
        self, rows: Integer[np.ndarray, " chosen"] | Bool[np.ndarray, " row"]
    ) -> "ShardIndex":
        """The index of some rows, in the order given."""
        return ShardIndex(
            self.shards,
            self.fields,
            keys=self.keys[rows],
            shard_numbers=self.shard_numbers[rows],
            offsets=self.offsets[rows],
            sizes=self.sizes[rows],
        )

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over every sample's key, field sizes and shard name; `shards.fingerprint`."""
        digest = hashlib.sha256()
        columns = sorted(range(len(self.fields)), key=self.fields.__getitem__)
        names = [json.dumps(self.fields[column]) for column in columns]
        shards = [json.dumps(path.name) for path in self.shards]
        rows = zip(
            self.keys.tolist(),
            self.shard_numbers.tolist(),
            self.sizes[:, columns].tolist(),
            strict=True,
        )
        for key, number, sizes in rows:
            places = zip(names, sizes, strict=True)
            found = ", ".join([f"{name}: {size}" for name, size in places if size != ABSENT])
            quoted = json.dumps(key.decode())
            digest.update(f"[{quoted}, {shards[number]}, {{{found}}}]".encode())
        return digest.hexdigest()


def build_index(
    paths: Sequence[Shard], *, cache: Path | None, workers: int = 0, progress: bool = False
) -> ShardIndex:
    """The index of the shards, in their order.

    Shards that are indexed in the cache already are not read; a killed run goes on behind the last.

    Args:
        paths: the shards.
        cache: folder in which `index/` holds one file per shard, named by path, size and version.
        workers: processes, for sets that take longer than a few seconds.
        progress: show a bar.

    Raises:
        DataError: naming the first shard, sample and byte of what would lose, mix up or repeat
            samples.
    """
    tables: list[ShardTable] = []
    results = map_in_processes(partial(_read_table, cache=cache), paths, workers=workers)
    for found in tqdm(
        results, desc="index", unit="shard", total=len(paths), disable=not progress, delay=2
    ):
        if isinstance(found, Problem):
            raise DataError(f"{found}. clipattr-index lists all that is wrong")
        tables.append(found)
    index = merge_tables(paths, tables)
    for repeated in find_repeated_keys(index):
        raise DataError(str(repeated))
    return index


def _read_table(path: Shard, cache: Path | None) -> ShardTable | Problem:
    file = table_file(cache, path) if cache and path.is_file() else None
    table = load_table(file) if file else None
    if table is not None:
        return table
    table, problems = scan_shard(path)
    fatal = problems.first_fatal()
    if fatal is not None:
        return fatal
    if file:
        save_table(file, table)
    return table


def merge_tables(paths: Sequence[Shard], tables: Sequence[ShardTable]) -> ShardIndex:
    """One index of the shards' tables; its fields are those that occur in any."""
    fields = tuple(dict.fromkeys(name for table in tables for name in table.fields))
    lengths = [len(table.keys) for table in tables]
    offsets = np.full((sum(lengths), len(fields)), ABSENT, dtype=np.int64)
    sizes = offsets.copy()
    start = 0
    for table, length in zip(tables, lengths, strict=True):
        columns = [fields.index(name) for name in table.fields]
        offsets[start : start + length, columns] = table.offsets
        sizes[start : start + length, columns] = table.sizes
        start += length
    return ShardIndex(
        paths,
        fields,
        keys=np.concatenate([table.keys for table in tables]) if tables else np.zeros(0, "S1"),
        shard_numbers=np.repeat(np.arange(len(tables), dtype=np.int32), lengths),
        offsets=offsets,
        sizes=sizes,
    )


def find_repeated_keys(index: ShardIndex) -> list[Problem]:
    """Of each shard with keys that stand in it or in a shard before it, the first."""
    order = np.argsort(index.keys, kind="stable")
    ordered = index.keys[order]
    again = np.flatnonzero(ordered[1:] == ordered[:-1])
    problems = {number: Problems(str(shard)) for number, shard in enumerate(index.shards)}
    for row, before in sorted(zip(order[again + 1].tolist(), order[again].tolist(), strict=True)):
        problems[int(index.shard_numbers[row])].add(
            Fault.key_twice,
            f"the key stands in {index.shards[index.shard_numbers[before]]} already",
            key=index.key(row),
            byte=index.first_byte(row),
        )
    return [problem for found in problems.values() for problem in found]


def select_usable(
    index: ShardIndex, needed: tuple[str, ...], max_bad_fraction: float
) -> tuple[ShardIndex, list[BadSample]]:
    """The samples that have an image and all needed fields, and a report of the others.

    More than `max_bad_fraction` of the others are an error.
    """
    lacks = {f"image ({', '.join(IMAGE_FIELDS)})": ~index.has(*IMAGE_FIELDS)}
    lacks |= {name: ~index.has(name) for name in needed}
    is_bad = np.logical_or.reduce(list(lacks.values()))
    bad: list[BadSample] = []
    for row in np.flatnonzero(is_bad).tolist():
        sample = index.sample(row)
        absent = [name for name, is_absent in lacks.items() if is_absent[row]]
        reason = f"lacks {', '.join(absent)}; has {', '.join(sorted(sample.fields))}"
        bad.append(BadSample(str(sample.shard), sample.key, reason))
    check_bad(bad, len(index), max_bad_fraction)
    if len(bad) == len(index):
        raise DataError("the shards hold no sample")
    return index.select(~is_bad), bad
