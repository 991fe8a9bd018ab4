"""Group distributionally robust logistic regression, to its exact solution.

    minimise over w  the maximum over groups g of L_g(w), + ridge / 2 |W|^2

with L_g the mean loss of group g (Sagawa et al., Distributionally robust neural networks for group
shifts, 2020) and ridge = 1 / (C rows), as for a plain mean of losses. The maximum is one over
weights q of the groups, and the game of w against q is convex against concave.

Each round takes an implicit step of exponentiated gradient on q (a proximal point in relative
entropy): it minimises  tau log sum_g q_g exp(L_g / tau) + ridge / 2 |W|^2  by L-BFGS, from where
the last round ended, and the minimum's own weights q_g exp(L_g / tau) / sum become the next q. They
are the ones to which w is the best answer, so max_g L_g - sum_g q_g L_g is how far w is from the
solution. tau falls from round to round: a smaller one is a longer step and a harder problem.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int
from torch import Tensor

from clipattr.probes.group_rows import Candidate, GroupRows, columns_of, targets_of
from clipattr.probes.lbfgs import Evaluation, Minimum, Precondition, search, solve
from clipattr.probes.logistic import check_targets, in_raw_units, prepare_rows
from clipattr.probes.objective import (
    Problem,
    Rows,
    Spectrum,
    evaluate,
    kronecker,
    mean_curvature,
)

# tau as a share of the mean curvature of the groups' losses: where it starts, what it is multiplied
# by after each round, and where a smaller one would lose changes of q in the rounding of float32.
_FIRST_SHARE, _FALL, _LEAST_SHARE = 0.25, 0.4, 1e-3
# Of the gap before a round: the error in the losses with which it may end.
_ERROR = 0.3
# Logarithm of the weight from which a group can come back within a few rounds.
_LEAST = -14.0


class _Losses(NamedTuple):
    """Mean loss of each group at a point, and its gradient."""

    values: Float64[Tensor, " group"]
    gradients: Float64[Tensor, "group column feature"]


class _Position(NamedTuple):
    """Weights of the probe [column, feature + 1], and logarithms of those of the groups."""

    point: Float64[Tensor, "column feature"]
    log_q: Float64[Tensor, " group"]


class _Game:
    """Losses of all groups at any point; those of the last point are kept."""

    def __init__(self, groups: Sequence[Rows], spectrum: Spectrum, ridge: float) -> None:
        self.groups = groups
        self.spectrum = spectrum
        self.ridge = ridge
        self.n_passes = 0
        self._last: tuple[Tensor, _Losses] | None = None

    def losses(self, point: Float64[Tensor, "column feature"]) -> _Losses:
        """One pass over all rows."""
        if self._last is None or self._last[0] is not point:
            found = [evaluate(rows, {0: Problem(0.0)}, {0: point})[0] for rows in self.groups]
            values = point.new_tensor([one.value for one in found])
            self._last = point, _Losses(values, torch.stack([one.gradient for one in found]))
            self.n_passes += 1
        return self._last[1]

    def penalty(self, point: Float64[Tensor, "column feature"]) -> float:
        """Of the weights; the bias has none."""
        return self.ridge / 2 * float(point[:, :-1].square().sum())

    def slope(self, point: Tensor, q: Float64[Tensor, " group"]) -> Tensor:
        """Gradient of sum_g q_g L_g + penalty."""
        result = torch.einsum("g,gcf->cf", q, self.losses(point).gradients)
        result[:, :-1] += self.ridge * point[:, :-1]
        return result

    def inverse(self, point: Tensor, q: Float64[Tensor, " group"]) -> Precondition:
        """Of the Hessian of sum_g q_g L_g + penalty, nearly."""
        curvatures = torch.stack([mean_curvature(rows, {0: point})[0] for rows in self.groups])
        curvature = torch.einsum("g,gcd->cd", q, curvatures)
        return kronecker(curvature, self.spectrum, self.ridge)


def fit_group_dro(
    rows: GroupRows,
    groups: Int[Tensor, " row"],
    n_classes: int,
    Cs: Sequence[float],
    *,
    standardise: bool = False,
    tol: float = 1e-4,
    max_rounds: int = 60,
) -> list[Candidate]:
    """The solution for each C, ascending, each from that of the C before; none may be empty.

    The features are copied, sorted by group. `gap` of a solution is that of the game, as a share
    of the objective, plus the estimate of how far the probe is from the best answer to the weights
    of the groups, which are told as details.
    """
    features, labels, _ = rows
    targets = targets_of(labels, n_classes)
    n_columns = check_targets(len(features), targets, Cs, columns_of(n_classes))
    ones = torch.ones(len(features), device=features.device)
    whole, spectrum = prepare_rows(features, targets, ones, n_columns, standardise)
    parts = [_part(whole, groups == group) for group in range(int(groups.max()) + 1)]
    at = _Position(
        spectrum.values.new_zeros(n_columns, features.shape[1] + 1),
        spectrum.values.new_zeros(len(parts)),
    )
    candidates: list[Candidate] = []
    for C in sorted(set(Cs)):
        game = _Game(parts, spectrum, 1 / (C * len(features)))
        at, minimum = _solve(game, at, tol, max_rounds)
        q = at.log_q.softmax(0).tolist()
        found = {f"weight of group {group}": share for group, share in enumerate(q)}
        candidates.append(Candidate(in_raw_units(minimum, C, float(len(features)), whole), found))
    return candidates


def _part(rows: Rows, is_in: Tensor) -> Rows:
    return replace(
        rows,
        features=rows.features[is_in],
        targets=rows.targets[is_in],
        weights=rows.weights[is_in],
    )


def _solve(game: _Game, at: _Position, tol: float, max_rounds: int) -> tuple[_Position, Minimum]:
    share = _FIRST_SHARE
    value, gap = _measure(game, at)
    best = at, value, gap
    for _ in range(max_rounds):
        if gap <= tol * value:
            break
        at = _step(game, at, share, _ERROR * gap)
        value, gap = _measure(game, at)
        share = max(share * _FALL, _LEAST_SHARE)
        if gap < best[2]:
            best = at, value, gap
    at, value, gap = best
    return at, Minimum(at.point, value, gap, game.n_passes, gap <= tol * value)


def _measure(game: _Game, at: _Position) -> tuple[float, float]:
    """Objective, and how far it is above the solution."""
    values, q = game.losses(at.point).values, at.log_q.softmax(0)
    slope = game.slope(at.point, q)
    off = float((slope * game.inverse(at.point, q)(slope)).sum()) / 2
    worst = float(values.max())
    return worst + game.penalty(at.point), worst - float(q @ values) + off


def _step(game: _Game, at: _Position, share: float, error: float) -> _Position:
    """An implicit step of q, to a point whose losses are off by about `error`."""
    losses, log_q = game.losses(at.point), at.log_q.clamp(min=_LEAST).log_softmax(0)
    metric = _measure_game(game.inverse(at.point, log_q.exp()), losses.gradients, log_q.exp())
    # Nothing to choose between: any step ends it.
    scale = metric.scale if metric.scale > 0 else float(losses.values.max())
    tau = share * scale

    def evaluate_all(points: Mapping[int, Tensor]) -> dict[int, Evaluation]:
        return {number: _smooth(game, point, log_q, tau) for number, point in points.items()}

    # Losses answer to a distance e from the minimum by sqrt(2 e reach) at most; the smooth function
    # is steeper than the game by up to 1 + 1 / share.
    allowed = min(error, error**2 / (2 * max(metric.reach, 1e-300))) / (1 + 1 / share)
    tol = allowed / float(losses.values.max())
    one = search(at.point, metric.precondition(tau), tol=tol, max_iter=200)
    (minimum,) = solve([one], evaluate_all)
    return _Position(minimum.point, _respond(game, minimum.point, log_q, tau))


def _respond(game: _Game, point: Tensor, log_q: Tensor, tau: float) -> Tensor:
    return (log_q + game.losses(point).values / tau).log_softmax(0)


def _smooth(game: _Game, point: Tensor, log_q: Tensor, tau: float) -> Evaluation:
    """The value tau log sum_g q_g exp(L_g / tau) + penalty."""
    values = game.losses(point).values
    smooth = tau * float(torch.logsumexp(log_q + values / tau, 0))
    q = _respond(game, point, log_q, tau).softmax(0)
    return Evaluation(smooth + game.penalty(point), game.slope(point, q))


class _Metric(NamedTuple):
    """How the losses of groups answer to each other: G K^-1 G of their gradients, weighed by q."""

    inverse: Precondition
    scale: float
    """mean curvature of the groups' losses, however little they count"""
    reach: float
    """the largest of these curvatures"""
    solved: Float64[Tensor, "group column feature"]
    product: Float64[Tensor, "group group"]

    def precondition(self, tau: float) -> Precondition:
        """K plus the covariance of the gradients over tau, inverted (Woodbury)."""
        small = self.product + tau * torch.eye(len(self.product)).to(self.product)

        def apply(gradient: Float64[Tensor, "column feature"]) -> Float64[Tensor, "column feature"]:
            known = torch.einsum("gcf,cf->g", self.solved, gradient)
            shares = torch.linalg.solve(small, known)
            return self.inverse(gradient) - torch.einsum("g,gcf->cf", shares, self.solved)

        return apply


def _measure_game(
    inverse: Precondition,
    gradients: Float64[Tensor, "group column feature"],
    q: Float64[Tensor, " group"],
) -> _Metric:
    centred = gradients - torch.einsum("g,gcf->cf", q, gradients)
    solved = torch.stack([inverse(one) for one in centred])
    product = torch.einsum("gcf,hcf->gh", centred, solved)
    roots = q.sqrt()
    return _Metric(
        inverse,
        float(product.diagonal().mean()),
        float(product.diagonal().max()),
        roots[:, None, None] * solved,
        roots[:, None] * product * roots,
    )
