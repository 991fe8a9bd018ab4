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
    n: int
    """images or pairs"""


class CueShare(NamedTuple):
    """reliance_h(s, c) = mean over images of sum_{j in s} R_j / mean of sum_j |R_j|."""

    score: str
    text: Interval
    probe: Interval


def spreads(result: ShortcutResult) -> dict[str, Float64[Tensor, " score"]]:
    """Population standard deviation of each head's scores over the images."""
    found: dict[str, Tensor] = {}
    for head, logits in result.logits.items():
        found[head] = contrast_logits(logits).std(dim=0, correction=0)
        constant = (~(found[head] > 0)).nonzero()
        if len(constant):
            score = int(constant[0])
            raise DataError(
                f"head {head!r}, score {score}: its standard deviation over {len(logits)} images "
                f"is {float(found[head][score])}; effects are measured against a score that varies"
            )
    return found


def measure_effects(
    text: Float[Tensor, "n score"],
    probe: Float[Tensor, "n score"],
    *,
    spreads: Mapping[str, Float[Tensor, " score"]],
    names: Sequence[str],
    measure: str,
    resamples: int,
    seed: int,
) -> list[CueEffect]:
    """Means of effects, their ratio and their excess, with percentile bootstrap intervals.

    An image or pair is drawn with both heads and all scores, so that these stay paired. The excess
    of a resample has the signs of its own means.

    Args:
        text: y(with the cue) - y(without it) of each image or pair, in units of the head.
        probe: the same of the probe.
        spreads: what each is divided by, "text" and "probe".
        names: of the scores.
        measure: what was done, for tables.
        resamples: of the bootstrap.
        seed: of the draws.
    """
    scaled = [
        each.double() / spreads[head].to(each.device).double()
        for head, each in (("text", text), ("probe", probe))
    ]
    table = torch.stack(scaled)
    means, drawn = _bootstrap(table, resamples, seed, what=measure)
    effects: list[CueEffect] = []
    for number, name in enumerate(names):
        (of_text, of_probe), (texts, probes) = means[:, number], drawn[:, :, number]
        found = _interval(of_text, texts)
        is_nothing = found.low <= 0 <= found.high
        ratio = amplification_ratio(of_probe, of_text), amplification_ratio(probes, texts)
        excess = of_probe.abs() - of_text.abs(), probes.abs() - texts.abs()
        effects.append(
            CueEffect(
                measure=measure,
                score=name,
                text=found,
                probe=_interval(of_probe, probes),
                amplification=UNDEFINED if is_nothing else _interval(*ratio),
                excess=_interval(*excess),
                n=len(text),
            )
        )
    return effects


def measure_shares(
    result: ShortcutResult, cue: str, names: Sequence[str], *, resamples: int, seed: int
) -> list[CueShare]:
    """Which share of the attribution of each score falls on the cue's latents."""
    shares: dict[str, list[Interval]] = {}
    for head in ("text", "probe"):
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
    table: Float64[Tensor, "two n score"], resamples: int, seed: int, *, what: str
) -> tuple[Float64[Tensor, "two score"], Float64[Tensor, "two resample score"]]:
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
    return table.mean(dim=1), drawn.unflatten(1, (2, -1)).transpose(0, 1)


def _interval(point: Tensor, drawn: Float64[Tensor, " resample"]) -> Interval:
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(point), low, high)
