"""Attribution of every latent to every class over the evaluated set, in closed form."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor
from torchmetrics import Metric

from clipattr.attribution import (
    LastLayerHead,
    LensTable,
    RelianceSums,
    add_reliance,
    build_lens_table,
    count_positive,
)
from clipattr.callbacks.base import ReadoutCallback
from clipattr.codes import SparseCodes
from clipattr.spliced import Readout, Spliced


class RelianceMeans(NamedTuple):
    """What is left of the images."""

    mean_attribution: Float64[Tensor, "class latent"]
    share_of_images: Float64[Tensor, " latent"]
    """share of the images in which each latent fires"""
    share_positive: Float32[Tensor, "class latent"] | None
    """of these, share with a positive attribution to the class; nan where it never fires"""
    n_images: int


class RelianceTotals(Metric):
    """`RelianceSums` of all images, in how many each latent fired, and how many there are.

    8 bytes x latents x width of the embedding, however many classes there are. With `signs` 4 bytes
    x latents x classes more, and attributions of every image to every class while it is read.
    """

    full_state_update = False
    scale: Tensor
    shift: Tensor
    state: Tensor
    fired: Tensor
    n_images: Tensor
    positive: Tensor

    def __init__(
        self, head: LastLayerHead, W_dec: Float[Tensor, "latent model"], *, signs: bool = True
    ) -> None:
        """No image yet."""
        super().__init__()
        self.head = head
        self.W_dec = W_dec
        self.signs = signs
        self.table: LensTable = build_lens_table(head, W_dec)
        n_latents, width = self.table.directions.shape
        zeros = torch.zeros(n_latents, dtype=torch.float64)
        for name in ("scale", "shift"):
            self.add_state(name, zeros.clone(), dist_reduce_fx="sum")
        state = torch.zeros(n_latents, width, dtype=torch.float64)
        self.add_state("state", state, dist_reduce_fx="sum")
        counts = torch.zeros(n_latents, dtype=torch.int64)
        self.add_state("fired", counts, dist_reduce_fx="sum")
        self.add_state("n_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        if signs:
            positive = torch.zeros(n_latents, len(head.weights), dtype=torch.int32)
            self.add_state("positive", positive, dist_reduce_fx="sum")

    def update(self, x: Float[Tensor, "batch model"], codes: SparseCodes) -> None:
        """Add a batch; only the rows of latents that are active in it are touched."""
        sums = RelianceSums(self.scale, self.shift, self.state)
        add_reliance(sums, self.head, self.table, x, codes, self.W_dec)
        if self.signs:
            count_positive(self.positive, self.head, self.table, x, codes, self.W_dec)
        fired = codes.indices[codes.is_active]
        self.fired.index_add_(0, fired, torch.ones_like(fired))
        self.n_images += len(x)

    def compute(self) -> RelianceMeans:
        """Apply the head, and divide once."""
        sums = RelianceSums(self.scale, self.shift, self.state)
        # Rows of a class together: it is read by class from here on.
        mean = (sums.matrix(self.head, self.table) / self.n_images).contiguous()
        share_positive = None
        if self.signs:
            share_positive = (self.positive.T.float() / self.fired).contiguous()
        return RelianceMeans(
            mean, self.fired.double() / self.n_images, share_positive, int(self.n_images)
        )


class RelianceCallback(ReadoutCallback):
    """Fills `mean_attribution` [class, latent], `share_of_images` [latent] and `share_positive`.

    The mean is the sum of the attributions over all images, whatever their class, divided by their
    number. `share_positive` [class, latent] is that of the images in which the latent fires, nan
    where it fires in none; it takes most of the time, and `signs=False` leaves it out.
    """

    def __init__(
        self, spliced: Spliced, weights: Float[Tensor, "class embed"], *, signs: bool = True
    ) -> None:
        head = LastLayerHead(*spliced.cut.last_layer(), weights)
        self.total = RelianceTotals(head, spliced.sae.directions.detach(), signs=signs)
        self.mean_attribution: Float64[Tensor, "class latent"] | None = None
        self.share_of_images: Float64[Tensor, " latent"] | None = None
        self.share_positive: Float32[Tensor, "class latent"] | None = None
        self.n_images = 0
        super().__init__(self.total)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """Add the batch's moves: no class is looked at yet."""
        self.total.update(readout.x, readout.codes)

    def finish(self) -> None:
        """Read the totals."""
        found = self.total.compute()
        self.mean_attribution, self.share_of_images = found.mean_attribution, found.share_of_images
        self.share_positive, self.n_images = found.share_positive, found.n_images
