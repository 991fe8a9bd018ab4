"""What is said of sparse values over the images of each class: merged exactly over processes."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int, Int32
from torch import Tensor
from torchmetrics import Metric

from clipattr.codes import SparseCodes


class ClassSums(Metric):
    """sum over the images n of class c of value_nj, [class, latent] in float64."""

    full_state_update = False
    total: Tensor

    def __init__(self, *, n_classes: int, n_latents: int) -> None:
        """An empty sum."""
        super().__init__()
        zeros = torch.zeros(n_classes, n_latents, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")

    def update(
        self,
        classes: Int[Tensor, " batch"],
        codes: SparseCodes,
        values: Float[Tensor, "batch slot"],
    ) -> None:
        """Add what is said of the active slots of each image to its class."""
        _add(self.total, classes, codes, torch.where(codes.is_active, values.double(), 0.0))

    def compute(self) -> Float64[Tensor, "class latent"]:
        """The sums."""
        return self.total


class Counts(NamedTuple):
    """In how many images of a class something is so."""

    images: Int[Tensor, " class"]
    """images of the class"""
    fired: Int32[Tensor, "class latent"]
    """of these, with the latent active"""
    positive: Int32[Tensor, "class latent"]
    """of these, with a positive value"""


class ClassCounts(Metric):
    """`Counts` of the images seen; a latent has one slot per image. 8 bytes x classes x latents."""

    full_state_update = False
    images: Tensor
    fired: Tensor
    positive: Tensor

    def __init__(self, *, n_classes: int, n_latents: int) -> None:
        """No image yet."""
        super().__init__()
        images = torch.zeros(n_classes, dtype=torch.int64)
        self.add_state("images", images, dist_reduce_fx="sum")
        for name in ("fired", "positive"):
            zeros = torch.zeros(n_classes, n_latents, dtype=torch.int32)
            self.add_state(name, zeros, dist_reduce_fx="sum")

    def update(
        self,
        classes: Int[Tensor, " batch"],
        codes: SparseCodes,
        values: Float[Tensor, "batch slot"],
    ) -> None:
        """Count the images of a batch for their classes."""
        self.images.index_add_(0, classes, torch.ones_like(classes))
        _add(self.fired, classes, codes, codes.is_active.int())
        _add(self.positive, classes, codes, (codes.is_active & (values > 0)).int())

    def compute(self) -> Counts:
        """The counts."""
        return Counts(self.images, self.fired, self.positive)


def _add(total: Tensor, classes: Tensor, codes: SparseCodes, values: Tensor) -> None:
    places = classes[:, None] * codes.n_latents + codes.indices
    total.view(-1).index_add_(0, places.flatten(), values.flatten())
