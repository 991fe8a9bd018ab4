"""The truth scorecard: is the latent of each planted failure found, and at which rank?"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.metrics.intervals import Interval, bootstrap_mean
from clipattr.metrics.ranks import auroc
from clipattr.world.prompts import Failure

LEARNED_AUROC = 0.6


class LatentUse(NamedTuple):
    """What one latent does to one prompt's score, over all test images."""

    mean_attribution: Interval
    """0 counts for an image in which the latent does not fire"""
    share_of_images: float
    """in which it fires"""
    share_positive: float
    """of those, the images whose score it raises; nan where it never fires"""


class ScorecardEntry(NamedTuple):
    """One failure. Ranks count from 1 over all latents, highest first."""

    failure: Failure
    latent: int
    """the latent whose firing best separates the planted factor: the truth"""
    auroc: float
    """of that latent"""
    rank_attribution: int
    rank_logit_lens: int
    score_auroc: float
    """of the prompt's score for the factor, on images that do not show the prompt's class"""
    use: LatentUse
    """of that latent by the prompt"""

    @property
    def learned(self) -> bool:
        """Whether the model shows the planted effect at all."""
        return self.score_auroc >= LEARNED_AUROC


def grade(
    failure: Failure,
    *,
    activations: Float[Tensor, "image latent"],
    scores: Float[Tensor, " image"],
    shows_factor: Bool[Tensor, " image"],
    shows_class: Bool[Tensor, " image"],
    mean_attribution: Float[Tensor, " latent"],
    logit_lens: Float[Tensor, " latent"],
    codes: SparseCodes,
    attributions: Float[Tensor, "image slot"],
    resamples: int,
    seed: int,
) -> ScorecardEntry:
    """Grade both rankings for the failure's prompt against the latent that truly carries it."""
    separation = auroc(activations, shows_factor)
    latent = int(separation.argmax())
    others = ~shows_class
    score_auroc = auroc(scores[others][:, None], shows_factor[others])
    return ScorecardEntry(
        failure=failure,
        latent=latent,
        auroc=float(separation[latent]),
        rank_attribution=rank_of(mean_attribution, latent),
        rank_logit_lens=rank_of(logit_lens, latent),
        score_auroc=float(score_auroc),
        use=use_of_latent(latent, codes, attributions, resamples=resamples, seed=seed),
    )


def use_of_latent(
    latent: int,
    codes: SparseCodes,
    attributions: Float[Tensor, "image slot"],
    *,
    resamples: int,
    seed: int,
) -> LatentUse:
    """Mean, share of firing and share of positive signs of the latent's attributions."""
    is_latent = (codes.indices == latent) & codes.is_active
    per_image = torch.where(is_latent, attributions, 0.0).sum(dim=1)
    fires = is_latent.any(dim=1)
    generator = torch.Generator(per_image.device).manual_seed(seed)
    return LatentUse(
        mean_attribution=bootstrap_mean(per_image, resamples=resamples, generator=generator),
        share_of_images=float(fires.double().mean()),
        share_positive=float((per_image[fires] > 0).double().mean()),
    )


def rank_of(values: Float[Tensor, " latent"], latent: int) -> int:
    """1 for the highest value; latents that tie with it count as before it."""
    return int((values >= values[latent]).sum())


def latents_of(
    activations: Float[Tensor, "image latent"],
    shows_factor: Bool[Tensor, " image"],
    *,
    at_least: float,
) -> Int[Tensor, " cue"]:
    """The latents that separate a factor with this AUROC; the best one when none does."""
    separation = auroc(activations, shows_factor)
    chosen = (separation >= at_least).nonzero().flatten()
    return chosen if len(chosen) else separation.argmax()[None]
