"""What a pass of `ShortcutCallback` found, and its numbers with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int
from torch import Tensor

from clipattr.errors import DataError
from clipattr.metrics.intervals import Interval, resampled_means
from clipattr.shortcuts.amplification import amplification_ratio
from clipattr.shortcuts.automatic import LatentSums
from clipattr.shortcuts.contrast import contrast_logits

UNDEFINED = Interval(math.nan, math.nan, math.nan)
HEADS = ("text", "probe")
# Of the spread of the data: a resample may be of one image alone, and is then not divided by 0.
_LEAST_SPREAD = 1e-6


class ShortcutResult(NamedTuple):
    """All images, sorted by row; on the device of the callback."""

    rows: Int[Tensor, " image"]
    embeddings: Float32[Tensor, "image embed"]
    """unit rows"""
    logits: dict[str, Float64[Tensor, "image class"]]
    """by head"""
    without: dict[tuple[str, str], Float64[Tensor, "image class"]]
    """by head and cue: logits when the activations of the cue's latents are 0"""
    cue_attribution: dict[tuple[str, str], Float64[Tensor, "image score"]]
    """by head and cue: sum over the cue's latents of R"""
    total_attribution: dict[str, Float64[Tensor, "image score"]]
    """by head: sum over all latents of |R|"""
    sums: LatentSums | None
    """of all latents, where they were asked for"""


class CueEffect(NamedTuple):
    """Mean effect of a cue on one score, in standard deviations of each head's score."""

    measure: str
    score: str
    text: Interval
    probe: Interval
    amplification: Interval
    """probe / text; nan where the effect on the text head cannot be told from 0"""
    excess: Interval
    """|probe| - |text|"""
    excess_all: Interval
    """the excess, with an interval that holds for all scores of the measure at once"""
    n: int
    """images or pairs"""


class CueShare(NamedTuple):
    """reliance_h(s, c) = mean over images of sum_{j in s} R_j / mean of sum_j |R_j|."""

    score: str
    text: Interval
    probe: Interval


def spreads(result: ShortcutResult) -> dict[str, Float64[Tensor, " score"]]:
    """Population standard deviation of each head's scores over the images."""
    return {head: _spread(head, contrast_logits(each)) for head, each in result.logits.items()}


def _spread(head: str, scores: Float[Tensor, "image score"]) -> Float64[Tensor, " score"]:
    found = scores.double().std(dim=0, correction=0)
    constant = (~(found > 0)).nonzero()
    if len(constant):
        score = int(constant[0])
        raise DataError(
            f"head {head!r}, score {score}: its standard deviation over {len(scores)} images is "
            f"{float(found[score])}; effects are measured against a score that varies"
        )
    return found


def measure_effects(
    text: Float[Tensor, "n score"],
    probe: Float[Tensor, "n score"],
    *,
    scores: Mapping[str, Float[Tensor, "image score"]],
    same_images: bool,
    names: Sequence[str],
    measure: str,
    resamples: int,
    seed: int,
) -> list[CueEffect]:
    """Means of effects, their ratio and their excess, with percentile bootstrap intervals.

    An image or pair is drawn with both heads and all scores, so that these stay paired, and with
    each draw goes one of the images whose standard deviation the effects are divided by.

    The excess of a resample has the signs of the data's means: with those of its own it could not
    be below 0 where the text head is quiet. `excess_all` is excess +- c standard errors, c being
    the 95 % quantile over resamples of the largest distance of any score, in standard errors; of
    one score it is `excess`. Reference: Romano and Wolf, 2005 (max-t).

    Args:
        text: y(with the cue) - y(without it) of each image or pair, in units of the head.
        probe: the same of the probe.
        scores: of the evaluated images, "text" and "probe": their spread is the unit.
        same_images: row i of the effects is image i of the scores: drawn together, else apart.
        names: of the scores.
        measure: what was done, for tables.
        resamples: of the bootstrap.
        seed: of the draws.
    """
    if same_images:
        _check_same(text, scores, measure)
    table = torch.stack([text.double(), probe.double()])
    means, drawn = _bootstrap(table, resamples, seed, what=measure)
    units, drawn_units = _draw_spreads(scores, resamples, seed if same_images else seed + 1)
    means, drawn = means / units.to(means.device), drawn / drawn_units.to(drawn.device)
    signs = means.sign()
    excesses = drawn[1] * signs[1] - drawn[0] * signs[0]
    over_all = _over_all_scores(means[1].abs() - means[0].abs(), excesses)
    effects: list[CueEffect] = []
    for number, name in enumerate(names):
        (of_text, of_probe), (texts, probes) = means[:, number], drawn[:, :, number]
        found = _interval(of_text, texts)
        ratio = amplification_ratio(of_probe, of_text), amplification_ratio(probes, texts)
        excess = _interval(of_probe.abs() - of_text.abs(), excesses[:, number])
        effects.append(
            CueEffect(
                measure=measure,
                score=name,
                text=found,
                probe=_interval(of_probe, probes),
                amplification=UNDEFINED if found.low <= 0 <= found.high else _interval(*ratio),
                excess=excess,
                excess_all=over_all[number] if len(names) > 1 else excess,
                n=len(text),
            )
        )
    return effects


def measure_effect(
    changes: Float[Tensor, " n"],
    scores: Float[Tensor, " image"],
    *,
    same_images: bool,
    what: str,
    resamples: int,
    seed: int,
) -> Interval:
    """Mean effect on one score of one head, with the draws of `measure_effects`.

    Args:
        changes: y(with the cue) - y(without it) of each image or pair, in units of the head.
        scores: of the evaluated images: their spread is the unit.
        same_images: image i of the changes is image i of the scores: drawn together, else apart.
        what: the head, for messages.
        resamples: of the bootstrap.
        seed: of the draws.
    """
    if same_images and len(changes) != len(scores):
        raise DataError(f"{what}: {len(changes)} effects, but scores of {len(scores)} images")
    table = changes.double()[None, :, None]
    mean, drawn = _bootstrap(table, resamples, seed, what=what)
    unit, units = _draw_spread(what, scores[:, None], resamples, seed if same_images else seed + 1)
    return _interval((mean[0] / unit)[0], (drawn[0] / units)[:, 0])


def _check_same(
    effects: Float[Tensor, "n score"], scores: Mapping[str, Float[Tensor, "image score"]], what: str
) -> None:
    n_images = {head: len(scores[head]) for head in HEADS}
    if set(n_images.values()) != {len(effects)}:
        raise DataError(f"{what}: {len(effects)} effects, but scores of {n_images} images")


def _draw_spreads(
    scores: Mapping[str, Float[Tensor, "image score"]], resamples: int, seed: int
) -> tuple[Float64[Tensor, "two score"], Float64[Tensor, "two resample score"]]:
    """Standard deviations over the images, and over each draw of them, the same for both heads."""
    found = [_draw_spread(head, scores[head], resamples, seed) for head in HEADS]
    units, drawn = zip(*found, strict=True)
    return torch.stack(units), torch.stack(drawn)


def _draw_spread(
    head: str, scores: Float[Tensor, "image score"], resamples: int, seed: int
) -> tuple[Float64[Tensor, " score"], Float64[Tensor, "resample score"]]:
    unit = _spread(head, scores)
    centred = scores.double() - scores.double().mean(dim=0)
    generator = torch.Generator(centred.device).manual_seed(seed)
    moments = torch.cat([centred, centred.square()], dim=1)
    mean, square = resampled_means(moments, resamples=resamples, generator=generator).chunk(
        2, dim=1
    )
    least = (_LEAST_SPREAD * unit).square()
    return unit, torch.maximum(square - mean.square(), least).sqrt()


def _over_all_scores(
    points: Float64[Tensor, " score"], drawn: Float64[Tensor, "resample score"]
) -> list[Interval]:
    """Intervals that hold the numbers of all scores at once in 95 % of the cases."""
    errors = drawn.std(dim=0, correction=0)
    distances = (drawn - points).abs() / errors.clamp(min=torch.finfo(errors.dtype).tiny)
    reach = torch.quantile(distances.amax(dim=1), 0.95) * errors
    return [
        Interval(mean, mean - half, mean + half)
        for mean, half in zip(points.tolist(), reach.tolist(), strict=True)
    ]


def measure_shares(
    result: ShortcutResult, cue: str, names: Sequence[str], *, resamples: int, seed: int
) -> list[CueShare]:
    """Which share of the attribution of each score falls on the cue's latents."""
    shares: dict[str, list[Interval]] = {}
    for head in HEADS:
        table = torch.stack([result.cue_attribution[head, cue], result.total_attribution[head]])
        (cues, totals), drawn = _bootstrap(table, resamples, seed, what=f"share of {cue}")
        shares[head] = [
            _interval(cues[number] / totals[number], drawn[0, :, number] / drawn[1, :, number])
            if totals[number] > 0
            else UNDEFINED
            for number in range(len(names))
        ]
    return [
        CueShare(name, text, probe)
        for name, text, probe in zip(names, shares["text"], shares["probe"], strict=True)
    ]


def _bootstrap(
    table: Float64[Tensor, "table n score"], resamples: int, seed: int, *, what: str
) -> tuple[Float64[Tensor, "table score"], Float64[Tensor, "table resample score"]]:
    """Means over the data and over each resample, with the same draws for every column."""
    n = table.shape[1]
    n_bad = int((~table.isfinite()).any(dim=2).any(dim=0).sum())
    if n < 2 or n_bad:
        raise DataError(
            f"{what}: {n} images or pairs, {n_bad} of them with a number that is not finite; an "
            "interval needs at least 2, all finite"
        )
    generator = torch.Generator(table.device).manual_seed(seed)
    flat = table.transpose(0, 1).flatten(1)
    drawn = resampled_means(flat, resamples=resamples, generator=generator)
    return table.mean(dim=1), drawn.unflatten(1, (len(table), -1)).transpose(0, 1)


def _interval(point: Tensor, drawn: Float64[Tensor, " resample"]) -> Interval:
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(point), low, high)
