"""Settings of what is trained beside SAEs: the small CLIP, and probes."""

from dataclasses import dataclass, field

from clipattr.config.limits import check_label, check_not_negative, check_positive
from clipattr.errors import ConfigError


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


@dataclass
class ProbeConfig:
    """Linear probe on the normalised image embedding."""

    label: str = "cls"
    """sample field that holds the class: cls, or json:<key>"""
    classes: list[str] = field(default_factory=list)
    """class names, in the order of the labels; at least two"""
    lr: float = 0.01
    """peak learning rate of AdamW, cosine to zero"""
    weight_decay: float = 1e-4
    """on the weights"""
    batch_size: int = 512
    """rows per step, over all devices"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "probe", "lr", "batch_size")
        check_not_negative(self, "probe", "weight_decay")
        check_label("probe", self.label)
        if len(self.classes) < 2:
            raise ConfigError(f"probe.classes={self.classes}: name at least two classes")
