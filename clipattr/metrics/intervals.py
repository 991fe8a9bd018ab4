"""Bootstrap intervals over images for means, ratios of means and paired differences of ratios.

Every statistic here is a function of column means, and all columns are resampled together: what is
paired per image stays paired.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from clipattr.errors import DataError

# Entries of the table of resampling counts that exist at a time (32 MB): memory, not the result.
_CHUNK_ENTRIES = 2**22


class Interval(NamedTuple):
    """A number and its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap_statistic(
    columns: Sequence[Float[Tensor, " images"]],
    statistic: Callable[..., Tensor],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Percentile interval, 2.5 to 97.5 %, of a function of column means.

    Images are drawn with replacement, all columns of an image together. `statistic` takes one
    tensor per column (its means) and works elementwise. Interval.mean is the statistic of the data
    itself, not the mean of the resamples. Reference: Efron and Tibshirani, 1993, chapter 13.
    """
    table = torch.stack([column.double() for column in columns], dim=1).to(generator.device)
    _refuse_unusable(table)
    point = statistic(*table.mean(dim=0))
    drawn = statistic(*resampled_means(table, resamples=resamples, generator=generator).unbind(1))
    n_undefined = int((~drawn.isfinite()).sum())
    if n_undefined or not point.isfinite():
        raise DataError(
            f"bootstrap: the statistic is {float(point)} on the data and not finite in "
            f"{n_undefined} of {resamples} resamples; the mean of a denominator may not be 0"
        )
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(point), low, high)


def bootstrap_mean(
    values: Float[Tensor, " images"], *, resamples: int, generator: torch.Generator
) -> Interval:
    """Interval of the mean over images."""
    return bootstrap_statistic(
        [values], lambda mean: mean, resamples=resamples, generator=generator
    )


def bootstrap_ratio(
    numerators: Float[Tensor, " images"],
    denominators: Float[Tensor, " images"],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Interval of mean(numerators) / mean(denominators), both from the same images."""
    return bootstrap_statistic(
        [numerators, denominators],
        lambda above, below: above / below,
        resamples=resamples,
        generator=generator,
    )


def bootstrap_positive_ratio(
    numerators: Float[Tensor, " images"],
    denominators: Float[Tensor, " images"],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """`bootstrap_ratio` of what means something only where it is divided by more than 0.

    nan where the mean of the denominators is not above 0. Its ends alone are nan where that of the
    data is, but that of a resample is not.
    """
    table = torch.stack([numerators.double(), denominators.double()], dim=1).to(generator.device)
    _refuse_unusable(table)
    above, below = table.mean(dim=0)
    if below <= 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    means = resampled_means(table, resamples=resamples, generator=generator)
    drawn = torch.where(means[:, 1] > 0, means[:, 0] / means[:, 1], torch.nan)
    low, high = torch.quantile(drawn, drawn.new_tensor([0.025, 0.975])).tolist()
    return Interval(float(above / below), low, high)


def bootstrap_ratio_difference(
    numerators_a: Float[Tensor, " images"],
    numerators_b: Float[Tensor, " images"],
    denominators: Float[Tensor, " images"],
    *,
    resamples: int,
    generator: torch.Generator,
) -> Interval:
    """Interval of (mean(a) - mean(b)) / mean(denominators), paired: the same images for a and b.

    Denominators are as in `bootstrap_positive_ratio`.
    """
    return bootstrap_positive_ratio(
        numerators_a.double() - numerators_b.double(),
        denominators,
        resamples=resamples,
        generator=generator,
    )


def resampled_means(
    table: Float64[Tensor, "images column"], *, resamples: int, generator: torch.Generator
) -> Float64[Tensor, "resamples column"]:
    """Means of every column over `resamples` draws of the images with replacement.

    A draw is kept as how often each image came up, so the means are one matrix product per chunk.
    """
    n_images = table.shape[0]
    chunk = max(1, _CHUNK_ENTRIES // n_images)
    means = []
    for start in range(0, resamples, chunk):
        n_draws = min(chunk, resamples - start)
        picks = torch.randint(
            n_images, (n_draws, n_images), generator=generator, device=generator.device
        )
        picks += n_images * torch.arange(n_draws, device=picks.device)[:, None]
        counts = torch.bincount(picks.flatten(), minlength=n_draws * n_images)
        means.append(counts.view(n_draws, n_images).double() @ table / n_images)
    return torch.cat(means)


def _refuse_unusable(table: Float64[Tensor, "images column"]) -> None:
    n_images = table.shape[0]
    if n_images < 2:
        raise DataError(f"bootstrap: {n_images} images; at least 2 are needed for an interval")
    n_bad = int((~table.isfinite()).any(dim=1).sum())
    if n_bad:
        raise DataError(
            f"bootstrap: {n_bad} of {n_images} images have a value that is nan or infinite; "
            "leave them out by name before, every value must be finite"
        )
