"""What a user can get wrong. Every message says what was found, where, and what is allowed."""


class ConfigError(ValueError):
    """A config file, an override or a combination of fields that cannot work."""


class DataError(ValueError):
    """A shard, a sample or a stored activation that is missing, broken or of the wrong kind."""


class CheckpointError(ValueError):
    """A weights file that is missing, broken or belongs to something else."""


class Stopped(Exception):  # noqa: N818  nothing went wrong
    """Training was asked to stop by a signal, and has saved what it needs to go on."""
