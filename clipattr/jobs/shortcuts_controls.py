"""What the effects of cues are put beside: probes of shuffled labels, and placebo latents."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.callbacks.shortcuts_result import UNDEFINED, CueEffect
from clipattr.config.schema import Shortcuts
from clipattr.errors import DataError
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_effects import (
    PAIRS,
    PLACEBO_PAIRS,
    REMOVAL,
    Measured,
    Passes,
    pair_sides,
)
from clipattr.jobs.shortcuts_inputs import HEADS, Audited, ImageSet
from clipattr.jobs.shortcuts_learned import Learned
from clipattr.jobs.shortcuts_pairs import FEWEST_PAIRS, PLACEBO, WITH, CuePairs
from clipattr.jobs.shortcuts_removal import change_each
from clipattr.metrics.intervals import Interval, bootstrap_mean
from clipattr.report.shortcuts.claims import PLACEBO_REMOVAL
from clipattr.shortcuts.automatic import LatentSums
from clipattr.shortcuts.null_heads import (
    NullBand,
    draws_band,
    effects_on_heads,
    headline_effects,
    null_band,
    null_heads,
)
from clipattr.shortcuts.placebos import count_unlike, draw_placebos

Bands = dict[tuple[str, str], NullBand]
"""by measure and score"""
# An interval over fewer draws would be a guess.
_FEWEST_DRAWS = 10


class Controls(NamedTuple):
    """What is put beside the effects of every cue."""

    heads: Float[Tensor, "head class embed"]
    """probes of shuffled labels"""
    changes: dict[str, Float[Tensor, " embed"]]
    """by cue: mean change of the embedding by its latents"""
    draws: dict[str, Float[Tensor, "draw embed"]]
    """the same of each draw of other latents"""


def make_controls(
    config: Shortcuts,
    audited: Audited,
    images: ImageSet,
    passes: Passes,
    learned: Learned | None,
    cues: Sequence[KnownCue],
) -> Controls:
    """Probes that know nothing, and one more pass over the images for the latents."""
    sums = passes.result.sums
    drawn = {} if sums is None else {one.name: _draw(config, sums, one, cues) for one in cues}
    sets = {
        (cue.name, number): latents
        for cue in cues
        for number, latents in enumerate([cue.latents, *drawn.get(cue.name, [])])
        if len(cue.latents)
    }
    changed = change_each(audited, images, len(passes.labels), sets)
    changes = {name: moved for (name, number), moved in changed.items() if number == 0}
    draws = {
        name: torch.stack([changed[name, number] for number in range(1, len(found) + 1)])
        for name, found in drawn.items()
        if found
    }
    return Controls(_shuffle(config, audited, passes, learned), changes, draws)


def _shuffle(
    config: Shortcuts, audited: Audited, passes: Passes, learned: Learned | None
) -> Float[Tensor, "head class embed"]:
    """Learned from the images to learn from; without any, from those that are evaluated."""
    embeddings, labels = passes.result.embeddings, passes.labels
    if not config.shortcuts.shuffled:
        return embeddings.new_zeros(0, len(audited.classes), embeddings.shape[1])
    if learned is not None:
        embeddings, labels = learned.embeddings, learned.images.labels[learned.rows]
    return null_heads(
        embeddings,
        labels,
        n_classes=len(audited.classes),
        n_heads=config.shortcuts.shuffled,
        seed=config.seed,
    )


def _draw(
    config: Shortcuts, sums: LatentSums, cue: KnownCue, cues: Sequence[KnownCue]
) -> list[Tensor]:
    """Latents of about the same energy, none of which stands for a cue."""
    wanted = config.shortcuts.placebos
    if not len(cue.latents) or not wanted:
        return []
    is_excluded = torch.zeros(len(sums.energy), dtype=torch.bool)
    for each in cues:
        is_excluded[each.latents] = True
    try:
        draws = draw_placebos(
            sums.energy, cue.latents, is_excluded, n_draws=wanted, seed=_seed(config, cue)
        )
    except DataError as error:  # a cue may be half of a small dictionary
        cue.warnings.append(f"no placebo for its removal: {error}")
        return []
    if len(draws) < wanted:
        cue.warnings.append(f"{PLACEBO_REMOVAL}: {len(draws)} draws, and {wanted} were asked for")
    n_unlike = count_unlike(sums.energy, cue.latents, draws)
    if n_unlike:
        cue.warnings.append(
            f"{PLACEBO_REMOVAL}: draws with less than half, or more than twice, the energy of "
            f"the cue's latents: {n_unlike} of {len(draws)}"
        )
    return draws


def _seed(config: Shortcuts, cue: KnownCue) -> int:
    """Of its own for each cue."""
    digest = hashlib.sha256(f"{config.seed} {cue.name}".encode()).digest()
    return int.from_bytes(digest[:7])


def add_controls(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    cue: KnownCue,
    pairs: CuePairs | None,
    measured: Measured,
    controls: Controls,
) -> Measured:
    """The placebo of the removal among the effects, and where each effect stands beside chance."""
    images, bands = passes.result.embeddings, Bands()
    for measure, moved in _moves(cue, pairs, controls).items():
        nulls = effects_on_heads(controls.heads, images, moved)
        bands |= _bands(measured.effects, measure, nulls)
    if cue.name not in controls.draws:
        return measured._replace(bands=bands)
    text, probe = (
        torch.stack(
            [
                effects_on_heads(audited.heads[head].weights.cpu()[None], images, moved)[0]
                for moved in controls.draws[cue.name]
            ]
        )
        for head in HEADS
    )
    removal = {each.score: each for each in measured.effects if each.measure == REMOVAL}
    for number, score in enumerate(audited.scores):
        judged = removal[score].probe.mean
        bands[PLACEBO_REMOVAL, score] = draws_band(probe[:, number], judged)
    placebos = _placebo_effects(config, audited.scores, text, probe)
    return measured._replace(effects=[*measured.effects, *placebos], bands=bands)


def _moves(
    cue: KnownCue, pairs: CuePairs | None, controls: Controls
) -> Mapping[str, Float[Tensor, " embed"]]:
    """Mean change of the embedding, by measure."""
    found: dict[str, Tensor] = {}
    if pairs is not None and len(pairs.keys) >= FEWEST_PAIRS:
        for variant, measure in ((WITH, PAIRS), (PLACEBO, PLACEBO_PAIRS)):
            if variant in pairs.embeddings:
                upper, lower = (each.double() for each in pair_sides(pairs, variant))
                found[measure] = (upper - lower).mean(dim=0)
    if cue.name in controls.changes:
        found[REMOVAL] = controls.changes[cue.name]
    return found


def _bands(effects: Sequence[CueEffect], measure: str, nulls: Float[Tensor, "head score"]) -> Bands:
    """Each head is met on the score that would be its headline, as the probe is."""
    rows = [each for each in effects if each.measure == measure]
    of_heads = headline_effects(nulls, nulls.new_tensor([row.text.mean for row in rows]))
    return {(measure, row.score): null_band(of_heads, row.probe.mean) for row in rows}


def _placebo_effects(
    config: Shortcuts,
    scores: Sequence[str],
    text: Float[Tensor, "draw score"],
    probe: Float[Tensor, "draw score"],
) -> list[CueEffect]:
    """Mean sizes over draws, with intervals over draws: what such latents do, not these images."""
    effects: list[CueEffect] = []
    for number, score in enumerate(scores):
        of_text, of_probe = (each[:, number].abs() for each in (text, probe))
        excess = _over_draws(config, of_probe - of_text)
        effects.append(
            CueEffect(
                measure=PLACEBO_REMOVAL,
                score=score,
                text=_over_draws(config, of_text),
                probe=_over_draws(config, of_probe),
                amplification=UNDEFINED,
                excess=excess,
                excess_all=excess,
                n=len(text),
            )
        )
    return effects


def _over_draws(config: Shortcuts, sizes: Float[Tensor, " draw"]) -> Interval:
    if len(sizes) < _FEWEST_DRAWS:
        return Interval(float(sizes.mean()), math.nan, math.nan)
    generator = torch.Generator().manual_seed(config.seed)
    return bootstrap_mean(sizes, resamples=config.shortcuts.resamples, generator=generator)
