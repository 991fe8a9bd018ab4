"""How every job begins: skip what is finished, go on with what was interrupted."""

import logging
from pathlib import Path
from typing import NamedTuple

from clipattr.clip.names import local_files
from clipattr.config.schema import JobConfig, ModelConfig
from clipattr.data.shards import find_shards, size_of, version_of
from clipattr.errors import ConfigError
from clipattr.runs import RunFolder, is_finished_with, open_run

logger = logging.getLogger(__name__)


class Plan(NamedTuple):
    """One job: what was asked, what it reads and what it makes in its run folder."""

    config: JobConfig
    command: list[str]
    inputs: dict[str, object]
    outputs: tuple[str, ...]

    def is_finished(self) -> bool:
        """Whether the outputs are there already, made by this config from these inputs."""
        config = self.config
        is_done = is_finished_with(config, self.inputs, self.outputs)
        if is_done:
            logger.info("%s/%s is finished; change a setting to redo it", config.runs, config.name)
        return is_done

    def open(self) -> RunFolder:
        """Enter the run folder. Not before the inputs are loaded: a typo must destroy nothing."""
        return open_run(self.config, self.command, self.inputs, self.outputs)


def check_not_inside(config: JobConfig, setting: str, read: str) -> None:
    """Raise ConfigError where what the job reads lies in the folder that it would replace."""
    made = Path(config.runs, config.name).resolve()
    found = Path(read).resolve()
    if made == found or made in found.parents:
        raise ConfigError(
            f"name={config.name}: {setting}={read} lies in the folder of this run, which would be "
            "replaced; choose another name"
        )


def describe_shards(spec: str, setting: str) -> list[list[object]]:
    """Name, size and version of every shard: cheap, and enough to notice other data."""
    # Nothing is read: a cache says that a server which cannot give parts will do.
    shards = find_shards(spec, setting, cache=Path())
    return [[shard.name, size_of(shard), version_of(shard)] for shard in shards]


def describe_model(model: ModelConfig) -> list[list[object]]:
    """The name, and the files of a model that lies on this machine."""
    files = local_files(model.name, model.pretrained)
    return [[model.name, model.pretrained], *describe_files(files)]


def describe_files(paths: list[Path]) -> list[list[object]]:
    """Name, size and time; a missing file has none."""
    return [
        [path.name, path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [path.name]
        for path in paths
    ]
