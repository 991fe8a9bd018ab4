"""Linear correlation over all pairs (image, slot) at once; its interval resamples whole images.

The slots of an image are not independent of each other, so images are drawn, not pairs. Of fewer
than two pairs, and of equal ones, there is no correlation: it is nan, and so are the ends of an
interval some of whose draws have none.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from clipattr.metrics.intervals import Interval, resampled_means


def pooled_pearson(
    estimate: Float[Tensor, "image slot"],
    truth: Float[Tensor, "image slot"],
    mask: Bool[Tensor, "image slot"],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Correlation of estimate and truth over the slots in the mask of all images."""
    return _interval(_sums(estimate, truth, mask), _correlation, resamples, generator)


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
    return _interval(
        columns,
        lambda *means: _correlation(*means[:6]) - _correlation(*means[6:]),
        resamples,
        generator,
    )


def _interval(
    columns: Sequence[Tensor],
    correlate: Callable[..., Tensor],
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    table = torch.stack(list(columns), dim=1).to(generator.device)
    drawn = correlate(*resampled_means(table, resamples=resamples, generator=generator).unbind(1))
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(correlate(*table.mean(dim=0))), low, high)


def _sums(estimate: Tensor, truth: Tensor, mask: Tensor) -> list[Float64[Tensor, " image"]]:
    """Of each image: how many slots, and the sums that a correlation is made of."""
    one, other = (_standardise(each.double(), mask) for each in (estimate, truth))
    products = (one, other, one.square(), other.square(), one * other)
    return [each.sum(dim=1) for each in (mask.double(), *products)]


def _standardise(values: Tensor, mask: Tensor) -> Tensor:
    # A correlation does not see it; sums of squares far from 0 would lose their digits.
    chosen = values[mask]
    centred = values - chosen.mean()
    scaled = centred / centred[mask].square().mean().sqrt()
    return torch.where(mask, scaled, 0.0)


def _correlation(*means: Tensor) -> Tensor:
    n, one, other, one_square, other_square, product = means
    covariance = product / n - one * other / n.square()
    variances = (one_square / n - (one / n).square()) * (other_square / n - (other / n).square())
    return covariance / variances.sqrt()
