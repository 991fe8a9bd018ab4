"""What is wrong with shards, where, and what to do: the work of `clipattr-index`.

Damage that leaves the headers alone, such as a flipped bit in a JPEG, is found by checksums only:
decoders return a picture and say nothing. They are kept in `index.json` beside the shards.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from clipattr.atomic import write_text
from clipattr.data.faults import Fault, Problem, Problems
from clipattr.data.index import find_repeated_keys, merge_tables
from clipattr.data.parallel import map_in_processes
from clipattr.data.remote import RemoteShard, Shard
from clipattr.data.scan import scan_shard
from clipattr.data.shards import size_of
from clipattr.data.tables import ShardTable, save_table, table_file
from clipattr.errors import DataError

CHECKSUMS = "index.json"
SCHEMA_VERSION = 1


class Checksum(NamedTuple):
    """What `index.json` holds of a shard."""

    size: int
    sha256: str


class Report(NamedTuple):
    """What was found in all shards; `fields` counts the samples that have them."""

    n_shards: int
    n_samples: int
    n_bytes: int
    fields: dict[str, int]
    problems: list[Problem]


class _Found(NamedTuple):
    table: ShardTable
    problems: Problems
    size: int
    sha256: str


def check_shards(
    paths: Sequence[Shard],
    needed_fields: Sequence[str] = (),
    checksums: bool = False,
    *,
    cache: Path | None = None,
    workers: int = 0,
    progress: bool = False,
) -> Report:
    """Read all headers, and with `checksums` every byte.

    Args:
        paths: the shards.
        needed_fields: a sample without one of them is a problem.
        checksums: compare each shard with `index.json` beside it; one that is not in there and has
            no fatal problem is added.
        cache: keep the index of the shards that training would accept, as `build_index` does.
        workers: processes, for sets that take longer than a few seconds.
        progress: show a bar.
    """
    remote = [path for path in paths if isinstance(path, RemoteShard)]
    if checksums and remote:
        raise DataError(f"{remote[0]}: checksums stand beside the shards, copy them here first")
    inspect = partial(_inspect, needed=tuple(needed_fields), checksums=checksums, cache=cache)
    results = map_in_processes(inspect, paths, workers=workers)
    found = list(tqdm(results, desc="check", unit="shard", total=len(paths), disable=not progress))
    index = merge_tables(paths, [one.table for one in found])
    missing = _update_checksums(paths, found) if checksums else []
    problems = [problem for one in found for problem in one.problems]
    problems += missing + find_repeated_keys(index)
    return Report(
        n_shards=len(paths),
        n_samples=len(index),
        n_bytes=sum(one.size for one in found),
        fields={name: int(index.has(name).sum()) for name in sorted(index.fields)},
        problems=problems,
    )


def read_checksums(folder: Path) -> dict[str, Checksum]:
    """The entries of the folder's `index.json`, by the names of the shards."""
    path = folder / CHECKSUMS
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
        entries = content["shards"].items()
        known = {name: Checksum(int(e["size"]), str(e["sha256"])) for name, e in entries}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no list of checksums ({error!r}): move it away, and clipattr-index "
            "--checksums writes one"
        ) from error
    if version != SCHEMA_VERSION:
        raise DataError(f"{path}: schema_version is {version!r}, allowed is {SCHEMA_VERSION}")
    return known


def write_checksums(folder: Path, entries: dict[str, Checksum]) -> None:
    """Replace the folder's `index.json`."""
    shards = {name: entries[name]._asdict() for name in sorted(entries)}
    content = {"schema_version": SCHEMA_VERSION, "shards": shards}
    try:
        write_text(folder / CHECKSUMS, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise DataError(f"{folder / CHECKSUMS} cannot be written: {error}") from None


def _inspect(
    path: Shard, *, needed: tuple[str, ...], checksums: bool, cache: Path | None
) -> _Found:
    is_there = path.is_file()
    size = size_of(path) if is_there else 0
    file = table_file(cache, path) if cache and is_there else None
    table, problems = scan_shard(path)
    if file and problems.first_fatal() is None:
        save_table(file, table)
    _find_lacking(table, needed, problems)
    sha256 = ""
    if checksums and is_there:
        with path.open("rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    return _Found(table, problems, size, sha256)


def _find_lacking(table: ShardTable, needed: tuple[str, ...], problems: Problems) -> None:
    for row in range(len(table.keys)):
        has = table.names(row)
        lacks = [name for name in needed if name not in has]
        if lacks:
            what = f"lacks {', '.join(lacks)}; has {', '.join(sorted(has))}"
            problems.add(Fault.lacks_field, what, key=table.key(row), byte=table.first_byte(row))


def _compare(path: Shard, found: _Found, known: Checksum) -> None:
    what = ""
    if found.size != known.size:
        what = f"has {found.size} bytes; when {CHECKSUMS} was written it had {known.size}"
    elif found.sha256 != known.sha256:
        what = f"its bytes are not those of which {CHECKSUMS} holds the sha256"
    if what:
        found.problems.add(Fault.changed, what)


def _update_checksums(paths: Sequence[Shard], found: list[_Found]) -> list[Problem]:
    """Compare with each folder's `index.json`, enter new shards; what is listed and not there."""
    missing: list[Problem] = []
    local = [path for path in paths if isinstance(path, Path)]
    for folder in dict.fromkeys(path.parent for path in local):
        known = read_checksums(folder)
        new: dict[str, Checksum] = {}
        for path, one in zip(paths, found, strict=True):
            if isinstance(path, RemoteShard) or path.parent != folder:
                continue
            if path.name in known:
                _compare(path, one, known[path.name])
            elif one.problems.first_fatal() is None:
                new[path.name] = Checksum(one.size, one.sha256)
        if new:
            write_checksums(folder, known | new)
        for name in known:
            if not (folder / name).exists():
                what = f"is in {CHECKSUMS}, but not in the folder"
                missing.append(Problem(Fault.missing, str(folder / name), what))
    return missing
