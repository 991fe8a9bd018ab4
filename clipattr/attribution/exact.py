"""The ground truth of attribution: delete one latent, run the suffix, see what changed."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.attribution.gradients import attribution_patching
from clipattr.attribution.references import at_reference
from clipattr.attribution.score import Score, clean_scores
from clipattr.attribution.tokens import MergedCodes
from clipattr.codes import SparseCodes


@torch.no_grad()
def exact_patching(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    chunk_rows: int = 1024,
) -> Float[Tensor, "batch *site active"]:
    """Effect of deleting each latent alone: y(x) - y(x - a_j v_j).

    One suffix row per active slot, `chunk_rows` of them at a time whatever image they belong to: a
    row is a whole image where the suffix holds blocks, so choose fewer there. Slots without an
    active latent have effect 0 and cost nothing.
    """
    clean = clean_scores(score, x)
    effects = torch.zeros_like(codes.values, dtype=clean.dtype)
    for slots in codes.is_active.nonzero().split(chunk_rows):
        images = slots[:, 0]
        patched = score(_without_one_latent(x, codes, W_dec, slots), images)
        effects[slots.unbind(dim=1)] = clean[images] - patched
    return effects


def corrected_patching(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    n_exact: int,
    chunk_rows: int = 1024,
) -> Float[Tensor, "batch *site active"]:
    """Attribution patching, and exact patching where |R_j| is among the image's `n_exact` largest.

    The first-order estimate is worst where much changes, and there are few such latents.
    """
    estimate = attribution_patching(score, x, codes, W_dec)
    size = torch.where(codes.is_active, estimate.abs(), -1.0).flatten(1)
    largest = size.topk(min(n_exact, size.shape[1]), dim=1).indices
    is_exact = torch.zeros_like(size, dtype=torch.bool).scatter_(1, largest, True)
    is_exact = is_exact.view(estimate.shape) & codes.is_active
    chosen = codes._replace(values=torch.where(is_exact, codes.values, 0.0))
    effects = exact_patching(score, x, chosen, W_dec, chunk_rows)
    return torch.where(is_exact, effects.to(estimate.dtype), estimate)


@torch.no_grad()
def exact_patching_of_latents(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    merged: MergedCodes,
    chunk_rows: int = 256,
) -> Float[Tensor, "batch slot"]:
    """Effect of deleting each latent at all tokens of its image: y(x) - y(x - sum_t a_tj v_j).

    One row of the suffix per active slot of `merged`, which is `merge_tokens(codes)`.
    """
    clean = clean_scores(score, x)
    effects = torch.zeros_like(merged.codes.values, dtype=clean.dtype)
    for slots in merged.codes.is_active.nonzero().split(chunk_rows):
        images, slot = slots.unbind(dim=1)
        is_removed = merged.place[images].flatten(1) == slot[:, None]
        removed = codes.select(images)
        values = torch.where(is_removed.view(removed.values.shape), removed.values, 0.0)
        patched = score(at_reference(x[images], removed._replace(values=values), W_dec), images)
        effects[images, slot] = clean[images] - patched
    return effects


def _without_one_latent(
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    slots: Int[Tensor, "rows coordinates"],
) -> Float[Tensor, "rows *site model"]:
    """One copy of the image's activation per slot (image, position in the site, slot), edited."""
    image, *position, _ = slots.unbind(dim=1)
    where = slots.unbind(dim=1)
    edited = x[image]  # indexing by a tensor copies, so the edit below stays here
    row = torch.arange(slots.shape[0], device=x.device)
    edited[(row, *position)] -= codes.values[where][:, None] * W_dec[codes.indices[where]]
    return edited
