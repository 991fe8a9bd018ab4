"""Sites with several tokens: the same latent at many tokens is one latent of the image."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes, find_latents_of_images


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
    found = find_latents_of_images(codes)
    merged = SparseCodes(found.indices, found.sum(codes.values), codes.n_latents)
    return MergedCodes(merged, found.place, codes.is_active)
