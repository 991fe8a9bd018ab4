"""Settings of what an evaluation computes: sections of the schema."""

from collections import Counter
from dataclasses import dataclass, field
from typing import ClassVar

from clipattr.config.choices import Method
from clipattr.config.limits import check_label, check_not_negative, check_positive
from clipattr.errors import ConfigError


@dataclass
class FaithfulnessConfig:
    """How faithful attribution methods are."""

    methods: list[Method] = field(default_factory=lambda: list(Method))
    """attribution methods to compare"""
    images: int = 1000
    """images of the faithfulness table; at least 2"""
    steps: int = 16
    """latents deleted one after the other in a curve; no more than can be active"""
    ig_steps: int = 64
    """points of integrated gradients, by the Gauss-Legendre rule"""
    overlap_top: int = 5
    """n of the top-n overlap with exact patching"""
    resamples: int = 1000
    """bootstrap resamples of every interval"""
    control: bool = True
    """the same table for an untrained dictionary of the same size and as many active latents"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "evaluation", "images", "steps", "ig_steps", "overlap_top")
        check_positive(self, "evaluation", "resamples")
        if self.images == 1:
            raise ConfigError(
                "evaluation.images=1: at least 2 are needed, because every interval is over images"
            )
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("evaluation.methods names a method twice")
        if Method.logit_lens not in self.methods:
            raise ConfigError(
                "evaluation.methods lacks logit_lens, which every other method is compared with"
            )


@dataclass
class EvaluationConfig(FaithfulnessConfig):
    """What the planted world's evaluation computes."""

    top_examples: int = 20
    """images per latent that define its label"""
    gallery: int = 8
    """explained predictions on the page"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        super().check()
        check_positive(self, "evaluation", "top_examples")
        check_not_negative(self, "evaluation", "gallery")


@dataclass
class ClassesConfig:
    """Classes named in words."""

    section: ClassVar[str] = "zeroshot"

    classes: list[str] = field(default_factory=list)
    """names in the order of their numbers; or [FILE] with one name a line; or [imagenet]"""
    templates: str = "simple"
    """imagenet_80, imagenet_7, simple, none, a text file (one a line), or one such as 'a {}'"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        if not self.classes:
            raise ConfigError(
                f"{self.section}.classes=[]: name at least two classes, or one text file with a "
                "name a line, or [imagenet]"
            )
        repeated = [name for name, times in Counter(self.classes).items() if times > 1]
        if repeated:
            raise ConfigError(f"{self.section}.classes: {', '.join(repeated)} stands there twice")


@dataclass
class ZeroshotConfig(ClassesConfig):
    """Classes named in words, and labelled images to sort into them."""

    label: str = "cls"
    """sample field that holds the number or the name of the class: cls, or json:<key>"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_label("zeroshot", self.label)
        super().check()


@dataclass
class PromptsConfig(ClassesConfig):
    """Classes named in words, and images that may be labelled with them."""

    label: str | None = "cls"
    """sample field that holds the class: cls, or json:<key>; none: no labels and no accuracy"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        if self.label is not None:
            check_label("zeroshot", self.label)
        super().check()
