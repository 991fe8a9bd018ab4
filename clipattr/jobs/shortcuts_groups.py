"""Who is harmed: accuracy by label and cue, AUROC and calibration with and without it."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from clipattr.callbacks.shortcuts_result import UNDEFINED
from clipattr.config.schema import Shortcuts
from clipattr.jobs.shortcuts_cue_images import CueImages
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_effects import Passes, head_logits
from clipattr.jobs.shortcuts_inputs import HEADS, Audited
from clipattr.jobs.shortcuts_pairs import pick_examples
from clipattr.metrics.accuracy import wilson_interval
from clipattr.metrics.intervals import Interval
from clipattr.metrics.quality import Quality, measure_quality

Logits = Float[Tensor, "image class"]


class Group(NamedTuple):
    """One label with one state of the cue."""

    label: str
    has_cue: bool
    n_images: int
    accuracy: dict[str, Interval]
    examples: list[int]
    """samples, or pairs where the cue is known from them, spread over the group"""


class HeadQuality(NamedTuple):
    """A head on the images of a cue, and on all evaluated images as they are."""

    quality: Quality
    accuracy_of_all: float
    """the same as `quality.accuracy`, unless groups are made of pairs"""


def measure_groups(
    config: Shortcuts, audited: Audited, cue: KnownCue, shown: CueImages
) -> list[Group]:
    """Every label without and with the cue; no group where nothing says which images have it.

    Intervals are of one group by itself: of pairs, both sides have the same pictures.
    """
    if cue.source is None:
        return []
    is_right = {
        head: head_logits(audited, head, shown.embeddings).argmax(dim=1) == shown.labels
        for head in HEADS
    }
    return [
        _measure(config, audited, shown, is_right, label, is_with)
        for label in range(len(audited.classes))
        for is_with in (False, True)
    ]


def _measure(
    config: Shortcuts,
    audited: Audited,
    shown: CueImages,
    is_right: Mapping[str, Bool[Tensor, " image"]],
    label: int,
    is_with: bool,
) -> Group:
    has, known = shown.flags
    members = known & (shown.labels == label) & (has == is_with)
    accuracy = {head: _share(right[members]) for head, right in is_right.items()}
    examples = pick_examples(shown.sources[members], config.shortcuts.shown)
    return Group(audited.classes[label], is_with, int(members.sum()), accuracy, examples)


def _share(is_right: Bool[Tensor, " image"]) -> Interval:
    """Of one image as well, and with a width where all are right: a bootstrap has none there."""
    n_right, n_images = int(is_right.sum()), len(is_right)
    return wilson_interval(n_right, n_images) if n_images else UNDEFINED


def measure_heads(audited: Audited, passes: Passes, shown: CueImages) -> dict[str, HeadQuality]:
    """Of both heads, by name."""
    found: dict[str, HeadQuality] = {}
    for head in HEADS:
        logits = head_logits(audited, head, shown.embeddings)
        quality = measure_logits(audited.scale(head, logits), shown)
        of_all = share_right(head_logits(audited, head, passes.result.embeddings), passes)
        found[head] = HeadQuality(quality, of_all)
    return found


def measure_logits(logits: Logits, shown: CueImages) -> Quality:
    """Of logits of the images of a cue, whose softmax are probabilities."""
    has, known = shown.flags
    return measure_quality(logits, shown.labels, has_cue=has, known=known)


def share_right(logits: Logits, passes: Passes) -> float:
    """Accuracy over all evaluated images, as they are."""
    return float((logits.argmax(dim=1) == passes.labels).double().mean())
