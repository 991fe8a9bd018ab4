"""Logistic regression on cached features, for a whole path of C: full batch, L-BFGS.

    minimise  C sum_i s_i loss(W x_i + b, y_i) + |W|^2 / 2

scikit-learn's objective; the intercept is not penalised. Features stay float32 where they are;
curvature enters as a Kronecker product of two small matrices (the curvature of the loss by the
logits and the covariance of the features), which makes an iteration nearly a Newton step.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clipattr.errors import ConfigError, DataError
from clipattr.probes.lbfgs import Evaluation, Minimum, search, solve
from clipattr.probes.objective import (
    Problem,
    Rows,
    Spectrum,
    evaluate,
    kronecker,
    mean_curvature,
    measure_moments,
)

# With fewer columns than this a pass is bound by reading the features, which all C can share;
# with more, by arithmetic, and then it pays to start from the solution of the C before
# (benchmarks/probes.py).
_TOGETHER_BELOW = 16


class Solution(NamedTuple):
    """The minimum for one C, in units of the features as they came."""

    C: float
    weight: Float64[Tensor, "column feature"]
    bias: Float64[Tensor, " column"]
    objective: float
    """C sum_i s_i loss_i + |W|^2 / 2, the penalty on the weights that were penalised"""
    gap: float
    """estimate of objective - minimum, relative to the objective"""
    n_iterations: int
    converged: bool


def solve_path(
    features: Float[Tensor, "row feature"],
    targets: Int[Tensor, " row"] | Float[Tensor, "row task"],
    Cs: Sequence[float],
    *,
    n_classes: int | None = None,
    weights: Float[Tensor, " row"] | None = None,
    standardise: bool = False,
    tol: float = 1e-6,
    max_iter: int = 1000,
    together: bool | None = None,
) -> list[list[Solution]]:
    """For each C, in the order given, its solutions: one, or one for each binary task.

    Args:
        features: any floating type and device.
        targets: class numbers, or 0 and 1 for each of several independent binary tasks.
        Cs: inverse strengths of the penalty.
        n_classes: of class numbers; at least 3, two classes are a binary task.
        weights: what each row counts; 1 unless given.
        standardise: penalise the weights of features of unit variance (then given in raw units).
        tol: largest estimated distance to the minimum, as a share of the objective.
        max_iter: iterations for each C.
        together: all C in each pass over the features, or one after the other, each from the
            solution before; unless given, what is faster.
    """
    _check(features, targets, Cs, n_classes)
    s = features.new_ones(len(features), dtype=torch.float32) if weights is None else weights
    if len(s) != len(features) or not bool((s >= 0).all()) or not float(s.sum()) > 0:
        raise DataError("weights of rows: one for each row, none negative, not all 0")
    rows, spectrum = _prepare(features, targets, s.float(), n_classes, standardise)
    n_tasks = targets.shape[1] if targets.ndim == 2 else 1
    total = float(s.sum(dtype=torch.float64))
    ascending = sorted(set(Cs))
    problems = [Problem(1 / (C * total), task) for C in ascending for task in range(n_tasks)]
    if together is None:
        together = rows.n_columns * n_tasks < _TOGETHER_BELOW
    solver = _Solver(rows, spectrum, problems, tol, max_iter)
    minima = solver.together() if together else solver.in_turn(n_tasks)
    solved = {
        C: [_raw(minima[i * n_tasks + task], C, total, rows) for task in range(n_tasks)]
        for i, C in enumerate(ascending)
    }
    return [solved[C] for C in Cs]


class _Solver(NamedTuple):
    """What all problems share."""

    rows: Rows
    spectrum: Spectrum
    problems: list[Problem]
    tol: float
    max_iter: int

    def together(self) -> list[Minimum]:
        """All problems from zero, in the same passes."""
        zero = self.spectrum.values.new_zeros(self.rows.n_columns, len(self.spectrum.values) + 1)
        return self._solve(dict.fromkeys(range(len(self.problems)), zero))

    def in_turn(self, n_tasks: int) -> list[Minimum]:
        """C after C, ascending: the first from zero, each other from where the path leads."""
        zero = self.spectrum.values.new_zeros(self.rows.n_columns, len(self.spectrum.values) + 1)
        minima: list[Minimum] = []
        for first in range(0, len(self.problems), n_tasks):
            numbers = range(first, first + n_tasks)
            before = [minima[i - n_tasks].point if i >= n_tasks else zero for i in numbers]
            minima += self._solve(dict(zip(numbers, before, strict=True)))
        return minima

    def _solve(self, starts: dict[int, Tensor]) -> list[Minimum]:
        numbers = list(starts)
        curvatures = mean_curvature(self.rows, starts)
        searches = [
            search(
                starts[number],
                kronecker(curvatures[number], self.spectrum, self.problems[number].ridge),
                tol=self.tol,
                max_iter=self.max_iter,
            )
            for number in numbers
        ]
        problems = {i: self.problems[number] for i, number in enumerate(numbers)}

        def evaluate_all(points: dict[int, Tensor]) -> dict[int, Evaluation]:
            return evaluate(self.rows, problems, points)

        return solve(searches, evaluate_all)


def _prepare(
    features: Tensor, targets: Tensor, weights: Tensor, n_classes: int | None, standardise: bool
) -> tuple[Rows, Spectrum]:
    """Centred rows and the spectrum of their covariance."""
    moments = measure_moments(features, weights)
    if not bool(moments.covariance.isfinite().all()):
        raise DataError("features hold nan, infinity, or numbers whose squares overflow float32")
    spread = moments.covariance.diagonal().sqrt()
    # A feature that never varies says nothing, whatever its unit.
    factor = torch.where(spread > 0, 1 / spread, 1) if standardise else torch.ones_like(spread)
    values, vectors = torch.linalg.eigh(factor[:, None] * moments.covariance * factor)
    n_columns = 1 if targets.ndim == 2 else n_classes
    assert n_columns is not None, "_check"
    rows = Rows(features, targets, weights, moments.mean.float(), factor.float(), n_columns)
    return rows, Spectrum(values, vectors)


def _raw(minimum: Minimum, C: float, total: float, rows: Rows) -> Solution:
    """Shift and factor folded into weight and bias."""
    weight = minimum.point[:, :-1] * rows.factor.double()
    bias = minimum.point[:, -1] - weight @ rows.shift.double()
    objective = C * total * minimum.value
    gap = minimum.gap / max(abs(minimum.value), 1e-300)
    return Solution(C, weight, bias, objective, gap, minimum.n_iterations, minimum.converged)


def _check(features: Tensor, targets: Tensor, Cs: Sequence[float], n_classes: int | None) -> None:
    if len(targets) != len(features) or len(features) == 0:
        raise DataError(f"{len(features)} rows of features and {len(targets)} of targets")
    if not Cs or not all(0 < C < float("inf") for C in Cs):
        raise ConfigError(f"Cs={list(Cs)}: at least one, each greater than 0 and finite")
    if targets.ndim == 2:
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError("targets of binary tasks: each must be 0 or 1")
        return
    if n_classes is None or n_classes < 3:
        raise ConfigError(f"n_classes={n_classes}: two classes are a binary task, targets [row, 1]")
    if not bool(((targets >= 0) & (targets < n_classes)).all()):
        raise DataError(f"class numbers must lie between 0 and {n_classes - 1}")
