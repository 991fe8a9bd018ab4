"""Agreement of rankings: correlations and overlap per image over active latents, AUROC per column.

Everything is float64; nan means "not defined for this image" and is never replaced by a number.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from clipattr.errors import DataError


def pearson(
    a: Float[Tensor, "batch slot"],
    b: Float[Tensor, "batch slot"],
    mask: Bool[Tensor, "batch slot"],
) -> Float64[Tensor, " batch"]:
    """Linear correlation of a and b over the slots in the mask, image by image.

    nan with fewer than 3 slots in the mask, or when a or b is constant there.
    """
    a_centred, b_centred = _centre(a.double(), mask), _centre(b.double(), mask)
    covariance = (a_centred * b_centred).sum(dim=1)
    norms = a_centred.norm(dim=1) * b_centred.norm(dim=1)
    defined = (mask.sum(dim=1) >= 3) & ~_is_constant(a, mask) & ~_is_constant(b, mask)
    return torch.where(defined, covariance / norms, torch.nan)


def spearman(
    a: Float[Tensor, "batch slot"],
    b: Float[Tensor, "batch slot"],
    mask: Bool[Tensor, "batch slot"],
) -> Float64[Tensor, " batch"]:
    """Rank correlation over the slots in the mask; ties share their average rank.

    nan where `pearson` of the ranks is nan, and where a or b holds a nan in the mask.
    """
    correlation = pearson(_masked_ranks(a, mask), _masked_ranks(b, mask), mask)
    broken = ((a.isnan() | b.isnan()) & mask).any(dim=1)
    return torch.where(broken, torch.nan, correlation)


def top_overlap(
    a: Float[Tensor, "batch slot"],
    b: Float[Tensor, "batch slot"],
    mask: Bool[Tensor, "batch slot"],
    n: int,
) -> Float64[Tensor, " batch"]:
    """Share of the n highest slots of a that are among the n highest of b, within the mask.

    Ties go to the lower slot. nan for an image with n or fewer slots in the mask: all of them are
    chosen by every ranking, which says nothing.
    """
    shared = (_is_among_top(a, mask, n) & _is_among_top(b, mask, n)).sum(dim=1)
    return torch.where(mask.sum(dim=1) > n, shared.double() / n, torch.nan)


def auroc(
    scores: Float[Tensor, "rows column"],
    labels: Bool[Tensor, " rows"],
    chunk_columns: int = 256,
) -> Float64[Tensor, " column"]:
    """Probability that a random positive row scores above a random negative one; ties count half.

        (sum of the positives' ranks - P (P + 1) / 2) / (P N)

    Reference: Mann and Whitney, 1947. A column that holds a nan gets nan.
    """
    n_positive = int(labels.sum())
    n_negative = labels.shape[0] - n_positive
    if n_positive == 0 or n_negative == 0:
        raise DataError(
            f"auroc: {n_positive} positive and {n_negative} negative labels; "
            "at least one of each is needed"
        )
    areas = [_rank_sum(part, labels) for part in scores.split(chunk_columns, dim=1)]
    area = (torch.cat(areas) - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)
    return torch.where(scores.isnan().any(dim=0), torch.nan, area)


def average_ranks(values: Float[Tensor, "rows item"]) -> Float64[Tensor, "rows item"]:
    """Rank of each item within its row, 1 for the lowest; ties share their average rank."""
    ordered, order = values.sort(dim=1)
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = is_new.long().cumsum(dim=1) - 1
    position = torch.arange(1, values.shape[1] + 1, dtype=torch.float64, device=values.device)
    position = position.expand(values.shape)
    total = torch.zeros_like(position, memory_format=torch.contiguous_format)
    size = torch.zeros_like(total)
    total.scatter_add_(1, group, position)
    size.scatter_add_(1, group, torch.ones_like(position))
    tied = total.gather(1, group) / size.gather(1, group)
    return torch.empty_like(tied).scatter_(1, order, tied)


def _rank_sum(
    scores: Float[Tensor, "rows column"], labels: Bool[Tensor, " rows"]
) -> Float64[Tensor, " column"]:
    return average_ranks(scores.T.contiguous())[:, labels].sum(dim=1)


def _masked_ranks(
    values: Float[Tensor, "batch slot"], mask: Bool[Tensor, "batch slot"]
) -> Float64[Tensor, "batch slot"]:
    # Slots outside the mask sort last, so they shift no rank inside it.
    return average_ranks(torch.where(mask, values, torch.inf))


def _centre(
    values: Float64[Tensor, "batch slot"], mask: Bool[Tensor, "batch slot"]
) -> Float64[Tensor, "batch slot"]:
    kept = torch.where(mask, values, 0.0)
    mean = kept.sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
    return torch.where(mask, values - mean, 0.0)


def _is_constant(
    values: Float[Tensor, "batch slot"], mask: Bool[Tensor, "batch slot"]
) -> Bool[Tensor, " batch"]:
    # Compared by value: centring leaves rounding noise whose correlation would look like a result.
    lowest = torch.where(mask, values, torch.inf).amin(dim=1)
    highest = torch.where(mask, values, -torch.inf).amax(dim=1)
    return lowest == highest


def _is_among_top(
    values: Float[Tensor, "batch slot"], mask: Bool[Tensor, "batch slot"], n: int
) -> Bool[Tensor, "batch slot"]:
    ranked = torch.where(mask, values, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(mask).scatter_(1, order[:, :n], True)
