"""Sparse latent activations: the form in which codes travel, and the products with them.

A product gathers rows of a matrix and adds them up, forwards and backwards: its cost is
proportional to the active latents, and no tensor of rows x active x width exists. What adds them
up depends on the device: `clipattr.sparse`.
"""

import math
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from clipattr.sparse import gathered, kernels_for

# Rows that are turned into float64 at a time.
_BLOCK = 2048

Pool = Literal["max", "mean", "sum"]
"""What one activation of a latent in an image is made of those at its tokens."""


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
        starts = equal_bags(self.indices.reshape(math.prod(rows), n_active))
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


class LatentsOfImages(NamedTuple):
    """The latents that each image has at any of its tokens, each once."""

    indices: Int[Tensor, "batch slot"]
    """ascending, then padding"""
    place: Int[Tensor, "batch *site active"]
    """slot of each latent of each token; without meaning where it is inactive"""

    def sum(self, values: Float[Tensor, "batch *site active"]) -> Float[Tensor, "batch slot"]:
        """Sums over the tokens of what is said of the latents of each; 0 where one is inactive."""
        sums = values.new_zeros(self.indices.shape)
        return sums.scatter_add_(1, self.place.flatten(1), values.flatten(1))


def find_latents_of_images(codes: SparseCodes) -> LatentsOfImages:
    """Which latents fire anywhere in an image, by sorting: never [batch, n_latents]."""
    keys = torch.where(codes.is_active, codes.indices, codes.n_latents).flatten(1)
    ordered, order = keys.sort(dim=1)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    n_different = (is_first & (ordered < codes.n_latents)).sum(dim=1)
    width = int(n_different.max().clamp(min=1)) if len(keys) else 1
    slot = (is_first.cumsum(dim=1) - 1).clamp(max=width - 1)
    place = torch.empty_like(slot).scatter_(1, order, slot)
    # Inactive slots come last in the sort and may share a place: a maximum keeps the latent.
    latents = torch.where(codes.is_active.flatten(1), keys, 0)
    indices = keys.new_zeros(len(keys), width).scatter_reduce_(1, place, latents, "amax")
    return LatentsOfImages(indices, place.view(codes.indices.shape))


def pool_tokens(codes: SparseCodes, pool: Pool) -> SparseCodes:
    """One activation per image and latent, [batch, slot], of codes [batch, *token, active].

    What dense codes give along their token axes: a token at which a latent is silent counts as 0,
    in the mean as well as in the maximum. Codes without tokens are returned as they are.
    """
    if codes.indices.ndim == 2:
        return codes
    found = find_latents_of_images(codes)
    n_tokens = math.prod(codes.indices.shape[1:-1])
    # Tens of tokens are added up: in half precision the small ones would be lost.
    values = codes.values.to(torch.promote_types(codes.values.dtype, torch.float32))
    if pool == "max":
        pooled = _largest_of_tokens(values, codes.is_active, found, n_tokens)
    else:
        pooled = found.sum(values) / (n_tokens if pool == "mean" else 1)
    return SparseCodes(found.indices, pooled, codes.n_latents)


def _largest_of_tokens(
    values: Float[Tensor, "batch *site active"],
    is_active: Bool[Tensor, "batch *site active"],
    found: LatentsOfImages,
    n_tokens: int,
) -> Float[Tensor, "batch slot"]:
    place = found.place.flatten(1)
    known = values.masked_fill(~is_active, -torch.inf).flatten(1)
    nothing = known.new_full(found.indices.shape, -torch.inf)
    largest = nothing.scatter_reduce(1, place, known, "amax")
    n_active = torch.zeros_like(found.indices).scatter_add_(1, place, is_active.flatten(1).long())
    return torch.where(n_active < n_tokens, largest.clamp(min=0), largest)


def equal_bags(indices: Int[Tensor, "row active"]) -> Int[Tensor, " boundary"]:
    """Where the pairs of each row start when they are written one after the other, and the end."""
    n_rows, n_active = indices.shape
    return torch.arange(n_rows + 1, device=indices.device) * n_active


def combine(
    values: Float[Tensor, "row active"],
    indices: Int[Tensor, "row active"],
    rows: Float[Tensor, "latent model"],
) -> Float[Tensor, "row model"]:
    """C rows, where C[r, indices[r, i]] = values[r, i] is sparse."""
    starts = equal_bags(indices)
    return kernels_for(rows).sum_bags(values.flatten(), indices.flatten(), starts, rows, None)


class Transposed(NamedTuple):
    """The pairs of C sorted by latent, which makes them bags of rows: C^T is a gather as well."""

    order: Int[Tensor, " pair"]
    rows: Int[Tensor, " pair"]
    latents: Int[Tensor, " pair"]
    starts: Int[Tensor, " boundary"]

    def combine(
        self, values: Float[Tensor, " pair"], rows: Float[Tensor, "row model"]
    ) -> Float[Tensor, "latent model"]:
        """C^T rows."""
        kernels = kernels_for(rows)
        return kernels.sum_bags(values[self.order], self.rows, self.starts, rows, self.latents)

    def totals(self, values: Float[Tensor, " pair"]) -> Float[Tensor, " latent"]:
        """The sum of the values of each latent."""
        same_row = torch.zeros_like(self.rows)
        return self._replace(rows=same_row).combine(values, values.new_ones(1, 1)).squeeze(1)


def transpose(
    latents: Int[Tensor, " pair"], rows: Int[Tensor, " pair"], n_latents: int
) -> Transposed:
    """Sort the pairs (row, latent) by latent; those of a latent stay in order."""
    # Half the digits of the usual integers: a sort on CUDA goes through them one after the other.
    ordered, order = latents.int().sort(stable=True)
    return Transposed(order, rows[order], ordered, _starts(latents, n_latents))


def combine_transposed(
    values: Float[Tensor, "row active"],
    indices: Int[Tensor, "row active"],
    rows: Float[Tensor, "row model"],
    n_latents: int,
) -> Float[Tensor, "latent model"]:
    """C^T rows."""
    place = rows_of_bags(equal_bags(indices), indices.numel())
    return transpose(indices.flatten(), place, n_latents).combine(values.flatten(), rows)


def add_transposed(
    total: Float64[Tensor, "latent width"],
    values: Float[Tensor, "row active"],
    indices: Int[Tensor, "row active"],
    rows: Float[Tensor, "row width"],
) -> None:
    """Add C^T rows to a sum over batches, in place: only what the batch names is touched."""
    ordered, order = indices.flatten().int().sort(stable=True)
    latents, bags, counts = ordered.unique_consecutive(return_inverse=True, return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    places = order // indices.shape[1]
    sums = kernels_for(rows).sum_bags(
        values.flatten()[order], places, starts, rows.contiguous(), bags
    )
    for named, block in zip(latents.split(_BLOCK), sums.split(_BLOCK), strict=True):
        total.index_add_(0, named, block.double())


def rows_of_bags(starts: Int[Tensor, " boundary"], n_pairs: int) -> Int[Tensor, " pair"]:
    """The bag of each pair."""
    bags = torch.arange(len(starts) - 1, device=starts.device)
    return bags.repeat_interleave(starts.diff(), output_size=n_pairs)


def _starts(bags: Tensor, n_bags: int) -> Tensor:
    """Where each bag starts among its pairs once they are sorted, and where the last one ends."""
    # Not bincount, which on CUDA waits to learn the largest number.
    counts = bags.new_zeros(n_bags).scatter_add_(0, bags, torch.ones_like(bags))
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _sum_bags(values: Tensor, latents: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
    return cast(Tensor, _SumBags.apply(values.to(W_dec.dtype), latents, starts, W_dec))


class _SumBags(Function):
    """For each bag of pairs (latent, value) the sum of value * W_dec[latent]."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, latents: Tensor, starts: Tensor, W_dec: Tensor) -> Tensor:
        rows = gathered(W_dec)
        ctx.save_for_backward(values, latents, starts, rows)
        return kernels_for(rows).sum_bags(values, latents, starts, rows, None)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  of a decorator
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        values, latents, starts, rows = ctx.saved_tensors
        for_values, _, _, for_weights = ctx.needs_input_grad
        bags = rows_of_bags(starts, len(latents))
        kernels = kernels_for(rows)
        return (
            kernels.dot(gradient, rows, latents, starts, bags) if for_values else None,
            None,
            None,
            transpose(latents, bags, len(rows)).combine(values, gradient.to(rows.dtype))
            if for_weights
            else None,
        )
