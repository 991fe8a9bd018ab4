"""What every job reads: the model, the site at which it is cut, and the image shards."""

from dataclasses import dataclass

from omegaconf import MISSING

from clipattr.config.choices import CacheDtype, Stream, Tokens, WeightPrecision
from clipattr.config.limits import check_not_negative, check_positive
from clipattr.errors import ConfigError


@dataclass
class ModelConfig:
    """The frozen CLIP model."""

    name: str = "planted-world"
    """planted-world (bundled), an open_clip architecture, hf-hub:<id> or local-dir:<folder>"""
    pretrained: str | None = None
    """open_clip weight tag or a local checkpoint file; only with an architecture name"""
    precision: WeightPrecision = WeightPrecision.fp32
    """fp32, bf16 or fp16: what the weights are in and the towers compute in"""


@dataclass
class SiteConfig:
    """Where the tower is cut."""

    layer: int = -1
    """block whose output is read; negative counts from the end"""
    stream: Stream = Stream.residual
    """residual: the residual stream after the block; the others name what is inside it"""
    tokens: Tokens = Tokens.cls
    """cls: the class token, one row per image"""


@dataclass
class ReadConfig:
    """How image shards are read."""

    batch_size: int = 256
    """images per CLIP forward"""
    workers: int = 2
    """processes that decode images"""
    cache: str = "runs/cache"
    """folder of cached activations and indices: CLIP runs once per image"""
    cache_dtype: CacheDtype = CacheDtype.float32
    """numbers of the cache: float32, or float16 and bfloat16, which take half the space"""
    max_bad_fraction: float = 0.0
    """share of broken samples that is skipped and reported before the run stops"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "data", "batch_size")
        check_not_negative(self, "data", "workers")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction}: must be in [0, 1)")


@dataclass
class DataConfig(ReadConfig):
    """Image shards and how they are read."""

    shards: str = MISSING
    """a .tar file, a folder of them, or a brace pattern such as 'train/{000000..000011}.tar'"""
