"""Keeps the decoder rows v_j on the unit sphere: a small a_j must not hide behind a long v_j.

Before the optimiser step remove the parallel gradient (so that neither Adam's moments nor the
gradient norm contain it), after the step normalise. Reference: Bricken et al. 2023, Towards
monosemanticity.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


@torch.no_grad()
def normalise_decoder_(W_dec: Float[Tensor, "latent model"]) -> None:
    """In place, v_j <- v_j / ||v_j||."""
    W_dec.copy_(functional.normalize(W_dec, dim=1))


@torch.no_grad()
def remove_parallel_gradient_(W_dec: Float[Tensor, "latent model"]) -> None:
    """In place, g_j <- g_j - (g_j . u_j) u_j with u_j = v_j / ||v_j||, g the gradient of W_dec."""
    if W_dec.grad is None:
        return
    directions = functional.normalize(W_dec, dim=1)
    parallel = (W_dec.grad * directions).sum(1, keepdim=True)
    W_dec.grad.sub_(parallel * directions)
