"""What every job reads: the model, the site at which it is cut, and the image shards."""

from dataclasses import dataclass

from omegaconf import MISSING

from clipattr.config.choices import CacheDtype, Decode, Mode, Stream, Tokens, WeightPrecision
from clipattr.config.fields import format_value
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
    """cls: the class token, one row per image; spatial: all patches; all: every token"""
    tokens_per_image: int | None = None
    """tokens drawn per image (spatial and all); none: every token"""

    def check(self, name: str = "site") -> None:
        """Raise ConfigError when a combination cannot work; `name` is that of the section."""
        if self.tokens_per_image is None:
            return
        check_positive(self, name, "tokens_per_image")
        if self.tokens is Tokens.cls:
            raise ConfigError(
                f"{name}.tokens_per_image={self.tokens_per_image}: {name}.tokens=cls is one token; "
                "tokens are drawn from spatial or all"
            )


def check_target(site: SiteConfig, target: SiteConfig) -> None:
    """Raise ConfigError unless both have the same tokens, and the tower computes `target` later.

    Layers counted from different ends are compared by the job, which knows how many there are.
    """
    for name in ("tokens", "tokens_per_image"):
        read, written = getattr(site, name), getattr(target, name)
        if read != written:
            raise ConfigError(
                f"target.{name}={format_value(written)}: must be site.{name}={format_value(read)}, "
                "because a transcoder reads and reconstructs the same tokens"
            )
    if (site.layer < 0) != (target.layer < 0):
        return
    streams = list(Stream)
    first, last = ((one.layer, streams.index(one.stream)) for one in (site, target))
    if last <= first:
        raise ConfigError(
            f"target: {target.stream.name} of layer {target.layer} is "
            + ("the site itself" if last == first else "computed before the site, ")
            + (f"{site.stream.name} of layer {site.layer}" if last < first else "")
            + "; a transcoder reconstructs what the tower makes of the site, for example "
            "target.stream=mlp of site.stream=residual_middle"
        )


@dataclass
class ReadConfig:
    """How image shards are read."""

    batch_size: int = 256
    """images per CLIP forward"""
    workers: int | None = None
    """processes that decode images; none: as many as there are cores for this one"""
    decode: Decode = Decode.exact
    """exact: the model's own pixels; fast: one grey level off at most; draft: for large photos"""
    cache: str = "runs/cache"
    """folder of cached activations, indices and remote shards: CLIP runs once per image"""
    download_limit: float | None = None
    """GB of remote shards that are kept in the cache, the first of them; none: all"""
    cache_dtype: CacheDtype = CacheDtype.float32
    """numbers of the cache: float32, or float16 and bfloat16, which take half the space"""
    max_bad_fraction: float = 0.0
    """share of broken samples that is skipped and reported before the run stops"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "data", "batch_size")
        if self.workers is not None:
            check_not_negative(self, "data", "workers")
        if self.download_limit is not None:
            check_not_negative(self, "data", "download_limit")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction}: must be in [0, 1)")


@dataclass
class DataConfig(ReadConfig):
    """Image shards and how they are read."""

    shards: str = MISSING
    """a .tar file, a folder or a pattern like 'train/{000..011}.tar'; also http, s3, gs, hf URLs"""


@dataclass
class TrainingImagesConfig(DataConfig):
    """Image shards that are decoded again in every epoch."""

    mode: Mode = Mode.indexed
    """indexed: exact order and resume; streaming: for remote sets that are too large to index"""
    shuffle: int | None = None
    """images that are mixed with each other; none: all (indexed), 5000 per worker (streaming)"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        if self.shuffle is not None:
            check_positive(self, "data", "shuffle")
