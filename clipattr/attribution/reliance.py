"""The reliance of all classes on all latents, summed over a data set, at the last layer.

Latent j moves the unit embedding of an image by a_j J v_j, J = d e^/dx, and its attribution to a
class c is that move times w_c. So the moves are summed, which takes no classes, and the head is
applied once at the end:

    R_c. = sum_n a_nj (J_n v_j) . w_c,    a J v_j = u_j (A_j - r_j h - (r_j + q_j) e0)
    u_j = a_j / (s |e|),  q_j = v_j . x_bar / d,  r_j = (A_j . e^ - q_j (e0 . e^)) / |e|

A sign has no such sum: how often an attribution is positive is counted from `class_attributions`,
a block of rows at a time, which costs active latents x classes per image.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int32
from torch import Tensor

from clipattr.attribution.closed_form import (
    LastLayerHead,
    LensTable,
    class_attributions,
    read_state,
)
from clipattr.attribution.gradients import project_on_decoder
from clipattr.codes import SparseCodes, add_transposed

# Attributions that exist at a time while signs are counted (16 MB): memory, not the result.
_ENTRIES = 2**22


class RelianceSums(NamedTuple):
    """What is summed over images, in float64: of several batches or processes, the sums add up."""

    scale: Float64[Tensor, " latent"]
    """u_j, the factor of A_j"""
    shift: Float64[Tensor, " latent"]
    """u_j r_j, the factor of h"""
    state: Float64[Tensor, "latent embed"]
    """u_j (r_j + q_j) e0"""

    @torch.no_grad()
    def matrix(self, head: LastLayerHead, table: LensTable) -> Float64[Tensor, "class latent"]:
        """Sum over the images of the attribution of every latent to every class of the head."""
        by_class = self.state @ head.weights.double().T
        return _assemble(self.scale, self.shift, by_class, head, table)


def empty_reliance(table: LensTable) -> RelianceSums:
    """No image yet."""
    zeros = torch.zeros_like(table.directions, dtype=torch.float64)
    return RelianceSums(zeros[:, 0].clone(), zeros[:, 0].clone(), zeros)


@torch.no_grad()
def add_reliance(
    sums: RelianceSums,
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> None:
    """Add a batch in place. Only the rows of latents that are active in it are touched."""
    moves = _read_moves(head, table, x, codes, W_dec)
    _add_scalars(sums.scale, sums.shift, moves, codes)
    add_transposed(sums.state, moves.along_state, codes.indices, moves.linear)


@torch.no_grad()
def reliance_matrix(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float64[Tensor, "class latent"]:
    """Sum over the rows of the attribution of every latent to every class.

    The identity of `class_attributions` with the sum taken first, of one batch: here the head comes
    before the sum. Batches add up; for many of them and many classes keep `RelianceSums`.
    """
    moves = _read_moves(head, table, x, codes, W_dec)
    by_class = torch.zeros_like(table.logits, dtype=torch.float64)
    scale, shift = torch.zeros_like(by_class[:, :2]).unbind(dim=1)
    _add_scalars(scale, shift, moves, codes)
    by_image = moves.linear @ head.weights.T
    add_transposed(by_class, moves.along_state, codes.indices, by_image)
    return _assemble(scale, shift, by_class, head, table)


@torch.no_grad()
def count_positive(
    counts: Int32[Tensor, "latent class"],
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> None:
    """Add, in place, the images of a batch in which an attribution is positive."""
    n_rows = max(1, _ENTRIES // (codes.indices.shape[1] * counts.shape[1]))
    for rows in torch.arange(len(x), device=x.device).split(n_rows):
        block = codes.select(rows)
        # Padding has the attribution 0, which is not positive.
        found = class_attributions(head, table, x[rows], block, W_dec).flatten(0, 1)
        # Not index_add_, which takes integers one by one on the CPU: 4 times as long.
        counts.index_put_((block.indices.flatten(),), found.gt_(0).int(), accumulate=True)


class _Moves(NamedTuple):
    """The factors of a J v_j, for each slot, and e0."""

    scale: Float[Tensor, "batch active"]
    shift: Float[Tensor, "batch active"]
    along_state: Float[Tensor, "batch active"]
    linear: Float[Tensor, "batch embed"]


def _read_moves(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> _Moves:
    state = read_state(head, x)
    overlap = (state.linear * state.unit).sum(dim=-1, keepdim=True)
    u = codes.values / (state.deviation * state.length)
    q = project_on_decoder(state.x_bar, codes, W_dec) / x.shape[1]
    r = (project_on_decoder(state.unit, codes, table.directions) - q * overlap) / state.length
    return _Moves(u, u * r, u * (r + q), state.linear)


def _assemble(
    scale: Float64[Tensor, " latent"],
    shift: Float64[Tensor, " latent"],
    by_class: Float64[Tensor, "latent class"],
    head: LastLayerHead,
    table: LensTable,
) -> Float64[Tensor, "class latent"]:
    """The three terms of the sum, in the place of the last one."""
    found = by_class.neg_().addcmul_(scale[:, None], table.logits)
    return found.addr_(shift, (head.weights @ head.shift).double(), alpha=-1).T


def _add_scalars(
    scale: Float64[Tensor, " latent"],
    shift: Float64[Tensor, " latent"],
    moves: _Moves,
    codes: SparseCodes,
) -> None:
    latents = codes.indices.flatten()
    scale.index_add_(0, latents, moves.scale.flatten().double())
    shift.index_add_(0, latents, moves.shift.flatten().double())
