"""Where and how long a job computes: the section `trainer` of every job."""

from dataclasses import dataclass

from clipattr.config.choices import Logger, Precision
from clipattr.config.limits import check_positive
from clipattr.errors import ConfigError


@dataclass
class DeviceConfig:
    """Where a job computes."""

    accelerator: str = "auto"
    """auto (a CUDA GPU when there is one), cpu or gpu"""
    progress: bool = True
    """show progress bars"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        if self.accelerator not in ("auto", "cpu", "gpu"):
            raise ConfigError(f"trainer.accelerator={self.accelerator!r}: must be auto, cpu or gpu")


@dataclass
class DevicesConfig(DeviceConfig):
    """Where a job computes that can share its work."""

    devices: int = 1
    """processes (CPU) or GPUs"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        check_positive(self, "trainer", "devices")


@dataclass
class TrainerConfig(DevicesConfig):
    """How long, on what, and how often to look and save."""

    steps: int = 1000
    """optimiser steps"""
    precision: Precision = Precision.fp32
    """fp32 or bf16 (mixed)"""
    log_every: int = 50
    """steps between two logged points"""
    checkpoint_every: int = 500
    """steps between two checkpoints; a killed run resumes from the last one"""
    logger: Logger = Logger.csv
    """csv, tensorboard (extra) or wandb (extra)"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        check_positive(self, "trainer", "steps", "log_every", "checkpoint_every")


@dataclass
class SaeTrainerConfig(TrainerConfig):
    """The same, and what the devices have between them."""

    shard_latents: bool = False
    """devices divide the latents, and not the rows: a topk dictionary too wide for one of them"""
