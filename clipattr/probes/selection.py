"""How good predictions are, and which member of a path or grid is best, on validation rows."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor

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


def _rates(is_right: Bool[Tensor, " row"], sets: Int[Tensor, " row"]) -> list[float]:
    """Share of right rows of each set that occurs."""
    _, place = sets.unique(return_inverse=True)
    counts = torch.bincount(place)
    return (torch.bincount(place, weights=is_right.double()) / counts).tolist()
