"""Settings of the atlas: what the latents of an SAE mean, and on which of them a class relies."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipattr.config.choices import TokenPool
from clipattr.config.evaluation import PromptsConfig
from clipattr.config.inputs import DataConfig, ModelConfig
from clipattr.config.limits import check_not_negative, check_positive
from clipattr.errors import ConfigError


@dataclass
class ScorerConfig(ModelConfig):
    """The CLIP model that says what images show; best another than the explained one."""

    name: str = "MobileCLIP-S2"
    """planted-world (bundled), an open_clip architecture, hf-hub:<id> or local-dir:<folder>"""
    pretrained: str | None = "datacompdr"
    """open_clip weight tag or a local checkpoint file; only with an architecture name"""


@dataclass
class AtlasConfig:
    """How the latents are described."""

    vocabulary: list[str] = field(default_factory=list)
    """words for labels, beside the classes: text files (one a line), imagenet, or the words"""
    examples: int = 20
    """images that a latent fires on most, whose mean embedding is its meaning"""
    labels: int = 5
    """words per latent"""
    pool: TokenPool = TokenPool.max
    """what the activations at the tokens of an image become: max, mean or sum"""
    shuffles: int = 5
    """times that latents, and images, are shuffled to count what chance finds"""
    level: float = 0.05
    """share of the unexpected pairs that chance may find; it sets the evidence threshold"""
    shown: int = 12
    """images of a latent on its page, the strongest first"""
    spread: int = 6
    """images at quantiles of its activation, drawn from all that it fires on; 0: none"""
    heatmaps: bool = True
    """show where in its top images a latent is, for one more pass over the images shown"""
    thumbnail: int = 112
    """longer side of the small pictures, in pixels"""
    classes_shown: int = 10
    """classes that a latent raises on its page, and half as many that it lowers"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "atlas", "examples", "labels", "shuffles", "shown", "thumbnail")
        check_positive(self, "atlas", "classes_shown")
        check_not_negative(self, "atlas", "spread")
        if self.examples < 2:
            raise ConfigError("atlas.examples=1: one image has no spread; take at least two")
        if not 0.0 < self.level < 1.0:
            raise ConfigError(f"atlas.level={self.level}: must lie between 0 and 1")


@dataclass
class AtlasQuestion:
    """Of which SAE, on which images, for which classes, by whose eyes."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sae: str = MISSING
    """folder with sae.safetensors and sae.json, which says at which site"""
    zeroshot: PromptsConfig = field(default_factory=PromptsConfig)
    probe: str | None = None
    """folder with a probe of these classes, whose logits are explained; none: the prompts"""
    scorer: ScorerConfig = field(default_factory=ScorerConfig)
    atlas: AtlasConfig = field(default_factory=AtlasConfig)
