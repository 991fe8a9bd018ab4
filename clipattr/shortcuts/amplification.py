"""Does the classifier on top use a cue more than the text head does? Per-image and per-pair parts.

Means, ratios and intervals are left to the caller: everything here keeps its image or pair axis, so
that a bootstrap can resample it.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import DataError


class CueEffects(NamedTuple):
    """Effects of one cue on both heads, each in standard deviations of that head's score."""

    text: Float[Tensor, " pairs"]
    probe: Float[Tensor, " pairs"]


class AttributionShare(NamedTuple):
    """reliance_h(s, c) = mean(cue) / mean(total): numerator and denominator of each image."""

    cue: Float[Tensor, " batch"]
    total: Float[Tensor, " batch"]


def pair_effects(
    with_cue: Float[Tensor, " pairs"], without: Float[Tensor, " pairs"]
) -> Float[Tensor, " pairs"]:
    """y_h(image with the cue) - y_h(the same image without it), in float64.

    The two may be counterfactual pictures, or x and `remove_latents(x, ...)`.
    """
    return with_cue.double() - without.double()


def standardise(
    effects: Float[Tensor, " pairs"], scores: Float[Tensor, " images"]
) -> Float[Tensor, " pairs"]:
    """Effects in units of the (population) standard deviation of the head's score over a set.

    A cosine and a logit cannot be compared before this.
    """
    deviation = scores.double().std(correction=0)
    if not deviation > 0:
        raise DataError(
            f"the standard deviation of {len(scores)} head scores is {deviation.item()}: "
            "effects can only be standardised by a score that varies over the evaluation set"
        )
    return effects.double() / deviation


def cue_effects(
    *,
    text_effects: Float[Tensor, " pairs"],
    probe_effects: Float[Tensor, " pairs"],
    text_scores: Float[Tensor, " images"],
    probe_scores: Float[Tensor, " images"],
) -> CueEffects:
    """Both heads' effects on the same pairs, standardised by their scores on the same set."""
    return CueEffects(
        standardise(text_effects, text_scores), standardise(probe_effects, probe_scores)
    )


def amplification_ratio(
    mean_probe: Float[Tensor, "*resamples"], mean_text: Float[Tensor, "*resamples"]
) -> Float[Tensor, "*resamples"]:
    """Mean probe effect / mean text effect, element-wise over bootstrap resamples.

    Negative where the heads react in opposite directions. It says nothing where the text effect
    cannot be told from 0: the caller has to look at its interval first.
    """
    return mean_probe / mean_text


def attribution_share(
    attributions: Float[Tensor, "batch *tokens active"],
    codes: SparseCodes,
    cue_latents: Int[Tensor, " cue"],
) -> AttributionShare:
    """Sum over j in s of R_j, and sum over all j of |R_j|, for each image (float64)."""
    attributions = attributions.double() * codes.is_active
    return AttributionShare(
        (attributions * _is_chosen(codes, cue_latents)).flatten(1).sum(1),
        attributions.abs().flatten(1).sum(1),
    )


def remove_latents(
    x: Float[Tensor, "*rows model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    latents: Int[Tensor, " cue"],
) -> Float[Tensor, "*rows model"]:
    """The edit x - sum over j in s of a_j v_j: error term and all other latents stay."""
    removed = codes._replace(values=codes.values * _is_chosen(codes, latents))
    return x - removed.decode(W_dec)


def _is_chosen(codes: SparseCodes, latents: Int[Tensor, " cue"]) -> Tensor:
    is_chosen = torch.zeros(codes.n_latents, dtype=torch.bool, device=codes.indices.device)
    is_chosen[latents] = True
    return is_chosen[codes.indices]
