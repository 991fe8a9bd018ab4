"""Settings of the job on shortcuts: cues, pairs, repairs, and what is shown of them."""

import dataclasses
from collections import Counter
from dataclasses import dataclass

from omegaconf import MISSING

from clipattr.config.choices import OverlayKind, RepairMethod
from clipattr.config.inputs import DataConfig, ModelConfig
from clipattr.config.limits import check_label, check_not_negative, check_positive
from clipattr.errors import ConfigError

_EXAMPLE = "cues='[{name: water, field: json:place=water}]'"
# Of 19, with the probe itself, not even the largest effect is among fewer than one in twenty.
_FEWEST_SHUFFLED = 20


@dataclass
class CueConfig:
    """One cue, known by any of its fields or by several at once."""

    name: str = MISSING
    """what tables and pages call it"""
    field: str | None = None
    """sample field that says which images have it: json:sticker, json:place=water"""
    prompt: str | None = None
    """words for it: 'a photo with a ruler'; its direction in the embedding is taken out"""
    latents: list[int] = dataclasses.field(default_factory=list)
    """latents that stand for it; none: those that tell images with it from the others"""
    words: str | None = None
    """words whose latents stand for it: those of the atlas that the job find lists first"""
    overlay: OverlayKind | None = None
    """pasted: sticker, ruler, ink, watermark, frame or text; the same for a sample key for ever"""
    text: str = "SAMPLE"
    """what a watermark or a text says"""
    size: float | None = None
    """of the overlay, as a share of the shorter side; none: what is usual for its kind"""
    region: str | None = None
    """sample field with a picture as large as the image, bright where the cue is: mask.png"""
    pair: str | None = None
    """state of the pair shards in which the scene has the cue"""

    @property
    def kinds(self) -> list[str]:
        """How it is known."""
        known = {
            "metadata": self.field,
            "prompt": self.prompt,
            # A job fills in the latents that the words of a cue stand for.
            "latents": self.latents if self.words is None else [],
            "words": self.words,
            "overlay": self.overlay,
            "region": self.region,
            "pairs": self.pair,
        }
        return [kind for kind, value in known.items() if value]

    def check(self, place: str) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        if not self.name.strip() or set(self.name) & set("/\\") or self.name in (".", ".."):
            raise ConfigError(f"{place}.name={self.name!r}: must be words, without slashes")
        if not self.kinds:
            raise ConfigError(
                f"{place} ({self.name}): says nowhere how the cue is known. Give it a field, "
                f"a prompt, latents, words, an overlay, a region or a pair: {_EXAMPLE}"
            )
        shown = [kind for kind in self.kinds if kind in ("overlay", "region", "pairs")]
        if len(shown) > 1:
            raise ConfigError(
                f"{place} ({self.name}): has {' and '.join(shown)}; pairs of a cue are made in one "
                "way. Make two cues of it"
            )
        self._check_words(place)
        if len(set(self.latents)) < len(self.latents) or min(self.latents, default=0) < 0:
            raise ConfigError(f"{place}.latents={self.latents}: each at most once, numbered from 0")

    def _check_words(self, place: str) -> None:
        if self.words is None:
            return
        if not self.words.strip():
            raise ConfigError(f"{place}.words={self.words!r}: empty text has no latents")
        if self.latents:
            raise ConfigError(
                f"{place} ({self.name}): has latents={self.latents} and words={self.words!r}, "
                "which stand for latents too. Keep one of the two, or make two cues of it"
            )


@dataclass
class PairsConfig:
    """Shards that hold each scene several times: without and with cues."""

    shards: str | None = None
    """as data.shards; none: pairs are made of the evaluated images, by overlays and regions"""
    scene: str = "json:pair"
    """sample field that is the same in all pictures of a scene"""
    state: str = "json:variant"
    """sample field that says what is shown: one of the cues' `pair`, or `without`"""
    without: str = "none"
    """state of a scene without any cue"""
    images: int = 200
    """images, spread over data.shards, into which overlays are pasted and of which regions go"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "pairs", "images")
        if self.images < 2:
            raise ConfigError("pairs.images=1: an interval needs two")
        for name in ("scene", "state"):
            check_json("pairs", name, getattr(self, name))


@dataclass
class RepairConfig:
    """What is done about the cues, and from which images it is learned."""

    shards: str | None = None
    """labelled images to learn repairs from, none of data.shards among them; none: no repair"""
    methods: list[RepairMethod] = dataclasses.field(default_factory=lambda: list(RepairMethod))
    """suppress, project, retrain, dfr, balanced, group_dro"""
    Cs: list[float] = dataclasses.field(default_factory=lambda: [0.01, 0.1, 1.0, 10.0, 100.0])
    """inverse penalties of retrained probes; one is chosen on a part of the learned images"""
    reference: str | None = None
    """folder of a probe that never saw the cue: what could be reached; none: the prompts"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        if len(set(self.methods)) < len(self.methods):
            raise ConfigError("repair.methods names a method twice")
        if not self.Cs or min(self.Cs) <= 0:
            raise ConfigError(f"repair.Cs={self.Cs}: must be numbers greater than 0")


@dataclass
class ShortcutsConfig:
    """What is measured and shown."""

    automatic: bool = True
    """rank all latents by how much more the probe uses them than the prompts do; needs an SAE"""
    confirmed: int = 20
    """latents of that ranking whose exact effect is measured"""
    level: float = 0.05
    """share of the significant latents that chance may find"""
    cue_auroc: float = 0.8
    """how well a latent must tell images with a cue from others of their label to stand for it"""
    latents_of_words: int = 3
    """latents of the atlas that stand for the `words` of a cue, at most"""
    unexpected: int = 0
    """latents on which the atlas found a class of the probe to rely unexpectedly: each is a cue"""
    placebos: int = 30
    """draws of other latents beside those of a cue, each a pass of the suffix; 0: none"""
    shuffled: int = 100
    """probes of shuffled labels, beside which every effect is put: at least 20; 0: none"""
    resamples: int = 1000
    """bootstrap resamples of every interval"""
    shown: int = 6
    """example pictures of a group, a latent and of the pairs of a cue"""
    thumbnail: int = 112
    """longer side of the small pictures, in pixels"""

    def check(self) -> None:
        """Raise ConfigError when a value cannot work."""
        check_positive(self, "shortcuts", "confirmed", "resamples", "thumbnail")
        check_positive(self, "shortcuts", "latents_of_words")
        check_not_negative(self, "shortcuts", "shown", "unexpected", "placebos")
        if self.shuffled and self.shuffled < _FEWEST_SHUFFLED:
            raise ConfigError(
                f"shortcuts.shuffled={self.shuffled}: must be at least {_FEWEST_SHUFFLED}, fewer "
                "cannot show that chance is rare; or 0, and nothing is put beside the effects"
            )
        if not 0.0 < self.level < 1.0:
            raise ConfigError(f"shortcuts.level={self.level}: must lie between 0 and 1")
        if not 0.5 < self.cue_auroc <= 1.0:
            raise ConfigError(
                f"shortcuts.cue_auroc={self.cue_auroc}: must be more than 0.5, which is chance, "
                "and at most 1"
            )


@dataclass
class ShortcutsQuestion:
    """Which probe leans on which cues, beside which prompts, on which images."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    probe: str = MISSING
    """folder with a linear probe of the embedding: probe.safetensors and probe.json"""
    sae: str | None = None
    """folder with sae.safetensors and sae.json; none: nothing is said of latents"""
    atlas: str | None = None
    """folder of an atlas of the same SAE: labels of latents, cues by words and unexpected ones"""
    prompts: list[str] = dataclasses.field(default_factory=list)
    """what the probe is compared with, one per class in its order; none: its class names"""
    templates: str = "simple"
    """what class names stand in, as zeroshot.templates; prompts stand alone"""
    label: str | None = None
    """sample field that holds the class, cls or json:<key>; none: that of the probe"""
    cues: list[CueConfig] = dataclasses.field(default_factory=list)
    """suspects: '[{name: water, field: json:place=water}, {name: ruler, overlay: ruler}]'"""
    pairs: PairsConfig = dataclasses.field(default_factory=PairsConfig)
    repair: RepairConfig = dataclasses.field(default_factory=RepairConfig)
    shortcuts: ShortcutsConfig = dataclasses.field(default_factory=ShortcutsConfig)

    def check_question(self) -> None:
        """Raise ConfigError when a value or a combination cannot work."""
        for section in (self.pairs, self.repair, self.shortcuts):
            section.check()
        if self.label is not None:
            check_label("this job", self.label)
        for number, cue in enumerate(self.cues):
            cue.check(f"cues[{number}]")
        self._check_cues()
        self._check_atlas()

    def _check_atlas(self) -> None:
        if self.atlas is not None:
            if self.sae is None:
                raise ConfigError(
                    f"atlas={self.atlas}, and sae=null: an atlas describes the latents of an SAE; "
                    "name the one that it was made of"
                )
            return
        wanted = [f"cues: {cue.name} has words={cue.words!r}" for cue in self.cues if cue.words]
        if self.shortcuts.unexpected:
            wanted.append(f"shortcuts.unexpected={self.shortcuts.unexpected}")
        if wanted:
            raise ConfigError(
                f"{wanted[0]}, and atlas=null: latents are found in an atlas. Name the folder of "
                "one; configs/evaluate/atlas.yaml says how it is made"
            )

    def _check_cues(self) -> None:
        repeated = [name for name, n in Counter(cue.name for cue in self.cues).items() if n > 1]
        if repeated:
            raise ConfigError(f"cues: {', '.join(repeated)} stands there twice")
        if self.sae is None and not self.cues:
            raise ConfigError(
                "cues=[] and sae=null: nothing to look for. Name a cue, or an SAE among whose "
                f"latents cues are found: {_EXAMPLE}"
            )
        for cue in self.cues:
            if cue.pair is not None and self.pairs.shards is None:
                raise ConfigError(
                    f"cues: {cue.name} has pair={cue.pair}, and pairs.shards=null; say where the "
                    "pairs are"
                )
            if cue.latents and self.sae is None:
                raise ConfigError(f"cues: {cue.name} has latents={cue.latents}, and sae=null")


def check_json(section: str, name: str, value: str) -> None:
    """A field of a sample's JSON."""
    if not value.startswith("json:") or not value.removeprefix("json:"):
        raise ConfigError(f"{section}.{name}={value!r}: must be json:<key>")
