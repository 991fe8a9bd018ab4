"""Which patches made a latent fire that is read at the class token.

The class token is made of what its heads read from every token in every block. Let f be what it
comes to as a function of these reads r (attention weights and patches stay as they are). The
straight path from nothing read to everything read divides f among the tokens:

    R_s = sum_l r_ls . integral over alpha of df/dr_l (alpha sum_s r_ls)

which is complete: sum_s R_s = f(all) - f(nothing). Integrated gradients (Sundararajan et al., 2017)
with the reads as inputs. Their gradient is the same for all tokens of a block, because they are
added up before anything is done to them: it costs one token's MLPs per point, and no attention.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.gradients import path_points

Value = Callable[[Tensor, Tensor], Tensor]
"""f(totals [pair, layer, heads], pairs [pair]): one number per pair; pairs are independent"""


class ReadParts(NamedTuple):
    """What each token gave to each value, and the value where nothing is read."""

    per_token: Float[Tensor, "pair token"]
    nothing: Float[Tensor, " pair"]
    everything: Float[Tensor, " pair"]
    """f(all): `nothing` and the parts of all tokens, to the precision of the integral"""


@torch.no_grad()
def attribute_reads(
    value: Value,
    reads: Float[Tensor, "batch layer token heads"],
    images: Int[Tensor, " pair"],
    *,
    n_points: int = 16,
) -> ReadParts:
    """Divide value `pair` among the tokens of image `images[pair]`.

    Args:
        value: f, differentiable in the totals; called with all pairs.
        reads: what the class token reads from each token; see `clipattr.clip.class_token`.
        images: the row of `reads` of each pair.
        n_points: of the integral.
    """
    totals = reads.float().sum(dim=2)[images]
    pairs = torch.arange(len(images), device=images.device)
    gradient = torch.zeros_like(totals)
    for alpha, weight in path_points(n_points):
        gradient += weight * _gradient(value, alpha * totals, pairs)
    per_token = totals.new_zeros(len(images), reads.shape[2])
    for image in images.unique().tolist():
        is_here = images == image
        of_image = reads[image].float()
        per_token[is_here] = torch.einsum("plh,lth->pt", gradient[is_here], of_image)
    nothing = value(torch.zeros_like(totals), pairs).float()
    return ReadParts(per_token, nothing, value(totals, pairs).float())


def _gradient(value: Value, totals: Tensor, pairs: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = totals.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf, pairs).sum(), leaf)
    return gradient
