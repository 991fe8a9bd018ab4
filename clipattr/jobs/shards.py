"""The shards of a config: where they are, which samples are usable, how they are decoded."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from clipattr.config.inputs import ReadConfig
from clipattr.data import BadSample, ShardIndex, build_index, find_shards, select_usable
from clipattr.data.images import default_workers
from clipattr.data.remote import Shard
from clipattr.data.shards import check_bad

GB = 10**9


class Images(NamedTuple):
    """The usable samples of some shards, and a report of the others."""

    usable: ShardIndex
    bad: list[BadSample]

    def add_bad(self, undecodable: Sequence[BadSample], max_bad_fraction: float) -> list[BadSample]:
        """All that is left out; DataError when both kinds together are more than the run allows."""
        bad = [*self.bad, *undecodable]
        check_bad(bad, len(self.usable) + len(self.bad), max_bad_fraction)
        return bad


def locate_shards(spec: str, data: ReadConfig, setting: str = "data.shards") -> list[Shard]:
    """The shards that a setting names; remote ones are kept in the cache up to the limit."""
    limit = None if data.download_limit is None else int(data.download_limit * GB)
    return find_shards(spec, setting, cache=Path(data.cache), download_limit=limit)


def find_images(
    shards: str,
    data: ReadConfig,
    needed: tuple[str, ...] = (),
    *,
    setting: str = "data.shards",
    progress: bool,
) -> Images:
    """The images of the shards that have all needed fields."""
    index = build_index(
        locate_shards(shards, data, setting),
        cache=Path(data.cache),
        workers=count_workers(data),
        progress=progress,
    )
    return Images(*select_usable(index, needed, data.max_bad_fraction))


def count_workers(data: ReadConfig, local_world_size: int = 1) -> int:
    """Decoding processes of each of the processes on this machine."""
    return default_workers(local_world_size) if data.workers is None else data.workers
