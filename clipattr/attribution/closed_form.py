"""Attribution patching at the last layer, class token, without a forward or backward pass.

There the suffix is a layer norm and a projection, so the gradient is a formula, and attribution is
the un-normalised logit lens plus two corrections that know the image.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.gradients import project_on_decoder
from clipattr.codes import SparseCodes
from clipattr.sparse import kernels_for


class LastLayerHead(NamedTuple):
    """Layer norm (gamma, beta, eps), projection P with bias b, and the class rows w_c of the head.

        z = gamma * x_bar + beta,  e = z P + b,  y_c = e . w_c / |e| + bias_c

    Attribution has no use for a probe's bias; curves have.
    """

    gamma: Float[Tensor, " model"]
    beta: Float[Tensor, " model"]
    eps: float
    projection: Float[Tensor, "model embed"]
    bias: Float[Tensor, " embed"]
    weights: Float[Tensor, "class embed"]
    class_bias: Float[Tensor, " class"] | None = None

    @property
    def shift(self) -> Float[Tensor, " embed"]:
        """What the embedding has whatever the activation: h = beta P + b."""
        return self.beta @ self.projection + self.bias


class LensTable(NamedTuple):
    """What does not depend on the image: A = (V - mean(V)) diag(gamma) P and L = A W^T."""

    directions: Float[Tensor, "latent embed"]
    logits: Float[Tensor, "latent class"]


class HeadState(NamedTuple):
    """The layer-normed activation and what follows: e0 = (x_bar * gamma) P, e^ = e / |e|."""

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


class LensParts(NamedTuple):
    """Attribution patching taken apart: R = lens - along_embedding - along_state.

    lens               a_j L_jc / (s n): act x un-normalised logit lens, scaled by the image
    along_embedding    the part of the direction along the embedding, which the cosine ignores
    along_state        the part along the layer-normed state, which the layer norm ignores
    """

    lens: Float[Tensor, "batch active"]
    along_embedding: Float[Tensor, "batch active"]
    along_state: Float[Tensor, "batch active"]


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
    state = read_state(head, x)
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
    """Attribution patching for all classes at once, by the logit-lens identity.

        R_jc = a_j/(s n) [L_jc - y_c (A_j . e^) - (v_j . x_bar)/d (e0 . w_c - y_c (e0 . e^))]

    One gather of scaled rows of L and two updates in place: 4 k C bytes written per image, which is
    what bounds the batch. Over a data set use `reliance_matrix`.
    """
    terms = _read_terms(head, table, x, codes, W_dec)
    n_slots = codes.indices.numel()
    each = torch.arange(n_slots + 1, device=x.device)
    scaled = kernels_for(table.logits).sum_bags(
        terms.scale.flatten(), codes.indices.flatten(), each, table.logits, None
    )
    found = scaled.view(*codes.indices.shape, -1)
    for factor, per_class in (
        (terms.along_embedding, terms.scores),
        (terms.along_state, terms.state_logits),
    ):
        found.addcmul_((terms.scale * factor)[..., None], per_class[:, None], value=-1)
    return found


@torch.no_grad()
def lens_parts(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    targets: Int[Tensor, " batch"],
) -> LensParts:
    """The terms of the logit-lens identity for one class per image: where the lens goes wrong."""
    terms = _read_terms(head, table, x, codes, W_dec)
    scores, state_logits = (each.gather(1, targets[:, None]) for each in terms[3:])
    return LensParts(
        terms.scale * table.logits[codes.indices, targets[:, None]],
        terms.scale * terms.along_embedding * scores,
        terms.scale * terms.along_state * state_logits,
    )


def read_state(head: LastLayerHead, x: Float[Tensor, "batch model"]) -> HeadState:
    """The head's forward pass, with what it meets on the way."""
    centred = x - x.mean(dim=-1, keepdim=True)
    deviation = (centred.square().mean(dim=-1, keepdim=True) + head.eps).sqrt()
    x_bar = centred / deviation
    linear = (x_bar * head.gamma) @ head.projection
    embedding = linear + head.shift
    length = embedding.norm(dim=-1, keepdim=True)
    return HeadState(x_bar, deviation, linear, embedding / length, length)


def _read_terms(
    head: LastLayerHead,
    table: LensTable,
    x: Float[Tensor, "batch model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
) -> _Terms:
    state = read_state(head, x)
    scores = state.unit @ head.weights.T
    overlap = (state.linear * state.unit).sum(dim=-1, keepdim=True)
    return _Terms(
        scale=codes.values / (state.deviation * state.length),
        along_embedding=project_on_decoder(state.unit, codes, table.directions),
        along_state=project_on_decoder(state.x_bar, codes, W_dec) / x.shape[1],
        scores=scores,
        state_logits=state.linear @ head.weights.T - scores * overlap,
    )
