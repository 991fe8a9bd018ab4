"""Limited-memory BFGS with a preconditioner, written so that many problems share each evaluation.

A search is a generator: it yields a point and is sent the value and gradient there. `solve` runs
many of them side by side and asks for all their points at once, so that one pass over the data
serves every problem that has not ended (Nocedal and Wright, Numerical Optimization, chapters 3, 7).
"""

from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import NamedTuple

from jaxtyping import Float64
from torch import Tensor

# Conditions of Wolfe: how much of the promised decrease, and how flat it must have become.
_DECREASE, _CURVATURE = 1e-4, 0.9
# Values come from float32 products: differences below this share of the value are rounding.
_NOISE = 1e-8
_MAX_TRIALS = 20

Precondition = Callable[[Float64[Tensor, "..."]], Float64[Tensor, "..."]]
"""An approximate inverse Hessian times a gradient."""


class Evaluation(NamedTuple):
    """The function at a point."""

    value: float
    gradient: Float64[Tensor, "..."]


class Minimum(NamedTuple):
    """Where a search ended."""

    point: Float64[Tensor, "..."]
    value: float
    gap: float
    """estimate of value - minimum"""
    n_iterations: int
    converged: bool


Search = Generator[Tensor, Evaluation, Minimum]


class _Trial(NamedTuple):
    """A step along the direction, with value and slope there."""

    step: float
    value: float
    slope: float


class _Landing(NamedTuple):
    """Where a line search ended."""

    point: Tensor
    evaluation: Evaluation


def search(
    start: Float64[Tensor, "..."],
    precondition: Precondition,
    *,
    tol: float,
    max_iter: int,
    history: int = 20,
    reference: float = float("inf"),
) -> Search:
    """Minimise; ends when the estimated distance to the minimum is at most tol * value.

    The estimate is half the squared length of the gradient in the metric of the inverse Hessian
    that the search has learned: exact on a quadratic, and without a unit, as tol is. `reference` is
    the value of a model that knows nothing: what is gained on it counts where it is less.
    """
    point = start
    now = yield point
    pairs: deque[tuple[Tensor, Tensor, float]] = deque(maxlen=history)
    for n_iterations in range(max_iter):
        direction = -_inverse_hessian(now.gradient, pairs, precondition)
        slope = _dot(now.gradient, direction)
        if -slope / 2 <= _allowed(now.value, tol, reference):
            return Minimum(point, now.value, -slope / 2, n_iterations, True)
        landing = yield from _line_search(point, now, direction, slope)
        if landing is None:
            return Minimum(point, now.value, -slope / 2, n_iterations, False)
        moved = landing.point - point
        change = landing.evaluation.gradient - now.gradient
        point, now = landing
        bend = _dot(moved, change)
        if bend > 0:
            pairs.append((moved, change, bend))
    gap = _dot(now.gradient, _inverse_hessian(now.gradient, pairs, precondition)) / 2
    return Minimum(point, now.value, gap, max_iter, gap <= _allowed(now.value, tol, reference))


def solve(
    searches: Sequence[Search],
    evaluate: Callable[[Mapping[int, Tensor]], Mapping[int, Evaluation]],
) -> list[Minimum]:
    """Run searches side by side; `evaluate` gets the points of all that still run, by number."""
    minima: dict[int, Minimum] = {}
    points = {number: next(one) for number, one in enumerate(searches)}
    while points:
        waiting: dict[int, Tensor] = {}
        for number, evaluation in evaluate(points).items():
            try:
                waiting[number] = searches[number].send(evaluation)
            except StopIteration as end:
                minima[number] = end.value
        points = waiting
    return [minima[number] for number in range(len(searches))]


def _allowed(value: float, tol: float, reference: float) -> float:
    """Largest distance to the minimum at which to end; less than rounding is not asked for."""
    return max(tol * min(abs(value), reference - value), _NOISE * abs(value))


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum())


def _inverse_hessian(
    gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, float]], precondition: Precondition
) -> Tensor:
    """The two loops, around the preconditioner scaled to the latest curvature."""
    rest, shares = gradient, []
    for moved, change, bend in reversed(pairs):
        share = _dot(moved, rest) / bend
        shares.append(share)
        rest = rest - share * change
    result = precondition(rest)
    if pairs:
        _, change, bend = pairs[-1]
        result = result * (bend / _dot(change, precondition(change)))
    for (moved, change, bend), share in zip(pairs, reversed(shares), strict=True):
        result = result + (share - _dot(change, result) / bend) * moved
    return result


def _line_search(
    point: Tensor, now: Evaluation, direction: Tensor, slope: float
) -> Generator[Tensor, Evaluation, _Landing | None]:
    """A step that meets the strong conditions of Wolfe; None where rounding leaves none to find."""
    start = _Trial(0.0, now.value, slope)
    low, high = start, None
    step = 1.0
    for _ in range(_MAX_TRIALS):
        landing = _Landing(there := point + step * direction, (yield there))
        value, gradient = landing.evaluation
        trial = _Trial(step, value, _dot(gradient, direction))
        is_worse = _is_too_high(trial, start) or trial.value > low.value + _NOISE * abs(low.value)
        if not is_worse and abs(trial.slope) <= -_CURVATURE * slope:
            return landing
        if is_worse:
            high = trial
        else:
            outward = high is None or high.step > low.step
            if (trial.slope > 0) == outward:
                high = low
            low = trial
        step = 2 * step if high is None else _between(low, high)
    return None


def _is_too_high(trial: _Trial, start: _Trial) -> bool:
    """Not the promised decrease, by more than rounding explains; also nan and infinity."""
    allowed = start.value + _DECREASE * trial.step * start.slope + _NOISE * abs(start.value)
    return not trial.value <= allowed


def _between(low: _Trial, high: _Trial) -> float:
    """Minimum of the parabola through the value and slope at low and the value at high.

    Kept away from both ends, so that the bracket shrinks.
    """
    width = high.step - low.step
    rise = high.value - low.value - low.slope * width
    share = -low.slope * width / (2 * rise) if rise > 0 and rise < float("inf") else 0.5
    return low.step + min(max(share, 0.1), 0.9) * width
