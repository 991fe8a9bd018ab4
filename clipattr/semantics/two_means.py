"""Whether the top examples of a latent fall into two heaps: 2-means of many latents at once.

All of k-means needs inner products alone, so it runs on the Gram matrix of the examples, n x n for
each latent whatever the width of the embeddings.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

# Pairs (first, farthest from it) of examples that are tried as the first two centres.
_STARTS = 20
_ITERATIONS = 50
# Numbers of the largest temporary: 128 MB in float32.
_BLOCK = 2**25


class TwoMeans(NamedTuple):
    """The two clusters of each latent's examples; cluster 0 is that of its first example."""

    polysemanticity: Float[Tensor, " latent"]
    """1 - cosine of the two centres; nan for a latent with fewer than two examples"""
    clusters: Int[Tensor, "latent n"]
    """0 or 1 for each example, -1 where there is none"""
    sizes: Int[Tensor, "latent 2"]
    """an uneven split is an odd one out rather than a second meaning"""


def two_means(
    embeddings: Float[Tensor, "image embed"], examples: Int[Tensor, "latent n"]
) -> TwoMeans:
    """2-means of the unit embeddings of each latent's examples, rows of `embeddings` or -1.

    Polysemanticity is 1 - clarity of the two centres: of two, the mean pairwise cosine is their
    cosine. 0 if all examples are the same. k-means always finds two heaps, so that it is above 0
    for a latent with one meaning as well: compare latents, not with 0.

    Deterministic: Lloyd's iterations from up to 20 starts, an example and the one farthest from it;
    the split with the smallest sum of squares is kept. Reference: Dreyer et al. 2025, SemanticLens.
    """
    units = functional.normalize(embeddings, dim=1)
    n, width = examples.shape[1], embeddings.shape[1]
    step = max(1, _BLOCK // (n * max(width, min(n, _STARTS))))
    blocks = [_split(units[block.clamp_min(0)], block >= 0) for block in examples.split(step)]
    return TwoMeans(*(torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _split(
    units: Float[Tensor, "latent n embed"], is_example: Bool[Tensor, "latent n"]
) -> TwoMeans:
    gram = units @ units.mT
    tried = _descend(gram, is_example, _starts(gram, is_example))
    tightness = _tightness(gram, is_example, tried)
    best = tightness.masked_fill(~is_example[:, :_STARTS], -torch.inf).argmax(1)
    in_second = tried[torch.arange(len(best), device=best.device), best]
    # Which of the two is called the first is an accident of the start.
    in_second = (in_second != in_second[:, :1]) & is_example
    in_first = is_example & ~in_second
    sizes = torch.stack([in_first.sum(1), in_second.sum(1)], dim=1)
    polysemanticity = 1 - _cosine(gram, in_first, in_second)
    polysemanticity = polysemanticity.masked_fill(sizes[:, 1] == 0, 0.0)
    polysemanticity = polysemanticity.masked_fill(sizes.sum(1) < 2, torch.nan)
    return TwoMeans(polysemanticity, in_second.long().masked_fill(~is_example, -1), sizes)


def _starts(
    gram: Float[Tensor, "latent n n"], is_example: Bool[Tensor, "latent n"]
) -> Bool[Tensor, "latent start n"]:
    """For each start, which examples are nearer to the example farthest from the first one."""
    firsts = gram[:, :_STARTS]
    farthest = firsts.masked_fill(~is_example[:, None], torch.inf).argmin(2)
    seconds = gram.gather(1, farthest[..., None].expand(firsts.shape))
    return (seconds > firsts) & is_example[:, None]


def _descend(
    gram: Float[Tensor, "latent n n"],
    is_example: Bool[Tensor, "latent n"],
    in_second: Bool[Tensor, "latent start n"],
) -> Bool[Tensor, "latent start n"]:
    """Lloyd's iterations. No heap gets empty: one of its members is on its side of the middle."""
    for _ in range(_ITERATIONS):
        first, second = _heaps(is_example, in_second)
        moved = (_nearness(gram, second) > _nearness(gram, first)) & is_example[:, None]
        if torch.equal(moved, in_second):
            break
        in_second = moved
    return in_second


def _heaps(
    is_example: Bool[Tensor, "latent n"], in_second: Bool[Tensor, "latent start n"]
) -> tuple[Bool[Tensor, "latent start n"], Bool[Tensor, "latent start n"]]:
    return is_example[:, None] & ~in_second, in_second


def _nearness(
    gram: Float[Tensor, "latent n n"], members: Bool[Tensor, "latent start n"]
) -> Float[Tensor, "latent start n"]:
    """2 x . centre - |centre|^2 of each example: larger is nearer."""
    shares = _shares(gram, members)
    along = shares @ gram
    return 2 * along - (along * shares).sum(2, keepdim=True)


def _tightness(
    gram: Float[Tensor, "latent n n"],
    is_example: Bool[Tensor, "latent n"],
    in_second: Bool[Tensor, "latent start n"],
) -> Float[Tensor, "latent start"]:
    """sum_k size_k |centre_k|^2: what is left is the sum of squares inside of the heaps."""
    heaps = _heaps(is_example, in_second)
    first, second = ((_shares(gram, heap) @ gram * heap).sum(2) for heap in heaps)
    return first + second


def _shares(
    gram: Float[Tensor, "latent n n"], members: Bool[Tensor, "latent start n"]
) -> Float[Tensor, "latent start n"]:
    """What each example counts in the centre; 0 for those of an empty heap."""
    weights = members.to(gram.dtype)
    return weights / weights.sum(2, keepdim=True).clamp_min(1)


def _cosine(
    gram: Float[Tensor, "latent n n"],
    first: Bool[Tensor, "latent n"],
    second: Bool[Tensor, "latent n"],
) -> Float[Tensor, " latent"]:
    """Of the sums of the members of two clusters, and so of their centres."""
    one, two = (each[:, :, None].to(gram.dtype) for each in (first, second))
    products = [(a.mT @ gram @ b).flatten() for a, b in ((one, two), (one, one), (two, two))]
    return products[0] / (products[1] * products[2]).sqrt()
