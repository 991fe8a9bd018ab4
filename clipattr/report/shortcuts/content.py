"""What the page of shortcuts shows, as plain values: no tensors, no paths; pictures are PNG bytes.

Effects are in standard deviations of each head's score over the evaluated images; a number that is
not defined is nan, and its interval three of them. The heads are called "text" and "probe", in this
order: in the dicts by head and as names of the first two rows of a quality table.
"""

import math
from dataclasses import dataclass, field

from clipattr.metrics.intervals import Interval


@dataclass(frozen=True)
class EffectRow:
    """One effect of a cue on one score: 'pairs', 'placebo of the pairs', 'removal', ...

    `excess` is |probe| - |text|; `amplification`, probe / text, is nan where the effect on the text
    head cannot be told from 0. All three are signed; a placebo is
    called 'placebo of the ...' after the measure that it stands beside.
    """

    measure: str
    score: str
    text: Interval
    probe: Interval
    amplification: Interval
    excess: Interval
    is_placebo: bool
    n: int
    """pairs, images, or draws of a placebo"""
    null_high: float = math.nan
    """size below which 95 % of the effects are that chance has: on probes of shuffled labels; of
    the placebo of the removal, those on the probe of its draws"""
    null_share: float = math.nan
    """(1 + k) / (1 + n_null), where k of those effects are at least as large as that on the probe;
    of the placebo of the removal k / n_null, where k are as large as that of the cue's latents"""
    excess_all: Interval | None = None
    """the excess with an interval that holds for all scores of the measure at once: what the
    headline is judged by; None of one score, where it is that of the excess"""
    n_null: int = 0
    """probes of shuffled labels, or draws, of which `null_high` and `null_share` are"""


@dataclass(frozen=True)
class ShareRow:
    """Share of the attribution of a score that falls on the cue's latents."""

    score: str
    text: Interval
    probe: Interval


@dataclass(frozen=True)
class GroupRow:
    """One label with one state of the cue: how many images, how accurate, and some of them."""

    label: str
    has_cue: bool
    n_images: int
    accuracy: dict[str, Interval]
    """by head"""
    examples: list[bytes]


@dataclass(frozen=True)
class PairPicture:
    """One image without and with the cue, and with the placebo where there is one.

    Each has the score of both heads, in standard deviations.
    """

    key: str
    without: bytes
    with_cue: bytes
    placebo: bytes | None
    scores: dict[str, tuple[float, float, float]]
    """by head: without, with, placebo (nan where there is none)"""
    score: str = ""
    """of which score they are; empty where there is but one"""
    is_cut_out: bool = False
    """without and placebo are what is left of the picture: another region is cut out"""


@dataclass(frozen=True)
class QualityRow:
    """A head, or a repaired probe, on the images of a cue; the cue's parts are nan without one."""

    name: str
    accuracy: float
    balanced_accuracy: float
    worst_group: float
    gap: float
    auroc: float
    auroc_with: float
    auroc_without: float
    ece: float
    ece_with: float
    ece_without: float
    accuracy_of_all: float = math.nan
    """over all evaluated images as they are, where the others are of the pairs"""


@dataclass(frozen=True)
class RepairRow:
    """A repaired probe: what was done, its quality, and the effect of the cue that is left."""

    name: str
    description: str
    quality: QualityRow
    effect: Interval
    """of the cue on the repaired probe, by the pairs, else by removal, on the score that it moves
    most: it stands below that of the probe"""
    restored: float
    """share of the worst-group accuracy below the reference that came back; nan where that was
    less than a percentage point"""


@dataclass(frozen=True)
class CurvePoint:
    """A repair at part of its strength."""

    strength: float
    average: float
    worst_group: float


@dataclass(frozen=True)
class Curve:
    """Average against worst group, as a repair grows from 0 to its full strength."""

    name: str
    points: list[CurvePoint]


@dataclass(frozen=True)
class CueResult:
    """Everything about one cue."""

    name: str
    kinds: list[str]
    """how it is known: metadata, prompt, latents, words, overlay, region, pairs"""
    latents: list[int]
    """what stands for it inside the model"""
    effects: list[EffectRow]
    """the measure that counts most first: the headline is about the first that is no placebo, and
    among its scores about the one with the largest excess"""
    shares: list[ShareRow]
    groups: list[GroupRow]
    quality: list[QualityRow]
    """text head and probe, with the groups of this cue; the last one is what repairs start from"""
    pairs: list[PairPicture]
    repairs: list[RepairRow]
    curves: list[Curve]
    warnings: list[str] = field(default_factory=list)
    source: str = ""
    """what says which images have it: metadata, pairs, latents; empty where nothing does. Of pairs,
    groups, quality, repairs and curves are those of their pictures, both sides of each"""
    labels: dict[int, list[str]] = field(default_factory=dict)
    """words for its latents, where an atlas has some"""


@dataclass(frozen=True)
class AmplifiedLatent:
    """A latent that the probe uses more than the text head does, found without naming a cue."""

    rank: int
    latent: int
    score: str
    text: Interval
    probe: Interval
    excess: Interval
    """exact effects of taking it out"""
    z: float
    """of the estimate by which it was ranked"""
    is_significant: bool
    share_of_images: float
    cues: list[str]
    """names of the cues whose latents it is among"""
    examples: list[bytes]
    labels: list[str] = field(default_factory=list)
    """words for it, the best first, where an atlas has some"""


@dataclass(frozen=True)
class Fact:
    """A line of the provenance."""

    name: str
    value: str


@dataclass(frozen=True)
class ShortcutsContent:
    """The whole page."""

    title: str
    classes: list[str]
    prompts: list[str]
    n_images: int
    cues: list[CueResult]
    amplified: list[AmplifiedLatent] | None
    """None: not asked for, or no SAE"""
    n_significant: int
    level: float
    facts: list[Fact]
    warnings: list[str] = field(default_factory=list)
