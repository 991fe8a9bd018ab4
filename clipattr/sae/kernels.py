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

from clipattr.codes import combine, combine_transposed


def pre_activations(
    x: Float[Tensor, "row model"],
    W_enc: Float[Tensor, "latent model"],
    b_enc: Float[Tensor, " latent"],
) -> Float[Tensor, "row latent"]:
    """Z = x W_enc^T + b_enc without a gradient, to choose from; `choose` has the gradient."""
    with torch.no_grad():
        return torch.addmm(b_enc, x, W_enc.T)


def choose(
    pre: Float[Tensor, "row latent"],
    indices: Int[Tensor, "row active"],
    x: Float[Tensor, "row model"],
    W_enc: Float[Tensor, "latent model"],
    b_enc: Float[Tensor, " latent"],
) -> Float[Tensor, "row active"]:
    """z[row, indices[row]], with the gradient of z with respect to x, W_enc and b_enc."""
    return cast(Tensor, _Choose.apply(pre, indices, x, W_enc, b_enc))


class _Choose(Function):
    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, indices: Tensor, x: Tensor, W_enc: Tensor, b_enc: Tensor
    ) -> Tensor:
        ctx.save_for_backward(indices, x, W_enc)
        # Under autocast z is in half precision, but what its gradient meets is not.
        return pre.gather(1, indices).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        indices, x, W_enc = ctx.saved_tensors
        _, _, for_x, for_weights, for_bias = ctx.needs_input_grad
        n_latents = len(W_enc)
        bias = W_enc.new_zeros(n_latents) if for_bias else None
        return (
            None,
            None,
            combine(gradient, indices, W_enc) if for_x else None,
            combine_transposed(gradient, indices, x, n_latents) if for_weights else None,
            None if bias is None else bias.index_add_(0, indices.flatten(), gradient.flatten()),
        )
