"""Sites with several tokens: the same latent at many tokens is one latent of the image."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes


class MergedCodes(NamedTuple):
    """The latents of each image, each once, and where the slots of its tokens went."""

    codes: SparseCodes
    """activations summed over the tokens, [batch, slot]; ascending latents, then padding"""
    place: Int[Tensor, "batch *site active"]
    """slot of each latent of each token in `codes`; without meaning where it is inactive"""
    is_active: Tensor
    """which of the slots that were merged hold a latent that fired"""

    def sum_over_tokens(
        self, attributions: Float[Tensor, "batch *site active"]
    ) -> Float[Tensor, "batch slot"]:
        """One attribution per latent and image; the map over the tokens is what goes in."""
        counted = torch.where(self.is_active, attributions, 0.0).flatten(1)
        sums = counted.new_zeros(self.codes.indices.shape)
        return sums.scatter_add_(1, self.place.flatten(1), counted)

    def per_token(self, of_slots: Int[Tensor, "batch slot"]) -> Int[Tensor, "batch *site active"]:
        """What is said of a latent, said of it at each of its tokens: its step in a curve."""
        return of_slots.gather(1, self.place.flatten(1)).view(self.place.shape)


def merge_tokens(codes: SparseCodes) -> MergedCodes:
    """Find the latents that each image has at any token. Exact, and never [batch, n_latents]."""
    keys = torch.where(codes.is_active, codes.indices, codes.n_latents).flatten(1)
    ordered, order = keys.sort(dim=1)
    is_first = torch.ones_like(ordered, dtype=torch.bool)
    is_first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    n_different = (is_first & (ordered < codes.n_latents)).sum(dim=1)
    width = max(1, int(n_different.max()))
    slot = (is_first.cumsum(dim=1) - 1).clamp(max=width - 1)
    place = torch.empty_like(slot).scatter_(1, order, slot)
    # Inactive slots come last in the sort and may share a place: a maximum keeps the latent.
    latents = torch.where(codes.is_active.flatten(1), keys, 0)
    indices = keys.new_zeros(len(keys), width).scatter_reduce_(1, place, latents, "amax")
    values = codes.values.new_zeros(len(keys), width)
    values.scatter_add_(1, place, codes.values.flatten(1))
    merged = SparseCodes(indices, values, codes.n_latents)
    return MergedCodes(merged, place.view(codes.indices.shape), codes.is_active)
