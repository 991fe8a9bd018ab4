"""What the world's evaluation has measured, for metrics.json and for the page."""

from typing import NamedTuple

from clipattr.callbacks import (
    ExamplesCallback,
    FaithfulnessCallback,
    GlobalDeletionCallback,
    ReconstructionCallback,
)
from clipattr.jobs.world_attribution import AgainstExact, Corrections
from clipattr.jobs.world_scorecard import ScorecardEntry
from clipattr.jobs.world_shortcuts import CueEntry, GroupEntry, HeadQuality, PairScores
from clipattr.jobs.world_unexpected import Grade


class Faithfulness(NamedTuple):
    """One dictionary: deletion by each image's own order, and by one order for each noun."""

    local: FaithfulnessCallback
    by_class_mean: GlobalDeletionCallback


class Inside(NamedTuple):
    """Questions one and two: what is inside, and how does it drive a prediction."""

    reconstruction: ReconstructionCallback
    examples: ExamplesCallback
    faithfulness: Faithfulness
    control: Faithfulness | None
    """of an untrained dictionary"""
    corrections: Corrections
    against_exact: AgainstExact
    scorecard: list[ScorecardEntry]
    unexpected: Grade | None
    """of the list of an atlas"""


class Shortcuts(NamedTuple):
    """Question three: is it a shortcut, and does the probe amplify it."""

    cues: list[CueEntry]
    groups: list[GroupEntry]
    heads: dict[str, HeadQuality]
    pairs: PairScores
