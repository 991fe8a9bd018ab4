"""Heads that know nothing: least squares on shuffled labels, and what a cue does to them.

A direction of the embedding moves whatever reads it. Heads that are learned as a probe is, of the
same images, from labels in a random order, say how far a cue moves a head to which the labels
taught nothing.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from clipattr.errors import DataError
from clipattr.shortcuts.contrast import contrast_logits

# Penalties that are tried, as a share of the mean variance of the embedding.
_PENALTIES = tuple(10.0 ** (step / 2) for step in range(-8, 5))
# Images whose residuals exist at a time.
_CHUNK = 8192


class NullBand(NamedTuple):
    """Effects of many heads, or draws, beside the one that is judged."""

    high: float
    """95 % of them are below it in size"""
    share: float
    """of them that are as large as the one judged, or larger"""
    n: int
    """how many there are"""


class _Spectrum(NamedTuple):
    """Centred images along the axes of their covariance."""

    along: Float64[Tensor, "image axis"]
    squares: Float64[Tensor, " axis"]
    """sums over the images"""
    axes: Float64[Tensor, "embed axis"]


def null_heads(
    embeddings: Float[Tensor, "image embed"],
    labels: Int[Tensor, " image"],
    *,
    n_classes: int,
    n_heads: int = 100,
    seed: int,
) -> Float64[Tensor, "head class embed"]:
    """Weights of ridge regressions on the classes, each with the labels in an order of its own.

    All have the penalty that suits the true labels best, by their leave-one-out error, and share
    one decomposition. Kept: 8 bytes x heads x classes x width.
    """
    if len(embeddings) < 2:
        raise DataError(f"probes of shuffled labels: {len(embeddings)} images; it takes 2")
    spectrum = _decompose(embeddings)
    n_images, generator = len(labels), torch.Generator().manual_seed(seed)
    labels = labels.cpu()
    shrunk = spectrum.squares + _choose_penalty(spectrum, labels, n_classes)
    found: list[Tensor] = []
    for _ in range(n_heads):
        shuffled = labels[torch.randperm(n_images, generator=generator)]
        sums = _class_sums(spectrum, shuffled, n_classes)
        found.append((sums / shrunk) @ spectrum.axes.T)
    return torch.stack(found)


def effects_on_heads(
    heads: Float[Tensor, "head class embed"],
    images: Float[Tensor, "image embed"],
    moved: Float[Tensor, " embed"],
) -> Float64[Tensor, "head score"]:
    """Mean effect on each score, in its standard deviations over the images.

    Args:
        heads: weights.
        images: unit rows, over which a score has its standard deviation.
        moved: mean of the unit embedding with the cue minus that without it.
    """
    scores = contrast_logits(heads.double().transpose(1, 2)).transpose(1, 2)
    covariance = torch.cov(images.double().T, correction=0)
    spreads = ((scores @ covariance) * scores).sum(dim=2).clamp(min=0).sqrt()
    return scores @ moved.double() / spreads


def headline_effects(
    nulls: Float[Tensor, "head score"], text: Float[Tensor, " score"]
) -> Float64[Tensor, " head"]:
    """The effect of each head on the score that would be its headline.

    That of the probe is on the score with the largest excess over the text head: the largest of
    many, which one and the same score of other heads is not.
    """
    nulls = nulls.double()
    chosen = (nulls.abs() - text.double().abs()).argmax(dim=1, keepdim=True)
    return nulls.gather(1, chosen).squeeze(1)


def null_band(nulls: Float[Tensor, " null"], judged: float) -> NullBand:
    """Where an effect stands among those that chance has; nan where one of them is not defined.

    The judged one counts as one of them, so that the share is that of a permutation test, never 0.
    Reference: Phipson and Smyth, 2010.
    """
    found = draws_band(nulls, judged)
    return found._replace(share=(1 + found.n * found.share) / (1 + found.n))


def draws_band(draws: Float[Tensor, " draw"], judged: float) -> NullBand:
    """Where an effect stands among others, which are counted as they are."""
    sizes = draws.double().abs()
    if not len(sizes) or not sizes.isfinite().all():
        return NullBand(float("nan"), float("nan"), len(sizes))
    share = (sizes >= abs(judged)).double().mean()
    return NullBand(float(sizes.quantile(0.95)), float(share), len(sizes))


def _decompose(embeddings: Float[Tensor, "image embed"]) -> _Spectrum:
    centred = embeddings.double().cpu()
    centred = centred - centred.mean(dim=0)
    squares, axes = torch.linalg.eigh(centred.T @ centred)
    return _Spectrum(centred @ axes, squares.clamp(min=0), axes)


def _class_sums(
    spectrum: _Spectrum, labels: Int[Tensor, " image"], n_classes: int
) -> Float64[Tensor, "class axis"]:
    """Targets of 0 and 1 times the images, without a table of targets."""
    sums = spectrum.along.new_zeros(n_classes, len(spectrum.squares))
    return sums.index_add_(0, labels, spectrum.along)


def _choose_penalty(spectrum: _Spectrum, labels: Int[Tensor, " image"], n_classes: int) -> float:
    """The least squared error of an image that was left out, in closed form.

    residual / (1 - leverage), of a regression with an intercept. Reference: Allen, 1974 (PRESS).
    """
    unit = float(spectrum.squares.mean())
    if unit <= 0:
        raise DataError(f"probes of shuffled labels: all {len(labels)} images have one embedding")
    sums = _class_sums(spectrum, labels, n_classes)
    means = torch.bincount(labels, minlength=n_classes).double() / len(labels)
    errors = [_error(spectrum, labels, sums, means, unit * each) for each in _PENALTIES]
    return unit * _PENALTIES[min(range(len(errors)), key=errors.__getitem__)]


def _error(
    spectrum: _Spectrum,
    labels: Int[Tensor, " image"],
    sums: Float64[Tensor, "class axis"],
    means: Float64[Tensor, " class"],
    penalty: float,
) -> float:
    shrunk, total = spectrum.squares + penalty, 0.0
    weights = (sums / shrunk).T
    for along, label in zip(spectrum.along.split(_CHUNK), labels.split(_CHUNK), strict=True):
        leverage = 1 / len(labels) + (along.square() / shrunk).sum(dim=1)
        residual = -(means + along @ weights)
        residual[torch.arange(len(label)), label] += 1
        total += float((residual.square().sum(dim=1) / (1 - leverage).square()).sum())
    return total
