"""Probes learned again on the rows of a repair, C chosen on a part of them that no fit sees.

Of all C within one binomial standard error of the best held-out score the one with the smallest
held-out log loss is taken: the score counts right images and does not see that a strong penalty
leaves every probability near one half.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipattr.probes.linear import LinearProbe
from clipattr.probes.robust import GroupRows, fit_groups

GroupMethod = Literal["dfr", "balanced", "group_dro"]

# One row of each group in five chooses C; a group needs two rows to fit on and one to choose on.
_PER_CHOOSING_ROW = 5
_FEWEST = 3


class RepairRows(NamedTuple):
    """Labelled images, and what is known of the cue in them."""

    embeddings: Float[Tensor, "image embed"]
    """unit rows"""
    cleaned: Float[Tensor, "strength image embed"] | None
    """with the cue suppressed: evaluated rows at every strength, learning rows at 1 (the last)"""
    labels: Int[Tensor, " image"]
    has_cue: Bool[Tensor, " image"]
    """without meaning where not `known`"""
    known: Bool[Tensor, " image"]
    sources: Int[Tensor, " image"]
    """the picture that each is, or is made of: what is made of one is held out with it"""


class Fit(NamedTuple):
    """How probes are learned."""

    n_classes: int
    Cs: Sequence[float]
    seed: int


def fit_cleaned(rows: RepairRows, fit: Fit) -> LinearProbe:
    """Plain logistic regression on the cleaned features of all rows.

    Where the cue is known of some rows, those choose, by their worst group; else the average does.
    """
    assert rows.cleaned is not None, "the caller has latents to suppress"
    held_out = hold_out(rows, fit.seed)
    has_groups = bool((held_out & rows.known).any())
    chooses = held_out & rows.known if has_groups else held_out
    data = GroupRows(rows.cleaned[-1], rows.labels)
    validation = _select(data, chooses)
    if has_groups:
        validation = validation._replace(groups=groups_of(rows)[chooses])
    return fit_groups(
        "erm",
        _select(data, ~held_out),
        n_classes=fit.n_classes,
        Cs=fit.Cs,
        validation=validation,
        criterion="worst_group" if has_groups else "accuracy",
        seed=fit.seed,
        by_loss=True,
    ).probe


def fit_by_groups(method: GroupMethod, rows: RepairRows, fit: Fit) -> LinearProbe:
    """On the rows of which the cue is known; groups that have no row count for nothing."""
    known = rows.known
    _, groups = groups_of(rows)[known].unique(return_inverse=True)
    data = GroupRows(rows.embeddings[known], rows.labels[known], groups)
    held_out = hold_out(rows, fit.seed)[known]
    return fit_groups(
        method,
        _select(data, ~held_out),
        n_classes=fit.n_classes,
        Cs=fit.Cs,
        validation=_select(data, held_out),
        criterion="worst_group",
        seed=fit.seed,
        by_loss=True,
    ).probe


def small_groups(rows: RepairRows, classes: Sequence[str]) -> str | None:
    """What stands in the way of a fit by groups, in words; None if nothing does."""
    if not bool(rows.known.any()):
        return "no learning image says whether it has the cue"
    found, counts = groups_of(rows)[rows.known].unique(return_counts=True)
    for group, count in zip(found.tolist(), counts.tolist(), strict=True):
        if count < _FEWEST:
            side = "with" if group % 2 else "without"
            return (
                f"{classes[group // 2]!r} {side} the cue has {count} learning images, at least "
                f"{_FEWEST} are needed"
            )
    return None


def groups_of(rows: RepairRows) -> Int[Tensor, " image"]:
    """Number of label x cue: 2 label + has_cue."""
    return 2 * rows.labels.long() + rows.has_cue.long()


def hold_out(rows: RepairRows, seed: int) -> Bool[Tensor, " image"]:
    """One picture in five of each label with each state of the cue (with, without, unknown), drawn.

    A picture that stands there without the cue and with it counts as one with it.
    """
    _, source = rows.sources.unique(return_inverse=True)
    n_pictures = int(source.max()) + 1
    state = torch.where(rows.known, rows.has_cue.long(), 2)
    stratum = torch.zeros(n_pictures, dtype=torch.int64)
    stratum.scatter_reduce_(0, source, 3 * rows.labels.long() + state, "amax")
    _, stratum, counts = stratum.unique(return_inverse=True, return_counts=True)
    drawn = torch.randperm(n_pictures, generator=torch.Generator().manual_seed(seed))
    order = drawn[stratum[drawn].argsort(stable=True)]
    place = torch.arange(n_pictures) - (counts.cumsum(0) - counts)[stratum[order]]
    quota = torch.where(counts < _FEWEST, 0, (counts // _PER_CHOOSING_ROW).clamp(min=1))
    chosen = torch.zeros(n_pictures, dtype=torch.bool)
    chosen[order] = place < quota[stratum[order]]
    return chosen[source]


def _select(rows: GroupRows, chosen: Bool[Tensor, " row"]) -> GroupRows:
    groups = None if rows.groups is None else rows.groups[chosen]
    return GroupRows(rows.features[chosen], rows.labels[chosen], groups)
