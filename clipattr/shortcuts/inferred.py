"""Groups where no metadata names the cue: whether its latents say that an image has it.

The rule: the latents fire or they do not. Where they fire in nearly
all images, that says nothing, and images are split in two at the cut of a one-dimensional two-means
clustering: of all thresholds the one that leaves the least squared distance to the two means.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from clipattr.errors import DataError

NEARLY_ALL = 0.9
"""share of the images in which a cue fires, from which firing says nothing"""


class InferredCue(NamedTuple):
    """Which images have a cue, as its latents say, and by which rule."""

    has_cue: Bool[Tensor, " image"]
    threshold: float
    """images above it have the cue; 0 where firing decides"""
    separation: float
    """share of the variance of the activation that lies between the two sides: 1 is two points, a
    bell cut in the middle has 0.64, a flat distribution 0.75; nan where one side is empty"""

    @property
    def words(self) -> str:
        """The rule and what came of it, for logs and pages."""
        rule = "they fire"
        if self.threshold > 0:
            rule = (
                f"they exceed {self.threshold:.3g}, a two-means split, for they fire nearly always"
            )
        return (
            f"{rule} in {int(self.has_cue.sum())} of {len(self.has_cue)} images (separation "
            f"{self.separation:.2f})"
        )


class InferredGroups(NamedTuple):
    """The group label * 2 + has_cue of each image, and how many images each has."""

    groups: Int[Tensor, " image"]
    cue: InferredCue
    counts: Int[Tensor, "label 2"]

    @property
    def has_cue(self) -> Bool[Tensor, " image"]:
        """Of each image."""
        return self.cue.has_cue


def infer_groups(
    activation: Float[Tensor, " image"], labels: Int[Tensor, " image"]
) -> InferredGroups:
    """Label x cue, the cue by `infer_cue`."""
    cue = infer_cue(activation)
    groups = labels.long() * 2 + cue.has_cue.long()
    n_labels = int(labels.max()) + 1
    counts = torch.bincount(groups, minlength=2 * n_labels).reshape(n_labels, 2)
    return InferredGroups(groups, cue, counts)


def infer_cue(activation: Float[Tensor, " image"], threshold: float | None = None) -> InferredCue:
    """From the activation of the cue's latents in each image (sum or maximum; 0 is silent).

    The rule is found in these images, unless the threshold of other images is given: sets that are
    compared need the same one, or a latent that fires in 89 % of one and 91 % of the other means
    two things.
    """
    values = activation.double()
    if not bool((values.isfinite() & (values >= 0)).all()):
        raise DataError("activations of a cue must be finite and not below 0")
    if threshold is None:
        threshold = _find_threshold(values)
    has_cue = values > threshold
    return InferredCue(has_cue, threshold, _separation(values, has_cue))


def _find_threshold(values: Float64[Tensor, " image"]) -> float:
    n_firing = int((values > 0).sum())
    if n_firing == 0:
        raise DataError(
            f"the cue's latents fire in none of {len(values)} images: they tell no groups apart"
        )
    return 0.0 if n_firing < NEARLY_ALL * len(values) else split_in_two(values)


def split_in_two(values: Float64[Tensor, " image"]) -> float:
    """The threshold of the two-means clustering: halfway between the values on both sides."""
    ordered = values.sort().values
    if float(ordered[0]) == float(ordered[-1]):
        raise DataError(f"the cue's latents give all {len(values)} images {float(ordered[0]):.3g}")
    n = torch.arange(1, len(ordered), dtype=torch.float64, device=values.device)
    below = (ordered - ordered.mean()).cumsum(0)[:-1]
    # Variance between the sides: with a mean of 0, below^2 / n + below^2 / (N - n).
    between = below.square() / n + below.square() / (len(ordered) - n)
    cut = int(between.argmax())
    return float(ordered[cut : cut + 2].mean())


def _separation(values: Float64[Tensor, " image"], has: Bool[Tensor, " image"]) -> float:
    """It is nan where there is but one side."""
    if bool(has.all()) or not bool(has.any()):
        return float("nan")
    means = torch.stack([values[~has].mean(), values[has].mean()])[has.long()]
    return float(means.var(correction=0) / values.var(correction=0))
