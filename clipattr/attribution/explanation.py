"""Why an image has its score: the latents behind it, what each is worth, and what is left over."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.attribution.exact import corrected_patching, exact_patching_of_latents
from clipattr.attribution.gradients import error_attribution, score_gradient
from clipattr.attribution.references import at_reference
from clipattr.attribution.score import Score, clean_scores
from clipattr.attribution.tokens import MergedCodes, merge_tokens
from clipattr.codes import SparseCodes

Attribute = Callable[[Score, Tensor, SparseCodes, Tensor], Tensor]

CORRECTED: Attribute = partial(corrected_patching, n_exact=32)
"""More exact ones than are shown: what is not corrected could be shown in the place of what is."""


class Explanation(NamedTuple):
    """One row per score; `top` are the slots of `merged` with the largest attributions."""

    score: Float[Tensor, " batch"]
    """y(x)"""
    without_latents: Float[Tensor, " batch"]
    """y(rest): every latent deleted, error term and decoder bias kept"""
    per_token: Float[Tensor, "batch *site active"]
    """attribution of each latent at each token"""
    merged: MergedCodes
    attribution: Float[Tensor, "batch slot"]
    """the same, summed over the tokens"""
    top: Int[Tensor, "batch rank"]
    exact: Float[Tensor, "batch rank"]
    """y(x) - y(x without the latent at all its tokens), of the latents of `top`"""
    error: Float[Tensor, " batch"]
    """attribution of the error term, to first order"""
    error_exact: Float[Tensor, " batch"]
    """y(x) - y(x - error)"""

    @property
    def latents(self) -> Int[Tensor, "batch rank"]:
        """The number of each latent of `top` in the dictionary."""
        return self.merged.codes.indices.gather(1, self.top)

    @property
    def activations(self) -> Float[Tensor, "batch rank"]:
        """Activation of each latent of `top`, summed over the tokens."""
        return self.merged.codes.values.gather(1, self.top)

    @property
    def is_active(self) -> Bool[Tensor, "batch rank"]:
        """Which of `top` are latents: an image may have fewer than were asked for."""
        return self.merged.codes.is_active.gather(1, self.top)

    def maps(self) -> Float[Tensor, "batch rank *site"]:
        """Where in the image each latent of `top` has its attribution, to which it adds up."""
        tokens = self.merged.place.flatten(1)[:, None] == self.top[:, :, None]
        counted = tokens & self.merged.is_active.flatten(1)[:, None]
        maps = torch.where(counted, self.per_token.flatten(1)[:, None], 0.0)
        return maps.unflatten(2, self.per_token.shape[1:]).sum(dim=-1)


@torch.no_grad()
def explain(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    error: Float[Tensor, "batch *site model"],
    *,
    n_top: int = 10,
    attribute: Attribute = CORRECTED,
) -> Explanation:
    """Attribute a score to latents, and measure exactly what the largest ones are worth.

    To explain several scores of one image, repeat its activation: a row has one score.

    Args:
        score: what is explained, one number per row of x.
        x: activations at the site of the SAE.
        codes: its active latents.
        W_dec: its directions in the units of x: `sae.directions`.
        error: what the SAE does not reconstruct: x - sae.decode(codes).
        n_top: latents whose exact effect is measured, those of the largest |attribution|.
        attribute: any method of this package on (score, x, codes, W_dec).
    """
    per_token = attribute(score, x, codes, W_dec)
    merged = merge_tokens(codes)
    attribution = merged.sum_over_tokens(per_token)
    size = torch.where(merged.codes.is_active, attribution.abs(), -1.0)
    top = size.argsort(dim=1, descending=True, stable=True)[:, :n_top]
    is_top = torch.zeros_like(merged.codes.is_active).scatter_(1, top, True)
    values = torch.where(is_top, merged.codes.values, 0.0)
    chosen = merged._replace(codes=merged.codes._replace(values=values))
    clean = clean_scores(score, x)
    return Explanation(
        score=clean,
        without_latents=clean_scores(score, at_reference(x, codes, W_dec)),
        per_token=per_token,
        merged=merged,
        attribution=attribution,
        top=top,
        exact=exact_patching_of_latents(score, x, codes, W_dec, chosen).gather(1, top),
        error=error_attribution(score_gradient(score, x), error).reshape(len(x), -1).sum(dim=1),
        error_exact=clean - clean_scores(score, x - error),
    )
