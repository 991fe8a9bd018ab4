"""Attribution by gradients: attribution patching and integrated gradients.

The rest of the activation, x - sum_j a_j v_j (error term and decoder bias), is a constant
throughout, so both methods are about the latents alone.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.attribution.score import Score, clean_scores
from clipattr.codes import SparseCodes


def score_gradient(
    score: Score, x: Float[Tensor, "batch *site model"]
) -> Float[Tensor, "batch *site model"]:
    """Gradient of each image's score with respect to its own activation, dy/dx.

    Differentiates the sum over the batch: the mean would scale every attribution by 1 / batch.
    Works under `torch.no_grad` and leaves every `.grad` untouched.
    """
    with torch.enable_grad():
        leaf = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(clean_scores(score, leaf).sum(), leaf)
    return gradient


def project_on_decoder(
    vectors: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch *site active"]:
    """Inner product of each row's vector with the decoder direction of each of its slots: v_j . u.

    This is the derivative of `decode` with respect to the code values, taken by autograd because
    the backward pass of embedding_bag never builds the [rows, active, model] tensor of directions.
    """
    with torch.enable_grad():
        values = codes.values.detach().to(vectors.dtype).requires_grad_()
        decoded = codes._replace(values=values).decode(W_dec.detach().to(vectors.dtype))
        (projected,) = torch.autograd.grad(decoded, values, vectors.detach())
    return projected


def attribution_patching(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch *site active"]:
    """First-order estimate of the effect of deleting each latent.

        R_j = a_j * (v_j . dy/dx)    at the clean x

    Reference: Nanda, "Attribution patching", 2023; Act x Grad on SAE latents.
    """
    projected = project_on_decoder(score_gradient(score, x), codes, W_dec)
    return codes.values.detach() * projected


def integrated_gradients(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    n_steps: int,
) -> Float[Tensor, "batch *site active"]:
    """Act x gradient averaged along the straight path on which all latents grow from zero.

        R_j = a_j * 1/n sum_i v_j . dy/dx(rest + alpha_i sum_l a_l v_l),  alpha_i = (i - 1/2) / n

    The midpoint rule never visits the end points and its error falls with 1 / n^2. Complete in the
    limit: sum_j R_j = y(x) - y(rest). Reference: Sundararajan et al., 2017, section 3.
    """
    decoded = codes.decode(W_dec).detach()
    rest = x.detach() - decoded
    total = torch.zeros_like(x)
    for step in range(n_steps):
        total += score_gradient(score, rest + (step + 0.5) / n_steps * decoded)
    return codes.values.detach() * project_on_decoder(total / n_steps, codes, W_dec)
