"""Attribution patching at the last layer, class token, without a forward or backward pass.

There the suffix is a layer norm and a projection, so the gradient is a formula, and attribution is
the un-normalised logit lens plus two corrections that know the image.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clipattr.attribution.gradients import project_on_decoder
from clipattr.codes import SparseCodes


class LastLayerHead(NamedTuple):
    """Layer norm (gamma, beta, eps), projection P with bias b, and the class rows w_c of the head.

        z = gamma * x_bar + beta,  e = z P + b,  y_c = e . w_c / |e|

    A probe's bias is missing on purpose: it has no gradient.
    """

    gamma: Float[Tensor, " model"]
    beta: Float[Tensor, " model"]
    eps: float
    projection: Float[Tensor, "model embed"]
    bias: Float[Tensor, " embed"]
    weights: Float[Tensor, "class embed"]


class LensTable(NamedTuple):
    """What does not depend on the image: A = (V - mean(V)) diag(gamma) P and L = A W^T."""

    directions: Float[Tensor, "latent embed"]
    logits: Float[Tensor, "latent class"]


class _State(NamedTuple):
    """The layer-normed activation and what follows from it."""

    x_bar: Float[Tensor, "batch model"]
    deviation: Float[Tensor, "batch 1"]
    linear: Float[Tensor, "batch embed"]
    unit: Float[Tensor, "batch embed"]
    length: Float[Tensor, "batch 1"]


class _Terms(NamedTuple):
    """Factors of the identity: three per slot and two per class."""

    scale: Float[Tensor, "batch active"]
    along_embedding: Float[Tensor, "batch active"]
    along_state: Float[Tensor, "batch active"]
    scores: Float[Tensor, "batch class"]
    state_logits: Float[Tensor, "batch class"]


@torch.no_grad()
def closed_form_attribution(
    head: LastLayerHead,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    targets: Int[Tensor, " batch"],
) -> Float[Tensor, "batch active"]:
    """Attribution patching for one class per image.

    de = (w - y e/n) / n,  q = gamma * (P de),  x_bar = (x - mean) / s
    g = (q - mean(q) - x_bar mean(x_bar * q)) / s,  R_j = a_j (v_j . g)
    """
    state = _read_state(head, x)
    rows = head.weights[targets]
    y = (state.unit * rows).sum(dim=-1, keepdim=True)
    q = head.gamma * (((rows - y * state.unit) / state.length) @ head.projection.T)
    along = (state.x_bar * q).mean(dim=-1, keepdim=True)
    gradient = (q - q.mean(dim=-1, keepdim=True) - state.x_bar * along) / state.deviation
    return codes.values * project_on_decoder(gradient, codes, W_dec)


@torch.no_grad()
def build_lens_table(head: LastLayerHead, W_dec: Float[Tensor, "latent model"]) -> LensTable:
    """The un-normalised logit lens of every latent for every class, once per model and head."""
    centred = W_dec - W_dec.mean(dim=1, keepdim=True)
    directions = (centred * head.gamma) @ head.projection
    return LensTable(directions, directions @ head.weights.T)


@torch.no_grad()
def class_attributions(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float[Tensor, "batch active class"]:
    """Attribution patching for all classes at once, by the logit-lens identity. Small batches only.

        R_jc = a_j/(s n) [L_jc - y_c (A_j . e^) - (v_j . x_bar)/d (e0 . w_c - y_c (e0 . e^))]

    with e^ = e/n and e0 = (x_bar * gamma) P. Over a data set use `reliance_matrix`.
    """
    terms = _read_terms(head, table, x, codes, W_dec)
    bracket = (
        table.logits[codes.indices]
        - terms.along_embedding[..., None] * terms.scores[:, None]
        - terms.along_state[..., None] * terms.state_logits[:, None]
    )
    return terms.scale[..., None] * bracket


@torch.no_grad()
def reliance_matrix(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> Float64[Tensor, "class latent"]:
    """Sum over the rows of the attribution of every latent to every class.

    The identity of `class_attributions` with the sum taken first: three sparse-times-dense
    products, so [rows, active, class] never exists. Batches add up.
    """
    terms = _read_terms(head, table, x, codes, W_dec)
    ones = torch.ones(x.shape[0], 1, dtype=torch.float64, device=x.device)
    reliance = table.logits * _sum_rows(terms.scale, codes, ones)
    reliance -= _sum_rows(terms.scale * terms.along_embedding, codes, terms.scores)
    reliance -= _sum_rows(terms.scale * terms.along_state, codes, terms.state_logits)
    return reliance.T


def _read_state(head: LastLayerHead, x: Float[Tensor, "batch model"]) -> _State:
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + head.eps).sqrt()
    x_bar = centred / deviation
    linear = (x_bar * head.gamma) @ head.projection
    embedding = linear + head.beta @ head.projection + head.bias
    length = embedding.norm(dim=-1, keepdim=True)
    return _State(x_bar, deviation, linear, embedding / length, length)


def _read_terms(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> _Terms:
    state = _read_state(head, x)
    scores = state.unit @ head.weights.T
    overlap = (state.linear * state.unit).sum(dim=-1, keepdim=True)
    return _Terms(
        scale=codes.values / (state.deviation * state.length),
        along_embedding=project_on_decoder(state.unit, codes, table.directions),
        along_state=project_on_decoder(state.x_bar, codes, W_dec) / x.shape[1],
        scores=scores,
        state_logits=state.linear @ head.weights.T - scores * overlap,
    )


def _sum_rows(
    slot_values: Float[Tensor, "batch active"],
    codes: SparseCodes,
    per_row: Float[Tensor, "batch columns"],
) -> Float64[Tensor, "latent columns"]:
    """Sparse [latent, batch] matrix of the slot values, times `per_row`, in float64."""
    n_rows, n_active = slot_values.shape
    rows = torch.arange(n_rows, device=per_row.device).repeat_interleave(n_active)
    transposed = torch.sparse_coo_tensor(
        torch.stack([codes.indices.flatten(), rows]),
        slot_values.flatten().double(),
        (codes.n_latents, n_rows),
        check_invariants=False,
    )
    return torch.sparse.mm(transposed, per_row.double())
