"""Sparse linear probes on the codes of an SAE: a path of L1 penalties, never densified.

    minimise  C sum_i s_i loss(W a_i + b, y_i) + |W|_1

scikit-learn's objective with penalty="l1" and solver="saga"; the intercept is not penalised.
Proximal gradient steps with momentum and restarts (Beck and Teboulle 2009, O'Donoghue and Candes
2015) in a diagonal metric: a latent that seldom fires takes larger steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipattr.codes import SparseCodes, Transposed, equal_bags, rows_of_bags, transpose
from clipattr.errors import DataError
from clipattr.probes.logistic import check_targets, check_weights
from clipattr.probes.objective import loss_and_residual

# Of the bound on the curvature, where steps begin: it is far above what most directions have.
_FIRST_SCALE = 1 / 64
# Slope of the penalty beyond which the bias is held to this: its gradient is a share of the rows.
_MOST_OF_BIAS = 0.1
# Losses are sums of float32: smaller differences are rounding.
_NOISE = 1e-7


class SparseProbe(nn.Module):
    """logits = W a + b of codes a; most of W is 0 after a path."""

    def __init__(self, n_latents: int, n_classes: int) -> None:
        """Every class has the same logit."""
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_classes, n_latents))
        self.bias = nn.Parameter(torch.zeros(n_classes))

    def forward(self, codes: SparseCodes) -> Float[Tensor, "*rows class"]:
        """Logits; the cost is that of the active latents."""
        return codes.decode(self.weight.T) + self.bias

    @property
    def latents(self) -> Int[Tensor, " used"]:
        """Those that any class reads."""
        return (self.weight != 0).any(dim=0).nonzero().squeeze(1)


class SparseSolution(NamedTuple):
    """The minimum for one C."""

    C: float
    weight: Float[Tensor, "column latent"]
    bias: Float[Tensor, " column"]
    objective: float
    violation: float
    """of the conditions of the minimum, as a share of the slope of the penalty: the objective is
    at most about twice that share above its minimum"""
    n_iterations: int
    converged: bool

    def to_probe(self) -> SparseProbe:
        """As a module; of one column (two classes) half the logit for each class."""
        weight, bias = self.weight, self.bias
        if len(weight) == 1:
            weight, bias = torch.cat([-weight, weight]) / 2, torch.cat([-bias, bias]) / 2
        probe = SparseProbe(weight.shape[1], len(weight))
        probe.load_state_dict({"weight": weight, "bias": bias})
        return probe


class _Point(NamedTuple):
    """W transposed, of which the products gather rows, and b."""

    weight: Float[Tensor, "latent column"]
    bias: Float[Tensor, " column"]

    def size(self) -> float:
        """|W|_1."""
        return float(self.weight.abs().sum(dtype=torch.float64))


class _Problem(NamedTuple):
    """Everything but C; the loss is a mean, so that steps do not depend on the number of rows.

    `metric` is a curvature along each latent, and along the bias, that the loss never exceeds.
    """

    codes: SparseCodes
    by_latent: Transposed
    targets: Tensor
    weights: Float[Tensor, " row"]
    total: float
    metric: _Point

    def loss(self, at: _Point) -> tuple[float, _Point]:
        """Mean loss and its gradient."""
        loss, residual = self._loss(at)
        return loss, _Point(
            self.by_latent.combine(self.codes.values.flatten(), residual), residual.sum(0)
        )

    def _loss(self, at: _Point) -> tuple[float, Tensor]:
        logits = self.codes.decode(at.weight) + at.bias
        loss, residual = loss_and_residual(logits[:, None], self.targets, self.weights)
        return float(loss) / self.total, residual.squeeze(1) / self.total

    def step(self, at: _Point, gradient: _Point, slope: float, scale: float) -> _Point:
        """Minimum of the loss's quadratic model, with `scale` of the metric, plus slope |W|_1."""
        metric = self.metric.weight * scale
        weight = softshrink_(at.weight - gradient.weight / metric, slope / metric)
        return _Point(weight, at.bias - gradient.bias / (self.metric.bias * scale))

    def is_below(
        self, at: _Point, loss: float, gradient: _Point, step: _Point, scale: float
    ) -> bool:
        """Whether the model was right to be above the loss where it led."""
        model = loss
        for old, slope, new, metric in zip(at, gradient, step, self.metric, strict=True):
            moved = new - old
            model += float((moved * (slope + scale / 2 * metric * moved)).sum(dtype=torch.float64))
        return self._loss(step)[0] <= model + _NOISE * abs(loss)


def softshrink_(values: Tensor, limits: Tensor) -> Tensor:
    """Towards 0 by the limit, and not beyond."""
    return values.sub_(values.clamp(-limits, limits))


def solve_sparse_path(
    codes: SparseCodes,
    targets: Int[Tensor, " row"] | Float[Tensor, "row 1"],
    Cs: Sequence[float],
    *,
    n_classes: int | None = None,
    weights: Float[Tensor, " row"] | None = None,
    tol: float = 1e-3,
    max_iter: int = 2000,
) -> list[SparseSolution]:
    """The solution for each C, in the order given; each starts from that of the C below.

    Args:
        codes: [row, active].
        targets: class numbers, or 0 and 1 of two classes.
        Cs: inverse strengths of the penalty.
        n_classes: of class numbers, at least 3.
        weights: what each row counts; 1 unless given.
        tol: largest violation of the conditions of the minimum, as a share of the penalty's slope.
        max_iter: steps for each C.
    """
    n_columns = check_targets(len(codes.values), targets, Cs, n_classes)
    problem = _pose(codes, targets, weights)
    at = _Point(
        codes.values.new_zeros(codes.n_latents, n_columns), codes.values.new_zeros(n_columns)
    )
    solved: dict[float, SparseSolution] = {}
    for C in sorted(set(Cs)):
        at, solved[C] = _solve(problem, at, C, tol, max_iter)
    return [solved[C] for C in Cs]


def _pose(codes: SparseCodes, targets: Tensor, weights: Tensor | None) -> _Problem:
    """(sum_j x_j w_j + b)^2 <= (sum_j |x_j| + u) (sum_j |x_j| w_j^2 + b^2 / u), for any u > 0."""
    if not bool(codes.values.isfinite().all()):
        raise DataError("codes hold nan or infinity")
    s = check_weights(weights, codes.values)
    n_rows, n_active = codes.values.shape
    place = rows_of_bags(equal_bags(codes.indices), n_rows * n_active)
    by_latent = transpose(codes.indices.flatten(), place, codes.n_latents)
    sizes, total = codes.values.abs(), float(s.sum(dtype=torch.float64))
    of_rows = sizes.sum(1)
    u = of_rows.mean().clamp(min=1e-6)
    # The largest curvature of a sigmoid and of a softmax.
    share = s * (of_rows + u) / total * (0.25 if targets.is_floating_point() else 0.5)
    of_latents = by_latent.combine(sizes.flatten(), share[:, None])
    # A latent that never fires has no gradient either: any step is none.
    metric = _Point(torch.where(of_latents > 0, of_latents, 1), share.sum()[None] / u)
    return _Problem(codes, by_latent, targets, s, total, metric)


def _solve(
    problem: _Problem, start: _Point, C: float, tol: float, max_iter: int
) -> tuple[_Point, SparseSolution]:
    slope = 1 / (C * problem.total)
    at = ahead = start
    momentum, scale, number = 1.0, _FIRST_SCALE, 0
    while True:
        loss, gradient = problem.loss(ahead)
        violation = _violation(ahead, gradient, slope)
        if violation <= tol or number == max_iter:
            break
        step = problem.step(ahead, gradient, slope, scale)
        while scale < 1 and not problem.is_below(ahead, loss, gradient, step, scale):
            scale = min(1.0, 2 * scale)
            step = problem.step(ahead, gradient, slope, scale)
        if _turns_back(problem.metric, at, ahead, step):
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        share = (momentum - 1) / following
        ahead = _Point(*(new + share * (new - old) for old, new in zip(at, step, strict=True)))
        at, momentum, number = step, following, number + 1
    objective = (loss + slope * ahead.size()) * C * problem.total
    weight = ahead.weight.T.contiguous()
    is_done = violation <= tol
    return ahead, SparseSolution(C, weight, ahead.bias, objective, violation, number, is_done)


def _turns_back(metric: _Point, at: _Point, ahead: _Point, step: _Point) -> bool:
    """Momentum has carried past the minimum along its direction: start it anew."""
    parts = zip(metric, at, ahead, step, strict=True)
    return sum(float(((b - new) * (new - a) * m).sum()) for m, a, b, new in parts) > 0


def _violation(at: _Point, gradient: _Point, slope: float) -> float:
    """Largest distance of the gradient to what it must be at a minimum, over the slope."""
    inner = torch.where(
        at.weight == 0,
        (gradient.weight.abs() - slope).clamp(min=0),
        (gradient.weight + slope * at.weight.sign()).abs(),
    )
    # A strong penalty is no excuse for a wrong bias, which it does not touch.
    of_bias = float(gradient.bias.abs().max()) / min(slope, _MOST_OF_BIAS)
    return max(float(inner.max()) / slope, of_bias)
