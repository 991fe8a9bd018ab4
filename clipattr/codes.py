"""Sparse latent activations: the form in which codes travel between the packages."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


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
        flat = torch.nn.functional.embedding_bag(
            self.indices.reshape(-1, n_active),
            W_dec,
            per_sample_weights=self.values.reshape(-1, n_active).to(W_dec.dtype),
            mode="sum",
        )
        return flat.reshape(*rows, W_dec.shape[1])
