"""Mean attribution of every latent to every class over the evaluated set, in closed form."""

import lightning as L
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torchmetrics import Metric

from clipattr.attribution import (
    LastLayerHead,
    LensTable,
    RelianceSums,
    add_reliance,
    build_lens_table,
)
from clipattr.callbacks.base import ReadoutCallback
from clipattr.codes import SparseCodes
from clipattr.spliced import Readout, Spliced


class RelianceTotals(Metric):
    """`RelianceSums` of all images, in how many each latent fired, and how many there are.

    8 bytes x latents x width of the embedding, however many classes there are.
    """

    full_state_update = False
    scale: Tensor
    shift: Tensor
    state: Tensor
    fired: Tensor
    n_images: Tensor

    def __init__(self, head: LastLayerHead, W_dec: Float[Tensor, "latent model"]) -> None:
        """No image yet."""
        super().__init__()
        self.head = head
        self.W_dec = W_dec
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

    def update(self, x: Float[Tensor, "batch model"], codes: SparseCodes) -> None:
        """Add a batch; only the rows of latents that are active in it are touched."""
        sums = RelianceSums(self.scale, self.shift, self.state)
        add_reliance(sums, self.head, self.table, x, codes, self.W_dec)
        fired = codes.indices[codes.is_active]
        self.fired.index_add_(0, fired, torch.ones_like(fired))
        self.n_images += len(x)

    def compute(self) -> tuple[Float64[Tensor, "class latent"], Float64[Tensor, " latent"]]:
        """Mean attribution, and the share of the images in which each latent fires."""
        sums = RelianceSums(self.scale, self.shift, self.state)
        mean = sums.matrix(self.head, self.table) / self.n_images
        return mean, self.fired.double() / self.n_images


class RelianceCallback(ReadoutCallback):
    """Fills `mean_attribution` [class, latent] and `share_of_images` [latent].

    The sum of the attributions over all images, whatever their class, divided by their number.
    """

    def __init__(self, spliced: Spliced, weights: Float[Tensor, "class embed"]) -> None:
        head = LastLayerHead(*spliced.cut.last_layer(), weights)
        self.total = RelianceTotals(head, spliced.sae.directions.detach())
        self.mean_attribution: Float64[Tensor, "class latent"] | None = None
        self.share_of_images: Float64[Tensor, " latent"] | None = None
        super().__init__(self.total)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """Add the batch's moves: no class is looked at yet."""
        self.total.update(readout.x, readout.codes)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Apply the head, and divide once."""
        self.mean_attribution, self.share_of_images = self.total.compute()
