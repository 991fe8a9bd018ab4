"""How well an SAE reconstructs, over a whole set: ratios are summed in float64 and divided once."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torchmetrics import Metric

from clipattr.codes import SparseCodes


class ReconstructionResult(NamedTuple):
    """Whole-set numbers; a latent is dead when it fired in none of the `n_rows` rows."""

    fvu: Float[Tensor, ""]
    explained_variance: Float[Tensor, ""]
    l0: Float[Tensor, ""]
    cosine: Float[Tensor, ""]
    dead_fraction: Float[Tensor, ""]
    firing_counts: Int[Tensor, " latent"]
    n_rows: Int[Tensor, ""]


def moments(x: Float[Tensor, "batch model"]) -> Float[Tensor, " packed"]:
    """[n, sum ||x - mean||^2, mean_1 .. mean_d], float64: one tensor, so that it merges as one."""
    x = x.double()
    mean = x.sum(0) / max(len(x), 1)
    spread = (x - mean).square().sum()
    return torch.cat([torch.stack([spread.new_tensor(len(x)), spread]), mean])


def merge_moments(parts: Float[Tensor, "parts packed"]) -> Float[Tensor, " packed"]:
    """Moments of the union of the parts, exact also when |mean| is far larger than the spread.

    n = sum n_p, mean = sum n_p mean_p / n, M = sum M_p + sum n_p ||mean_p - mean||^2.
    Reference: Chan, Golub, LeVeque 1983, Algorithms for computing the sample variance.
    """
    counts, spreads, means = parts[:, 0], parts[:, 1], parts[:, 2:]
    n_rows = counts.sum()
    mean = counts @ means / n_rows.clamp_min(1)
    between = counts @ (means - mean).square().sum(1)
    return torch.cat([torch.stack([n_rows, spreads.sum() + between]), mean])


def count_firings(codes: SparseCodes) -> Int[Tensor, " latent"]:
    """In how many rows each latent is active (a count, not a sum of activations)."""
    counts = torch.zeros(codes.n_latents, dtype=torch.int64, device=codes.indices.device)
    return counts.scatter_add_(0, codes.indices.flatten(), codes.is_active.flatten().long())


class Reconstruction(Metric):
    """FVU = sum ||x - x_hat||^2 / sum ||x - mean||^2 about the mean of the whole set, L0 and more.

    The cosine is that of the raw x and x_hat, averaged over rows: a large common mean makes it
    flatter than the FVU.
    """

    full_state_update = False
    moments: Tensor
    error_squared: Tensor
    cosine_sum: Tensor
    firing_counts: Tensor

    def __init__(self, *, d_model: int, n_latents: int, sync_on_compute: bool = True) -> None:
        """Empty sums for one site and one dictionary; gathered over processes by default."""
        super().__init__(sync_on_compute=sync_on_compute)
        zero = torch.zeros((), dtype=torch.float64)
        counts = torch.zeros(n_latents, dtype=torch.int64)
        packed = torch.zeros(2 + d_model, dtype=torch.float64)
        self.add_state("moments", packed, dist_reduce_fx=merge_moments)
        self.add_state("error_squared", zero, dist_reduce_fx="sum")
        self.add_state("cosine_sum", zero.clone(), dist_reduce_fx="sum")
        self.add_state("firing_counts", counts, dist_reduce_fx="sum")

    def update(
        self,
        x: Float[Tensor, "*rows model"],
        recon: Float[Tensor, "*rows model"],
        codes: SparseCodes,
    ) -> None:
        """Take in one batch."""
        x, recon = x.detach().flatten(0, -2).double(), recon.detach().flatten(0, -2).double()
        self.moments = merge_moments(torch.stack([self.moments, moments(x)]))
        self.error_squared += (x - recon).square().sum()
        self.cosine_sum += functional.cosine_similarity(x, recon, dim=1).sum()
        self.firing_counts += count_firings(codes)

    def compute(self) -> ReconstructionResult:
        """The numbers over everything seen; nan when nothing was."""
        n_rows, spread = self.moments[0], self.moments[1]
        fvu = self.error_squared / spread
        return ReconstructionResult(
            fvu=fvu,
            explained_variance=1 - fvu,
            l0=self.firing_counts.sum() / n_rows,
            cosine=self.cosine_sum / n_rows,
            dead_fraction=(self.firing_counts == 0).double().mean(),
            firing_counts=self.firing_counts.clone(),
            n_rows=n_rows.long(),
        )
