"""Repair a linear probe that leans on a cue: fitted on learning rows, tried on others.

Nothing about the evaluated rows enters a fit or a choice: C is chosen on a part of the learning
rows that no fit sees. What the caller brings is its own affair: latents of a cue that is shown in
pairs are found from the two sides of the evaluated pairs, which need no label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from clipattr.errors import ConfigError, DataError
from clipattr.jobs.repair_fits import Fit, RepairRows, fit_by_groups, fit_cleaned, small_groups
from clipattr.metrics.quality import Quality, measure_quality
from clipattr.probes.files import ProbeRecord, save_probe
from clipattr.probes.linear import LinearProbe, linear_logits
from clipattr.shortcuts.repair import (
    Suppression,
    direction_erasure,
    find_erasure,
    fold_erasure,
)
from clipattr.shortcuts.suppression_files import FEATURE, SuppressionRecord, save_suppression

__all__ = [
    "METHODS",
    "STRENGTHS",
    "Method",
    "RepairRows",
    "Repaired",
    "obstacle",
    "repair",
    "save_repaired",
    "trade_off",
]

Method = Literal["suppress", "project", "retrain", "dfr", "balanced", "group_dro"]
METHODS: tuple[Method, ...] = get_args(Method)
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Points of the trade-off curve."""

_DESCRIPTIONS: Mapping[Method, str] = {
    "suppress": "the same probe, with the latents of the cue held at their means",
    "project": "the same probe, with the direction of the cue erased from its input",
    "retrain": "learned again while the latents of the cue are held at their means",
    "dfr": "learned again on draws with as many images of every group",
    "balanced": "learned again, every group counting alike",
    "group_dro": "learned again for the group with the largest loss",
}


class Repaired(NamedTuple):
    """One repair, at every strength between nothing (0) and all of it (1)."""

    name: Method
    description: str
    strengths: list[float]
    logits: Float64[Tensor, "strength image class"]
    """of the evaluated rows; at strength 0 those of the probe as it came"""
    probe: LinearProbe
    """at strength 1"""
    needs_suppression: bool
    """whether it reads embeddings with the cue suppressed, and is wrong about others"""


class _Task(NamedTuple):
    """What all methods are given."""

    probe: LinearProbe
    learn: RepairRows
    evaluate: RepairRows
    direction: Float[Tensor, " embed"] | None
    fit: Fit


def repair(
    probe: LinearProbe,
    learn: RepairRows,
    evaluate: RepairRows,
    *,
    methods: Sequence[Method],
    direction: Float[Tensor, " embed"] | None,
    classes: Sequence[str],
    Cs: Sequence[float],
    seed: int,
) -> list[Repaired]:
    """Each method in turn; DataError where `obstacle` has something to say.

    Strength t is the strength of the edit for suppress and project, the line from the old weights
    to the new ones for those that learn again, and both together for retrain.

    Args:
        probe: of the unit embedding.
        learn: rows to learn from; no image may be among the evaluated ones.
        evaluate: rows on which logits are computed, and nothing else.
        methods: some of METHODS.
        direction: what `project` erases; None: what the cue flags of `learn` say.
        classes: names of the probe's classes, for messages.
        Cs: inverse strengths of the penalty, from which those that learn choose.
        seed: of what is held out and drawn.
    """
    learn, evaluate = _on_cpu(learn), _on_cpu(evaluate)
    for method in methods:
        if found := obstacle(method, learn, direction=direction, classes=classes):
            raise DataError(f"repair {method}: {found}")
    fit = Fit(len(probe.bias), Cs, seed)
    task = _Task(probe, learn, evaluate, direction, fit)
    return [_repair(method, task) for method in methods]


def obstacle(
    method: Method,
    learn: RepairRows,
    *,
    direction: Float[Tensor, " embed"] | None,
    classes: Sequence[str],
) -> str | None:
    """Why a method cannot be used on these rows, in words for a warning; None if it can."""
    match method:
        case "suppress" | "retrain":
            return None if learn.cleaned is not None else "the cue has no latents to suppress"
        case "project":
            if direction is not None or _has_both_sides(learn):
                return None
            return "no class has learning images with and without the cue, and no prompt names it"
        case "dfr" | "balanced" | "group_dro":
            return small_groups(learn, classes)


def trade_off(repaired: Repaired, evaluate: RepairRows) -> list[Quality]:
    """Quality at each strength: average against worst group."""
    return [
        measure_quality(
            logits,
            evaluate.labels,
            has_cue=evaluate.has_cue,
            known=evaluate.known,
        )
        for logits in repaired.logits
    ]


def save_repaired(
    folder: Path,
    repaired: Repaired,
    record: ProbeRecord,
    suppression: tuple[Suppression, SuppressionRecord] | None,
) -> None:
    """The probe, and beside it the suppression that its input needs.

    Such a probe says so in its feature, by which whoever would give it plain embeddings refuses it.
    """
    if repaired.needs_suppression:
        if suppression is None:
            raise ConfigError(f"{folder}: repair {repaired.name} is saved with its suppression")
        save_suppression(folder, *suppression)
        record = replace(record, feature=FEATURE)
    save_probe(repaired.probe, folder, record)


def _repair(method: Method, task: _Task) -> Repaired:
    after = _probe_after(method, task)
    needs_suppression = method in ("suppress", "retrain")
    along = _along_suppression if needs_suppression else _along_line
    logits = along(task.probe, after, task.evaluate)
    description, strengths = _DESCRIPTIONS[method], list(STRENGTHS)
    return Repaired(method, description, strengths, logits, after, needs_suppression)


def _probe_after(method: Method, task: _Task) -> LinearProbe:
    match method:
        case "suppress":
            return task.probe
        case "project":
            return _project(task)
        case "retrain":
            return fit_cleaned(task.learn, task.fit)
        case "dfr" | "balanced" | "group_dro":
            return fit_by_groups(method, task.learn, task.fit)


@torch.no_grad()
def _project(task: _Task) -> LinearProbe:
    """The erasure folded into the weights: an ordinary probe of the same feature."""
    learn, known = task.learn, task.learn.known
    if task.direction is not None:
        erasure = direction_erasure(task.direction.cpu(), learn.embeddings)
    else:
        erasure = find_erasure(learn.embeddings[known], learn.labels[known], learn.has_cue[known])
    folded = fold_erasure(task.probe.weight, task.probe.bias, erasure)
    probe = LinearProbe(task.probe.weight.shape[1], len(task.probe.bias))
    probe.weight.copy_(folded.weights)
    probe.bias.copy_(folded.bias)
    return probe


def _along_line(
    before: LinearProbe, after: LinearProbe, rows: RepairRows
) -> Float64[Tensor, "strength image class"]:
    """Logits are linear in the weights: the line between two probes is that of their logits."""
    start, end = (
        linear_logits(rows.embeddings, each.weight, each.bias) for each in (before, after)
    )
    return torch.stack([start.lerp(end, strength) for strength in STRENGTHS])


def _along_suppression(
    before: LinearProbe, after: LinearProbe, rows: RepairRows
) -> Float64[Tensor, "strength image class"]:
    """Each strength of the suppression with the probe as far along its line."""
    if rows.cleaned is None or len(rows.cleaned) != len(STRENGTHS):
        raise ValueError(f"evaluated rows are not cleaned at the strengths {STRENGTHS}")
    cleaned = [rows.embeddings, *rows.cleaned[1:]]
    found: list[Tensor] = []
    for embeddings, strength in zip(cleaned, STRENGTHS, strict=True):
        start, end = (linear_logits(embeddings, each.weight, each.bias) for each in (before, after))
        found.append(start.lerp(end, strength))
    return torch.stack(found)


def _has_both_sides(rows: RepairRows) -> bool:
    with_cue, without = (
        set(rows.labels[rows.known & side].tolist()) for side in (rows.has_cue, ~rows.has_cue)
    )
    return bool(with_cue & without)


def _on_cpu(rows: RepairRows) -> RepairRows:
    embeddings, cleaned, *others = rows
    cleaned = None if cleaned is None else cleaned.cpu()
    return RepairRows(embeddings.cpu(), cleaned, *(each.cpu() for each in others))
