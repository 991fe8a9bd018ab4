"""Logistic losses of many linear problems in one pass over the rows, and their curvature.

A problem has a row of weights and a bias for each of its columns: multinomial problems (softmax
over the columns) share the labels, binary ones (sigmoid, one column each) name a target column.
Rows are taken in blocks that stay in the cache, products are float32, what is added up over blocks
is float64.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import log_softmax, softplus

from clipattr.probes.lbfgs import Evaluation, Precondition

# Logits in a block; with them and the rows of a block the work stays in the caches of a core.
_LOGITS = 1 << 19
_MOST_ROWS = 4096


class Moments(NamedTuple):
    """Weighted mean and covariance of the features."""

    mean: Float64[Tensor, " feature"]
    covariance: Float64[Tensor, "feature feature"]


class Problem(NamedTuple):
    """One regularised problem: mean loss + ridge / 2 * |W|^2, the bias not counted."""

    ridge: float
    target: int = 0
    """column of the targets, where problems are binary"""


@dataclass(frozen=True)
class Rows:
    """Features, what they are to predict, and what each row counts.

    `targets` are class numbers [row], or for binary problems 0 and 1 in columns [row, task].
    `shift` and `factor` make u = (x - shift) * factor of a feature, in which problems are posed.
    """

    features: Float[Tensor, "row feature"]
    targets: Int[Tensor, " row"] | Float[Tensor, "row task"]
    weights: Float[Tensor, " row"]
    shift: Float[Tensor, " feature"]
    factor: Float[Tensor, " feature"]
    n_columns: int
    """columns of one problem"""

    @property
    def is_binary(self) -> bool:
        """Whether problems are sigmoids of one column."""
        return self.targets.ndim == 2

    def blocks(self, n_logits: int) -> Iterator[tuple[slice, Float[Tensor, "block feature"]]]:
        """Places of rows, and u there; `n_logits` is how many a row will have."""
        size = max(256, min(_MOST_ROWS, _LOGITS // n_logits))
        for start in range(0, len(self.features), size):
            place = slice(start, start + size)
            yield place, (self.features[place].float() - self.shift) * self.factor


def measure_moments(
    features: Float[Tensor, "row feature"], weights: Float[Tensor, " row"]
) -> Moments:
    """In two passes: the covariance is of centred rows, so that a large mean costs no digits."""
    total = weights.double().sum()
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    covariance = mean.new_zeros(len(mean), len(mean))
    blocks = range(0, len(features), _MOST_ROWS)
    for start in blocks:
        place = slice(start, start + _MOST_ROWS)
        mean += (features[place].float() * weights[place, None]).sum(0).double()
    mean /= total
    for start in blocks:
        place = slice(start, start + _MOST_ROWS)
        centred = features[place].float() - mean.float()
        covariance += (centred.T @ (centred * weights[place, None])).double()
    return Moments(mean, covariance / total)


def evaluate(
    rows: Rows, problems: Mapping[int, Problem], points: Mapping[int, Tensor]
) -> dict[int, Evaluation]:
    """Objective and gradient of each problem at its point [column, feature + 1], bias last."""
    stacked = torch.cat(list(points.values()))
    W, bias = stacked[:, :-1].float(), stacked[:, -1].float()
    gradient = torch.zeros_like(stacked)
    losses = stacked.new_zeros(len(points))
    columns = [problems[number].target for number in points]
    for place, u in rows.blocks(len(stacked)):
        logits = torch.addmm(bias, u, W.T).view(len(u), len(points), rows.n_columns)
        targets = rows.targets[place][:, columns] if rows.is_binary else rows.targets[place]
        loss, residual = loss_and_residual(logits, targets, rows.weights[place])
        losses += loss
        residual = residual.flatten(1)
        gradient[:, :-1] += (residual.T @ u).double()
        gradient[:, -1] += residual.sum(0, dtype=torch.float64)
    total = rows.weights.sum(dtype=torch.float64)
    results: dict[int, Evaluation] = {}
    parts = gradient.split(rows.n_columns)
    for (number, point), loss, part in zip(points.items(), losses / total, parts, strict=True):
        inner, ridge = point[:, :-1], problems[number].ridge
        part = part / total
        part[:, :-1] += ridge * inner
        results[number] = Evaluation(float(loss + ridge / 2 * inner.square().sum()), part)
    return results


def entropies(rows: Rows) -> list[float]:
    """Loss of a bias alone: of the classes, or of each binary task."""
    weights = rows.weights.double()
    total = weights.sum()
    if rows.is_binary:
        ones = weights @ rows.targets.double() / total
        shares = torch.stack([ones, 1 - ones])
    else:
        shares = torch.bincount(rows.targets, weights)[:, None] / total
    return torch.special.entr(shares).sum(0).tolist()


def loss_and_residual(
    logits: Float[Tensor, "block problem column"],
    targets: Int[Tensor, " block"] | Float[Tensor, "block problem"],
    weights: Float[Tensor, " block"],
) -> tuple[Float64[Tensor, " problem"], Float[Tensor, "block problem column"]]:
    """Weighted losses added up over the block, and their derivatives by the logits.

    Floating-point targets are 0 and 1, of a sigmoid of one column.
    """
    if targets.is_floating_point():
        wanted, z = targets > 0, logits.squeeze(2)
        # Away from the target: neither loss nor derivative is a difference of numbers near 1.
        away = torch.where(wanted, -z, z)
        slope = away.sigmoid() * weights[:, None]
        loss = softplus(away) * weights[:, None]
        return loss.sum(0, dtype=torch.float64), torch.where(wanted, -slope, slope)[:, :, None]
    logs = log_softmax(logits, dim=2)
    label = targets[:, None, None].expand(-1, logits.shape[1], 1)
    log_right = logs.gather(2, label)
    residual = logs.exp_().scatter_(2, label, 0)
    wrong = residual.sum(2, keepdim=True)
    residual.scatter_(2, label, -wrong).mul_(weights[:, None, None])
    # The same number; the first has its digits where a row is all but certain.
    loss = -torch.where(wrong < 0.5, torch.log1p(-wrong), log_right).squeeze(2)
    return (loss * weights[:, None]).sum(0, dtype=torch.float64), residual


def mean_curvature(rows: Rows, points: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Hessian of the loss by the logits, averaged over the rows: diag(p) - p p^T, [column, column].

    Each number of `points` is that of a problem, as in `evaluate`.
    """
    stacked = torch.cat(list(points.values()))
    W, bias = stacked[:, :-1].float(), stacked[:, -1].float()
    curvature = stacked.new_zeros(len(points), rows.n_columns, rows.n_columns)
    for place, u in rows.blocks(len(stacked)):
        logits = torch.addmm(bias, u, W.T).view(len(u), len(points), rows.n_columns)
        p = (logits.sigmoid() if rows.is_binary else logits.softmax(2)).transpose(0, 1)
        weighted = p * rows.weights[place, None]
        curvature -= (weighted.transpose(1, 2) @ p).double()
        curvature.diagonal(dim1=1, dim2=2).add_(weighted.sum(1, dtype=torch.float64))
    curvature /= rows.weights.sum(dtype=torch.float64)
    return dict(zip(points, curvature, strict=True))


class Spectrum(NamedTuple):
    """Eigenvalues and eigenvectors of the covariance of u: made once for all problems."""

    values: Float64[Tensor, " feature"]
    vectors: Float64[Tensor, "feature feature"]


def kronecker(
    curvature: Float64[Tensor, "column column"], spectrum: Spectrum, ridge: float
) -> Precondition:
    """The inverse of curvature (x) covariance + ridge, which is the Hessian if both are unrelated.

    The bias has no ridge; features are centred, so it is on its own. Several columns are those of a
    softmax: one number added to all their biases changes nothing, and is kept out.
    """
    strengths, axes = torch.linalg.eigh(curvature)
    # Below that it is the rounding of sums in float32.
    strengths = strengths.clamp(min=1e-8)
    divisor = strengths[:, None] * spectrum.values.clamp(min=0) + ridge

    def apply(gradient: Float64[Tensor, "column feature"]) -> Float64[Tensor, "column feature"]:
        turned = axes.T @ gradient
        inner = (turned[:, :-1] @ spectrum.vectors) / divisor @ spectrum.vectors.T
        result = axes @ torch.cat([inner, turned[:, -1:] / strengths[:, None]], dim=1)
        if len(result) > 1:
            result[:, -1] -= result[:, -1].mean()
        return result

    return apply
