"""Sparse latent activations: the form in which codes travel, and the products with them.

A product gathers rows of a matrix and adds them up (`embedding_bag`), forwards and backwards: its
cost is proportional to the active latents, and no tensor of rows x active x width exists.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag


class SparseCodes(NamedTuple):
    """The active latents of each row: `indices` name them, `values` hold their activations a_j.

    A row with fewer than k active latents is padded with value 0; what `indices` says there has no
    meaning. Never expand to [rows, n_latents] where rows are many: the cost of everything written
    on this type is proportional to k, not to the dictionary.
    """

    indices: Int[Tensor, "*rows active"]
    values: Float[Tensor, "*rows active"]
    n_latents: int

    @property
    def is_active(self) -> Bool[Tensor, "*rows active"]:
        """Which slots hold a latent that fired."""
        return self.values != 0

    def select(self, rows: Int[Tensor, " chosen"]) -> "SparseCodes":
        """The codes of the chosen rows (first axis)."""
        return SparseCodes(self.indices[rows], self.values[rows], self.n_latents)

    def to_dense(self) -> Float[Tensor, "*rows latent"]:
        """The dense matrix, for tests and for small dictionaries."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.n_latents)
        return dense.scatter_add(-1, self.indices, self.values)

    def decode(self, W_dec: Float[Tensor, "latent model"]) -> Float[Tensor, "*rows model"]:
        """Sum of a_j v_j, without b_dec."""
        *rows, n_active = self.indices.shape
        values = self.values.reshape(-1, n_active).to(W_dec.dtype)
        flat = _Decode.apply(values, self.indices.reshape(-1, n_active), W_dec)
        return cast(Tensor, flat).reshape(*rows, W_dec.shape[1])


def combine(
    values: Float[Tensor, "row active"],
    indices: Int[Tensor, "row active"],
    rows: Float[Tensor, "latent model"],
) -> Float[Tensor, "row model"]:
    """C rows, where C[r, indices[r, i]] = values[r, i] is sparse."""
    return embedding_bag(indices, rows, per_sample_weights=values, mode="sum")


def combine_transposed(
    values: Float[Tensor, "row active"],
    indices: Int[Tensor, "row active"],
    rows: Float[Tensor, "row model"],
    n_latents: int,
) -> Float[Tensor, "latent model"]:
    """C^T rows: a gather as well, because sorted by latent the pairs are bags of rows."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    ends = torch.bincount(flat, minlength=n_latents).cumsum(0)
    weights = values.flatten()[order]
    starts = torch.cat([ends.new_zeros(1), ends])
    return embedding_bag(
        order // indices.shape[1],
        rows,
        starts,
        per_sample_weights=weights,
        mode="sum",
        include_last_offset=True,
    )


def dot_chosen(
    indices: Int[Tensor, "row active"],
    left: Float[Tensor, "row model"],
    right: Float[Tensor, "latent model"],
) -> Float[Tensor, "row active"]:
    """left[row] . right[indices[row, i]]."""
    n_rows, n_active = indices.shape
    place = torch.arange(n_rows, device=indices.device)
    # What autograd of embedding_bag computes for its weights: blocked, without a copy of the rows.
    found = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.contiguous(),
        right,
        indices.flatten(),
        place * n_active,
        place.repeat_interleave(n_active),
        0,  # mode: sum
        -1,  # no padding
    )
    return found.view(n_rows, n_active)


class _Decode(Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, indices, W_dec)
        return combine(values, indices, W_dec)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        values, indices, W_dec = ctx.saved_tensors
        for_values, _, for_weights = ctx.needs_input_grad
        transposed = combine_transposed(values, indices, gradient, len(W_dec))
        return (
            dot_chosen(indices, gradient, W_dec) if for_values else None,
            None,
            transposed if for_weights else None,
        )
