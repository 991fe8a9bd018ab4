"""The decoder directions among themselves: how redundant they are, and a map of them."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

# Latents x latents that are compared at a time: 64 MB.
_BLOCK = 4096


class NearestDirections(NamedTuple):
    """For each latent the other one whose direction is most like its own."""

    cosine: Float[Tensor, " latent"]
    latent: Int[Tensor, " latent"]

    @property
    def redundancy(self) -> float:
        """Mean over the latents of the largest cosine. Reference: Dreyer et al. 2025."""
        return float(self.cosine.double().mean())


@torch.no_grad()
def nearest_directions(W_dec: Float[Tensor, "latent model"]) -> NearestDirections:
    """max_{i != j} cos(v_i, v_j) and its argmax, the first of equal ones, for two latents or more.

    In blocks, each pair of blocks once; never [latents, latents].
    """
    if len(W_dec) < 2:
        raise ValueError(f"{len(W_dec)} directions: redundancy needs two")
    units = normalize(W_dec, dim=1)
    cosine = units.new_full((len(units),), -torch.inf)
    latent = torch.full_like(cosine, -1, dtype=torch.int64)
    starts = range(0, len(units), _BLOCK)
    for above in starts:
        for left in starts[: above // _BLOCK + 1]:
            cosines = units[above : above + _BLOCK] @ units[left : left + _BLOCK].T
            if above == left:
                cosines.fill_diagonal_(-torch.inf)
            _keep_larger(cosine, latent, cosines.max(1), above, left)
            if above != left:
                _keep_larger(cosine, latent, cosines.max(0), left, above)
    return NearestDirections(cosine, latent)


def _keep_larger(
    cosine: Tensor, latent: Tensor, found: tuple[Tensor, Tensor], start: int, offset: int
) -> None:
    """Update the latents from `start` on with what was found among those from `offset` on."""
    values, places = found
    here = slice(start, start + len(values))
    is_larger = values > cosine[here]
    cosine[here] = torch.where(is_larger, values, cosine[here])
    latent[here] = torch.where(is_larger, places + offset, latent[here])


class DirectionMap(NamedTuple):
    """Where each direction lies on a plane, and what share of the variance each axis shows."""

    positions: Float64[Tensor, "latent 2"]
    shares: Float64[Tensor, "2"]


@torch.no_grad()
def direction_map(W_dec: Float[Tensor, "latent model"]) -> DirectionMap:
    """The first two principal components of the unit directions, centred.

    Exact, by the [model, model] covariance in float64; the largest entry of an axis is positive, so
    that the map does not flip from run to run. The shares say how little two of many axes show.
    """
    units = normalize(W_dec.double(), dim=1)
    units = units - units.mean(0)
    variances, axes = torch.linalg.eigh(units.T @ units)
    top = axes[:, -2:].flip(1)
    top = top * top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    return DirectionMap(units @ top, variances[-2:].flip(0) / variances.sum())
