"""Who is harmed: accuracy by label and cue, AUROC and calibration with and without it."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from clipattr.callbacks.shortcuts_result import UNDEFINED
from clipattr.config.schema import Shortcuts
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_effects import Passes
from clipattr.jobs.shortcuts_inputs import HEADS, Audited
from clipattr.jobs.shortcuts_latents import Flags
from clipattr.jobs.site_states import spread
from clipattr.metrics.intervals import Interval, bootstrap_mean
from clipattr.metrics.quality import Quality, measure_quality


class Group(NamedTuple):
    """One label with one state of the cue."""

    label: str
    has_cue: bool
    n_images: int
    accuracy: dict[str, Interval]
    examples: list[int]
    """samples, spread over the group"""


def flags_of_rows(passes: Passes, cue: KnownCue) -> Flags | None:
    """Flags of the images that were looked at."""
    if cue.flags is None:
        return None
    rows = passes.result.rows
    return Flags(cue.flags.has[rows], cue.flags.known[rows])


def measure_groups(
    config: Shortcuts, audited: Audited, passes: Passes, cue: KnownCue
) -> list[Group]:
    """Every label without and with the cue; no group where nobody says which images have it."""
    flags = flags_of_rows(passes, cue)
    if flags is None:
        return []
    is_right = {head: passes.result.logits[head].argmax(dim=1) == passes.labels for head in HEADS}
    return [
        _measure(
            config,
            audited,
            passes,
            label,
            is_with,
            is_right,
            _members(passes, flags, label, is_with),
        )
        for label in range(len(audited.classes))
        for is_with in (False, True)
    ]


def _members(passes: Passes, flags: Flags, label: int, is_with: bool) -> Bool[Tensor, " image"]:
    return flags.known & (passes.labels == label) & (flags.has == is_with)


def _measure(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    label: int,
    is_with: bool,
    is_right: Mapping[str, Bool[Tensor, " image"]],
    members: Bool[Tensor, " image"],
) -> Group:
    rows = passes.result.rows[members]
    shown = rows[torch.from_numpy(spread(len(rows), min(config.shortcuts.shown, len(rows))))]
    accuracy = {
        head: _mean(right[members].double(), config.shortcuts.resamples, config.seed)
        for head, right in is_right.items()
    }
    return Group(audited.classes[label], is_with, len(rows), accuracy, shown.tolist())


def _mean(values: Float[Tensor, " image"], resamples: int, seed: int) -> Interval:
    if len(values) < 2:
        return UNDEFINED
    generator = torch.Generator().manual_seed(seed)
    return bootstrap_mean(values, resamples=resamples, generator=generator)


def measure_heads(audited: Audited, passes: Passes, cue: KnownCue | None) -> dict[str, Quality]:
    """Quality of both heads, by name."""
    flags = None if cue is None else flags_of_rows(passes, cue)
    return {
        head: quality_of(audited.probabilities(head, passes.result.logits[head]), passes, flags)
        for head in HEADS
    }


def quality_of(
    probabilities: Float[Tensor, "image class"], passes: Passes, flags: Flags | None
) -> Quality:
    """On the images that were looked at."""
    if flags is None:
        return measure_quality(probabilities, passes.labels)
    return measure_quality(probabilities, passes.labels, has_cue=flags.has, known=flags.known)
