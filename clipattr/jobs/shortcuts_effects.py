"""What cues do to both heads: the passes over the images, and effects with intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.callbacks import take_all
from clipattr.callbacks.shortcuts import ShortcutCallback
from clipattr.callbacks.shortcuts_result import (
    UNDEFINED,
    CueEffect,
    CueShare,
    ShortcutResult,
    measure_effects,
    measure_shares,
    spreads,
)
from clipattr.config.schema import Shortcuts
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_encoding import embed_states
from clipattr.jobs.shortcuts_inputs import HEADS, PROBE, TEXT, Audited, ImageSet
from clipattr.jobs.shortcuts_pairs import FEWEST_PAIRS, PLACEBO, WITH, WITHOUT, CuePairs
from clipattr.jobs.shortcuts_removal import Removed
from clipattr.probes.linear import linear_logits
from clipattr.report.shortcuts.claims import PLACEBO_REMOVAL
from clipattr.shortcuts.contrast import contrast_logits, remove_direction
from clipattr.shortcuts.null_heads import NullBand

PAIRS, REMOVAL, DIRECTION = "pairs", "removal", "direction"
PLACEBO_PAIRS = "placebo of the pairs"
_PLACEBOS = (PLACEBO_PAIRS, PLACEBO_REMOVAL)
# Not one effect for each evaluated image, but of pairs, or of some of the images.
_APART = (PAIRS, PLACEBO_PAIRS, DIRECTION)
# Images that a prompt fits best: a tenth, but no fewer, and never more than half.
_FEWEST_FITTING = 20

Scores = Float[Tensor, "n score"]


class Measured(NamedTuple):
    """Effects of one cue; the placebos are among them."""

    effects: list[CueEffect]
    shares: list[CueShare]
    bands: dict[tuple[str, str], NullBand]
    """by measure and score: probes of shuffled labels, or other latents, beside the probe"""


class Passes(NamedTuple):
    """The evaluated images under both heads, and without each cue."""

    result: ShortcutResult
    spreads: dict[str, Float[Tensor, " score"]]
    labels: Int[Tensor, " image"]


def look(config: Shortcuts, audited: Audited, images: ImageSet, cues: Sequence[KnownCue]) -> Passes:
    """One pass for the cues and all latents; without an SAE the heads alone are applied."""
    if audited.spliced is None:
        result = _apply_heads(audited, images)
    else:
        latents = {cue.name: cue.latents for cue in cues if len(cue.latents)}
        callback = ShortcutCallback(audited.spliced, audited.heads, cues=latents, automatic=True)
        take_all(audited.spliced, images.batches, callback)
        callback.finish()
        assert callback.result is not None, "after the pass"
        result = _to_cpu(callback.result)
    labels = images.labels[result.rows]
    return Passes(result, spreads(result), labels)


def _apply_heads(audited: Audited, images: ImageSet) -> ShortcutResult:
    rows = torch.cat([row for _, row, _ in images.batches]).sort().values
    unit = embed_states(audited, images.batches, len(images.samples))[rows]
    logits = {head: head_logits(audited, head, unit) for head in audited.heads}
    return ShortcutResult(rows, unit, logits, {}, {}, {}, None)


def _to_cpu(result: ShortcutResult) -> ShortcutResult:
    sums = result.sums
    if sums is not None:
        found = sums._asdict().items()
        sums = sums._replace(**{name: each.cpu() for name, each in found if name != "n_images"})
    return ShortcutResult(
        result.rows.cpu(),
        result.embeddings.cpu(),
        {name: each.cpu() for name, each in result.logits.items()},
        {name: each.cpu() for name, each in result.without.items()},
        {name: each.cpu() for name, each in result.cue_attribution.items()},
        {name: each.cpu() for name, each in result.total_attribution.items()},
        sums,
    )


def removal_effect(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    removed: Removed,
    measure: str,
    score: int,
) -> CueEffect:
    """y(x) - y(x without the latents) of one score, over all images.

    With a thousand scores, most of the time would go into the intervals of the others.
    """
    text, probe = (_changes(audited, passes, removed, head) for head in HEADS)
    chosen = slice(score, score + 1)
    (effect,) = _measure(config, audited, passes, text, probe, measure, chosen)
    return effect


def _changes(audited: Audited, passes: Passes, removed: Removed, head: str) -> Scores:
    """0 where none of the latents fires."""
    before = contrast_logits(passes.result.logits[head])
    place = torch.searchsorted(passes.result.rows, removed.samples)
    changes = torch.zeros_like(before)
    changes[place] = before[place] - score(audited, head, removed.embeddings)
    return changes


def measure_cue(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    cue: KnownCue,
    pairs: CuePairs | None,
) -> Measured:
    """Every effect that is defined for a cue; `shortcuts_controls` adds what it is put beside."""
    effects: list[CueEffect] = []
    if pairs is not None:
        for variant, measure in ((WITH, PAIRS), (PLACEBO, PLACEBO_PAIRS)):
            if variant in pairs.embeddings:
                effects += _measure_pairs(config, audited, passes, pairs, variant, measure)
        if len(pairs.keys) < FEWEST_PAIRS:
            cue.warnings.append(
                f"{len(pairs.keys)} pairs: what they do is not defined with fewer than "
                f"{FEWEST_PAIRS}"
            )
    shares: list[CueShare] = []
    if len(cue.latents):
        text, probe = (
            contrast_logits(passes.result.logits[head])
            - contrast_logits(passes.result.without[head, cue.name])
            for head in HEADS
        )
        effects += _measure(config, audited, passes, text, probe, REMOVAL)
        draw = {"resamples": config.shortcuts.resamples, "seed": config.seed}
        shares = measure_shares(passes.result, cue.name, audited.scores, **draw)
    if cue.direction is not None:
        text, probe = direction_scores(audited, passes, cue)
        effects += _measure(config, audited, passes, text, probe, DIRECTION)
    return Measured(effects, shares, {})


def _measure_pairs(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    pairs: CuePairs,
    variant: str,
    measure: str,
) -> list[CueEffect]:
    """Not defined where there are too few for an interval."""
    if len(pairs.keys) < FEWEST_PAIRS:
        return [
            CueEffect(
                measure=measure,
                score=name,
                text=UNDEFINED,
                probe=UNDEFINED,
                amplification=UNDEFINED,
                excess=UNDEFINED,
                excess_all=UNDEFINED,
                n=len(pairs.keys),
            )
            for name in audited.scores
        ]
    text, probe = (pair_scores(audited, pairs, head, variant) for head in HEADS)
    return _measure(config, audited, passes, text, probe, measure)


def headline_score(effects: Sequence[CueEffect], names: Sequence[str]) -> int:
    """The score with the largest excess by the first measure with one; 0 where there is none."""
    found = [
        one for one in effects if one.measure not in _PLACEBOS and math.isfinite(one.excess.mean)
    ]
    if not found:
        return 0
    first = [one for one in found if one.measure == found[0].measure]
    return list(names).index(max(first, key=lambda one: one.excess.mean).score)


def pair_scores(audited: Audited, pairs: CuePairs, head: str, variant: str) -> Scores:
    """What the cue, or the placebo, adds to the scores of each pair."""
    upper, lower = (score(audited, head, each) for each in pair_sides(pairs, variant))
    return upper - lower


def pair_sides(
    pairs: CuePairs, variant: str
) -> tuple[Float[Tensor, "pair embed"], Float[Tensor, "pair embed"]]:
    """Embeddings with what a cue, or the placebo, adds, and those without it.

    A pasted placebo is compared with the image without. Beside a region that is taken out, the
    placebo is another one that is: what adds something is the image, which has both.
    """
    upper, lower = variant, WITHOUT
    if variant == PLACEBO and pairs.is_cut_out:
        upper, lower = WITH, PLACEBO
    return pairs.embeddings[upper], pairs.embeddings[lower]


def score(audited: Audited, head: str, embeddings: Float[Tensor, "n embed"]) -> Scores:
    """Scores of unit embeddings by a head, in float64."""
    return contrast_logits(head_logits(audited, head, embeddings))


def head_logits(
    audited: Audited, head: str, embeddings: Float[Tensor, "n embed"]
) -> Float[Tensor, "n class"]:
    """Of unit embeddings, in float64."""
    return linear_logits(embeddings, *audited.heads[head])


def direction_scores(audited: Audited, passes: Passes, cue: KnownCue) -> tuple[Scores, Scores]:
    """y(e) - y(e with what the prompt says brought to the mean of the other images).

    Of the images with the cue; where nobody says which those are, of the tenth that the prompt fits
    best. Over all images a shift to the mean adds up to nothing, whatever the head.
    """
    assert cue.direction is not None, "there is a prompt"
    unit, direction = passes.result.embeddings.double(), cue.direction.double()
    along = unit @ direction
    chosen, others = _with_and_without(passes, cue, along)
    edited = remove_direction(unit[chosen], direction, float(along[others].mean()))
    text, probe = (
        contrast_logits(passes.result.logits[head][chosen]) - score(audited, head, edited)
        for head in (TEXT, PROBE)
    )
    return text, probe


def _with_and_without(
    passes: Passes, cue: KnownCue, along: Float[Tensor, " image"]
) -> tuple[Bool[Tensor, " image"], Bool[Tensor, " image"]]:
    if cue.flags is not None:
        has, known = (each[passes.result.rows] for each in cue.flags)
        if int((known & has).sum()) > 1 and bool((known & ~has).any()):
            return known & has, known & ~has
    fits = torch.zeros_like(along, dtype=torch.bool)
    n_fitting = min(max(len(along) // 10, _FEWEST_FITTING), len(along) // 2)
    fits[along.topk(n_fitting).indices] = True
    return fits, ~fits


def _measure(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    text: Scores,
    probe: Scores,
    measure: str,
    chosen: slice = slice(None),
) -> list[CueEffect]:
    scores = {head: contrast_logits(passes.result.logits[head])[:, chosen] for head in HEADS}
    return measure_effects(
        text[:, chosen],
        probe[:, chosen],
        scores=scores,
        same_images=measure not in _APART,
        names=audited.scores[chosen],
        measure=measure,
        resamples=config.shortcuts.resamples,
        seed=config.seed,
    )
