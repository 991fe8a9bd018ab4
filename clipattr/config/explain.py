"""Settings of the explanation of one image."""

from collections import Counter
from dataclasses import dataclass, field

from omegaconf import MISSING

from clipattr.config.choices import ExplainMethod
from clipattr.config.inputs import ModelConfig
from clipattr.errors import ConfigError

MOST_EXAMPLES = 9
"""what one row of the picture has place for, beside a heatmap"""


@dataclass
class Question:
    """Which score of which image is explained, and how."""

    image: str = MISSING
    """the picture: a JPEG, PNG or WEBP file"""
    model: ModelConfig = field(default_factory=ModelConfig)
    sae: str = MISSING
    """folder with sae.safetensors and sae.json, which says at which site"""
    prompt: str | list[str] | None = None
    """words whose cosine with the image is explained, several as a list; or else a probe"""
    probe: str | None = None
    """folder with probe.safetensors and probe.json, whose logit of `label` is explained"""
    label: str | None = None
    """class of the probe: its name or its number"""
    rather_than: str | None = None
    """why the prompt and not this one, or why the label and not this one: the difference"""
    atlas: str | None = None
    """folder of an atlas of the same SAE: labels and example images of the latents"""
    examples: int = 4
    """example images per latent in the picture, where there is an atlas; 0: none"""
    method: ExplainMethod = ExplainMethod.corrected_patching
    """how the score is attributed to latents; docs/attribution.md compares them"""
    top: int = 10
    """latents shown, those of the largest attribution; their exact effects are measured"""
    corrected: int = 32
    """latents of corrected_patching whose attribution is exact, at one token each"""
    ig_points: int = 8
    """points of integrated gradients"""

    @property
    def prompts(self) -> list[str]:
        """Every prompt that is explained."""
        if self.prompt is None:
            return []
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    def check_question(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        for name, value in (
            ("top", self.top),
            ("corrected", self.corrected),
            ("ig_points", self.ig_points),
        ):
            if value < 1:
                raise ConfigError(f"{name}={value}: must be greater than 0")
        if not 0 <= self.examples <= MOST_EXAMPLES:
            raise ConfigError(f"examples={self.examples}: allowed are 0 to {MOST_EXAMPLES}")
        if bool(self.prompts) == (self.probe is not None):
            found = "both are there" if self.prompts else "neither is there"
            raise ConfigError(
                f"prompt, probe: {found}. Say what is explained by one of them: "
                "prompt='a photo of a cat', or probe=FOLDER label=CLASS"
            )
        if (self.label is None) != (self.probe is None):
            lacking = "label=CLASS" if self.label is None else "probe=FOLDER"
            raise ConfigError(f"probe, label: they go together; add {lacking}")
        self._check_words()

    def _check_words(self) -> None:
        words = self.prompts or [self.label or ""]
        words = words if self.rather_than is None else [*words, self.rather_than]
        if not all(word.strip() for word in words):
            raise ConfigError("prompt, label, rather_than: one of them is empty text")
        repeated = [word for word, times in Counter(words).items() if times > 1]
        if repeated:
            raise ConfigError(
                f"prompt, label, rather_than: {repeated[0]!r} stands there twice; nothing is to be "
                "explained about it rather than itself"
            )
