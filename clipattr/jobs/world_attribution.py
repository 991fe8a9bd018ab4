"""Where the methods differ: the parts of an attribution, and estimates beside the exact effect.

Over all pairs (image, active latent) of the faithfulness table, in closed form from cached rows.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.attribution import (
    LastLayerHead,
    LensParts,
    act_times_logit_lens,
    build_lens_table,
    lens_parts,
    logit_lens,
    logit_lens_table,
    read_edits,
)
from clipattr.metrics.intervals import Interval, bootstrap_mean, bootstrap_positive_ratio
from clipattr.metrics.pooled_correlation import pooled_pearson, pooled_pearson_difference
from clipattr.metrics.ranks import spearman
from clipattr.spliced import Spliced

# Both estimates of each pair are drawn: 1,500 points keep the page small and are enough to see.
PAIRS_DRAWN = 750
_ROWS_AT_A_TIME = 256
_UNDEFINED = Interval(float("nan"), float("nan"), float("nan"))


class Estimates(NamedTuple):
    """What every method says of every slot, and the truth."""

    is_active: Bool[Tensor, "image slot"]
    exact: Float64[Tensor, "image slot"]
    attribution_patching: Float64[Tensor, "image slot"]
    logit_lens: Float64[Tensor, "image slot"]
    act_times_logit_lens: Float64[Tensor, "image slot"]
    parts: LensParts


class Corrections(NamedTuple):
    """What separates attribution patching from the logit lens."""

    size: dict[str, Interval]
    """part -> mean |part| / mean |lens part|"""
    agreement: dict[str, Interval]
    """from logit lens to attribution patching step by step -> Spearman with exact patching"""
    gain: Interval
    """Spearman of attribution patching minus that of the lens part alone, images paired"""
    lens_part_pearson: Interval
    """of the lens part with attribution patching, over all pairs"""


class AgainstExact(NamedTuple):
    """Both estimates beside the exact effect, over all pairs; some are drawn."""

    n_images: int
    n_pairs: int
    pearson: dict[str, Interval]
    difference: Interval
    """of the two correlations, images paired"""
    lens_scale: float
    """of activation x logit lens, which has no unit: least squares through the origin"""
    drawn: Float64[Tensor, "drawn 3"]
    """exact effect, attribution patching, scaled activation x logit lens"""


@torch.no_grad()
def read_estimates(
    spliced: Spliced,
    x: Float[Tensor, "image model"],
    weights: Float[Tensor, "class embed"],
    targets: Int[Tensor, " image"],
) -> Estimates:
    """The estimates for the class of each image; padding is marked by `is_active`."""
    directions = spliced.sae.directions.detach()
    head = LastLayerHead(*spliced.cut.last_layer(), weights)
    table = build_lens_table(head, directions)
    lens = logit_lens_table(spliced.cut.read_directly, directions, weights)
    codes = spliced.sae.encode(x)
    found = []
    for rows in torch.arange(len(x), device=x.device).split(_ROWS_AT_A_TIME):
        of_rows = (x[rows], codes.select(rows), directions, targets[rows])
        edits = read_edits(head, table, *of_rows)
        parts = lens_parts(head, table, *of_rows)
        found.append((edits.exact_patching(), edits.attribution_patching(), *parts))
    exact, attribution, *parts = (torch.cat(each) for each in zip(*found, strict=True))
    return Estimates(
        codes.is_active,
        exact,
        attribution,
        logit_lens(lens, targets, codes).double(),
        act_times_logit_lens(lens, targets, codes).double(),
        LensParts(*(part.double() for part in parts)),
    )


def measure_corrections(estimates: Estimates, *, resamples: int, seed: int) -> Corrections:
    """How large the corrections to the lens part are, and what they are worth."""
    is_active, parts = estimates.is_active, estimates.parts
    sums = {
        name: torch.where(is_active, part.abs(), 0.0).sum(dim=1)
        for name, part in parts._asdict().items()
    }
    steps = {
        "logit_lens": estimates.logit_lens,
        "act_times_logit_lens": estimates.act_times_logit_lens,
        "lens_part": parts.lens,
        "without_along_embedding": parts.lens - parts.along_embedding,
        "attribution_patching": estimates.attribution_patching,
    }
    ranks = {name: spearman(step, estimates.exact, is_active) for name, step in steps.items()}
    lens = sums.pop("lens")
    options = {"resamples": resamples}
    return Corrections(
        size={
            name: bootstrap_positive_ratio(part, lens, **options, generator=_generator(seed, lens))
            for name, part in sums.items()
        },
        agreement={name: _mean(each, resamples, seed) for name, each in ranks.items()},
        gain=_mean(ranks["attribution_patching"] - ranks["lens_part"], resamples, seed),
        lens_part_pearson=pooled_pearson(
            parts.lens,
            estimates.attribution_patching,
            is_active,
            **options,
            generator=_generator(seed, lens),
        ),
    )


def compare_with_exact(estimates: Estimates, *, resamples: int, seed: int) -> AgainstExact:
    """The correlation of both estimates with the exact effect, and a sample of pairs to draw."""
    exact, is_active = estimates.exact, estimates.is_active
    attribution, lens = estimates.attribution_patching, estimates.act_times_logit_lens
    compared = {"attribution_patching": attribution, "act_times_logit_lens": lens}
    options = {"resamples": resamples}
    pairs = torch.stack([exact, attribution, lens], dim=-1)[is_active]
    scale = (pairs[:, 0] @ pairs[:, 2]) / pairs[:, 2].square().sum()
    drawn = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:PAIRS_DRAWN]
    return AgainstExact(
        n_images=len(exact),
        n_pairs=len(pairs),
        pearson={
            name: pooled_pearson(
                each, exact, is_active, **options, generator=_generator(seed, exact)
            )
            for name, each in compared.items()
        },
        difference=pooled_pearson_difference(
            attribution, lens, exact, is_active, **options, generator=_generator(seed, exact)
        ),
        lens_scale=float(scale),
        drawn=pairs[drawn.sort().values.to(pairs.device)] * pairs.new_tensor([1, 1, float(scale)]),
    )


def _mean(values: Tensor, resamples: int, seed: int) -> Interval:
    """Over the images where the number is defined."""
    defined = values[~values.isnan()]
    if len(defined) < 2:
        return _UNDEFINED
    return bootstrap_mean(defined, resamples=resamples, generator=_generator(seed, values))


def _generator(seed: int, values: Tensor) -> torch.Generator:
    return torch.Generator(values.device).manual_seed(seed)
