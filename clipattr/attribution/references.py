"""What a latent is compared with when it is taken away: zero, its mean, or another image.

Every method of this package is about the edit x - sum_j a_j v_j over the latents of its `codes`. To
compare with a reference r_j, hand it the codes a_j - r_j instead: attribution, exact patching,
integrated gradients and curves then set latents to r_j where they would have set them to zero.

Attribution patching reads the gradient at the activation it is given. At the clean one:
`attribution_patching(score, x, change, W_dec)`; at the corrupted one: the same with
`at_reference(x, change, W_dec)` in the place of x.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.codes import SparseCodes


def minus_mean(codes: SparseCodes, means: Float[Tensor, " latent"]) -> SparseCodes:
    """a_j - mean_j of the active latents; those that did not fire are left alone."""
    change = codes.values - means[codes.indices]
    return codes._replace(values=torch.where(codes.is_active, change, 0.0))


def minus_counterfactual(codes: SparseCodes, other: SparseCodes) -> SparseCodes:
    """a_j - a_j(x') over the latents that are active in either image.

    Each row has the slots of both: first its own in their order, then what is active in the
    counterfactual alone (0 where there is nothing more). A row costs k k' comparisons.
    """
    is_same = codes.indices[..., :, None] == other.indices[..., None, :]
    is_same &= codes.is_active[..., :, None]
    shared = (is_same.to(codes.values.dtype) @ other.values[..., None]).squeeze(-1)
    alone = torch.where(is_same.any(dim=-2), 0.0, -other.values)
    indices = torch.cat([codes.indices, other.indices], dim=-1)
    return SparseCodes(indices, torch.cat([codes.values - shared, alone], dim=-1), codes.n_latents)


def at_reference(
    x: Float[Tensor, "*rows model"], codes: SparseCodes, W_dec: Float[Tensor, "latent model"]
) -> Float[Tensor, "*rows model"]:
    """The activation with every latent of `codes` at its reference: x - sum_j a_j v_j."""
    return x - codes.decode(W_dec)


def neuron_codes(
    x: Float[Tensor, "*rows model"], means: Float[Tensor, " model"] | None = None
) -> tuple[SparseCodes, Float[Tensor, "model model"]]:
    """The coordinates of x as latents, with the decoder that they have: unit vectors.

    Of the residual stream at a residual site, of an MLP's hidden layer at the stream `neurons`: so
    that neurons go through the same functions as the latents of a dictionary. The reference is 0,
    or the mean of each neuron. Every neuron has a slot, in order.
    """
    width = x.shape[-1]
    indices = torch.arange(width, device=x.device).expand(x.shape)
    values = x if means is None else x - means
    return SparseCodes(indices, values, width), torch.eye(width, dtype=x.dtype, device=x.device)
