"""Sparse latent activations: the form in which codes travel, and the products with them.

A product gathers rows of a matrix and adds them up (`embedding_bag`), forwards and backwards: its
cost is proportional to the active latents, and no tensor of rows x active x width exists.
"""

import math
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

    def reshape(self, *rows: int) -> "SparseCodes":
        """The same codes with other axes in front of the active ones."""
        indices, values = (each.reshape(*rows, each.shape[-1]) for each in self[:2])
        return SparseCodes(indices, values, self.n_latents)

    def to_dense(self) -> Float[Tensor, "*rows latent"]:
        """The dense matrix, for tests and for small dictionaries."""
        dense = self.values.new_zeros(*self.values.shape[:-1], self.n_latents)
        return dense.scatter_add(-1, self.indices, self.values)

    def decode(self, W_dec: Float[Tensor, "latent model"]) -> Float[Tensor, "*rows model"]:
        """Sum of a_j v_j, without b_dec."""
        *rows, n_active = self.indices.shape
        n_rows = math.prod(rows)
        starts = torch.arange(n_rows + 1, device=self.indices.device) * n_active
        flat = _sum_bags(self.values.flatten(), self.indices.flatten(), starts, W_dec)
        return flat.reshape(*rows, W_dec.shape[1])

    def decode_parts(
        self,
        parts: Int[Tensor, "row active"],
        n_parts: int,
        W_dec: Float[Tensor, "latent model"],
    ) -> Float[Tensor, "part row model"]:
        """Sum of a_j v_j over the slots of each part; a slot is read once, for its own part."""
        n_rows = len(self.indices)
        place = torch.arange(n_rows, device=parts.device)[:, None]
        bags = (parts * n_rows + place).flatten()
        order = bags.argsort(stable=True)
        starts = _starts(bags, n_parts * n_rows)
        values, indices = self.values.flatten()[order], self.indices.flatten()[order]
        return _sum_bags(values, indices, starts, W_dec).view(n_parts, n_rows, -1)


def pack(
    chosen: Int[Tensor, " pair"], n_rows: int, n_latents: int
) -> tuple[Int[Tensor, "row active"], Bool[Tensor, "row active"]]:
    """Latents of each row, and which slots are more than padding.

    `chosen` holds row * n_latents + latent, ascending. There are as many slots as the fullest row
    needs.
    """
    rows = chosen // n_latents
    starts = _starts(rows, n_rows)
    width = max(1, int(starts.diff().max()))
    slots = rows * width + torch.arange(len(chosen), device=chosen.device) - starts[rows]
    # Padding names all latents in turn: a sum over the rows of one latent must not get them all.
    indices = torch.arange(n_rows * width, device=chosen.device) % n_latents
    indices[slots] = chosen % n_latents
    is_chosen = torch.zeros_like(indices, dtype=torch.bool).index_fill_(0, slots, True)
    return indices.view(n_rows, width), is_chosen.view(n_rows, width)


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
    place = torch.arange(len(rows), device=rows.device).repeat_interleave(indices.shape[1])
    return _combine_pairs_transposed(values.flatten(), indices.flatten(), place, rows, n_latents)


def _combine_pairs_transposed(
    values: Tensor, latents: Tensor, place: Tensor, rows: Tensor, n_latents: int
) -> Tensor:
    order = latents.argsort(stable=True)
    return embedding_bag(
        place[order],
        rows,
        _starts(latents, n_latents),
        per_sample_weights=values[order],
        mode="sum",
        include_last_offset=True,
    )


def _starts(bags: Tensor, n_bags: int) -> Tensor:
    """Where each bag starts among its pairs once they are sorted, and where the last one ends."""
    ends = torch.bincount(bags, minlength=n_bags).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def _sum_bags(values: Tensor, latents: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
    return cast(Tensor, _SumBags.apply(values.to(W_dec.dtype), latents, starts, W_dec))


class _SumBags(Function):
    """For each bag of pairs (latent, value) the sum of value * W_dec[latent]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, latents: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
        ctx.save_for_backward(values, latents, starts, W_dec)
        return embedding_bag(
            latents,
            W_dec,
            starts,
            per_sample_weights=values,
            mode="sum",
            include_last_offset=True,
        )

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        values, latents, starts, W_dec = ctx.saved_tensors
        for_values, _, _, for_weights = ctx.needs_input_grad
        places = torch.arange(len(gradient), device=starts.device)
        bags = places.repeat_interleave(starts.diff(), output_size=len(latents))
        return (
            _dot(gradient, W_dec, latents, starts[:-1], bags) if for_values else None,
            None,
            None,
            _combine_pairs_transposed(values, latents, bags, gradient, len(W_dec))
            if for_weights
            else None,
        )


def _dot(left: Tensor, right: Tensor, latents: Tensor, starts: Tensor, bags: Tensor) -> Tensor:
    """left[bag] . right[latent] of each pair: what autograd of embedding_bag computes.

    Blocked, without a copy of the rows.
    """
    sum_mode, no_padding = 0, -1
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, latents, starts, bags, sum_mode, no_padding
    )
