"""Sparse values summed over the images of each class: merged exactly over processes."""

import torch
from jaxtyping import Float, Float64, Int
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
        places = classes[:, None] * codes.n_latents + codes.indices
        counted = torch.where(codes.is_active, values.double(), 0.0)
        self.total.view(-1).index_add_(0, places.flatten(), counted.flatten())

    def compute(self) -> Float64[Tensor, "class latent"]:
        """The sums."""
        return self.total
