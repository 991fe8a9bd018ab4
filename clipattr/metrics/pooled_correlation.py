"""Linear correlation over all pairs (image, slot) at once; its interval resamples whole images.

The slots of an image are not independent of each other, so images are drawn, not pairs.
"""

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from clipattr.metrics.intervals import Interval, bootstrap_statistic


def pooled_pearson(
    estimate: Float[Tensor, "image slot"],
    truth: Float[Tensor, "image slot"],
    mask: Bool[Tensor, "image slot"],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Correlation of estimate and truth over the slots in the mask of all images."""
    return bootstrap_statistic(
        _sums(estimate, truth, mask), _correlation, resamples=resamples, generator=generator
    )


def pooled_pearson_difference(
    one: Float[Tensor, "image slot"],
    other: Float[Tensor, "image slot"],
    truth: Float[Tensor, "image slot"],
    mask: Bool[Tensor, "image slot"],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Correlation of `one` with the truth minus that of `other`, the same images drawn for both."""
    columns = [*_sums(one, truth, mask), *_sums(other, truth, mask)]
    return bootstrap_statistic(
        columns,
        lambda *means: _correlation(*means[:6]) - _correlation(*means[6:]),
        resamples=resamples,
        generator=generator,
    )


def _sums(estimate: Tensor, truth: Tensor, mask: Tensor) -> list[Float64[Tensor, " image"]]:
    """Of each image: how many slots, and the sums that a correlation is made of."""
    one, other = (_standardise(each.double(), mask) for each in (estimate, truth))
    products = (one, other, one.square(), other.square(), one * other)
    return [each.sum(dim=1) for each in (mask.double(), *products)]


def _standardise(values: Tensor, mask: Tensor) -> Tensor:
    # A correlation does not see it; sums of squares far from 0 would lose their digits.
    chosen = values[mask]
    scaled = (values - chosen.mean()) / chosen.std(correction=0)
    return torch.where(mask, scaled, 0.0)


def _correlation(*means: Tensor) -> Tensor:
    n, one, other, one_square, other_square, product = means
    covariance = product / n - one * other / n.square()
    variances = (one_square / n - (one / n).square()) * (other_square / n - (other / n).square())
    return covariance / variances.sqrt()
