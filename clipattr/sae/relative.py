"""Ratios of sums over a batch: what is minimised has no units, and suits any layer."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Average = Callable[[Tensor], Tensor]
"""The mean over processes of a number or a vector of theirs; no gradient is asked of it."""


def alone(value: Tensor) -> Tensor:
    """The average over one process."""
    return value


@torch.no_grad()
def spread_of(
    target: Float[Tensor, "batch model"],
    unit: Float[Tensor, "..."] | None = None,
    average: Average = alone,
) -> Float[Tensor, ""]:
    """Sum ||x - mean(x)||^2, the mean being that of the batch.

    With a unit (one per row or per dimension) the difference is divided by it. Of several
    processes, which have as many rows each, it is the mean of theirs about the mean of all: the
    mean of their ratios then is the ratio of the sums over all rows.
    """
    spread = average(_size(target - average(target.mean(0)), unit))
    # Equal rows have no spread; dividing by one keeps the gradient finite there.
    return torch.where(spread > 0, spread, 1.0)


def relative_error(
    target: Float[Tensor, "batch model"],
    estimate: Float[Tensor, "batch model"],
    spread: Float[Tensor, ""],
    unit: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Sum ||x - x_hat||^2 / spread, in the unit of the spread: the mean predictor has 1.

    A training loss: the mean of the batch is not the mean of the data, so the FVU that is reported
    comes from clipattr.metrics. Reference: Gao et al. 2024, section 2.1 (normalised MSE).
    """
    return _size(target - estimate, unit) / spread


def relative_sum(
    values: Float[Tensor, "batch latent"], spread: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """mean_row sum_j a_j / sqrt(mean ||x - mean(x)||^2)."""
    return values.sum(1).mean() / (spread / len(values)).sqrt()


def _size(difference: Tensor, unit: Tensor | None) -> Tensor:
    return (difference if unit is None else difference / unit).square().sum()
