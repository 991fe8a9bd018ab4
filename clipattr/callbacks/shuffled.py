"""What chance finds: the same examples and reliance, with shuffled names of latents."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torchmetrics import Metric

from clipattr.attribution import LastLayerHead, build_lens_table, class_attributions
from clipattr.callbacks.base import ReadoutCallback
from clipattr.codes import SparseCodes
from clipattr.semantics.permutation import shuffle_latents
from clipattr.spliced import Readout, Spliced

# Attributions that exist at a time (32 MB in float32): memory, not the result.
_ENTRIES = 2**23


class AttributionSums(Metric):
    """sum over images of what is said of each slot about every class: [latent, class], float64."""

    full_state_update = False
    total: Tensor
    n_images: Tensor

    def __init__(self, *, n_latents: int, n_classes: int) -> None:
        """No image yet."""
        super().__init__()
        zeros = torch.zeros(n_latents, n_classes, dtype=torch.float64)
        self.add_state("total", zeros, dist_reduce_fx="sum")
        self.add_state("n_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: SparseCodes, values: Float[Tensor, "batch slot class"]) -> None:
        """Add a batch; padding says 0."""
        self.total.index_add_(0, codes.indices.flatten(), values.flatten(0, 1).double())
        self.n_images += len(values)

    def compute(self) -> Float64[Tensor, "class latent"]:
        """The mean over the images."""
        return self.total.T / self.n_images


class ShuffledReliance(ReadoutCallback):
    """Fills `mean_attribution` [class, latent] at the last layer, names of latents shuffled."""

    def __init__(self, spliced: Spliced, weights: Float[Tensor, "class embed"], *, seed: int):
        self._head = LastLayerHead(*spliced.cut.last_layer(), weights)
        self._directions = spliced.sae.directions.detach()
        self._table = build_lens_table(self._head, self._directions)
        self._seed = seed
        self._sums = AttributionSums(n_latents=len(self._directions), n_classes=len(weights))
        self.mean_attribution: Float64[Tensor, "class latent"] | None = None
        super().__init__(self._sums)

    @torch.no_grad()
    def take(self, readout: Readout) -> None:
        """True attributions under false names."""
        n_slots, n_classes = readout.codes.indices.shape[1], len(self._head.weights)
        n_rows = max(1, _ENTRIES // (n_slots * n_classes))
        for rows in torch.arange(len(readout.x), device=readout.x.device).split(n_rows):
            codes = readout.codes.select(rows)
            found = class_attributions(
                self._head, self._table, readout.x[rows], codes, self._directions
            )
            self._sums.update(shuffle_latents(codes, readout.rows[rows], self._seed), found)

    def finish(self) -> None:
        """Divide once."""
        self.mean_attribution = self._sums.compute()


class ShuffledNames(ReadoutCallback):
    """Shows another callback the readouts under false names."""

    def __init__(self, callback: ReadoutCallback, *, seed: int) -> None:
        self._callback, self._seed = callback, seed
        super().__init__()

    def start(self, device: torch.device | str) -> None:
        """As the other does."""
        self._callback.start(device)

    def take(self, readout: Readout) -> None:
        """The latents of each image are renamed."""
        names = shuffle_latents(readout.codes, readout.rows, self._seed)
        self._callback.take(readout._replace(codes=names))

    def finish(self) -> None:
        """As the other does."""
        self._callback.finish()
