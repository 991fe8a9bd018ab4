"""How often and how strongly each latent is active, with a state of three numbers per latent."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.codes import SparseCodes
from clipattr.metrics.reconstruction import count_firings

DECADES, BINS_PER_DECADE = 6, 4
EDGES = tuple(
    10 ** (step / BINS_PER_DECADE - DECADES) for step in range(DECADES * BINS_PER_DECADE + 1)
)
"""Of the bins of firing frequency: four per decade, from one row in a million to every row."""


class LatentActivityResult(NamedTuple):
    """Per latent; `mean` and `largest` are of the rows in which it is active, nan without any."""

    n_rows: int
    firing_counts: Int[Tensor, " latent"]
    mean: Float64[Tensor, " latent"]
    largest: Float[Tensor, " latent"]


class LatentActivity(Metric):
    """Firing counts, sums and maxima of activations; merged over processes."""

    full_state_update = False
    n_rows: Tensor
    firing_counts: Tensor
    total: Tensor
    largest: Tensor

    def __init__(self, *, n_latents: int) -> None:
        """Nothing has fired."""
        super().__init__()
        zeros = torch.zeros(n_latents, dtype=torch.int64)
        self.add_state("n_rows", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("firing_counts", zeros, dist_reduce_fx="sum")
        self.add_state("total", zeros.double(), dist_reduce_fx="sum")
        nothing = torch.full((n_latents,), -torch.inf)
        self.add_state("largest", nothing, dist_reduce_fx="max")

    def update(self, codes: SparseCodes) -> None:
        """Take in the codes of a batch, whatever their axes."""
        latents, values = codes.indices.flatten(), codes.values.detach().flatten()
        self.n_rows += codes.indices[..., 0].numel()
        self.firing_counts += count_firings(codes)
        self.total.scatter_add_(0, latents, values.double())
        active = torch.where(values != 0, values.float(), -torch.inf)
        self.largest.scatter_reduce_(0, latents, active, "amax")

    def compute(self) -> LatentActivityResult:
        """The table over everything seen."""
        counts = self.firing_counts.clone()
        largest = torch.where(counts > 0, self.largest, torch.nan)
        return LatentActivityResult(int(self.n_rows), counts, self.total / counts, largest)


class FrequencyHistogram(NamedTuple):
    """How many latents fire how often: `counts[b]` of them between EDGES[b] and EDGES[b + 1].

    A bin has its lower edge and not its upper one, but for the last. Latents that are rarer than
    the lowest edge are in the first bin, those that never fired are `dead` and in none.
    """

    dead: int
    counts: list[int]


def frequency_histogram(firing_counts: Int[Tensor, " latent"], n_rows: int) -> FrequencyHistogram:
    """The histogram of firing_counts / n_rows."""
    counts = firing_counts.cpu()
    frequency = counts[counts > 0].double() / n_rows
    bins = torch.bucketize(frequency, torch.tensor(EDGES, dtype=torch.float64), right=True) - 1
    bins = bins.clamp(0, len(EDGES) - 2)
    found = torch.bincount(bins, minlength=len(EDGES) - 1)
    return FrequencyHistogram(int((counts == 0).sum()), found.tolist())
