"""Heads that are the minimum of a convex problem: a path over C, and methods for groups."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.config.choices import ClassWeight, GroupMethod
from clipattr.config.probe import ProbeConfig
from clipattr.errors import DataError
from clipattr.jobs.probe_choice import Candidate, Choice
from clipattr.jobs.probe_sets import ProbeRows
from clipattr.probes.linear import from_columns
from clipattr.probes.logistic import Solution, solve_path
from clipattr.probes.robust import GroupRows, fit_groups
from clipattr.probes.sparse import SparseSolution, solve_sparse_path

logger = logging.getLogger(__name__)


def fit_path(settings: ProbeConfig, rows: ProbeRows, device: torch.device | str) -> list[Candidate]:
    """One head for each C, the strongest penalty first; `device` must hold all rows."""
    Cs, n_classes = sorted(settings.C), len(settings.class_names)
    targets, columns = _targets(rows.targets, n_classes).to(device), None
    if targets.ndim == 1:
        columns = n_classes
    weights = balance_classes(rows.targets, n_classes, settings.class_weight)
    of_rows = None if weights is None else weights[rows.targets.long()].to(device)
    shared: dict[str, Any] = {"n_classes": columns, "weights": of_rows}
    if isinstance(rows.x, SparseCodes):
        codes = SparseCodes(rows.x.indices.to(device), rows.x.values.to(device), rows.x.n_latents)
        found = solve_sparse_path(codes, targets, Cs, **shared)
        candidates = [_sparse_candidate(one) for one in found]
    else:
        shared["standardise"] = settings.standardise
        solved = solve_path(rows.x.to(device), targets, Cs, **shared)
        candidates = [_candidate(tasks, n_classes) for tasks in solved]
    for one in candidates:
        if not one.details["converged"]:
            logger.warning(
                "C=%g: stopped after %d iterations, before the minimum (estimated gap %.1e); "
                "penalise more",
                *(one.settings["C"], one.details["n_iterations"], one.details["gap"]),
            )
    return candidates


def fit_method(
    settings: ProbeConfig, rows: ProbeRows, validation: ProbeRows | None, seed: int
) -> Choice:
    """What `fit_groups` keeps; rows whose group is unknown are left out."""
    found = fit_groups(
        settings.method.name,
        _group_rows(rows, needs_groups=settings.method is not GroupMethod.jtt),
        n_classes=len(settings.classes),
        Cs=settings.C,
        validation=None if validation is None else _group_rows(validation, needs_groups=True),
        criterion=settings.chosen_by.name,
        standardise=settings.standardise,
        seed=seed,
        n_groups=2 * len(settings.classes),
    )
    path = [
        {
            "C": one.C,
            **one.details,
            "gap": one.gap,
            "converged": one.converged,
            "score": one.score,
            "chosen": (one.C, one.details) == (found.C, found.details),
        }
        for one in found.trials
    ]
    return Choice(found.probe, {"C": found.C, **found.details}, path)


def balance_classes(
    targets: Tensor, n_classes: int, wanted: ClassWeight
) -> Float[Tensor, " class"] | None:
    """Of class numbers n / (classes * n_c); of several labels negatives / positives of each."""
    if wanted is ClassWeight.none:
        return None
    if targets.is_floating_point():
        positives = targets.sum(dim=0)
        return (len(targets) - positives) / positives.clamp(min=1)
    counts = torch.bincount(targets, minlength=n_classes).float()
    n_present = int((counts > 0).sum())
    return len(targets) / (n_present * counts.clamp(min=1))


def _group_rows(rows: ProbeRows, *, needs_groups: bool) -> GroupRows:
    if not needs_groups:
        assert isinstance(rows.x, Tensor), "what a linear head reads"
        return GroupRows(rows.x, rows.targets, None)
    known = rows.of_known_groups()
    assert isinstance(known.x, Tensor), "what a linear head reads"
    return GroupRows(known.x, known.targets, known.groups)


def _targets(targets: Tensor, n_classes: int) -> Tensor:
    """As the solvers take them: two classes are one binary task."""
    if targets.is_floating_point():
        for number, column in enumerate(targets.unbind(1)):
            if bool((column == column[0]).all()):
                raise DataError(f"label {number} is {column[0]:g} in all rows: nothing to learn")
        return targets
    if int(targets.min()) == int(targets.max()):
        raise DataError(f"all rows have the label {int(targets[0])}: nothing to learn")
    return targets[:, None].float() if n_classes == 2 else targets


def _sparse_candidate(one: SparseSolution) -> Candidate:
    details: dict[str, float | bool] = {
        "gap": one.violation,
        "n_iterations": one.n_iterations,
        "converged": one.converged,
    }
    return Candidate(one.to_probe().cpu(), {"C": one.C}, details)


def _candidate(tasks: Sequence[Solution], n_classes: int) -> Candidate:
    """The solution, or those of several labels, as one head."""
    weight = torch.cat([one.weight for one in tasks])
    bias = torch.cat([one.bias for one in tasks])
    details: dict[str, float | bool] = {
        "objective": sum(one.objective for one in tasks),
        "gap": max(one.gap for one in tasks),
        "n_iterations": max(one.n_iterations for one in tasks),
        "converged": all(one.converged for one in tasks),
    }
    return Candidate(from_columns(weight, bias, n_classes), {"C": tasks[0].C}, details)
