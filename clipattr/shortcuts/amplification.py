"""Does the classifier on top use a cue more than the text head does? Per-image and per-pair parts.

Means, ratios and intervals are left to the caller: everything here keeps its image or pair axis, so
that a bootstrap can resample it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import DataError


class AttributionShare(NamedTuple):
    """reliance_h(s, c) = mean(cue) / mean(total): numerators and denominator of each image."""

    cue: Float64[Tensor, "cue image *score"]
    total: Float64[Tensor, "image *score"]


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


def amplification_ratio(
    mean_probe: Float[Tensor, "*resamples"], mean_text: Float[Tensor, "*resamples"]
) -> Float[Tensor, "*resamples"]:
    """Mean probe effect / mean text effect, element-wise over bootstrap resamples.

    Negative where the heads react in opposite directions. It says nothing where the text effect
    cannot be told from 0: the caller has to look at its interval first.
    """
    return mean_probe / mean_text


def attribution_share(
    attributions: Float[Tensor, "image slot *score"],
    latents: Int[Tensor, "image slot"],
    cues: Sequence[Int[Tensor, " _"]],
) -> AttributionShare:
    """Sum over j in s of R_j for each cue s, and sum over all j of |R_j|, for each image.

    `latents` names those of each image, each once; attributions of padding are 0.
    """
    attributions = attributions.double()
    total = attributions.abs().sum(dim=1)
    of_cues = total.new_zeros(len(cues), *total.shape)
    for number, cue in enumerate(cues):
        is_chosen = torch.isin(latents, cue).double()
        of_cues[number] = torch.einsum("is...,is->i...", attributions, is_chosen)
    return AttributionShare(of_cues, total)


def remove_latents(
    x: Float[Tensor, "*rows model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    latents: Int[Tensor, " cue"],
) -> Float[Tensor, "*rows model"]:
    """The edit x - sum over j in s of a_j v_j: error term and all other latents stay."""
    removed = codes._replace(values=codes.values * is_among(codes, latents))
    return x - removed.decode(W_dec)


def is_among(codes: SparseCodes, latents: Int[Tensor, " cue"]) -> Bool[Tensor, "*rows active"]:
    """Which slots name one of the latents, whether it fires or not."""
    is_chosen = torch.zeros(codes.n_latents, dtype=torch.bool, device=codes.indices.device)
    is_chosen[latents] = True
    return is_chosen[codes.indices]
