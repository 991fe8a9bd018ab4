"""Logistic regression on cached features, for a whole path of C: full batch, L-BFGS.

    minimise  C sum_i s_i loss(W x_i + b, y_i) + |W|^2 / 2

scikit-learn's objective; the intercept is not penalised. Features stay float32 where they are;
curvature enters as a Kronecker product of two small matrices (the curvature of the loss by the
logits and the covariance of the features), which makes an iteration nearly a Newton step.
"""

import math
from collections.abc import Mapping, Sequence
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
    entropies,
    evaluate,
    kronecker,
    mean_curvature,
    measure_moments,
)

# Up to this many binary tasks are solved for all C at once: a pass is then bound by reading the
# features. Otherwise it is bound by arithmetic, and it pays to start from the solutions of the C
# before (benchmarks/probes.py).
_MOST_TASKS_TOGETHER = 8


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
    tol: float = 1e-5,
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
    n_columns = check_targets(len(features), targets, Cs, n_classes)
    s = check_weights(weights, features)
    rows, spectrum = prepare_rows(features, targets, s, n_columns, standardise)
    n_tasks = targets.shape[1] if targets.ndim == 2 else 1
    total = float(s.sum(dtype=torch.float64))
    ascending = sorted(set(Cs))
    problems = [Problem(1 / (C * total), task) for C in ascending for task in range(n_tasks)]
    if together is None:
        together = rows.is_binary and n_tasks <= _MOST_TASKS_TOGETHER
    solver = _Solver(rows, spectrum, problems, tol, max_iter)
    minima = solver.together() if together else solver.in_turn(n_tasks)
    solved = {
        C: [in_raw_units(minima[i * n_tasks + task], C, total, rows) for task in range(n_tasks)]
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
            starts = {i: self._ahead(minima[i % n_tasks :: n_tasks], i, n_tasks) for i in numbers}
            minima += self._solve({i: zero if at is None else at for i, at in starts.items()})
        return minima

    def _ahead(self, before: list[Minimum], number: int, n_tasks: int) -> Tensor | None:
        """The line through the last two solutions of a task, straight in log C."""
        if len(before) < 2:
            return before[-1].point if before else None
        older, last, ahead = (
            math.log(self.problems[number - i * n_tasks].ridge) for i in (2, 1, 0)
        )
        far = (ahead - last) / (last - older)
        return before[-1].point + far * (before[-1].point - before[-2].point)

    def _solve(self, starts: dict[int, Tensor]) -> list[Minimum]:
        numbers, references = list(starts), entropies(self.rows)
        curvatures = mean_curvature(self.rows, starts)
        searches = [
            search(
                starts[number],
                kronecker(curvatures[number], self.spectrum, self.problems[number].ridge),
                tol=self.tol,
                max_iter=self.max_iter,
                reference=references[self.problems[number].target],
            )
            for number in numbers
        ]
        problems = {i: self.problems[number] for i, number in enumerate(numbers)}

        def evaluate_all(points: Mapping[int, Tensor]) -> dict[int, Evaluation]:
            return evaluate(self.rows, problems, points)

        return solve(searches, evaluate_all)


def prepare_rows(
    features: Tensor, targets: Tensor, weights: Tensor, n_columns: int, standardise: bool
) -> tuple[Rows, Spectrum]:
    """Centred rows and the spectrum of their covariance."""
    moments = measure_moments(features, weights)
    if not bool(moments.covariance.isfinite().all()):
        raise DataError("features hold nan, infinity, or numbers whose squares overflow float32")
    spread = moments.covariance.diagonal().sqrt()
    # A feature that never varies says nothing, whatever its unit.
    factor = torch.where(spread > 0, 1 / spread, 1) if standardise else torch.ones_like(spread)
    values, vectors = torch.linalg.eigh(factor[:, None] * moments.covariance * factor)
    rows = Rows(features, targets, weights, moments.mean.float(), factor.float(), n_columns)
    return rows, Spectrum(values, vectors)


def in_raw_units(minimum: Minimum, C: float, total: float, rows: Rows) -> Solution:
    """Shift and factor folded into weight and bias."""
    weight = minimum.point[:, :-1] * rows.factor.double()
    bias = minimum.point[:, -1] - weight @ rows.shift.double()
    objective = C * total * minimum.value
    gap = minimum.gap / max(abs(minimum.value), 1e-300)
    return Solution(C, weight, bias, objective, gap, minimum.n_iterations, minimum.converged)


def check_targets(n_rows: int, targets: Tensor, Cs: Sequence[float], n_classes: int | None) -> int:
    """Columns of one problem; raises unless all of it makes sense."""
    if len(targets) != n_rows or n_rows == 0:
        raise DataError(f"{n_rows} rows of features and {len(targets)} of targets")
    if not Cs or not all(0 < C < float("inf") for C in Cs):
        raise ConfigError(f"Cs={list(Cs)}: at least one, each greater than 0 and finite")
    if targets.ndim == 2:
        if not bool(((targets == 0) | (targets == 1)).all()):
            raise DataError("targets of binary tasks: each must be 0 or 1")
        return 1
    if n_classes is None or n_classes < 3:
        raise ConfigError(f"n_classes={n_classes}: two classes are a binary task, targets [row, 1]")
    if not bool(((targets >= 0) & (targets < n_classes)).all()):
        raise DataError(f"class numbers must lie between 0 and {n_classes - 1}")
    return n_classes


def check_weights(weights: Tensor | None, rows: Tensor) -> Float[Tensor, " row"]:
    """Of the rows, in float32; 1 unless given."""
    s = rows.new_ones(len(rows)) if weights is None else weights
    if len(s) != len(rows) or not bool((s >= 0).all()) or not float(s.sum()) > 0:
        raise DataError("weights of rows: one for each row, none negative, not all 0")
    return s.float()
