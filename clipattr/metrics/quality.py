"""How good a classifier is, on average and for the images with and without a cue."""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from clipattr.errors import DataError
from clipattr.metrics.calibration import N_BINS, calibration_bins
from clipattr.metrics.groups import GroupCounts, count_groups
from clipattr.metrics.ranks import auroc


class Quality(NamedTuple):
    """One row of a table of classifiers; nan where a number is not defined.

    Averages are over all images, what is said about the cue over those of which it is known.
    """

    accuracy: float
    """share of images whose own class has the largest logit; the first one on a tie"""
    balanced_accuracy: float
    """mean over the classes with images of the share that is right"""
    auroc: float
    """two classes: of the second; more: mean over the classes of each against the rest"""
    ece: float
    """expected calibration error of the largest probability"""
    worst_group: float
    """lowest accuracy of a group (label x cue) that has images"""
    gap: float
    """accuracy over the images of which the cue is known - worst_group"""
    auroc_with: float
    """among the images with the cue"""
    auroc_without: float
    """among those without"""
    ece_with: float
    """among the images with the cue"""
    ece_without: float
    """among those without"""
    counts: GroupCounts | None
    """right ones and images of each label (rows), without and with the cue (columns)"""


def measure_quality(
    logits: Float[Tensor, "image class"],
    labels: Int[Tensor, " image"],
    *,
    has_cue: Bool[Tensor, " image"] | None = None,
    known: Bool[Tensor, " image"] | None = None,
    n_bins: int = N_BINS,
) -> Quality:
    """What a classifier does to labelled images, which may be in any order.

    Args:
        logits: of two classes or more; their softmax are the probabilities. Ranks are taken of the
            log odds, for a probability near 1 is rounded to 1.
        labels: the right classes.
        has_cue: whether the image has the cue; without it what is said about the cue is nan.
        known: whether that is known of the image; without it, of all.
        n_bins: of the calibration error.
    """
    _check(logits, labels)
    logits, labels = logits.double().cpu(), labels.long().cpu()
    n_classes = logits.shape[1]
    is_right = logits.argmax(dim=1) == labels
    images = torch.bincount(labels, minlength=n_classes)
    right = torch.bincount(labels[is_right], minlength=n_classes)
    average = Quality(
        accuracy=is_right.sum().item() / len(labels),
        balanced_accuracy=(right.double() / images)[images > 0].mean().item(),
        auroc=_auroc(logits, labels),
        ece=_calibration_error(logits, is_right, n_bins),
        worst_group=math.nan,
        gap=math.nan,
        auroc_with=math.nan,
        auroc_without=math.nan,
        ece_with=math.nan,
        ece_without=math.nan,
        counts=None,
    )
    if has_cue is None:
        return average
    is_known = torch.ones_like(is_right) if known is None else known.cpu()
    return _add_cue(average, logits, labels, has_cue.cpu(), is_known, n_bins)


class QualityMetric(Metric):
    """`measure_quality` of streamed images, exact over batches and processes in any order.

    Keeps 8 (n_classes + 2) bytes per image: ranks need all of them.
    """

    full_state_update = False
    logits: list[Tensor]
    labels: list[Tensor]
    cues: list[Tensor]

    def __init__(self, n_classes: int, *, n_bins: int = N_BINS) -> None:
        """No images yet."""
        super().__init__()
        self.n_classes, self.n_bins = n_classes, n_bins
        # Flat: torchmetrics cannot gather a two-dimensional state when one process has none.
        for name in ("logits", "labels", "cues"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        logits: Float[Tensor, "image class"],
        labels: Int[Tensor, " image"],
        has_cue: Bool[Tensor, " image"] | None = None,
        known: Bool[Tensor, " image"] | None = None,
    ) -> None:
        """Add images."""
        if logits.shape[1] != self.n_classes:
            raise ValueError(f"{logits.shape[1]} classes given, expected {self.n_classes}")
        cues = torch.full_like(labels, -1, dtype=torch.int64) if has_cue is None else has_cue.long()
        if known is not None:
            cues = torch.where(known, cues, -1)
        self.logits.append(logits.detach().double().flatten())
        self.labels.append(labels.detach().long())
        self.cues.append(cues)

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As in torchmetrics, but a process without images takes part with the right dtypes."""
        if isinstance(self.labels, list) and not self.labels:
            for name, dtype in (
                ("logits", torch.float64),
                ("labels", torch.int64),
                ("cues", torch.int64),
            ):
                getattr(self, name).append(torch.empty(0, dtype=dtype, device=self.device))
        super().sync(*args, **kwargs)

    def compute(self) -> Quality:
        """Of all images; DataError when there is none."""
        logits = dim_zero_cat(self.logits).reshape(-1, self.n_classes)
        labels, cues = dim_zero_cat(self.labels), dim_zero_cat(self.cues)
        return measure_quality(
            logits, labels, has_cue=cues == 1, known=cues >= 0, n_bins=self.n_bins
        )


def _check(logits: Tensor, labels: Tensor) -> None:
    n_images, n_classes = logits.shape
    if n_images == 0 or n_classes < 2:
        raise DataError(
            f"quality: {n_images} images and {n_classes} classes; needed are at least 1 and 2"
        )
    if labels.min() < 0 or labels.max() >= n_classes:
        raise DataError(
            f"quality: labels lie in [{labels.min().item()}, {labels.max().item()}], allowed is "
            f"[0, {n_classes - 1}]"
        )
    is_broken = ~logits.isfinite().all(dim=1)
    if is_broken.any():
        raise DataError(
            f"quality: {is_broken.sum().item()} of {n_images} images have a logit that is nan or "
            "infinite"
        )


def _add_cue(
    average: Quality,
    logits: Float64[Tensor, "image class"],
    labels: Int[Tensor, " image"],
    has_cue: Bool[Tensor, " image"],
    known: Bool[Tensor, " image"],
    n_bins: int,
) -> Quality:
    if not known.any():
        return average
    predictions = logits.argmax(dim=1)
    counts = count_groups(
        predictions=predictions[known],
        labels=labels[known],
        cues=has_cue[known].long(),
        n_labels=logits.shape[1],
        n_cues=2,
    )

    def measure(part: Bool[Tensor, " image"]) -> tuple[float, float]:
        is_right = (predictions == labels)[part]
        return (
            _auroc(logits[part], labels[part]),
            _calibration_error(logits[part], is_right, n_bins),
        )

    auroc_with, ece_with = measure(known & has_cue)
    auroc_without, ece_without = measure(known & ~has_cue)
    return average._replace(
        worst_group=counts.worst_group_accuracy,
        gap=counts.gap,
        auroc_with=auroc_with,
        auroc_without=auroc_without,
        ece_with=ece_with,
        ece_without=ece_without,
        counts=counts,
    )


def _auroc(logits: Float64[Tensor, "image class"], labels: Int[Tensor, " image"]) -> float:
    """Over the classes that some images have and others lack; nan without one."""
    n_classes = logits.shape[1]
    odds = log_odds(logits)
    wanted = [1] if n_classes == 2 else range(n_classes)
    areas = [
        auroc(odds[:, [one]], labels == one)
        for one in wanted
        if 0 < int((labels == one).sum()) < len(labels)
    ]
    return torch.cat(areas).mean().item() if areas else math.nan


def log_odds(logits: Float64[Tensor, "image class"]) -> Float64[Tensor, "image class"]:
    """The log of p / (1 - p) of the softmax p: y_c - log(sum of e^y over the other classes).

    It tells images apart whose p is 1 to the last bit.
    """
    total = logits.logsumexp(dim=1, keepdim=True)
    # Of all classes but the first, p is at most 1 / 2: 1 - p keeps its digits.
    odds = logits - total - torch.log1p(-(logits - total).exp())
    if not len(logits):
        return odds
    top, first = logits.max(dim=1, keepdim=True)
    others = logits.scatter(1, first, -math.inf).logsumexp(dim=1, keepdim=True)
    return odds.scatter(1, first, top - others)


def _calibration_error(
    logits: Float64[Tensor, "image class"], is_right: Bool[Tensor, " image"], n_bins: int
) -> float:
    # Of no image the largest probability is not defined, and its bins are empty.
    confidence = logits.softmax(dim=1).amax(dim=1).clamp(0.0, 1.0)
    return calibration_bins(confidence, is_right, n_bins).error
