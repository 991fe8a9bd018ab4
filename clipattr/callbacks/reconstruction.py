"""How well the SAE reconstructs, and that a splice without an edit is the identity."""

import torch
from torchmetrics import MaxMetric

from clipattr.callbacks.base import ReadoutCallback
from clipattr.metrics.reconstruction import Reconstruction
from clipattr.spliced import Readout, Spliced


class ReconstructionCallback(ReadoutCallback):
    """Fills `sae` and `splice` after the test epoch."""

    def __init__(self, spliced: Spliced) -> None:
        self.spliced = spliced
        sae = spliced.sae
        self.reconstruction = Reconstruction(d_model=sae.d_model, n_latents=sae.n_latents)
        # A nan would otherwise be dropped, and the splice look exact.
        self.splice_error = MaxMetric(nan_strategy="error")
        self.sae: dict[str, float] = {}
        self.splice: dict[str, float] = {}
        super().__init__(self.reconstruction, self.splice_error)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """Error of x_hat, and how far the spliced embedding is from the clean one."""
        self.reconstruction.update(readout.x, readout.recon, readout.codes)
        spliced = self.spliced.embed(readout.codes, readout.error, readout.rest)
        clean = self.spliced.cut.suffix(readout.x, readout.rest)
        self.splice_error.update((spliced - clean).abs().max())

    def finish(self) -> None:
        """Divide once, over the whole set."""
        result = self.reconstruction.compute()
        self.sae = {
            "fvu": float(result.fvu),
            "l0": float(result.l0),
            "dead_fraction": float(result.dead_fraction),
        }
        self.splice = {"max_error": float(self.splice_error.compute())}
