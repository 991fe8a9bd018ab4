"""Which of several fits is kept, by validation rows alone, and how good a head is."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.codes import SparseCodes
from clipattr.errors import ConfigError, DataError
from clipattr.jobs.probe_features import Features
from clipattr.jobs.probe_sets import ProbeRows
from clipattr.metrics.quality import Quality, measure_quality
from clipattr.probes.files import Head
from clipattr.probes.linear import LinearProbe
from clipattr.probes.selection import best, score
from clipattr.probes.sparse import SparseProbe
from clipattr.probes.text import interpolate

# Rows whose logits are computed at a time.
_CHUNK = 2048


class Candidate(NamedTuple):
    """A head, and how it was fitted; those that are preferred among equals come first."""

    head: Head
    settings: dict[str, float]
    """as they stand in the table: C, or lr and weight_decay"""
    details: dict[str, float | bool]
    """what is told of the fit"""


class Choice(NamedTuple):
    """The head that is kept, and the table of all."""

    head: Head
    settings: dict[str, float]
    path: list[dict[str, float | bool]]


def choose(candidates: Sequence[Candidate], validation: ProbeRows | None, criterion: str) -> Choice:
    """The first of the best on the validation rows; without these there is one candidate."""
    if validation is None:
        (only,) = candidates
        return Choice(only.head, only.settings, [_row(only, math.nan, is_chosen=True)])
    scores = [
        score_head(logits_of(one.head, validation.x), validation, criterion) for one in candidates
    ]
    chosen = best(scores)
    path = [
        _row(one, value, is_chosen=number == chosen)
        for number, (one, value) in enumerate(zip(candidates, scores, strict=True))
    ]
    return Choice(candidates[chosen].head, candidates[chosen].settings, path)


def towards_text(
    choice: Choice,
    text: LinearProbe,
    alphas: Sequence[float],
    validation: ProbeRows | None,
    criterion: str,
) -> Choice:
    """The best point between the text head and the chosen probe; nearer the text of equals."""
    assert isinstance(choice.head, LinearProbe), "checked by the config"
    between = [
        Candidate(interpolate(text, choice.head, alpha), {**choice.settings, "alpha": alpha}, {})
        for alpha in sorted(alphas)
    ]
    found = choose(between, validation, criterion)
    before = [{**row, "chosen": False} for row in choice.path]
    return Choice(found.head, found.settings, [*before, *found.path])


@torch.no_grad()
def logits_of(head: Head, x: Features) -> Float[Tensor, "image class"]:
    """Of all rows, in batches."""
    if isinstance(head, SparseProbe):
        assert isinstance(x, SparseCodes), "what a sparse head reads"
        places = torch.arange(len(x.values)).split(_CHUNK)
        parts = [head(x.select(rows)) for rows in places]
    else:
        assert isinstance(x, Tensor), "what the other heads read"
        parts = [head(rows.float()) for rows in x.split(_CHUNK)]
    return torch.cat(parts)


def check_finite(head: Head, rows: ProbeRows, advice: str) -> None:
    """Raise ConfigError for a head that gives a row no number, where its features are numbers."""
    x = rows.x.values if isinstance(rows.x, SparseCodes) else rows.x
    if not bool(x.isfinite().all()):
        raise DataError(
            "features of the training images are not finite; use model.precision=fp32 or bf16"
        )
    is_finite = all(bool(each.isfinite().all()) for each in head.parameters())
    if not is_finite or not bool(logits_of(head, rows.x).isfinite().all()):
        raise ConfigError(f"the head is not finite: {advice}")


def score_head(logits: Float[Tensor, "image class"], rows: ProbeRows, criterion: str) -> float:
    """What is chosen by; a head that is not finite is wrong everywhere."""
    is_finite = logits.isfinite().all(dim=1)
    if rows.targets.is_floating_point():
        predicted = torch.where(is_finite[:, None], (logits > 0).long(), -1)
        columns = zip(predicted.unbind(1), rows.targets.long().unbind(1), strict=True)
        scores = [score(found, wanted, criterion) for found, wanted in columns]
        return sum(scores) / len(scores)
    predicted = torch.where(is_finite, logits.argmax(dim=1), -1)
    if criterion != "worst_group" or rows.known is None:
        return score(predicted, rows.targets, criterion, rows.groups)
    assert rows.groups is not None, "known of a cue"
    known = rows.known
    return score(predicted[known], rows.targets[known], criterion, rows.groups[known])


def describe_quality(head: Head, rows: ProbeRows, classes: Sequence[str]) -> dict[str, object]:
    """Every number of metrics.json about these rows; of several labels each by itself."""
    logits = logits_of(head, rows.x).double()
    if not rows.targets.is_floating_point():
        quality = measure_quality(logits, rows.targets, has_cue=rows.has_cue, known=rows.known)
        return _to_json(quality, classes)
    each = [
        measure_quality(torch.stack([torch.zeros_like(column), column], dim=1), wanted)
        for column, wanted in zip(logits.unbind(1), rows.targets.long().unbind(1), strict=True)
    ]
    names = ("accuracy", "balanced_accuracy", "auroc", "ece")
    means = {name: sum(getattr(one, name) for one in each) / len(each) for name in names}
    labels = {name: _to_json(one, ()) for name, one in zip(classes, each, strict=True)}
    return {**means, "labels": labels}


def _row(one: Candidate, value: float, *, is_chosen: bool) -> dict[str, float | bool]:
    return {**one.settings, **one.details, "score": value, "chosen": is_chosen}


def _to_json(quality: Quality, classes: Sequence[str]) -> dict[str, object]:
    """Without what is said of a cue where there is none."""
    numbers = {
        name: value
        for name, value in quality._asdict().items()
        if name != "counts" and (quality.counts is not None or not name.startswith(_OF_CUE))
    }
    if quality.counts is None:
        return numbers
    groups = {
        name: {"without": without, "with": with_cue}
        for name, (without, with_cue) in zip(classes, quality.counts.accuracy.tolist(), strict=True)
    }
    return {**numbers, "groups": groups}


_OF_CUE = ("worst_group", "gap", "auroc_", "ece_")
