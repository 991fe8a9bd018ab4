"""Settings of predictions: a probe applied to the pictures of a folder."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipattr.config.choices import Decode
from clipattr.config.inputs import ModelConfig
from clipattr.config.limits import check_not_negative, check_positive
from clipattr.errors import ConfigError


@dataclass
class PicturesConfig:
    """How picture files are read."""

    batch_size: int = 256
    """images per CLIP forward"""
    workers: int | None = None
    """processes that decode images; none: as many as there are cores for this one"""
    decode: Decode = Decode.exact
    """exact: the model's own pixels; fast: one grey level off at most; draft: for large photos"""
    max_bad_fraction: float = 0.0
    """share of broken files that is left out and listed before the run stops"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "data", "batch_size")
        if self.workers is not None:
            check_not_negative(self, "data", "workers")
        if not 0.0 <= self.max_bad_fraction < 1.0:
            raise ConfigError(f"data.max_bad_fraction={self.max_bad_fraction}: must be in [0, 1)")


@dataclass
class PredictTask:
    """Which pictures, by which probe of which model."""

    images: str = MISSING
    """a folder, read with all folders below it, or one file: JPEG, PNG or WEBP"""
    model: ModelConfig = field(default_factory=ModelConfig)
    probe: str = MISSING
    """folder with probe.safetensors and probe.json, and perhaps a suppression beside them"""
    sae: str | None = None
    """folder of the SAE that the probe needs, if any; none: where its suppression says it is"""
    top: int | None = None
    """classes written per image, the most probable ones; none: all, each in a column of its own"""
    data: PicturesConfig = field(default_factory=PicturesConfig)

    def check_task(self) -> None:
        """Raise ConfigError when a value cannot work."""
        if self.top is not None and self.top < 1:
            raise ConfigError(f"top={self.top}: must be greater than 0, or null for all classes")
