"""Where training starts: the centre of the data, and directions that point at it."""

from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# The share of a data point in a direction that is drawn to it; the rest is random, so that two
# latents which start at one row differ.
DATA_SHARE = 0.8
_MAX_ITERATIONS = 200


class Bias(Enum):
    """What b_dec starts from."""

    mean = "mean"
    geometric_median = "geometric_median"
    """not moved by a few rows of enormous norm"""


def centre_of(rows: Float[Tensor, "row model"], bias: Bias) -> Float[Tensor, " model"]:
    """The mean or the geometric median of the rows, in float64."""
    rows = rows.double()
    return rows.mean(0) if bias is Bias.mean else geometric_median(rows)


def geometric_median(
    rows: Float[Tensor, "row model"], tolerance: float = 1e-8
) -> Float[Tensor, " model"]:
    """The point y with the least sum of distances ||x_i - y||, by Weiszfeld's iteration.

        y <- sum_i w_i x_i / sum_i w_i,   w_i = 1 / ||x_i - y||

    It ends when a step is shorter than `tolerance` times the median distance, or after 200 steps.
    Reference: Vardi, Zhang 2000, The multivariate L1-median and associated data depth, who say what
    to do on one of the rows.
    """
    median = rows.mean(0)
    for _ in range(_MAX_ITERATIONS):
        distances = (rows - median).norm(dim=1)
        is_away = distances > 0
        weights = (1 / distances).where(is_away, 0.0)
        pull = weights @ rows - weights.sum() * median
        # Rows on which the iteration stands hold it with a force of one each.
        held = (~is_away).sum() / pull.norm()
        if not held < 1:
            break
        step = (1 - held) * pull / weights.sum()
        if step.norm() <= tolerance * distances.median():
            break
        median = median + step
    return median


def point_at(
    rows: Float[Tensor, "row model"], directions: Float[Tensor, "latent model"]
) -> Float[Tensor, "latent model"]:
    """Unit directions of which each is drawn to one row, in turn if there are fewer rows."""
    chosen = torch.arange(len(directions), device=rows.device) % len(rows)
    points = functional.normalize(rows[chosen].to(directions.dtype), dim=1)
    return functional.normalize(torch.lerp(directions, points, DATA_SHARE), dim=1)
