"""Whether the class names of a setting are those that lie beside the shards."""

import logging
from collections.abc import Sequence
from pathlib import Path

from clipattr.data import ShardIndex
from clipattr.errors import ConfigError

logger = logging.getLogger(__name__)

LISTED = "classes.txt"
"""what clipattr-shards writes: a name a line, in the order of the labels"""


def check_class_names(samples: ShardIndex, label: str, names: Sequence[str], setting: str) -> None:
    """ConfigError for the same names in another order; a warning for other names.

    Labels that are numbers (`cls`) mean the names in the order of the list. Shards without a list,
    or on another machine, say nothing.
    """
    if label != "cls":
        return
    for path in _lists_beside(samples):
        found = path.read_text(encoding="utf-8").splitlines()
        if found == list(names):
            continue
        if sorted(found) == sorted(names):
            raise ConfigError(
                f"{setting}={list(names)}: {path} has these classes in another order, {found}, "
                "and the labels are numbers of that order; write them so"
            )
        logger.warning(
            "%s are %s, and %s names the classes of these labels %s: number 0 is taken to be %r",
            *(setting, list(names), path, found, names[0]),
        )


def check_prompts(prompts: Sequence[str], names: Sequence[str], setting: str) -> None:
    """A warning for a prompt that has the name of another class, and not that of its own."""
    for prompt, own in zip(prompts, names, strict=True):
        others = [name for name in names if name != own and name.lower() in prompt.lower()]
        if others and own.lower() not in prompt.lower():
            logger.warning(
                "%s: %r is taken for the class %r, and names %r; prompts stand in the order of the "
                "classes %s",
                *(setting, prompt, own, others[0], list(names)),
            )


def _lists_beside(samples: ShardIndex) -> list[Path]:
    folders = {shard.parent for shard in samples.shards if isinstance(shard, Path)}
    return [folder / LISTED for folder in sorted(folders) if (folder / LISTED).is_file()]
