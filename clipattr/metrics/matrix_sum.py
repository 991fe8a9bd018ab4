"""A matrix summed over rows, as a mean: float64 sums, divided once, merged over processes."""

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric


class MatrixSum(Metric):
    """mean = (sum over all rows of their matrices) / (number of rows)."""

    full_state_update = False
    total: Tensor
    n_rows: Tensor

    def __init__(self, height: int, width: int) -> None:
        """An empty sum."""
        super().__init__()
        zeros = torch.zeros(height, width, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("n_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, batch_sum: Float[Tensor, "height width"], n_rows: int) -> None:
        """Add the sum over the rows of a batch."""
        self.total += batch_sum
        self.n_rows += n_rows

    def compute(self) -> Float[Tensor, "height width"]:
        """The mean over rows; nan before the first update."""
        return self.total / self.n_rows
