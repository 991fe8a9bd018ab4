"""From attributions to an order in which latents are deleted or inserted."""

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
