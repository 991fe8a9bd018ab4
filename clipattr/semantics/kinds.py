"""What kind an unexpected reliance may be of: simple rules, each with the numbers it rests on.

A rule suggests and never asserts. Several may hold, strongest first; none: "unclear".
"""

from enum import Enum
from typing import NamedTuple

FITS_TOO = 0.15
"""share of the latents that align at least as well, up to which a word fits too"""
LIFT = 1.5
"""how much more often than elsewhere a latent of the context fires on images of the class"""


class Kind(Enum):
    """The kinds that the rules know."""

    compound = "part of a compound"
    typography = "written word"
    polysemy = "another sense"
    context = "context"
    similar = "similar class"
    unclear = "unclear"


class Evidence(NamedTuple):
    """What is known of a pair; None where it is not."""

    class_name: str
    label: str
    """best word of the latent"""
    label_is_class: bool
    """whether it is the name of another class"""
    part: str | None
    """a label that is a part of the class's name"""
    written_sigmas: float
    """standard errors by which its images are nearer to the class's name in writing than to
    `label`"""
    alignment: float
    aligned_share: float
    """share of the latents that align with the class at least as well"""
    counterpart: int | None
    """the latent that means the class and drives it"""
    counterpart_cosine: float | None
    """of the centred means of the images of both"""
    lift: float | None
    """P(fires | image of the class) / P(fires)"""
    share_of_class: float | None
    """P(image of the class | fires)"""


class Suggestion(NamedTuple):
    """A kind, and why."""

    kind: Kind
    reason: str


def suggest_kinds(evidence: Evidence) -> list[Suggestion]:
    """Every rule that holds."""
    rules = (_compound, _typography, _polysemy, _context, _similar)
    found = [suggestion for rule in rules if (suggestion := rule(evidence)) is not None]
    unclear = Suggestion(Kind.unclear, f"nearest word: '{evidence.label}'")
    return found or [unclear]


def _compound(evidence: Evidence) -> Suggestion | None:
    if evidence.part is None:
        return None
    reason = f"its label '{evidence.part}' is a part of the name '{evidence.class_name}'"
    return Suggestion(Kind.compound, reason)


def _typography(evidence: Evidence) -> Suggestion | None:
    if not evidence.written_sigmas >= 2:
        return None
    return Suggestion(
        Kind.typography,
        f"its images are nearer to the written word '{evidence.class_name}' than to "
        f"'{evidence.label}' ({evidence.written_sigmas:.1f} standard errors)",
    )


def _polysemy(evidence: Evidence) -> Suggestion | None:
    fits = evidence.alignment > 0 and evidence.aligned_share <= FITS_TOO
    if not fits or evidence.counterpart is None or evidence.counterpart_cosine is None:
        return None
    if evidence.counterpart_cosine >= 0.5:
        return None
    return Suggestion(
        Kind.polysemy,
        f"the word fits too (better than {100 * (1 - evidence.aligned_share):.0f} % of the "
        f"latents), but its images are unlike those of latent {evidence.counterpart} "
        f"(cosine {evidence.counterpart_cosine:.2f})",
    )


def _context(evidence: Evidence) -> Suggestion | None:
    if evidence.lift is None or evidence.share_of_class is None or evidence.label_is_class:
        return None
    if evidence.lift < LIFT or evidence.share_of_class > 0.5:
        return None
    return Suggestion(
        Kind.context,
        f"'{evidence.label}' is no class; it fires {evidence.lift:.1f} times as often on images of "
        f"the class, which are {100 * evidence.share_of_class:.0f} % of those it fires on",
    )


def _similar(evidence: Evidence) -> Suggestion | None:
    if not evidence.label_is_class or evidence.label == evidence.class_name:
        return None
    return Suggestion(Kind.similar, f"its images look like the class '{evidence.label}'")
