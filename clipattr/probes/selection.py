"""How good predictions are, and which member of a path or grid is best, on validation rows."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from clipattr.errors import ConfigError, DataError


def score(
    predicted: Int[Tensor, " row"],
    labels: Int[Tensor, " row"],
    criterion: str = "accuracy",
    groups: Int[Tensor, " row"] | None = None,
) -> float:
    """One number, the larger the better; only classes and groups that occur count.

    `accuracy` is the share of right rows, `balanced_accuracy` its mean over the classes,
    `worst_group` its minimum over the groups.
    """
    if len(labels) == 0:
        raise DataError("no rows to score")
    is_right = predicted == labels
    match criterion:
        case "accuracy":
            return float(is_right.double().mean())
        case "balanced_accuracy":
            return sum(rates := _rates(is_right, labels)) / len(rates)
        case "worst_group":
            if groups is None or len(groups) != len(labels):
                raise DataError("worst_group needs the group of each validation row")
            return min(_rates(is_right, groups))
        case _:
            raise ConfigError(
                f"criterion={criterion!r}: must be accuracy, balanced_accuracy or worst_group"
            )


def best(scores: Sequence[float]) -> int:
    """The first of the largest: members are given in the order of preference."""
    if not scores or any(one != one for one in scores):
        raise DataError(f"cannot choose by the scores {list(scores)}")
    return max(range(len(scores)), key=lambda number: scores[number])


def standard_error(
    predicted: Int[Tensor, " row"],
    labels: Int[Tensor, " row"],
    criterion: str = "accuracy",
    groups: Int[Tensor, " row"] | None = None,
) -> float:
    """Of `score`, rows as binomial draws: of a worst group, that of the rate p of its n rows.

    sqrt(p (1 - p) / n); of a mean of rates the root of the sum of their squares over their number.
    Of k right rows p is (k + 1) / (n + 2): few rows that are all right are not right for sure.
    """
    is_right = predicted == labels
    if criterion == "accuracy":
        return math.sqrt(_variance(score(predicted, labels, criterion, groups), len(labels)))
    sets = labels if criterion == "balanced_accuracy" or groups is None else groups
    counts = sets.unique(return_counts=True)[1].tolist()
    rates = _rates(is_right, sets)
    variances = [_variance(rate, n) for rate, n in zip(rates, counts, strict=True)]
    if criterion == "balanced_accuracy":
        return math.sqrt(sum(variances)) / len(variances)
    return math.sqrt(variances[rates.index(min(rates))])


def log_loss(
    logits: Float[Tensor, "row class"],
    labels: Int[Tensor, " row"],
    groups: Int[Tensor, " row"] | None = None,
) -> float:
    """Mean of -log p(label) over the rows; with groups the mean of their means."""
    losses = cross_entropy(logits.double(), labels.long(), reduction="none")
    if groups is None:
        return float(losses.mean())
    _, place, counts = groups.unique(return_inverse=True, return_counts=True)
    return float((torch.bincount(place, weights=losses) / counts).mean())


def best_within_error(
    scores: Sequence[float], errors: Sequence[float], losses: Sequence[float]
) -> int:
    """The smallest loss among the members within one standard error of the best score.

    Those cannot be told apart by the score, and a score that counts right rows says nothing of how
    good the probabilities are. The error is the larger of the two: worst groups differ in size.
    """
    top = best(scores)
    within = [n for n, one in enumerate(scores) if one >= scores[top] - max(errors[top], errors[n])]
    return min(within, key=lambda number: losses[number])


def _variance(rate: float, n: int) -> float:
    smoothed = (rate * n + 1) / (n + 2)
    return smoothed * (1 - smoothed) / n


def _rates(is_right: Bool[Tensor, " row"], sets: Int[Tensor, " row"]) -> list[float]:
    """Share of right rows of each set that occurs."""
    _, place = sets.unique(return_inverse=True)
    counts = torch.bincount(place)
    return (torch.bincount(place, weights=is_right.double()) / counts).tolist()
