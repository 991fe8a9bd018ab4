"""Accuracy of class scores over a set: top-1, top-5, per class, with intervals of proportions."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.classification import MulticlassStatScores

from clipattr.errors import DataError
from clipattr.metrics.intervals import Interval

TOP = 5
# 97.5 % quantile of the normal distribution.
_Z = 1.959963984540054


class Accuracy(NamedTuple):
    """Shares of images whose own class is first, or among the first five, by score.

    top5 is None when there are no more than five classes. `per_class[c]` is None where class c has
    no image, and `mean_per_class` is the mean over the classes that have one.
    """

    top1: Interval
    top5: Interval | None
    mean_per_class: float
    per_class: list[float | None]
    images: list[int]


def measure_accuracy(
    batches: Iterable[tuple[Float[Tensor, "image class"], Int[Tensor, " image"]]], n_classes: int
) -> Accuracy:
    """Accuracy of batches of scores and labels, at least one image."""
    first = MulticlassStatScores(n_classes, average=None)
    top = MulticlassStatScores(n_classes, average=None, top_k=min(TOP, n_classes))
    for scores, labels in batches:
        n_bad = int((~scores.isfinite()).any(dim=1).sum())
        if n_bad:
            raise DataError(f"accuracy: {n_bad} images of a batch have a score of nan or infinity")
        first.update(scores.cpu(), labels)
        top.update(scores.cpu(), labels)
    # Columns: true positives, false positives, true negatives, false negatives, images.
    right, images = first.compute()[:, 0], first.compute()[:, 4]
    in_top = top.compute()[:, 0]
    n_images = int(images.sum())
    # By hand: the means of torchmetrics count a class without an image as wrong.
    per_class = [
        n_right / n if n else None
        for n_right, n in zip(right.tolist(), images.tolist(), strict=True)
    ]
    seen = [share for share in per_class if share is not None]
    return Accuracy(
        top1=wilson_interval(int(right.sum()), n_images),
        top5=wilson_interval(int(in_top.sum()), n_images) if n_classes > TOP else None,
        mean_per_class=sum(seen) / len(seen),
        per_class=per_class,
        images=images.tolist(),
    )


def wilson_interval(n_right: int, n_images: int) -> Interval:
    """95 % interval of a proportion; unlike the bootstrap's it has a width at 0 and at 1.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n). Reference: Wilson 1927,
    Probable inference, the law of succession, and statistical inference.
    """
    share, spread = n_right / n_images, _Z**2 / n_images
    centre = share + spread / 2
    half = (share * (1 - share) * spread + spread**2 / 4) ** 0.5
    return Interval(share, (centre - half) / (1 + spread), (centre + half) / (1 + spread))
