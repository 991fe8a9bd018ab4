"""Group methods that weigh or draw the rows and fit by logistic regression as ever.

C is what it is in `solve_path`, that of a mean loss times the number of rows: weights have a mean
of 1, so that a C means the same penalty for every method.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.errors import DataError
from clipattr.probes.group_rows import Candidate, GroupRows, columns_of, predict, targets_of
from clipattr.probes.linear import LinearProbe
from clipattr.probes.logistic import Solution, solve_path
from clipattr.probes.objective import measure_moments

N_SUBSETS = 10
UPWEIGHTS = (5.0, 20.0, 50.0)
# Of the first models of just-train-twice, spread over the path of C.
_MOST_FIRST = 4


def fit_weighted(
    rows: GroupRows,
    n_classes: int,
    Cs: Sequence[float],
    *,
    weights: Float[Tensor, " row"] | None = None,
    standardise: bool = False,
) -> list[Solution]:
    """The path of C, each row counting its weight over their mean."""
    if weights is not None:
        weights = (weights / weights.double().mean()).float()
    path = solve_path(
        rows.features,
        targets_of(rows.labels, n_classes),
        Cs,
        n_classes=columns_of(n_classes),
        weights=weights,
        standardise=standardise,
    )
    return [one for (one,) in path]


def balance(groups: Int[Tensor, " row"]) -> Float[Tensor, " row"]:
    """1 / size of the row's group: what drawing groups alike does on average."""
    return 1 / torch.bincount(groups).double()[groups]


def fit_subsets(
    rows: GroupRows,
    groups: Int[Tensor, " row"],
    n_classes: int,
    Cs: Sequence[float],
    *,
    seed: int = 0,
) -> list[Candidate]:
    """Deep feature reweighting: the mean of fits on random subsets with as many of each group.

    Features are standardised by the moments of all rows first (Kirichenko et al., Last layer
    re-training is sufficient for robustness to spurious correlations, 2023).
    """
    moments = measure_moments(rows.features, torch.ones_like(groups, dtype=torch.float32))
    spread = moments.covariance.diagonal().sqrt()
    factor = torch.where(spread > 0, 1 / spread, 1)
    scaled = (rows.features.float() - moments.mean.float()) * factor.float()
    draw = torch.Generator().manual_seed(seed)
    paths: list[list[Solution]] = []
    for _ in range(N_SUBSETS):
        place = draw_balanced(groups, draw)
        paths.append(fit_weighted(GroupRows(scaled[place], rows.labels[place]), n_classes, Cs))
    n_each = float(torch.bincount(groups).min())
    return [
        Candidate(_average(fits, moments.mean, factor), {"rows of each group": n_each})
        for fits in zip(*paths, strict=True)
    ]


def draw_balanced(groups: Int[Tensor, " row"], generator: torch.Generator) -> Int[Tensor, " drawn"]:
    """Places of as many rows of each group as the smallest has, without replacement."""
    order = torch.randperm(len(groups), generator=generator).to(groups.device)
    n_each = int(torch.bincount(groups).min())
    drawn = [order[groups[order] == group][:n_each] for group in range(int(groups.max()) + 1)]
    return torch.cat(drawn).sort().values


def _average(
    fits: Sequence[Solution], shift: Float[Tensor, " feature"], factor: Float[Tensor, " feature"]
) -> Solution:
    """Mean weights and biases, for raw features."""
    weight = torch.stack([one.weight for one in fits]).mean(0) * factor
    return Solution(
        C=fits[0].C,
        weight=weight,
        bias=torch.stack([one.bias for one in fits]).mean(0) - weight @ shift,
        objective=sum(one.objective for one in fits) / len(fits),
        gap=max(one.gap for one in fits),
        n_iterations=max(one.n_iterations for one in fits),
        converged=all(one.converged for one in fits),
    )


def fit_twice(
    rows: GroupRows,
    n_classes: int,
    Cs: Sequence[float],
    *,
    upweights: Sequence[float] = UPWEIGHTS,
    standardise: bool = False,
    start: LinearProbe | None = None,
) -> list[Candidate]:
    """Just train twice: rows that a first model gets wrong count `upweight` times.

    The first model is `start`, or one of the path of C, whose strong penalties stand for the early
    stopping of Liu et al., Just train twice: improving group robustness without training group
    information, 2021. Rows need no groups.
    """
    candidates: list[Candidate] = []
    for first, is_wrong in _mistakes(rows, n_classes, Cs, standardise, start).items():
        found = {"wrong rows of the first model": float(is_wrong.sum())}
        if first is not None:
            found["C of the first model"] = first
        for upweight in upweights:
            weights = torch.where(is_wrong, upweight, 1.0)
            path = fit_weighted(rows, n_classes, Cs, weights=weights, standardise=standardise)
            candidates += [Candidate(one, {"upweight": upweight, **found}) for one in path]
    return candidates


def _mistakes(
    rows: GroupRows,
    n_classes: int,
    Cs: Sequence[float],
    standardise: bool,
    start: LinearProbe | None,
) -> dict[float | None, Tensor]:
    """Wrong rows of each first model by its C, each set of them once."""
    if start is not None:
        with torch.no_grad():
            predicted = start.to(rows.features.device)(rows.features.float()).argmax(dim=1)
        sets: dict[float | None, Tensor] = {None: predicted != rows.labels}
    else:
        path = fit_weighted(rows, n_classes, _spread(Cs), standardise=standardise)
        sets = {one.C: predict(one, rows.features) != rows.labels for one in path}
    kept: dict[float | None, Tensor] = {}
    for first, is_wrong in sets.items():
        if bool(is_wrong.any()) and not any(is_wrong.equal(other) for other in kept.values()):
            kept[first] = is_wrong
    if not kept:
        raise DataError(
            f"jtt: the first model gets all {len(rows.labels)} rows right, so none can be "
            "upweighted: give a smaller C"
        )
    return kept


def _spread(Cs: Sequence[float]) -> list[float]:
    """At most a few, from the strongest penalty on."""
    ordered = sorted(set(Cs))
    step = max(1, -(-len(ordered) // _MOST_FIRST))
    return ordered[::step]
