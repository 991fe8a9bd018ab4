"""Settings of the planted world: a section of the schema."""

from dataclasses import dataclass

from clipattr.config.limits import check_positive


@dataclass
class WorldConfig:
    """Sizes of the planted world's splits."""

    out: str = "runs/world"
    """folder of the shards, one sub-folder per split"""
    train: int = 24000
    """captioned images with the planted rates, for CLIP and the SAE"""
    val: int = 2000
    """held-out images, same rates"""
    test: int = 4000
    """held-out images in which every planted correlation is broken"""
    task_train: int = 3000
    """cracked / intact images in which the tag sticker goes with the label"""
    task_test: int = 2000
    """cracked / intact images in which both stickers are balanced"""
    task_pairs: int = 400
    """scenes drawn three times: without sticker, with the tag, with the seal"""
    shard_size: int = 1000
    """images per shard"""
    workers: int = 2
    """processes that draw"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "world", "train", "val", "test", "task_train", "task_test")
        check_positive(self, "world", "task_pairs", "shard_size", "workers")
