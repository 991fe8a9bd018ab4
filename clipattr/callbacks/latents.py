"""Statistics of latents over images: how often they fire, and how alike those images are."""

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torchmetrics import Metric

from clipattr.callbacks.base import ReadoutCallback
from clipattr.codes import Pool, pool_tokens
from clipattr.metrics.class_spread import ClassSpread, ClassSpreadResult
from clipattr.metrics.latent_activity import LatentActivity, LatentActivityResult
from clipattr.metrics.monosemanticity import Monosemanticity
from clipattr.spliced import Readout


class LatentsCallback(ReadoutCallback):
    """Reads each image once, with its embedding by a semantic scorer and, if known, its class.

    Attributes:
        activity: how many images each latent fires in, and how strongly.
        monosemanticity: of each latent, [latent].
        spread: over the classes; None without classes.
    """

    def __init__(
        self,
        *,
        n_latents: int,
        embeddings: Float[Tensor, "image embed"],
        classes: Int[Tensor, " image"] | None = None,
        n_classes: int = 0,
        pool: Pool = "max",
    ) -> None:
        """Rows of both tables are the row numbers of the readouts."""
        self._embeddings, self._classes = embeddings, classes
        self._pool: Pool = pool
        self._activity = LatentActivity(n_latents=n_latents)
        self._similarity = Monosemanticity(n_latents=n_latents, d_embed=embeddings.shape[1])
        self._spread = None
        metrics: list[Metric] = [self._activity, self._similarity]
        if classes is not None:
            self._spread = ClassSpread(n_latents=n_latents, n_classes=n_classes)
            metrics.append(self._spread)
        self.activity: LatentActivityResult | None = None
        self.monosemanticity: Float64[Tensor, " latent"] | None = None
        self.spread: ClassSpreadResult | None = None
        super().__init__(*metrics)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """One activation per image and latent, whatever the site."""
        codes, rows = pool_tokens(readout.codes, self._pool), readout.rows.cpu()
        self._activity.update(codes)
        self._similarity.update(codes, self._embeddings[rows].to(codes.values.device))
        if self._spread is not None:
            assert self._classes is not None, "or there would be no spread"
            self._spread.update(codes, self._classes[rows].to(codes.values.device))

    def finish(self) -> None:
        """Merged over processes."""
        self.activity = self._activity.compute()
        self.monosemanticity = self._similarity.compute()
        self.spread = None if self._spread is None else self._spread.compute()
