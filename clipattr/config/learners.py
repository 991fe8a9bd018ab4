"""Settings of the small CLIP that is trained from scratch."""

from dataclasses import dataclass

from clipattr.config.limits import check_not_negative, check_positive


@dataclass
class ClipConfig:
    """The small CLIP that is trained from scratch."""

    architecture: str = "planted-world"
    """planted-world, or a folder with an open_clip_config.json (and bpe_merges.txt.gz)"""
    lr: float = 1e-3
    """peak learning rate of AdamW, cosine to zero"""
    weight_decay: float = 0.1
    """on matrices only"""
    warmup: int = 100
    """steps of linear warm-up"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "clip", "lr")
        check_not_negative(self, "clip", "weight_decay", "warmup")
