"""Settings of the evaluation of attribution, for any model, head and images."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from clipattr.config.choices import Explained, Method
from clipattr.config.evaluation import FaithfulnessConfig, PromptsConfig
from clipattr.config.inputs import DataConfig, ModelConfig
from clipattr.config.limits import check_positive
from clipattr.errors import ConfigError


@dataclass
class AttributionConfig(FaithfulnessConfig):
    """What the evaluation of attribution computes, for any model and any images."""

    explained: Explained = Explained.predicted
    """the class that each image is explained for: predicted (by the head), or label"""
    top: int = 20
    """latents of each class in reliance.csv"""
    signs: bool = True
    """share of positive attributions; behind the last block it costs latents x classes per image"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        check_positive(self, "evaluation", "top")
        if Method.attribution_patching not in self.methods:
            raise ConfigError(
                "evaluation.methods lacks attribution_patching, which the reliance of classes on "
                "latents is made of"
            )


@dataclass
class AttributionQuestion:
    """Which scores of which images are attributed to which latents."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sae: str = MISSING
    """folder with sae.safetensors and sae.json, which says at which site"""
    zeroshot: PromptsConfig | None = None
    """classes in words, whose cosines with an image are explained; or else a probe"""
    probe: str | None = None
    """folder with probe.safetensors and probe.json, whose logits are explained"""
    evaluation: AttributionConfig = field(default_factory=AttributionConfig)

    def check_question(self) -> None:
        """Raise ConfigError when a combination cannot work."""
        if (self.zeroshot is None) == (self.probe is None):
            found = "neither is there" if self.probe is None else "both are there"
            raise ConfigError(
                f"zeroshot, probe: {found}. Say which head is explained by one of them: "
                "zeroshot.classes='[cat, dog]', or probe=FOLDER zeroshot=null"
            )
        is_labelled = self.zeroshot is None or self.zeroshot.label is not None
        if self.evaluation.explained is Explained.label and not is_labelled:
            raise ConfigError(
                "evaluation.explained=label with zeroshot.label=null: say which field is the label"
            )
