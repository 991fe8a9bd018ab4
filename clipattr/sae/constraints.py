"""Keeps the decoder rows v_j on the unit sphere: a small a_j must not hide behind a long v_j.

Before the optimiser step remove the parallel gradient (so that neither Adam's moments nor the
gradient norm contain it), after the step normalise. Reference: Bricken et al. 2023, Towards
monosemanticity.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Rows that are worked on together: both blocks stay in the cache of a core, and each number is read
# from memory once instead of at every operation.
BLOCK = 256


@torch.no_grad()
def normalise_decoder_(W_dec: Float[Tensor, "latent model"]) -> None:
    """In place, v_j <- v_j / ||v_j||."""
    # In place: a second matrix would have to be given memory by the system at every step.
    W_dec.div_(torch.linalg.vector_norm(W_dec, dim=1, keepdim=True).clamp_min_(1e-12))


@torch.no_grad()
def remove_parallel_gradient_(W_dec: Float[Tensor, "latent model"]) -> None:
    """In place, g_j <- g_j - (g_j . u_j) u_j with u_j = v_j / ||v_j||, g the gradient of W_dec."""
    if W_dec.grad is None:
        return
    size = len(W_dec) if W_dec.is_cuda else BLOCK
    for rows, gradient in zip(W_dec.split(size), W_dec.grad.split(size), strict=True):
        directions = functional.normalize(rows, dim=1)
        parallel = (gradient * directions).sum(1, keepdim=True)
        gradient.addcmul_(parallel, directions, value=-1)
