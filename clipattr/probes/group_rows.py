"""Rows with the group of each, and the choice among fits on rows that no fit has seen."""

import logging
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from clipattr.errors import ConfigError, DataError
from clipattr.probes.linear import LinearProbe, from_columns
from clipattr.probes.logistic import Solution
from clipattr.probes.selection import (
    best,
    best_within_error,
    log_loss,
    score,
    standard_error,
)

logger = logging.getLogger(__name__)


class GroupRows(NamedTuple):
    """Features, class numbers, and the number of each row's group (label x cue) where known."""

    features: Float[Tensor, "row feature"]
    labels: Int[Tensor, " row"]
    groups: Int[Tensor, " row"] | None = None


class Candidate(NamedTuple):
    """One fit of those that are chosen from."""

    solution: Solution
    details: Mapping[str, float]
    """settings of the method beside C, and what it found, under names for tables"""


class Trial(NamedTuple):
    """What is told of a fit, chosen or not."""

    C: float
    details: Mapping[str, float]
    score: float
    """on the validation rows; nan without"""
    gap: float
    """estimate of objective - minimum, relative to the objective"""
    converged: bool


class Fitted(NamedTuple):
    """The chosen fit."""

    probe: LinearProbe
    C: float
    score: float
    """on the validation rows; nan without"""
    details: Mapping[str, float]
    """settings of the method beside C, and what it found"""
    trials: list[Trial]
    """all fits, the strongest penalty first"""


def targets_of(labels: Int[Tensor, " row"], n_classes: int) -> Tensor:
    """As `solve_path` takes them: two classes are one binary task."""
    return labels[:, None].float() if n_classes == 2 else labels.long()


def columns_of(n_classes: int) -> int | None:
    """`n_classes` of `solve_path`."""
    return None if n_classes == 2 else n_classes


def check_rows(rows: GroupRows, n_classes: int, what: str) -> None:
    """Raises unless there is one label, and where given one group, for each row."""
    features, labels, groups = rows
    if n_classes < 2:
        raise ConfigError(f"n_classes={n_classes}: at least 2")
    if len(labels) != len(features) or len(labels) == 0:
        raise DataError(f"{what} rows: {len(features)} of features and {len(labels)} labels")
    if groups is not None and len(groups) != len(labels):
        raise DataError(f"{what} rows: {len(labels)} labels and {len(groups)} groups")
    if not 0 <= int(labels.min()) <= int(labels.max()) < n_classes:
        raise DataError(
            f"{what} rows: class numbers lie between {int(labels.min())} and {int(labels.max())}, "
            f"allowed is 0 to {n_classes - 1}"
        )
    if groups is not None and int(groups.min()) < 0:
        raise DataError(f"{what} rows: a group has the number {int(groups.min())}, below 0")


def need_groups(
    rows: GroupRows,
    validation: GroupRows | None,
    method: str,
    *,
    least: int = 1,
    n_groups: int | None = None,
) -> Int[Tensor, " row"]:
    """The groups; raises where there are none, or one has fewer rows than `least`.

    n_groups: how many there are; None: as many as the largest number that occurs says.
    """
    if rows.groups is None:
        raise DataError(f"{method} needs the group of each row: give groups, or infer them")
    sets = [rows.groups]
    if validation is not None and validation.groups is not None:
        sets.append(validation.groups)
    n_seen = max(int(one.max()) for one in sets) + 1
    if n_groups is None:
        n_groups = n_seen
    if n_seen > n_groups:
        raise DataError(f"{method}: a group has the number {n_seen - 1}, of {n_groups} groups")
    counts = torch.bincount(rows.groups, minlength=n_groups).tolist()
    if few := [f"group {i} has {n}" for i, n in enumerate(counts) if n < least]:
        raise DataError(
            f"{method} needs at least {least} of the {len(rows.labels)} rows in each of the "
            f"{n_groups} groups: {', '.join(few)}; add rows, or number only the groups that can "
            "have rows"
        )
    return rows.groups


def choose(
    candidates: Sequence[Candidate],
    validation: GroupRows | None,
    *,
    criterion: str,
    n_classes: int,
    by_loss: bool = False,
) -> Fitted:
    """The best on the validation rows, of equals the strongest penalty.

    by_loss: of those within a standard error of the best, the one with the smallest log loss there.
    """
    if validation is None and len(candidates) > 1:
        raise ConfigError(
            f"{len(candidates)} fits to choose from, and no validation rows: give these, or one "
            "value of each setting"
        )
    ordered = sorted(candidates, key=lambda one: one.solution.C)
    scores = [
        float("nan") if validation is None else _score(one.solution, validation, criterion)
        for one in ordered
    ]
    number = 0
    if validation is not None:
        number = _best_by_loss(ordered, scores, validation, criterion) if by_loss else best(scores)
    trials = [
        Trial(one.solution.C, one.details, value, one.solution.gap, one.solution.converged)
        for one, value in zip(ordered, scores, strict=True)
    ]
    chosen = ordered[number].solution
    if not chosen.converged:
        logger.warning(
            "C=%g: stopped %.1e of the objective above its minimum (estimate): penalise more, or "
            "standardise",
            *(chosen.C, chosen.gap),
        )
    probe = from_columns(chosen.weight, chosen.bias, n_classes)
    return Fitted(probe, chosen.C, scores[number], ordered[number].details, trials)


def _best_by_loss(
    ordered: Sequence[Candidate], scores: Sequence[float], rows: GroupRows, criterion: str
) -> int:
    errors, losses = list[float](), list[float]()
    for one in ordered:
        predicted = predict(one.solution, rows.features)
        errors.append(standard_error(predicted, rows.labels, criterion, rows.groups))
        losses.append(log_loss(_logits(one.solution, rows.features), rows.labels, rows.groups))
    return best_within_error(scores, errors, losses)


def predict(solution: Solution, features: Float[Tensor, "row feature"]) -> Int[Tensor, " row"]:
    """The class number with the largest logit."""
    return _logits(solution, features).argmax(dim=1)


def _logits(
    solution: Solution, features: Float[Tensor, "row feature"]
) -> Float[Tensor, "row class"]:
    """Of a binary task that of the first class is 0."""
    logits = torch.addmm(solution.bias.float(), features.float(), solution.weight.float().T)
    if len(solution.bias) > 1:
        return logits
    return torch.cat([torch.zeros_like(logits), logits], dim=1)


def _score(solution: Solution, rows: GroupRows, criterion: str) -> float:
    predicted = predict(solution, rows.features)
    return score(predicted, rows.labels, criterion, rows.groups)
