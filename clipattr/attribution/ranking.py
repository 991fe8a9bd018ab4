"""From attributions to an order in which latents are deleted or inserted, and to steps of a curve.

The step of a slot is the number of the edit that takes it away, counted from 0. Slots may share a
step (a latent at all its tokens), and steps may be empty (a latent that did not fire here).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.codes import SparseCodes


def active_order(
    attributions: Float[Tensor, "batch *site active"], codes: SparseCodes
) -> Int[Tensor, "batch slot"]:
    """Slots of each image from the highest attribution to the lowest, inactive slots last.

    A site with a token axis is flattened: slot = token * active + position. Equal attributions keep
    the order of their slots, so the same numbers give the same curve on every machine.
    """
    ranked = torch.where(codes.is_active, attributions, -torch.inf).flatten(start_dim=1)
    return ranked.argsort(dim=1, descending=True, stable=True)


def steps_of(order: Int[Tensor, "*rows slot"]) -> Int[Tensor, "*rows slot"]:
    """The step of each slot, where one slot is edited per step: the inverse of the order."""
    steps = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty_like(order).scatter_(-1, order, steps)


def global_steps(
    ranking: Int[Tensor, " latent"], codes: SparseCodes
) -> Int[Tensor, "batch *site active"]:
    """One ranking of all latents for every image: step t edits latent ranking[t] where it fired."""
    return steps_of(ranking)[codes.indices]


def listed_steps(
    listed: Int[Tensor, "batch step"], codes: SparseCodes
) -> Int[Tensor, "batch active"]:
    """A list of latents for each image: step t edits latent listed[t] where it fired.

    Latents that are not in the list come after all that are.
    """
    is_listed = codes.indices[:, :, None] == listed[:, None]
    return torch.where(is_listed.any(dim=2), is_listed.int().argmax(dim=2), listed.shape[1])
