"""How far a classifier's confidence is from how often it is right."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

N_BINS = 15


class CalibrationBins(NamedTuple):
    """What a reliability diagram shows; the means of an empty bin are nan."""

    images: Int64[Tensor, " bin"]
    accuracy: Float64[Tensor, " bin"]
    """share of the bin's images that are right"""
    confidence: Float64[Tensor, " bin"]
    """mean confidence of the bin's images"""

    @property
    def error(self) -> float:
        """ECE = sum_b n_b / n |accuracy_b - confidence_b|; nan without images.

        Reference: Guo et al. 2017, On calibration of modern neural networks.
        """
        distance = (self.accuracy - self.confidence).abs().nan_to_num(nan=0.0)
        return ((self.images * distance).sum() / self.images.sum()).item()


def calibration_bins(
    confidence: Float[Tensor, " image"], is_right: Bool[Tensor, " image"], n_bins: int = N_BINS
) -> CalibrationBins:
    """Images by confidence, in bins of one width: [0, 1/n), ..., [1 - 1/n, 1].

    The numbers do not depend on the order of the images, to the last bit.
    """
    # Sorted: the order of a sum decides its last bits.
    ordered, order = confidence.double().cpu().sort()
    edges = torch.linspace(0.0, 1.0, n_bins + 1, dtype=torch.float64)[1:-1]
    bins = torch.bucketize(ordered, edges, right=True)
    images = torch.bincount(bins, minlength=n_bins)
    right = torch.bincount(bins[is_right.cpu()[order]], minlength=n_bins)
    total = torch.bincount(bins, weights=ordered, minlength=n_bins)
    return CalibrationBins(images, right.double() / images, total / images)
