"""Faithfulness of an order of latents: deletion and insertion curves, and the completeness gap."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clipattr.attribution.score import Score, clean_scores
from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError


@torch.no_grad()
def deletion_curve(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    order: Int[Tensor, "batch slot"],
    n_steps: int,
) -> Float[Tensor, "batch points"]:
    """Score after the first 0, 1, ..., n_steps slots of the order are deleted. Lower is better.

        y(x - sum_{s < step} a_s v_s)

    Point 0 is the clean score. The rest (error term and decoder bias) is never touched. An image
    with fewer active latents than steps stays flat from there on.
    """
    return _curve(score, x, codes._replace(values=-codes.values), W_dec, order, n_steps)


@torch.no_grad()
def insertion_curve(
    score: Score,
    x: Float[Tensor, "batch *site model"],
    codes: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    order: Int[Tensor, "batch slot"],
    n_steps: int,
) -> Float[Tensor, "batch points"]:
    """Score after the first 0, 1, ..., n_steps slots are added to the rest. Higher is better.

        y(rest + sum_{s < step} a_s v_s),  rest = x - sum_j a_j v_j

    Point 0 has no latent at all; once every active slot is in, the score is the clean one.
    """
    return _curve(score, x - codes.decode(W_dec), codes, W_dec, order, n_steps)


def area_under(curve: Float[Tensor, "batch points"]) -> Float64[Tensor, " batch"]:
    """Trapezoid over the steps, divided by their number: the mean height of each image's curve.

    Divide by y(0) only after averaging over images (ratio of means): single scores can be near 0.
    """
    return torch.trapezoid(curve.double(), dim=1) / (curve.shape[1] - 1)


class CompletenessGap(NamedTuple):
    """Per image: what the attributions miss, and the change they should explain, both absolute.

    Over a data set the gap is missing.sum() / change.sum(): one image whose score hardly changes
    would dominate a mean of ratios.
    """

    missing: Float64[Tensor, " batch"]
    change: Float64[Tensor, " batch"]

    @property
    def ratio(self) -> Float64[Tensor, " batch"]:
        """The gap of each image by itself."""
        return self.missing / self.change


@torch.no_grad()
def completeness_gap(
    attributions: Float[Tensor, "batch *site active"],
    codes: SparseCodes,
    y_clean: Float[Tensor, " batch"],
    y_rest: Float[Tensor, " batch"],
) -> CompletenessGap:
    """How far the attributions are from adding up to the effect of all latents together.

        |sum_j R_j - (y(x) - y(rest))| / |y(x) - y(rest)|

    Reference: Sundararajan et al., 2017, completeness axiom.
    """
    explained = torch.where(codes.is_active, attributions, 0.0).double().flatten(1).sum(dim=1)
    change = y_clean.double() - y_rest.double()
    return CompletenessGap((explained - change).abs(), change.abs())


def _curve(
    score: Score,
    start: Float[Tensor, "batch *site model"],
    steps: SparseCodes,
    W_dec: Float[Tensor, "latent model"],
    order: Int[Tensor, "batch slot"],
    n_steps: int,
) -> Float[Tensor, "batch points"]:
    """Add values_s v_s to `start` slot by slot: one suffix call and one [batch, model] per step."""
    if not 1 <= n_steps <= order.shape[1]:
        raise ConfigError(
            f"curve with n_steps={n_steps}: codes have {order.shape[1]} slots per image, "
            f"allowed are 1 to {order.shape[1]} steps"
        )
    edited = start.clone(memory_format=torch.contiguous_format)
    positions = edited.view(start.shape[0], -1, start.shape[-1])
    images = torch.arange(start.shape[0], device=start.device)
    indices, values = steps.indices.flatten(1), steps.values.flatten(1)
    points = [clean_scores(score, edited)]
    for slot in order[:, :n_steps].unbind(dim=1):
        contribution = values[images, slot][:, None] * W_dec[indices[images, slot]]
        positions[images, slot // steps.values.shape[-1]] += contribution
        points.append(clean_scores(score, edited))
    return torch.stack(points, dim=1)
