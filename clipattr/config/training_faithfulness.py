"""Settings of the faithfulness that is measured while an SAE trains."""

from dataclasses import dataclass
from typing import ClassVar

from clipattr.config.evaluation import ClassesConfig
from clipattr.config.limits import check_positive
from clipattr.errors import ConfigError


@dataclass
class TrainingFaithfulnessConfig(ClassesConfig):
    """Held-out images, explained for the class that CLIP predicts, through the SAE of a step."""

    section: ClassVar[str] = "faithfulness"

    images: int = 256
    """held-out images, spread over the shards; they stay in memory"""
    every: int = 500
    """training steps between two measurements"""
    steps: int = 10
    """latents deleted one after the other in a curve; no more than can be active"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        check_positive(self, "faithfulness", "images", "every", "steps")

    def check_training(self, steps: int, *, is_transcoder: bool, shard_latents: bool) -> None:
        """Raise ConfigError where a training cannot be measured."""
        if self.every > steps:
            raise ConfigError(
                f"faithfulness.every={self.every} with trainer.steps={steps}: nothing would be "
                "measured; every step that it divides is"
            )
        if is_transcoder:
            raise ConfigError(
                "faithfulness with sae.architecture=transcoder: it does not reconstruct the site "
                "that it reads, so that no score can be explained by its latents; leave "
                "faithfulness out"
            )
        if shard_latents:
            raise ConfigError(
                "faithfulness with trainer.shard_latents=true: no process has the whole dictionary "
                "while it trains; leave faithfulness out, and run evaluate_attribution afterwards"
            )
