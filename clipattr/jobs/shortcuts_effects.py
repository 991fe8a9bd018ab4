"""What cues do to both heads: the passes over the images, and effects with intervals."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.callbacks import take_all
from clipattr.callbacks.shortcuts import ShortcutCallback
from clipattr.callbacks.shortcuts_result import (
    CueEffect,
    CueShare,
    ShortcutResult,
    measure_effects,
    measure_shares,
    spreads,
)
from clipattr.config.schema import Shortcuts
from clipattr.errors import DataError
from clipattr.jobs.shortcuts_cues import KnownCue
from clipattr.jobs.shortcuts_inputs import HEADS, PROBE, TEXT, Audited, ImageSet
from clipattr.jobs.shortcuts_pairs import PLACEBO, WITH, WITHOUT, CuePairs, embed_states
from clipattr.jobs.shortcuts_removal import Removed
from clipattr.shortcuts.automatic import LatentSums, placebo_latents
from clipattr.shortcuts.contrast import contrast_logits, remove_direction

PAIRS, REMOVAL, DIRECTION = "pairs", "removal", "direction"
PLACEBO_PAIRS, PLACEBO_REMOVAL = "placebo of the pairs", "placebo of the removal"
# Images that a prompt fits best: a tenth, but no fewer, and never more than half.
_FEWEST_FITTING = 20
# Placebos of a cue.
_DRAWS = 5

Scores = Float[Tensor, "n score"]


class Measured(NamedTuple):
    """Effects of one cue; the placebos are among them."""

    effects: list[CueEffect]
    shares: list[CueShare]


class Passes(NamedTuple):
    """The evaluated images under both heads, and without each cue."""

    result: ShortcutResult
    spreads: dict[str, Float[Tensor, " score"]]
    labels: Int[Tensor, " image"]
    placebos: dict[str, dict[str, Int[Tensor, " latent"]]]
    """of the cues with latents: several draws of as many others, each with its name"""


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
    passes = Passes(result, spreads(result), labels, {})
    return passes if result.sums is None else _add_placebos(config, passes, result.sums, cues)


def _apply_heads(audited: Audited, images: ImageSet) -> ShortcutResult:
    rows = torch.cat([row for _, row, _ in images.batches]).sort().values
    unit = embed_states(audited, images.batches, len(images.samples))[rows]
    logits = {
        name: unit.double() @ head.weights.double().cpu().T + head.bias.double().cpu()
        for name, head in audited.heads.items()
    }
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


def _add_placebos(
    config: Shortcuts, passes: Passes, sums: LatentSums, cues: Sequence[KnownCue]
) -> Passes:
    """As many latents of nearest energy, none of which stands for a cue.

    One of them may be what the task is about, so that several are drawn and their effects averaged.
    """
    excluded = torch.zeros(len(sums.energy), dtype=torch.bool)
    for cue in cues:
        excluded[cue.latents] = True
    placebos: dict[str, dict[str, Tensor]] = {}
    for cue in cues:
        if not len(cue.latents):
            continue
        try:
            placebos[cue.name] = {
                f"placebo {draw} of {cue.name}": placebo_latents(
                    sums.energy, cue.latents, excluded, seed=config.seed + draw
                )
                for draw in range(_DRAWS)
            }
        except DataError as error:  # a cue may be half of a small dictionary
            cue.warnings.append(f"no placebo for its removal: {error}")
    return passes._replace(placebos=placebos)


def removal_effects(
    config: Shortcuts,
    audited: Audited,
    passes: Passes,
    removed: Sequence[Removed],
    measure: str,
) -> list[CueEffect]:
    """y(x) - y(x without the latents), over all images; the mean of several sets of latents."""
    text, probe = (
        torch.stack([_changes(audited, passes, one, head) for one in removed]).mean(dim=0)
        for head in HEADS
    )
    return _measure(config, audited, passes, text, probe, measure)


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
    removed: Mapping[str, Removed],
) -> Measured:
    """Every effect that is defined for a cue."""
    effects: list[CueEffect] = []
    if pairs is not None:
        for variant, measure in ((WITH, PAIRS), (PLACEBO, PLACEBO_PAIRS)):
            if variant in pairs.embeddings:
                text, probe = (pair_scores(audited, pairs, head, variant) for head in HEADS)
                effects += _measure(config, audited, passes, text, probe, measure)
    shares: list[CueShare] = []
    if len(cue.latents):
        text, probe = (
            contrast_logits(passes.result.logits[head])
            - contrast_logits(passes.result.without[head, cue.name])
            for head in HEADS
        )
        effects += _measure(config, audited, passes, text, probe, REMOVAL)
        if cue.name in passes.placebos:
            draws = [removed[name] for name in passes.placebos[cue.name]]
            effects += removal_effects(config, audited, passes, draws, PLACEBO_REMOVAL)
        draw = {"resamples": config.shortcuts.resamples, "seed": config.seed}
        shares = measure_shares(passes.result, cue.name, audited.scores, **draw)
    if cue.direction is not None:
        text, probe = direction_scores(audited, passes, cue)
        effects += _measure(config, audited, passes, text, probe, DIRECTION)
    return Measured(effects, shares)


def pair_scores(audited: Audited, pairs: CuePairs, head: str, variant: str) -> Scores:
    """What the cue, or the placebo, adds to the scores of each pair.

    A pasted placebo is compared with the image without. Beside a region that is taken out, the
    placebo is another one that is: what adds something is the image, which has both.
    """
    upper, lower = variant, WITHOUT
    if variant == PLACEBO and pairs.is_cut_out:
        upper, lower = WITH, PLACEBO
    return score(audited, head, pairs.embeddings[upper]) - score(
        audited, head, pairs.embeddings[lower]
    )


def score(audited: Audited, head: str, embeddings: Float[Tensor, "n embed"]) -> Scores:
    """Scores of unit embeddings by a head, in float64."""
    weights, bias = (each.double().cpu() for each in audited.heads[head])
    return contrast_logits(embeddings.double() @ weights.T + bias)


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
    config: Shortcuts, audited: Audited, passes: Passes, text: Scores, probe: Scores, measure: str
) -> list[CueEffect]:
    return measure_effects(
        text,
        probe,
        spreads=passes.spreads,
        names=audited.scores,
        measure=measure,
        resamples=config.shortcuts.resamples,
        seed=config.seed,
    )
