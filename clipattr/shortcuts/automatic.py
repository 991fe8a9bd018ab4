"""With no cue named: the latents that a probe uses more than a text prompt does.

An effect is the mean attribution of a latent to a score over the evaluated images, R, in standard
deviations of that head's score, d. What is ranked and tested is

    excess = |E[R_probe]| / d_probe - |E[R_text]| / d_text

An attribution is an estimate of an effect: take the first ones out to learn what they do.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.errors import ConfigError, DataError

HEADS = ("text", "probe")
FEWEST = 5
"""Images in which a latent must fire for a test of its mean."""
# Heads are rounded to float32 once, with one sign in all images: no number of images shows more
# than this of an excess (of the larger effect), nor a smaller standard error (of the RMS).
_LEAST_EXCESS = 1e-5
_LEAST_OF_ALL = 1e-6
_LEAST_ERROR = 1e-6


class LatentSums(NamedTuple):
    """Sums over images of the attributions of each latent; heads are text and probe."""

    total: Float64[Tensor, "head score latent"]
    square: Float64[Tensor, "head score latent"]
    cross: Float64[Tensor, "score latent"]
    """text times probe"""
    fired: Int[Tensor, " latent"]
    """images in which the latent fires"""
    energy: Float64[Tensor, " latent"]
    """sum over images and tokens of |a_j v_j|^2"""
    n_images: int


class Amplified(NamedTuple):
    """A latent and a score; effects are estimated, in standard deviations."""

    latent: int
    score: int
    text: float
    probe: float
    excess: float
    """|probe| - |text|"""
    standard_error: float
    """of the excess"""
    z: float
    p: float
    is_significant: bool


class Ranking(NamedTuple):
    """Pairs of latent and score, those with the largest excess first."""

    first: list[Amplified]
    n_tested: int
    n_significant: int
    """of the tested ones, listed or not"""
    n_rare: int
    """latents that fire, but in too few images for a test"""


class _Tests(NamedTuple):
    text: Float64[Tensor, "score latent"]
    probe: Float64[Tensor, "score latent"]
    excess: Float64[Tensor, "score latent"]
    standard_error: Float64[Tensor, "score latent"]
    z: Float64[Tensor, "score latent"]
    p: Float64[Tensor, "score latent"]


def rank_amplified(
    sums: LatentSums,
    spreads: Mapping[str, Float[Tensor, " score"]],
    *,
    level: float = 0.05,
    n_first: int = 100,
) -> Ranking:
    """Order by excess, and test each excess against 0, all of them at one false discovery rate.

    z = excess / standard error of the paired difference. The sign of the probe's effect is taken
    from the same images, so that p is twice the probability of a larger z: where the latent does
    nothing to the text head, an excess of either sign counts. Spreads are taken as known. An excess
    below 1e-5 of the larger effect, or 1e-6, is rounding: z = 0 and p = 1.

    Args:
        sums: of `ShortcutCallback`.
        spreads: standard deviation of each score over the same images, of "text" and "probe".
        level: Benjamini and Hochberg's share of false ones among those called significant.
        n_first: how many to list.
    """
    if not 0 < level < 1:
        raise ConfigError(f"level={level}: a share between 0 and 1")
    if sums.n_images < FEWEST:
        raise DataError(f"{sums.n_images} images: a test of latents needs at least {FEWEST}")
    tested = (sums.fired >= FEWEST).nonzero().squeeze(1)
    found = _test(sums, spreads, tested)
    is_significant = benjamini_hochberg(found.p.flatten(), level)
    order = found.excess.flatten().argsort(descending=True, stable=True)[:n_first]
    return Ranking(
        [_entry(found, tested, int(place), bool(is_significant[place])) for place in order],
        n_tested=found.p.numel(),
        n_significant=int(is_significant.sum()),
        n_rare=int(((sums.fired > 0) & (sums.fired < FEWEST)).sum()),
    )


def _test(
    sums: LatentSums, spreads: Mapping[str, Tensor], latents: Int[Tensor, " tested"]
) -> _Tests:
    n, n_scores = sums.n_images, len(sums.cross)
    scale = [spreads[head].to(sums.total).reshape(n_scores, 1) for head in HEADS]
    text, probe = (sums.total[head][:, latents] / (n * scale[head]) for head in (0, 1))
    squares = [sums.square[head][:, latents] / (n * scale[head] ** 2) for head in (0, 1)]
    square = squares[0] + squares[1]
    cross = sums.cross[:, latents] / (n * scale[0] * scale[1])
    excess = probe.abs() - text.abs()
    # Of d_i = sign(probe) R_probe,i / d_probe - sign(text) R_text,i / d_text, whose mean it is.
    second = square - 2 * probe.sign() * text.sign() * cross
    variance = (second - excess.square()).clamp(min=0) / n
    standard_error = torch.maximum(variance, _LEAST_ERROR**2 * square).sqrt()
    least = (_LEAST_EXCESS * torch.maximum(text.abs(), probe.abs())).clamp(min=_LEAST_OF_ALL)
    is_more = excess.abs() > least
    z = torch.where(is_more, excess / standard_error, 0.0)
    p = torch.special.erfc(z / math.sqrt(2)).clamp(max=1)
    return _Tests(text, probe, excess, standard_error, z, p)


def _entry(found: _Tests, latents: Tensor, place: int, is_significant: bool) -> Amplified:
    score, column = divmod(place, len(latents))
    return Amplified(
        latent=int(latents[column]),
        score=score,
        text=float(found.text[score, column]),
        probe=float(found.probe[score, column]),
        excess=float(found.excess[score, column]),
        standard_error=float(found.standard_error[score, column]),
        z=float(found.z[score, column]),
        p=float(found.p[score, column]),
        is_significant=is_significant,
    )


def benjamini_hochberg(p: Float[Tensor, " test"], level: float) -> Bool[Tensor, " test"]:
    """Which tests to call significant so that the expected share of false ones is below `level`.

    The k smallest p, with the largest k whose p is at most level k / n. Reference: Benjamini and
    Hochberg, 1995; it holds under positive dependence (Benjamini and Yekutieli, 2001).
    """
    ordered, order = p.sort()
    ranks = torch.arange(1, len(p) + 1, dtype=torch.float64, device=p.device)
    passes = (ordered <= level * ranks / len(p)).nonzero()
    is_significant = torch.zeros_like(p, dtype=torch.bool)
    if len(passes):
        is_significant[order[: int(passes.max()) + 1]] = True
    return is_significant
