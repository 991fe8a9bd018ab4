"""Ratios of sums over a batch: what is minimised has no units, and suits any layer."""

import torch
from jaxtyping import Float
from torch import Tensor


def relative_error(
    target: Float[Tensor, "batch model"],
    estimate: Float[Tensor, "batch model"],
    unit: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """Sum ||x - x_hat||^2 / sum ||x - mean(x)||^2, the mean being that of the batch.

    With a unit (one per row or per dimension) both differences are divided by it. A training loss:
    the mean of the batch is not the mean of the data, so the FVU that is reported comes from
    clipattr.metrics. Reference: Gao et al. 2024, section 2.1 (normalised MSE).
    """
    return _size(target - estimate, unit) / _spread(target, unit)


def relative_sum(
    values: Float[Tensor, "batch latent"],
    target: Float[Tensor, "batch model"],
    unit: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, ""]:
    """mean_row sum_j a_j / sqrt(mean ||x - mean(x)||^2), the difference divided by the unit."""
    return values.sum(1).mean() / (_spread(target, unit) / len(target)).sqrt()


def _size(difference: Tensor, unit: Tensor | None) -> Tensor:
    return (difference if unit is None else difference / unit).square().sum()


def _spread(target: Tensor, unit: Tensor | None) -> Tensor:
    spread = _size(target - target.mean(0), unit)
    # Equal rows have no spread; dividing by one keeps the gradient finite there.
    return torch.where(spread > 0, spread, 1.0)
