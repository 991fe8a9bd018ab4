"""Attribution by gradients: attribution patching, gradient alone, integrated gradients.

The rest of the activation, x - sum_j a_j v_j (error term and decoder bias), is a constant
throughout, so that all of them are about the latents alone; `error_attribution` is about the rest.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from numpy.polynomial.legendre import leggauss
from torch import Tensor

from clipattr.attribution.references import at_reference
from clipattr.attribution.score import Score, clean_scores
from clipattr.codes import SparseCodes, equal_bags, rows_of_bags
from clipattr.errors import ConfigError
from clipattr.sparse import kernels_for


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


@torch.no_grad()
def project_on_decoder(
    vectors: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch *site active"]:
    """Inner product of each row's vector with the decoder direction of each of its slots: v_j . u.

    The [rows, active, model] tensor of directions never exists.
    """
    indices = codes.indices.flatten(0, -2)
    starts = equal_bags(indices)
    rows = W_dec.detach().to(vectors.dtype)
    products = kernels_for(rows).dot(
        vectors.flatten(0, -2).contiguous(),
        rows,
        indices.flatten(),
        starts,
        rows_of_bags(starts, indices.numel()),
    )
    return products.view(codes.indices.shape)


def gradient_only(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch *site active"]:
    """Derivative of the score with respect to each active latent: v_j . dy/dx."""
    projected = project_on_decoder(score_gradient(score, x), codes, W_dec)
    return torch.where(codes.is_active, projected, 0.0)


def attribution_patching(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch *site active"]:
    """First-order estimate of the effect of deleting each latent.

        R_j = a_j * (v_j . dy/dx)    at the x that is given

    Reference: Nanda, "Attribution patching", 2023; Act x Grad on SAE latents.
    """
    projected = project_on_decoder(score_gradient(score, x), codes, W_dec)
    return codes.values.detach() * projected


def two_point(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch *site active"]:
    """Attribution patching with the mean of the gradients at both ends: at x and without latents.

    Complete on a quadratic score, for twice the passes of attribution patching.
    """
    ends = (x, at_reference(x, codes, W_dec).detach())
    gradient = (score_gradient(score, ends[0]) + score_gradient(score, ends[1])) / 2
    return codes.values.detach() * project_on_decoder(gradient, codes, W_dec)


def integrated_gradients(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    n_steps: int,
) -> Float[Tensor, "batch *site active"]:
    """Act x gradient averaged along the straight path on which all latents grow from zero.

        R_j = a_j * integral over alpha of v_j . dy/dx(rest + alpha sum_l a_l v_l)

    By the Gauss-Legendre rule, which is exact for a gradient that is a polynomial of degree
    2 n_steps - 1 in alpha, and never visits the end points. Complete in the limit:
    sum_j R_j = y(x) - y(rest). Reference: Sundararajan et al., 2017, section 3.
    """
    decoded = codes.decode(W_dec).detach()
    rest = x.detach() - decoded
    total = torch.zeros_like(x)
    for alpha, weight in path_points(n_steps):
        total += weight * score_gradient(score, rest + alpha * decoded)
    return codes.values.detach() * project_on_decoder(total, codes, W_dec)


def path_points(n_steps: int) -> Iterator[tuple[float, float]]:
    """Where between 0 and 1 an integral is read, and the weight of each place; they add up to 1."""
    if n_steps < 1:
        raise ConfigError(f"integrated gradients with n_steps={n_steps}: at least 1 is needed")
    places, weights = leggauss(n_steps)
    return zip(((places + 1) / 2).tolist(), (weights / 2).tolist(), strict=True)


def error_attribution(
    gradient: Float[Tensor, "batch *site model"], error: Float[Tensor, "batch *site model"]
) -> Float[Tensor, "batch *site"]:
    """First-order effect of deleting the SAE's error term, at each token: R_eps = eps . dy/dx."""
    return (error * gradient).sum(dim=-1)
