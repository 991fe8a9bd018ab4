"""From numbers of images to a faithfulness table: intervals, paired differences, class means."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from clipattr.config.choices import Method
from clipattr.errors import ConfigError, DataError
from clipattr.metrics.intervals import (
    Interval,
    bootstrap_mean,
    bootstrap_positive_ratio,
    bootstrap_ratio_difference,
)
from clipattr.metrics.matrix_sum import MatrixSum

AREAS = ("deletion", "insertion")
AGREEMENTS = ("spearman", "pearson", "overlap")
COLUMNS = (*AREAS, *AGREEMENTS, "missing")
IN_UNITS = (Method.attribution_patching, Method.integrated_gradients, Method.exact)
"""methods with attributions in units of the score, which can add up to a change of it"""
_UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


class Faithfulness(NamedTuple):
    """Result of one method; nan is what is not defined.

    An AUC is not where the clean scores do not add up to more than 0, because its order of methods
    would be the wrong way round; a drop, a gain and a gap are not where no latent changes a score.
    """

    deletion_curve: list[float]
    insertion_curve: list[float]
    deletion_error: list[float]
    """standard error of the mean over images, at each step"""
    insertion_error: list[float]
    deletion_auc: Interval
    insertion_auc: Interval
    deletion_drop: Interval
    """fall of the score, on average over the deletion curve, over the change by all latents"""
    insertion_gain: Interval
    """the same of its rise over the insertion curve, from the rest"""
    spearman_exact: Interval
    pearson_exact: Interval
    overlap_exact: Interval
    n_undefined: int
    """images without a rank agreement: too few active latents"""
    completeness: Interval | None
    """share of the change of the score that the sum of the attributions misses; None: no units"""
    minus_logit_lens: Interval | None
    """of the deletion AUC, images paired; None of logit lens itself"""
    differences: dict[str, Interval]
    """the same of every column, by name; empty of logit lens itself"""


class Unrestricted(NamedTuple):
    """Logit lens ranked over all latents: it deletes mostly what did not fire. No baseline."""

    deletion_auc: Interval
    insertion_auc: Interval


class _Bootstrap(NamedTuple):
    """One seed for all: every method is resampled with the same images."""

    resamples: int
    seed: int

    def _generator(self, values: Tensor) -> torch.Generator:
        return torch.Generator(values.device).manual_seed(self.seed)

    def mean(self, values: Tensor) -> Interval:
        """Over the images where the number is defined."""
        defined = values[~values.isnan()]
        if len(defined) < 2:
            return _UNDEFINED
        generator = self._generator(values)
        return bootstrap_mean(defined, resamples=self.resamples, generator=generator)

    def ratio(self, above: Tensor, below: Tensor) -> Interval:
        """Sums first; nan where they are divided by nothing above 0."""
        generator = self._generator(below)
        return bootstrap_positive_ratio(above, below, resamples=self.resamples, generator=generator)

    def difference(self, one: Tensor, other: Tensor, below: Tensor) -> Interval:
        """Of two such ratios, paired."""
        generator = self._generator(below)
        return bootstrap_ratio_difference(
            one, other, below, resamples=self.resamples, generator=generator
        )


def check_methods(methods: Collection[Method]) -> None:
    """ConfigError without the one that all are compared with."""
    if Method.logit_lens not in methods:
        found = ", ".join(method.name for method in methods) or "none"
        raise ConfigError(
            f"methods ({found}): logit_lens must be among them, which the others are compared with"
        )


def check_targets(targets: Int[Tensor, " images"], n_classes: int) -> None:
    """ConfigError for a class that the head does not have."""
    outside = targets[(targets < 0) | (targets >= n_classes)]
    if len(outside):
        raise ConfigError(
            f"targets: {int(outside[0])} is no class of the head, whose {n_classes} rows are the "
            f"classes 0 to {n_classes - 1}"
        )


def check_images(n_images: int, least: int) -> None:
    """DataError for a table of too few images."""
    if n_images < least:
        raise DataError(
            f"faithfulness: {n_images} images were measured, at least {least} are needed; they are "
            "the rows of the batches that are below the number of targets"
        )


def summarise(
    method: Method,
    table: Float64[Tensor, "images column"],
    reference: Float64[Tensor, "images column"],
    scores: Float64[Tensor, "images 2"],
    curves: MatrixSum,
    *,
    resamples: int,
    seed: int,
) -> Faithfulness:
    """One method, beside the table of logit lens, the clean score and its drop to the rest."""
    draw = _Bootstrap(resamples, seed)
    by_name = dict(zip(COLUMNS, table.T, strict=True))
    clean, drop = scores.T
    change = drop.abs()
    means, squares = curves.compute().split(2)
    # Rounding may leave a variance of zero a little below it.
    errors = ((squares - means.square()).clamp(min=0) / len(table)).sqrt()
    differences = {}
    if method is not Method.logit_lens:
        differences = _differences(draw, table, reference, clean, change)
    defined = ~(by_name["spearman"].isnan() | by_name["overlap"].isnan())
    has_units = method in IN_UNITS
    return Faithfulness(
        deletion_curve=means[0].tolist(),
        insertion_curve=means[1].tolist(),
        deletion_error=errors[0].tolist(),
        insertion_error=errors[1].tolist(),
        deletion_auc=draw.ratio(by_name["deletion"], clean),
        insertion_auc=draw.ratio(by_name["insertion"], clean),
        deletion_drop=draw.ratio(clean - by_name["deletion"], change),
        insertion_gain=draw.ratio(by_name["insertion"] - (clean - drop), change),
        spearman_exact=draw.mean(by_name["spearman"]),
        pearson_exact=draw.mean(by_name["pearson"]),
        overlap_exact=draw.mean(by_name["overlap"]),
        n_undefined=int((~defined).sum()),
        completeness=draw.ratio(by_name["missing"], change) if has_units else None,
        minus_logit_lens=differences.get("deletion_auc"),
        differences=differences,
    )


def summarise_areas(
    areas: Float64[Tensor, "images 2"],
    clean: Float64[Tensor, " images"],
    *,
    resamples: int,
    seed: int,
) -> tuple[Interval, Interval]:
    """Deletion and insertion."""
    draw = _Bootstrap(resamples, seed)
    return draw.ratio(areas[:, 0], clean), draw.ratio(areas[:, 1], clean)


def summarise_difference(
    one: Float64[Tensor, " images"],
    other: Float64[Tensor, " images"],
    clean: Float64[Tensor, " images"],
    *,
    resamples: int,
    seed: int,
) -> Interval:
    """Area of one curve minus that of another, images paired."""
    return _Bootstrap(resamples, seed).difference(one, other, clean)


def summarise_unrestricted(
    areas: Float64[Tensor, "images 2"],
    scores: Float64[Tensor, "images 2"],
    *,
    resamples: int,
    seed: int,
) -> Unrestricted:
    """Its two areas."""
    return Unrestricted(*summarise_areas(areas, scores[:, 0], resamples=resamples, seed=seed))


def mean_by_class(
    table: Float64[Tensor, "images column"],
    scores: Float64[Tensor, "images 2"],
    classes: Int[Tensor, " images"],
) -> dict[int, dict[str, float | int]]:
    """The same numbers without intervals, of the images of each class that has any.

    The areas are nan where the clean scores of the class do not add up to more than 0.
    """
    found: dict[int, dict[str, float | int]] = {}
    for number in classes.unique().tolist():
        rows, clean = table[classes == number], scores[classes == number, 0]
        below = clean.sum()
        areas = torch.where(below > 0, rows[:, : len(AREAS)].sum(dim=0) / below, torch.nan)
        agreements = rows[:, len(AREAS) : len(AREAS) + len(AGREEMENTS)].nanmean(dim=0)
        names = (*(f"{name}_auc" for name in AREAS), *(f"{name}_exact" for name in AGREEMENTS))
        numbers = dict(zip(names, torch.cat([areas, agreements]).tolist(), strict=True))
        found[number] = {"images": len(rows), **numbers}
    return found


def _differences(
    draw: _Bootstrap, table: Tensor, reference: Tensor, clean: Tensor, change: Tensor
) -> dict[str, Interval]:
    """This method minus logit lens."""
    found = {
        f"{name}_auc": draw.difference(table[:, number], reference[:, number], clean)
        for number, name in enumerate(AREAS)
    }
    found["deletion_drop"] = draw.difference(reference[:, 0], table[:, 0], change)
    found["insertion_gain"] = draw.difference(table[:, 1], reference[:, 1], change)
    for number, name in enumerate(AGREEMENTS, start=len(AREAS)):
        found[f"{name}_exact"] = draw.mean(table[:, number] - reference[:, number])
    return found
