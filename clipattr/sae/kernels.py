"""The encoder of a sparse step: one dense product, to choose from, and gradients of the chosen.

A dense step has six products of rows x width x latents; here there is one. The gradient is exact
for what is chosen, and the choice itself has none, as in autograd of a top-k.
"""

from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clipattr.codes import combine, equal_bags, rows_of_bags, transpose
from clipattr.sparse import gathered, kernels_for


def pre_activations(
    x: Float[Tensor, "row model"],
    W_enc: Float[Tensor, "latent model"],
    b_enc: Float[Tensor, " latent"],
) -> Float[Tensor, "row latent"]:
    """Z = x W_enc^T + b_enc without a gradient, to choose from; `choose` has the gradient.

    Under autocast it is in half precision. The bias is added by the product itself (CUDA's adds it
    in float32 before it rounds), which costs less than any reading of z.
    """
    with torch.no_grad():
        return torch.addmm(b_enc, x, W_enc.T)


@torch.no_grad()
def top_k(pre: Float[Tensor, "row latent"], k: int) -> Int[Tensor, "row active"]:
    """The k largest of each row, largest first."""
    return kernels_for(pre).top_k(pre, k)[1]


def choose(
    pre: Float[Tensor, "row latent"],
    indices: Int[Tensor, "row active"],
    x: Float[Tensor, "row model"],
    W_enc: Float[Tensor, "latent model"],
    b_enc: Float[Tensor, " latent"],
) -> Float[Tensor, "row active"]:
    """z[row, indices[row]], with the gradient of z with respect to x, W_enc and b_enc.

    Where z is in lower precision than x, as under autocast, it was good enough to choose from, and
    the chosen ones are computed again in that of x.
    """
    return cast(Tensor, _Choose.apply(pre, indices, x, W_enc, b_enc))


class _Choose(Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor
    ) -> Tensor:
        weights = gathered(W_enc)
        ctx.save_for_backward(indices, x, weights)
        if pre.dtype == x.dtype:
            return pre.gather(1, indices)
        starts, latents = equal_bags(indices), indices.flatten()
        rows = rows_of_bags(starts, len(latents))
        products = kernels_for(weights).dot(x, weights, latents, starts, rows)
        return products.view_as(indices) + b_enc[indices]

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        indices, x, weights = ctx.saved_tensors
        _, _, for_x, for_weights, for_bias = ctx.needs_input_grad
        rows = rows_of_bags(equal_bags(indices), indices.numel())
        transposed = transpose(indices.flatten(), rows, len(weights))
        values = gradient.flatten()
        return (
            None,
            None,
            combine(gradient, indices, weights) if for_x else None,
            transposed.combine(values, x.to(weights.dtype)) if for_weights else None,
            transposed.totals(values) if for_bias else None,
        )
