"""Latents for a question: a text, a picture, or another latent."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from clipattr.semantics.labels import label_scores


class Ranked(NamedTuple):
    """Latents with their scores."""

    latents: Int[Tensor, " found"]
    scores: Float[Tensor, " found"]


class Answer(NamedTuple):
    """Both ends of the ranking; no latent is in both."""

    most: Ranked
    """the highest score first"""
    least: Ranked
    """the lowest score first"""


def find_latents(
    means: Float[Tensor, "latent embed"],
    query: Float[Tensor, " embed"],
    reference: Float[Tensor, " embed"] | None = None,
    top: int = 10,
    *,
    without: int | None = None,
) -> Answer:
    """The latents whose images are most, and least, like the query.

    A text by cos(x_tilde_j, t) - cos(x_tilde_j, reference), as labels are scored; something seen
    by `likeness`. Latents that never fired, whose means are nan, are in neither list; of two with
    one score the lower number comes first.

    Args:
        means: x_tilde_j, the mean unit embedding of the latent's top images.
        query: the embedding of a text or an image, or the mean of a latent.
        reference: what all texts share, where the query is a text: best the mean of a vocabulary
            in the query's own prompts. For labels the empty text will do, since the reference
            drops out when words are ranked for one latent; it decides when latents are ranked.
        top: latents of each list; with fewer than twice as many in all the second is shorter.
        without: the latent that asks, which is most like itself.
    """
    if reference is None:
        scores = likeness(means, query)
    else:
        scores = label_scores(means, query[None], reference)[:, 0]
    if without is not None:
        scores = scores.index_fill(0, torch.tensor([without], device=scores.device), torch.nan)
    known = scores.isfinite().nonzero()[:, 0]
    order = known[scores[known].argsort(descending=True, stable=True)]
    most, least = order[:top], order[top:].flip(0)[:top]
    return Answer(Ranked(most, scores[most]), Ranked(least, scores[least]))


def likeness(
    means: Float[Tensor, "latent embed"], query: Float[Tensor, " embed"]
) -> Float[Tensor, " latent"]:
    """cos(u_j - m, q - m): u_j the unit x_tilde_j, q of unit length, m the mean of all u_j.

    0 is a latent like any other. Embeddings of images lie in a narrow cone: without m all cosines
    are high, and how near x_tilde_j is to the middle of the cone has a say. Unit vectors first,
    since the length of x_tilde_j is how much its images are alike, not what they show.
    Reference: Liang et al. 2022, Mind the gap.
    """
    units = normalize(means, dim=1)
    # Over latents that fired alone: the rows of the others are nan.
    middle = units.nanmean(dim=0)
    return normalize(units - middle, dim=1) @ normalize(normalize(query, dim=0) - middle, dim=0)
