"""How every job begins: skip what is finished, go on with what was interrupted."""

import logging
from pathlib import Path

from clipattr.config.schema import JobConfig
from clipattr.data.shards import find_shards
from clipattr.runs import RunFolder, is_finished_with, open_run

logger = logging.getLogger(__name__)


def start(config: JobConfig, command: list[str], inputs: dict[str, object]) -> RunFolder | None:
    """The run's folder, or None when this config has already finished on these inputs."""
    if is_finished_with(config, inputs):
        logger.info("%s/%s is finished; change a setting to run it anew", config.runs, config.name)
        return None
    return open_run(config, command, inputs)


def describe_shards(spec: str) -> list[list[object]]:
    """Name and size of every shard: cheap, and enough to notice other data."""
    return [[path.name, path.stat().st_size] for path in find_shards(spec)]


def describe_files(*paths: Path) -> list[list[object]]:
    """Name, size and time of files that another job wrote; a missing one has none."""
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [path.name]
        for path in paths
    ]
