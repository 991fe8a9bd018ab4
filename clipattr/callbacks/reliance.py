"""Mean attribution of every latent to every class over the evaluated set, in closed form."""

import lightning as L
import torch
from jaxtyping import Float
from torch import Tensor

from clipattr.attribution.closed_form import LastLayerHead, build_lens_table
from clipattr.attribution.reliance import reliance_matrix
from clipattr.callbacks.base import ReadoutCallback
from clipattr.metrics.matrix_sum import MatrixSum
from clipattr.spliced import Readout, Spliced


class RelianceCallback(ReadoutCallback):
    """Fills `mean_attribution` [class, latent]: sum of R over images / their number."""

    def __init__(self, spliced: Spliced, weights: Float[Tensor, "class embed"]) -> None:
        self.head = LastLayerHead(*spliced.cut.last_layer(), weights)
        self.W_dec = spliced.sae.W_dec.detach()
        self.table = build_lens_table(self.head, self.W_dec)
        self.total = MatrixSum(len(weights), spliced.sae.n_latents)
        self.mean_attribution: Float[Tensor, "class latent"] | None = None
        super().__init__(self.total)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """Add the batch's sum: three sparse-times-dense products."""
        batch = reliance_matrix(self.head, self.table, readout.x, readout.codes, self.W_dec)
        self.total.update(batch, len(readout.x))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Divide once."""
        self.mean_attribution = self.total.compute()
