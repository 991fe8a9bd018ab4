"""How much the images that activate a latent look alike, each pair weighted by its activations.

With a_n the activation of the latent in image n, scaled to [0, 1] over the set, and u_n the unit
embedding of the image,

    MS = sum_{n < m} a_n a_m (u_n . u_m) / sum_{n < m} a_n a_m
       = (|sum a u|^2 - sum a^2) / ((sum a)^2 - sum a^2)

so that one pass over the images is enough, where the pairs are quadratic. Two things make it a
stream: MS does not change with the scale of a, so the largest activation is not needed; and the
smallest one is taken off at the end, because sum (a - low) u = sum a u - low sum u.

Reference: Pach et al. 2025, Sparse autoencoders learn monosemantic features in vision-language
models; as in their program, every two images of the set count once, no image with itself, and the
sum is divided by the weights of the pairs.
"""

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import normalize
from torchmetrics import Metric

from clipattr.codes import SparseCodes, add_transposed
from clipattr.errors import DataError
from clipattr.metrics.reconstruction import count_firings

# Rounding of sums in float64, relative to the squares that are taken off each other.
_ROUNDING = 1e-12


class Monosemanticity(Metric):
    """MS of every latent; nan for one whose activation rises above its lowest in fewer than two.

    A latent that is silent in an image has activation 0 there; activations may be negative. State:
    one float64 vector per latent, 8 * latents * width bytes.
    """

    full_state_update = False
    n_images: Tensor
    embedded: Tensor
    weighted: Tensor
    total: Tensor
    squared: Tensor
    smallest: Tensor
    firing_counts: Tensor

    def __init__(self, *, n_latents: int, d_embed: int) -> None:
        """No image yet."""
        super().__init__()
        zeros = torch.zeros(n_latents, dtype=torch.float64)
        self.add_state("n_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("embedded", zeros.new_zeros(d_embed), dist_reduce_fx="sum")
        self.add_state("weighted", zeros.new_zeros(n_latents, d_embed), dist_reduce_fx="sum")
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("squared", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("smallest", zeros + torch.inf, dist_reduce_fx="min")
        self.add_state("firing_counts", zeros.long(), dist_reduce_fx="sum")

    def update(self, codes: SparseCodes, embeddings: Float[Tensor, "batch embed"]) -> None:
        """Take in images: one row of codes, and an embedding of any length, for each."""
        # In float64 from here: what is left of |sum a u|^2 may be a millionth of it.
        units = normalize(embeddings.detach().double(), dim=1)
        _check(units)
        latents, values = codes.indices.flatten(), codes.values.detach().double()
        self.n_images += len(units)
        self.embedded += units.sum(0)
        add_transposed(self.weighted, values, codes.indices, units)
        self.total.index_add_(0, latents, values.flatten())
        self.squared.index_add_(0, latents, values.flatten().square())
        active = torch.where(codes.is_active, values, torch.inf).flatten()
        self.smallest.scatter_reduce_(0, latents, active, "amin")
        self.firing_counts += count_firings(codes)

    def compute(self) -> Float64[Tensor, " latent"]:
        """MS over all images seen."""
        is_silent = self.firing_counts < self.n_images
        low = torch.where(is_silent, self.smallest.clamp_max(0), self.smallest)
        total = self.total - low * self.n_images
        squared = self.squared - 2 * low * self.total + low.square() * self.n_images
        vectors = torch.addr(self.weighted, low, self.embedded, alpha=-1)
        weights = total.square() - squared
        # One pair at least: what rounding leaves of none is not divided by.
        floor = _ROUNDING * (self.squared + low.square() * self.n_images)
        weights = weights.masked_fill(weights <= floor, torch.nan)
        return (vectors.square().sum(1) - squared) / weights


def _check(units: Float64[Tensor, "batch embed"]) -> None:
    is_unit = (units.square().sum(1) - 1).abs() < _ROUNDING
    if not is_unit.all():
        raise DataError(
            f"monosemanticity: {int((~is_unit).sum())} of {len(units)} embeddings of a batch are "
            "zero, nan or infinite, and have no direction"
        )
